"""Vector-quantised autoencoders against PyTorch diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.models import VQConfig, VQModel
from diffuse_jax.models.codebook import Codebook
from diffuse_jax.pipelines.parts.decode import autoencoder
from tests.oracle import twins
from tests.oracle.comparisons import TOLERANCE, channel_first, compare_vq, difference

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffuse_jax.torch_backend.twins import CALLS  # noqa: E402


@pytest.mark.parametrize("name", twins.VQS)
def test_latents_and_images_equal_pytorch(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    module, model, params = found = twins.vq_twin(name, tmp_path)
    differences = compare_vq(found, rng)
    assert max(differences.values()) <= TOLERANCE, differences
    c = model.config
    apply = lambda method, *args: jax.jit(lambda p, *a: model.apply({"params": p}, *a, method=method))(params, *args)
    exact = jax.jit(lambda p, z: model.apply({"params": p}, z, True, method="decode"))
    images = rng.uniform(-1, 1, (2, 12, 10, 3)).astype(np.float32)
    latents = rng.standard_normal((2, 5, 6, c.code_channels)).astype(np.float32)
    given = rng.integers(c.num_vq_embeddings, size=(2, 5, 6)) if c.lookup_from_codebook else latents
    with torch.no_grad():
        chosen = module.quantize(channel_first(latents))[2][2].reshape(2, 5, 6)
    assert np.array_equal(apply("indices", latents), chosen)
    assert len(np.unique(chosen)) > 5
    assert difference(exact(params, given), apply("decode", latents)) > 0.01, "quantising changes the image"

    for name, ours, args in (
        ("encode", apply("encode", images).mode(), (images,)),
        ("decode", exact(params, given), (given, True)),
    ):
        with torch.no_grad():
            result = CALLS["VQModel", name](module, torch.tensor(args[0]), *args[1:])
        assert difference(ours, result[0] if name == "encode" else result) <= TOLERANCE


@pytest.mark.parametrize("name", ["wider vectors, attention in levels", "MoVQ"])
def test_pytorch_opens_what_is_saved_here(name: str, tmp_path: Path) -> None:
    module, model, params = twins.vq_twin(name, tmp_path / "theirs")
    assert not model.config.unknown()
    model.save_pretrained(tmp_path / "ours", params)
    again, report = diffusers.VQModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)
    plain = lambda config: {k: json.dumps(v) for k, v in config.items() if not k.startswith("_")}
    assert plain(again.config) == plain(module.config)


@pytest.mark.slow
def test_recomputing_changes_no_gradient(rng: np.random.Generator) -> None:
    config = VQConfig(**twins.VQS["MoVQ"])
    images = rng.uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    params = VQModel(config).init(jax.random.key(0), images)["params"]
    params["quantize"]["embedding"]["embedding"] *= 50  # else one vector is the nearest everywhere
    loss = lambda remat: lambda p: jnp.square(VQModel(config, remat=remat).apply({"params": p}, images)).mean()
    plain, recomputed = (jax.jit(jax.grad(loss(remat)))(params) for remat in ("none", "full"))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert np.abs(plain["encoder"]["conv_in"]["kernel"]).max() > 0, "gradients pass through the codebook"


def test_the_nearest_vector_is_the_nearest(rng: np.random.Generator) -> None:
    book, z = Codebook(30, 3), rng.standard_normal((2, 4, 3)).astype(np.float32)
    vectors = rng.standard_normal((30, 3)).astype(np.float32)
    params = {"params": {"embedding": {"embedding": vectors}}}
    expected = np.linalg.norm(z[:, :, None] - vectors, axis=-1).argmin(-1)
    np.testing.assert_array_equal(book.apply(params, z, method="nearest"), expected)
    np.testing.assert_allclose(book.apply(params, z), vectors[expected], atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    model = VQModel(VQConfig(**twins.VQS["indices"]))
    decode = lambda *given: jax.eval_shape(
        lambda p, z: model.apply({"params": p}, z, *given[1:], method="decode"), model.shapes(), given[0]
    )
    array = jax.ShapeDtypeStruct
    with pytest.raises(ValueError, match=r"latents must be \[B,h,w,6\], got \(1, 4, 4, 3\)"):
        decode(array((1, 4, 4, 3), "float32"))
    with pytest.raises(ValueError, match=r"integers \[B,h,w\], got float32 \(1, 4, 4, 6\)"):
        decode(array((1, 4, 4, 6), "float32"), True)
    with pytest.raises(ValueError, match="expected 'group' or 'spatial'"):
        VQConfig(norm_type="layer")
    with pytest.raises(ValueError, match="vq_embed_dim must be latent_channels=3"):
        VQConfig(norm_type="spatial", vq_embed_dim=4)
    with pytest.raises(ValueError, match="must be 'UpDecoderBlock2D' or 'AttnUpDecoderBlock2D' at every level"):
        VQConfig(up_block_types=("UpBlock2D",))


def test_float16_that_would_overflow_runs_in_float32() -> None:
    assert autoencoder(VQModel(VQConfig(force_upcast=True), dtype="float16")).dtype == jnp.float32
    assert autoencoder(VQModel(dtype="float16")).dtype == jnp.float16
