"""The noise that PyTorch draws for a seed, so that a seed of another program gives the same image here.

Plain NumPy, without PyTorch: a function takes a seed and the shapes of successive ``torch.randn`` calls with one
generator, and returns their arrays. :data:`STREAMS` has them by the name that ``noise=`` of a call takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Shape: TypeAlias = Sequence[int]
Floats: TypeAlias = NDArray[np.float32]

BLOCK = 16
"""Numbers that PyTorch transforms at a time on a CPU: a cosine and a sine half of eight pairs."""


def torch_normal(seed: int, *shapes: Shape) -> list[Floats]:
    """What ``torch.randn(shape, generator=g)`` returns for one shape after the other, ``g`` being
    ``torch.Generator("cpu").manual_seed(seed)``.

    PyTorch draws from a Mersenne Twister (Matsumoto and Nishimura 1998) and transforms pairs of uniform numbers (Box
    and Muller 1958). Tensors of fewer than 16 elements are drawn in another way than larger ones, as here. Its
    logarithm and cosine differ between CPUs in the last bits, so values agree to about 1e-6.

    Args:
      seed: from 0 to 2**64 - 1; PyTorch uses the lowest 32 bits.
      *shapes: of the arrays, in the order in which they are drawn.

    Returns:
      float32 arrays.

    Raises:
      ValueError: the seed is out of range.
    """
    twister = np.random.RandomState(check_seed(seed) & 0xFFFFFFFF)
    words = lambda n: np.frombuffer(twister.bytes(4 * n), "<u4")
    spare: list[float] = []  # the second of a pair; the generator keeps it for the next small tensor
    draw = lambda n: _large(n, words) if n >= BLOCK else _small(n, words, spare)
    return [draw(math.prod(shape)).astype(np.float32).reshape(shape) for shape in shapes]


def _large(count: int, words: Callable[[int], NDArray[np.uint32]]) -> NDArray[np.float64]:
    """At least 16 numbers from 24-bit uniform ones, in blocks of 16; the last block is redrawn and overlaps."""
    uniform = lambda n: (words(n) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)
    whole = count - count % BLOCK
    out = np.empty(count)
    out[:whole] = _block_normal(uniform(count)[:whole])
    if whole != count:
        out[-BLOCK:] = _block_normal(uniform(BLOCK))
    return out


def _block_normal(uniform: Floats) -> NDArray[np.float64]:
    first, second = np.moveaxis(uniform.reshape(-1, 2, BLOCK // 2), 1, 0)
    radius = np.sqrt(-2 * np.log(1 - first.astype(np.float64)))
    angle = (np.float32(2 * np.pi) * second).astype(np.float64)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)


def _small(count: int, words: Callable[[int], NDArray[np.uint32]], spare: list[float]) -> NDArray[np.float64]:
    """Fewer than 16 numbers from 53-bit uniform ones, two at a time."""
    out = []
    for _ in range(count):
        if not spare:
            high_a, low_a, high_b, low_b = (int(word) for word in words(4))
            a, b = ((high << 32 | low) % 2**53 * 2.0**-53 for high, low in ((high_a, low_a), (high_b, low_b)))
            radius, angle = math.sqrt(-2 * math.log1p(-b)), 2 * math.pi * a
            spare += [radius * math.sin(angle), radius * math.cos(angle)]
        out.append(spare.pop())
    return np.array(out)


def cuda_normal(seed: int, *shapes: Shape) -> list[Floats]:
    """What ``torch.randn(shape, generator=g, device="cuda")`` returns for one shape after the other, ``g`` being
    ``torch.Generator("cuda").manual_seed(seed)``; also the noise of programs that imitate it on a CPU.

    PyTorch gives each thread of the GPU a separate Philox stream. As long as a tensor has no more elements than the
    GPU has resident threads (from 30720 to over 300000; SD 1.5 at 512x512 draws 16384), each draws one number and all
    GPUs agree. A larger tensor is what the imitations compute, and what a GPU with enough threads would.

    Args:
      seed: from 0 to 2**64 - 1.
      *shapes: of the arrays, in the order in which they are drawn.

    Returns:
      float32 arrays; GPUs approximate the sine and the logarithm, so values agree to about 1e-6.

    Raises:
      ValueError: the seed is out of range.
    """
    key = _pair(np.uint64(check_seed(seed)))
    found: list[Floats] = []
    for shape in shapes:
        thread = np.arange(math.prod(shape), dtype=np.uint64)
        call = sum(array.size > 0 for array in found)  # an empty tensor draws nothing
        words = philox4x32((*_pair(np.uint64(call)), *_pair(thread)), key)
        found.append(_pair_normal(*words[:2]).reshape(shape))
    return found


def _pair_normal(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> Floats:
    """The first of the two numbers that a pair of words gives."""
    step = np.float32(2.0**-32)
    uniform = first.astype(np.float32) * step + step / 2
    angle = second.astype(np.float32) * (step * np.float32(2 * np.pi)) + step * np.float32(np.pi)
    radius = np.sqrt(-2 * np.log(uniform.astype(np.float64)))
    return (radius * np.sin(angle.astype(np.float64))).astype(np.float32)


def philox4x32(
    counter: Sequence[NDArray[np.uint32]], key: Sequence[NDArray[np.uint32]], rounds: int = 10
) -> tuple[NDArray[np.uint32], ...]:
    """Four random words for each counter: the Philox 4x32 generator (Salmon et al. 2011, 'Parallel random numbers: as
    easy as 1, 2, 3').

    Args:
      counter: four uint32 arrays of shapes that fit together, the lowest word first.
      key: two.
      rounds: of mixing.
    """
    c0, c1, c2, c3 = (np.asarray(word, np.uint32) for word in counter)
    k0, k1 = (np.asarray(word, np.uint64) for word in key)
    for _ in range(rounds):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ _low(k0), low1, high0 ^ c3 ^ _low(k1), low0
        k0, k1 = k0 + np.uint64(0x9E3779B9), k1 + np.uint64(0xBB67AE85)
    return c0, c1, c2, c3


def _product(factor: int, word: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    product = word.astype(np.uint64) * np.uint64(factor)
    return (product >> np.uint64(32)).astype(np.uint32), _low(product)


def _low(number: NDArray[np.uint64]) -> NDArray[np.uint32]:
    return (number & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def _pair(number: NDArray[np.uint64] | np.uint64) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """The low and the high word."""
    number = np.asarray(number, np.uint64)
    return _low(number), _low(number >> np.uint64(32))


def check_seed(seed: int) -> int:
    """The seed, if PyTorch takes it.

    Raises:
      ValueError: it is not an integer from 0 to 2**64 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise ValueError(f"a seed of PyTorch's noise must be an integer from 0 to 2**64 - 1, got {seed!r}")
    return int(seed)


Stream: TypeAlias = Callable[..., list[Floats]]

STREAMS: dict[str, Stream] = {"torch": torch_normal, "cuda": cuda_normal}
"""Name -> ``stream(seed, *shapes)``, the arrays of successive draws."""
