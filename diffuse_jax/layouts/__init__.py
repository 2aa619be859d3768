"""The meaning of keys in other programs' files: which network a tensor belongs to, and which architecture it implies.

:mod:`diffuse_jax.weights` reads and writes the files themselves.
"""

from __future__ import annotations

from diffuse_jax.layouts.families import FAMILIES, family_for
from diffuse_jax.layouts.ip_adapter import IPAdapterFile, read_ip_adapter
from diffuse_jax.layouts.networks import NETWORKS, network_in, read_network, write_network
from diffuse_jax.layouts.single_file import Part, SingleFile, open_file, read_single_file
from diffuse_jax.layouts.single_file_writer import write_single_file

__all__ = [
    "FAMILIES",
    "NETWORKS",
    "IPAdapterFile",
    "Part",
    "SingleFile",
    "family_for",
    "network_in",
    "open_file",
    "read_ip_adapter",
    "read_network",
    "read_single_file",
    "write_network",
    "write_single_file",
]
