"""Names and axes: PyTorch -> Flax -> PyTorch loses nothing, for every architecture and for any other tree."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffuse_jax.weights import Checkpoint, WeightsError, match, names, place
from tests.weights.tiny import NETWORKS, same_bits, torch_tensors


@pytest.mark.parametrize("name", NETWORKS)
def test_torch_to_flax_to_torch_is_bit_identical(name: str, rng: np.random.Generator) -> None:
    shapes = NETWORKS[name].shapes()
    before = torch_tensors(NETWORKS[name], rng)
    # Every bit pattern must survive, including NaNs.
    first = next(iter(before.values()))
    first.reshape(-1)[:2] = np.array([0x7FC00001, 0xFF800001], np.uint32).view(np.float32)
    found = match(Checkpoint(before, dict.fromkeys(before, Path("file"))), shapes, label=name)
    params = names.flatten(place(found))
    assert {path: leaf.shape for path, leaf in params.items()} == {
        path: leaf.shape for path, leaf in names.flatten(shapes).items()
    }
    after = {key: names.to_torch(path, np.asarray(params[path])) for key, path in names.torch_keys(params).items()}
    assert after.keys() == before.keys()
    for key in before:
        assert same_bits(before[key], after[key]), key


@pytest.mark.parametrize("name", NETWORKS)
def test_old_flax_names_are_the_inverse_of_the_aliases(name: str) -> None:
    paths = ["/".join(path) for path in names.flatten(NETWORKS[name].shapes())]
    old = [names.rename(path, names.FLAX_OLD) for path in paths]
    assert [names.rename(path, names.FLAX_ALIASES) for path in old] == paths
    assert len(set(old)) == len(old)


words = st.sampled_from(["blocks_0", "blocks_1", "blocks_11", "attn", "linear_1", "linear_2", "to_out_0", "norm"])
leaves = st.sampled_from(["kernel", "bias", "embedding", "class_embedding"])
trees = st.dictionaries(
    st.tuples(words, words, leaves), st.lists(st.integers(1, 3), min_size=2, max_size=5), min_size=1
)


@given(trees)
def test_any_tree_goes_to_torch_and_back(tree: dict[tuple[str, ...], list[int]]) -> None:
    # A module has one weight: kernel, scale and embedding are the same word in PyTorch.
    tree = {path: shape for path, shape in tree.items() if path[-1] != "embedding" or (*path[:2], "kernel") not in tree}
    arrays = {path: np.arange(np.prod(shape)).reshape(shape) for path, shape in tree.items()}
    keys = names.torch_keys(arrays)
    assert len(keys) == len(arrays)
    for path in keys.values():
        assert same_bits(names.from_torch(path, names.to_torch(path, arrays[path])), arrays[path])


def test_axes_of_each_rank() -> None:
    assert names.to_torch(("conv", "kernel"), np.zeros((3, 5, 7, 11))).shape == (11, 7, 3, 5)  # HWIO -> OIHW
    assert names.to_torch(("conv", "kernel"), np.zeros((3, 7, 11))).shape == (11, 7, 3)
    assert names.to_torch(("conv", "kernel"), np.zeros((2, 3, 5, 7, 11))).shape == (11, 7, 2, 3, 5)
    assert names.to_torch(("dense", "kernel"), np.zeros((7, 11))).shape == (11, 7)
    assert names.to_torch(("tokens", "embedding"), np.zeros((7, 11))).shape == (7, 11)


def test_two_paths_with_one_key_are_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"norm/kernel and norm/scale are both 'norm.weight'"):
        names.torch_keys([("norm", "scale"), ("norm", "kernel")])


def test_renames_apply_to_the_torch_side() -> None:
    renames = ((r"^conv_in\.", "stem.0."),)
    assert names.torch_keys([("conv_in", "kernel")], renames) == {"stem.0.weight": ("conv_in", "kernel")}


SHAPES = {
    "conv1": {"kernel": jax.ShapeDtypeStruct((3, 3, 2, 4), "float32"), "bias": jax.ShapeDtypeStruct((4,), "float32")}
}


def checkpoint(**tensors: np.ndarray) -> Checkpoint:
    named = {key.replace("__", "."): array for key, array in tensors.items()}
    return Checkpoint(named, dict.fromkeys(named, Path("some.safetensors")))


WEIGHT, BIAS = np.zeros((4, 2, 3, 3), np.float32), np.zeros(4, np.float32)


def test_missing_and_left_over_tensors_are_named_on_both_sides() -> None:
    with pytest.raises(WeightsError) as error:
        match(checkpoint(conv1__bias=BIAS, other=BIAS), SHAPES, label="unet")
    assert str(error.value) == (
        "unet: 1 missing, 1 unexpected, e.g. 'conv1.weight' for conv1/kernel; 'other' matches nothing"
    )


def test_a_wrong_shape_names_file_key_and_both_shapes() -> None:
    with pytest.raises(WeightsError) as error:
        match(checkpoint(conv1__weight=WEIGHT[:3], conv1__bias=BIAS), SHAPES, label="unet")
    for part in ("some.safetensors", "'conv1.weight'", "[3, 2, 3, 3]", "conv1/kernel", "[3, 3, 2, 4]"):
        assert part in str(error.value)


def test_one_parameter_under_two_names_is_refused() -> None:
    shapes = {"attentions_0": {"to_q": {"bias": jax.ShapeDtypeStruct((4,), "float32")}}}
    with pytest.raises(WeightsError, match="are the same parameter"):
        match(checkpoint(attentions__0__query__bias=BIAS, attentions__0__to_q__bias=BIAS), shapes, label="vae")


def test_position_buffers_are_not_parameters() -> None:
    found = match(
        checkpoint(conv1__weight=WEIGHT, conv1__bias=BIAS, x__position_ids=np.arange(3)), SHAPES, label="unet"
    )
    assert len(found) == 2


def test_aliases_of_older_and_newer_releases(rng: np.random.Generator) -> None:
    vae = torch_tensors(NETWORKS["vae"], rng)
    old = {
        key.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace("to_out.0", "proj_attn"): a
        for key, a in vae.items()
    }
    assert old.keys() != vae.keys()
    clip = torch_tensors(NETWORKS["clip"], rng)
    new = {key.removeprefix("text_model."): a for key, a in clip.items()}
    for tensors, name in ((old, "vae"), (new, "clip")):
        found = match(checkpoint(**tensors), NETWORKS[name].shapes(), label=name)
        for array in tensors.values():
            assert any(array is view or np.shares_memory(array, view) for view in found.values())
