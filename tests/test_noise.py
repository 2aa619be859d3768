"""The generators of PyTorch in NumPy; the one on the CPU is compared with PyTorch in ``oracle/test_noise.py``."""

from __future__ import annotations

import numpy as np
import pytest

from diffuse_jax.noise import STREAMS, cuda_normal, philox4x32, torch_normal

FULL = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((FULL,) * 4, (FULL,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_answers_that_its_authors_published(counter, key, wanted: str):
    words = [np.array([word, 0], np.uint32) for word in counter]
    assert [int(word[0]) for word in philox4x32(words, key)] == [int(w, 16) for w in wanted.split()]


def test_cuda_noise_is_what_a_gpu_printed():
    """``torch.manual_seed(0); torch.randn(..., device="cuda")``, as found in bug reports on PyTorch."""
    printed = [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797, -0.6229, -0.3284, -1.0745, -0.3631, -1.6711, 2.2655]
    np.testing.assert_allclose(cuda_normal(0, (3, 4))[0].reshape(-1), printed, atol=5.1e-5)


@pytest.mark.parametrize("kind", STREAMS)
def test_every_stream_is_standard_normal_and_never_repeats(kind: str):
    draws = STREAMS[kind](7, (4, 64, 64), (4, 64, 64), (3,), (4, 64, 64))
    large = np.stack([draws[0], draws[1], draws[3]]).reshape(3, -1)
    assert abs(large.mean()) < 0.02
    assert abs(large.std() - 1) < 0.02
    assert abs(np.corrcoef(large)[np.triu_indices(3, 1)]).max() < 0.03
    assert len(np.unique(large)) > 0.99 * large.size
    assert all(array.dtype == np.float32 for array in draws)
    np.testing.assert_array_equal(STREAMS[kind](7, (4, 64, 64))[0], draws[0])


def test_only_cuda_noise_depends_on_the_high_word_of_a_seed():
    low, high = 5, 5 + 2**32
    np.testing.assert_array_equal(*(torch_normal(seed, (9,))[0] for seed in (low, high)))
    assert abs(cuda_normal(low, (9,))[0] - cuda_normal(high, (9,))[0]).min() > 0


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "7"])
def test_a_seed_that_pytorch_refuses_is_named(kind: str, seed: object):
    with pytest.raises(ValueError, match="an integer from 0 to 2..64 - 1, got"):
        STREAMS[kind](seed, (2,))
