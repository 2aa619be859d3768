"""A mesh as text, such as ``data=4,fsdp=2``; this module loads no JAX."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
"""The axes of a mesh that the library knows, the outermost first."""


def parse_axes(text: str) -> dict[str, int]:
    """The sizes that a text such as ``data=4,fsdp=2`` gives to axes of a mesh; -1 stands for all remaining devices.

    Raises:
      ValueError: it is not of this form, or names an axis that does not exist, or one twice.
    """
    sizes: dict[str, int] = {}
    for pair in text.split(","):
        name, equals, number = (part.strip() for part in pair.partition("="))
        if not (equals and number.removeprefix("-").isdecimal() and number.isascii()):
            raise ValueError(f"a mesh is written as AXIS=SIZE pairs such as data=4,fsdp=2, got {text[:80]!r}")
        if name not in MESH_AXES:
            raise ValueError(f"a mesh has no axis {name[:80]!r}; there are {', '.join(MESH_AXES)}")
        if name in sizes:
            raise ValueError(f"the mesh {text[:80]!r} names the axis {name} twice")
        sizes[name] = int(number)
        if sizes[name] == 0 or sizes[name] < -1:
            raise ValueError(f"the mesh axis {name} must be at least 1, or -1 for all remaining devices, got {number}")
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"only one axis of a mesh may be -1, got {text[:80]!r}")
    return sizes


def with_data(sizes: Mapping[str, int]) -> dict[str, int]:
    """The same sizes; where ``data`` is not named, it takes the devices that the other axes leave."""
    return {"data": 1 if -1 in sizes.values() else -1} | dict(sizes)


def mesh_text(text: str) -> str:
    """An argparse type: the text of a mesh, checked."""
    try:
        parse_axes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
