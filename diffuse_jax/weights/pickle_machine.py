"""A pickle interpreter that can only build plain containers and descriptions of tensors.

Python's unpickler calls whatever a file names. This one interprets the opcodes (split by ``pickletools``) with a closed
table of globals, none of which is ever called: each stands for a constructor defined here. Anything else is refused,
and the error names it.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from diffuse_jax.errors import bad, parsing
from diffuse_jax.limits import MAX_ELEMENTS, MAX_RANK


@dataclasses.dataclass(frozen=True)
class Storage:
    """A block of numbers that tensors can share: its key in the file, its dtype and its number of elements."""

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor as a strided view of a storage; offset and strides are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


class Container(dict):
    """A dict that PyTorch saved as an ``OrderedDict``; attributes that a file sets on it are dropped."""


@dataclasses.dataclass(frozen=True)
class Name:
    """The name of a global in a pickle."""

    module: str
    name: str


TORCH_DTYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
}
STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "UntypedStorage": np.uint8,
}


def _tensor(storage: Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> TensorSpec:
    """``torch._utils._rebuild_tensor`` and ``_rebuild_tensor_v2``; gradients and hooks are ignored."""
    return _tensor_spec(storage, offset, shape, strides, getattr(storage, "dtype", None))


def _tensor_v3(storage: Storage, offset: int, shape: tuple, strides: tuple, *rest: Any) -> TensorSpec:
    """``_rebuild_tensor_v3``: an untyped storage, with the dtype as third of the further arguments."""
    return _tensor_spec(storage, offset, shape, strides, rest[2])


def _tensor_spec(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any) -> TensorSpec:
    """A tensor, after checking the types of its parts and that it is neither outside nor larger than its storage."""
    if not isinstance(storage, Storage) or not isinstance(dtype, np.dtype):
        raise TypeError("a tensor with an invalid storage or dtype")
    numbers = (offset, *shape[:MAX_RANK], *strides[:MAX_RANK])
    if not len(shape) == len(strides) <= MAX_RANK or not all(
        type(n) is int and 0 <= n <= MAX_ELEMENTS for n in numbers
    ):
        raise TypeError("a tensor with an invalid offset, shape or strides")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    room = storage.size * storage.dtype.itemsize
    if 0 not in shape and (last + 1) * dtype.itemsize > room:
        raise TypeError(f"a tensor of shape {list(shape)} that reaches outside its storage of {storage.size} elements")
    # With zero strides, a single element can be a view of any size.
    if math.prod(shape) * dtype.itemsize > room or math.prod(n or 1 for n in shape) > MAX_ELEMENTS:
        raise TypeError(f"a tensor of shape {list(shape)} that is larger than its storage of {storage.size} elements")
    return TensorSpec(storage, offset, tuple(shape), tuple(strides), dtype)


def _ordered(*pairs: Any) -> Container:
    """``OrderedDict()`` or ``OrderedDict([(key, value), ...])``."""
    found = Container()
    if pairs:
        (items,) = pairs
        for key, value in items:
            found[_key(key)] = value
    return found


def _size(*sizes: Any) -> tuple[int, ...]:
    """``torch.Size((2, 3))``."""
    (items,) = sizes
    if not isinstance(items, tuple | list) or len(items) > MAX_RANK or not all(type(n) is int for n in items):
        raise TypeError("a size that is not a few integers")
    return tuple(items)


def _key(value: Any) -> Any:
    """A key of a dict or an item of a set; hashing nested tuples could take forever."""
    if not isinstance(value, KEYS):
        raise TypeError(f"a key of type {type(value).__name__}")
    return value


def _left_out(*_: Any) -> Container:
    """A value of training state that no reader uses; it is neither built nor looked at."""
    return Container()


CALLS: dict[Name, Callable[..., Any]] = {
    Name("collections", "OrderedDict"): _ordered,
    Name("torch", "Size"): _size,
    Name("torch._utils", "_rebuild_tensor"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    Name("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    # NumPy's numbers, such as the best loss so far
    Name("numpy", "dtype"): _left_out,
    Name("numpy.core.multiarray", "scalar"): _left_out,
    Name("numpy._core.multiarray", "scalar"): _left_out,
    Name("_codecs", "encode"): _left_out,
}
"""Globals that a file may call -> the function that is called instead."""

VALUES: dict[Name, Any] = (
    {Name("torch", name): np.dtype(kind) for name, kind in TORCH_DTYPES.items()}
    | {Name("torch", name): np.dtype(kind) for name, kind in STORAGES.items()}
    | {Name("torch.storage", "UntypedStorage"): np.dtype(np.uint8)}
)
"""Globals that stand for a dtype."""

NAMED_ONLY = ("pytorch_lightning.", "lightning.")
"""Modules whose globals stand for their own names: PyTorch Lightning files the state of a callback under its class."""

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
KEYS = (str, int, float, bytes, type(None))

MAX_STEPS = 2_000_000
"""Maximum number of instructions in a pickle; a tensor takes about forty."""

MAX_REPEATED = 1_000_000
"""Maximum number of items that calls copy from containers, which a pickle can use repeatedly."""


class Machine:
    """Interprets one pickle; ``persistent`` turns a persistent id into a value."""

    def __init__(self, persistent: Callable[[Any], Any]) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.copied = 0
        self.memo: dict[int, Any] = {}
        self.persistent = persistent

    def run(self, data: IO[bytes]) -> Any:
        """Build the object of the pickle at the stream's position, and leave the stream at the pickle's end."""
        for steps, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name == "STOP":
                return self.stack.pop()
            if steps > MAX_STEPS:
                raise TypeError(f"more than {MAX_STEPS} instructions")
            self._step(opcode.name, argument)
        raise TypeError("a pickle without an end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in LITERALS:
            stack.append(argument)
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[int(argument)])
        elif name == "GLOBAL":
            stack.append(self._global(*argument.split(" ", 1)))
        elif name not in ("PROTO", "FRAME"):
            operation = getattr(self, f"_op_{name.lower()}", None)
            if operation is None:
                raise TypeError(f"the pickle instruction {name}")
            operation()

    def _global(self, module: str, name: str) -> Any:
        if module.startswith(NAMED_ONLY):
            return f"{module}.{name}"
        found = Name(module, name)
        if found not in CALLS and found not in VALUES:
            raise TypeError(f"the global {module}.{name}")
        return VALUES.get(found, found)

    def _until_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _op_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a global whose name is not text")
        self.stack.append(self._global(module, name))

    def _op_binpersid(self) -> None:
        self.stack.append(self.persistent(self.stack.pop()))

    def _op_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise TypeError(f"a call of {function if isinstance(function, str) else type(function).__name__:.80}")
        self.copied += sum(len(item) for item in arguments if isinstance(item, list | dict | tuple))
        if len(arguments) > MAX_RANK or self.copied > MAX_REPEATED:
            raise TypeError("calls with more arguments than tensors have")
        self.stack.append(CALLS[function](*arguments))

    def _op_build(self) -> None:
        self.stack.pop()  # attributes, such as the versions stored in a state_dict
        if not isinstance(self.stack[-1], Container):
            raise TypeError(f"attributes set on {type(self.stack[-1]).__name__}")

    def _op_tuple(self) -> None:
        items = self._until_mark()
        self.stack.append(tuple(items))

    def _op_tuple1(self) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def _op_tuple2(self) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def _op_tuple3(self) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def _op_list(self) -> None:
        items = self._until_mark()
        self.stack.append(items)

    def _op_dict(self) -> None:
        items = self._until_mark()
        self.stack.append(dict(zip(map(_key, items[::2]), items[1::2], strict=True)))

    def _op_append(self) -> None:
        value = self.stack.pop()
        self._top(list).append(value)

    def _op_appends(self) -> None:
        items = self._until_mark()
        self._top(list).extend(items)

    def _op_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._top(dict)[_key(key)] = value

    def _op_setitems(self) -> None:
        items = self._until_mark()
        self._top(dict).update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def _op_additems(self) -> None:
        items = self._until_mark()
        self._top(set).update(map(_key, items))

    def _op_pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._until_mark()

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise TypeError(f"items put into {type(self.stack[-1]).__name__}")
        return self.stack[-1]


def interpret(path: Path, data: IO[bytes], persistent: Callable[[Any], Any]) -> Any:
    """The object of the pickle at the stream's position.

    Raises:
      WeightsError: the pickle is damaged, or asks for anything but tensors and plain containers; the message names it.
    """
    with parsing(path):
        try:
            return Machine(persistent).run(data)
        except TypeError as error:
            text = f"refused: its pickle contains {error}; only tensors and plain containers are read"
            raise bad(path, text) from error
