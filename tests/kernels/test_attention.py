"""attention() against the formula in float64, on every path, and its promises about memory and platforms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffuse_jax.kernels import attention, blocked, target_platform
from diffuse_jax.kernels.dot_product import choose_implementation
from diffuse_jax.sharding import make_mesh


def formula(q, k, v, mask=None, is_causal=False, scale=None) -> np.ndarray:
    """softmax(scale q k^T) v in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = np.ones(scores.shape, bool) if mask is None else np.broadcast_to(mask, scores.shape)
    if is_causal:
        seen = seen & np.tri(*scores.shape[-2:], dtype=bool)
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def arrays(rng, batch=2, queries=24, keys=None, heads=3, depth=8, dtype=np.float32):
    sizes = (queries, keys or queries, keys or queries)
    return [jnp.asarray(rng.standard_normal((batch, n, heads, depth)), dtype) for n in sizes]


def random_mask(rng, *shape: int) -> np.ndarray:
    mask = rng.random(shape) < 0.6
    mask[..., 0] = True  # every query sees the first key
    return mask


@pytest.fixture(params=["whole", "blocks"])
def block_bytes(request, monkeypatch):
    """The usual block, into which small inputs fit whole, or one so small that they take several."""
    if request.param == "blocks":
        monkeypatch.setattr(blocked, "BLOCK_BYTES", {"cpu": 1, "gpu": 1, "tpu": 1})
        monkeypatch.setattr(blocked, "_MIN_ROWS", 7)
        jax.clear_caches()
    return request.param


OPTIONS = {
    "self": ({}, {}),
    "text": ({"queries": 33, "keys": 77}, {}),
    "one key": ({"queries": 5, "keys": 1}, {}),
    "causal": ({"queries": 19}, {"is_causal": True}),
    "scale": ({}, {"scale": 0.3}),
    "key mask": ({"keys": 13}, {"mask": (2, 1, 1, 13)}),
    "shared mask": ({"queries": 17, "keys": 13}, {"mask": (17, 13)}),
    "full mask": ({"queries": 17, "keys": 13}, {"mask": (2, 3, 17, 13), "is_causal": True}),
    "head mask": ({"queries": 9}, {"mask": (3, 1, 9)}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_blocked_is_the_formula(rng, block_bytes, case):
    sizes, options = OPTIONS[case]
    q, k, v = arrays(rng, **sizes)
    if "mask" in options:
        options = options | {"mask": random_mask(rng, *options["mask"])}
    for platform in ("cpu", "gpu") if len(options) != 1 else ("cpu",):  # the loop over heads is for CPUs alone
        with target_platform(platform):
            out = jax.jit(lambda *a: attention(*a, implementation="blocked", **options))(q, k, v)
        np.testing.assert_allclose(out, formula(q, k, v, **options), atol=2e-6)


def test_outside_of_a_program_it_compiles_once(rng, caplog):
    q, k, v = (jnp.asarray(rng.standard_normal((1, 70, 2, 8)), jnp.float32) for _ in range(3))
    first = attention(q, k, v, implementation="blocked")
    with jax.log_compiles():
        again = attention(q, k, v, implementation="blocked")
    assert not [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()]
    np.testing.assert_array_equal(again, first)


def test_gradients_are_those_of_the_formula(rng, block_bytes):
    q, k, v = arrays(rng, queries=17, keys=13)
    mask, up = random_mask(rng, 2, 1, 17, 13), rng.standard_normal(q.shape)
    with jax.enable_x64(True):
        dense = lambda q, k, v: jnp.sum(up * _formula_in_jax(q, k, v, mask))
        expected = jax.jit(jax.grad(dense, (0, 1, 2)))(*(jnp.asarray(x, jnp.float64) for x in (q, k, v)))
    ours = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.float32(up) * attention(*a, mask=mask)), (0, 1, 2)))(q, k, v)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


def _formula_in_jax(q, k, v, mask):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)), v)


def test_bfloat16_adds_only_its_rounding(rng):
    q, k, v = arrays(rng, queries=64, depth=16, dtype=jnp.bfloat16)
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), formula(q, k, v), atol=2e-2)


def test_huge_scores_and_hidden_rows_stay_finite(rng):
    q, k, v = arrays(rng, queries=8)
    assert np.isfinite(attention(q * 1e3, k * 1e3, v)).all()
    assert np.isfinite(attention(q, k, v, mask=np.zeros((8, 8), bool))).all()


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_memory_stays_under_a_block(monkeypatch, platform):
    """The whole scores would be 2*4*2048*2048*4 = 134 MB, and kept for gradients; inputs are 1 MB each."""
    shape = jax.ShapeDtypeStruct((2, 2048, 4, 16), jnp.float32)
    block = {"cpu": 4 << 20, "gpu": 16 << 20}
    monkeypatch.setattr(blocked, "BLOCK_BYTES", block)
    with target_platform(platform):
        f = lambda *a: attention(*a, implementation="blocked").sum()
        for fn, scores in ((f, 2), (jax.grad(f, (0, 1, 2)), 5)):  # the backward pass has a few arrays like the scores
            used = jax.jit(fn).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes
            assert used < scores * block[platform] + 12 * shape.size * 4


def _choice(dtype=jnp.bfloat16, queries=4096, keys=4096, depth=64, mask=None) -> str:
    q, k = (jax.ShapeDtypeStruct((2, n, 8, depth), dtype) for n in (queries, keys))
    return choose_implementation(q, k, mask)


def test_choice_follows_the_table():
    key_mask, full_mask = (jax.ShapeDtypeStruct(s, bool) for s in ((2, 1, 1, 4096), (1, 1, 4096, 4096)))
    assert _choice() == "blocked"
    with target_platform("gpu"):
        assert (_choice(), _choice(keys=77), _choice(mask=full_mask)) == ("cudnn",) * 3
        assert (_choice(jnp.float32), _choice(depth=512)) == ("blocked",) * 2
    with target_platform("tpu"):
        assert (_choice(), _choice(jnp.float32), _choice(mask=key_mask), _choice(depth=512)) == ("flash",) * 4
        assert (_choice(keys=77), _choice(queries=256, keys=256), _choice(mask=full_mask)) == ("blocked",) * 3


@pytest.mark.parametrize("case", ["self", "text", "causal", "key mask", "full mask"])
@pytest.mark.parametrize("grad", [False, True])
def test_cudnn_lowers_for_a_gpu_that_is_not_here(rng, monkeypatch, case, grad):
    """JAX checks shapes while tracing and lowers to cuDNN's call; odd lengths pass because they were padded."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    if fused.cuda_versions is None:
        monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    sizes, options = OPTIONS[case]
    q, k, v = arrays(rng, **(sizes | {"depth": 40}), dtype=jnp.bfloat16)
    if "mask" in options:
        options = options | {"mask": random_mask(rng, *options["mask"])}
    f = lambda *a: attention(*a, **options)
    if grad:
        f = jax.grad(lambda *a: attention(*a, **options).astype(jnp.float32).sum(), (0, 1, 2))
    with target_platform("gpu"):
        text = jax.jit(f).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__cudnn$fmha") >= 1 + grad


@pytest.mark.parametrize("case", ["self", "text", "key mask", "causal"])
def test_flash_is_the_formula(rng, case):
    """The TPU kernel interpreted on a CPU: what we add (padding, segments, layouts) is right."""
    tpu = pytest.importorskip("jax.experimental.pallas.tpu")
    sizes, options = OPTIONS[case]
    q, k, v = arrays(rng, **(sizes | {"heads": 1}))
    if "mask" in options:
        options = options | {"mask": random_mask(rng, *options["mask"])}
    with tpu.force_tpu_interpret_mode():
        out = jax.jit(lambda *a: attention(*a, implementation="flash", **options))(q, k, v)
    np.testing.assert_allclose(out, formula(q, k, v, **options), atol=1e-5)


@pytest.mark.parametrize(("case", "depth"), [("self", 8), ("text", 160)], ids=str)
def test_flash_and_its_gradients_are_those_of_plain_xla(rng, case, depth):
    """What runs where there is no such kernel; 160 channels a head are padded for it to 256."""
    tpu = pytest.importorskip("jax.experimental.pallas.tpu")
    sizes, options = OPTIONS[case]
    q, k, v = arrays(rng, **(sizes | {"batch": 1, "heads": 1, "depth": depth}))
    up = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)

    def run(implementation):
        output = lambda *a: attention(*a, implementation=implementation, **options)
        return jax.jit(lambda *a: (output(*a), jax.vjp(output, *a)[1](up)))(q, k, v)

    with tpu.force_tpu_interpret_mode():
        found = jax.tree.leaves(run("flash"))
    for a, b in zip(found, jax.tree.leaves(run("blocked")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("axes", [{"data": 1, "fsdp": 8}, {"data": 4, "tensor": 2}], ids=str)
def test_gradients_of_flash_are_not_summed_over_devices(axes):
    """Batch and heads are sharded, so there is nothing to add up, not even over an axis of one device."""
    shape = jax.ShapeDtypeStruct((8, 1024, 2, 64), jnp.bfloat16)
    gradient = jax.grad(lambda q, k, v: attention(q, k, v).astype(jnp.float32).sum(), (0, 1, 2))
    with jax.set_mesh(make_mesh(**axes)), target_platform("tpu"):
        traced = str(jax.make_jaxpr(gradient)(shape, shape, shape))
    assert "shard_map" in traced
    assert traced.count("pallas_call[") == 3, "forward, gradient of queries, gradient of keys and values"
    assert "psum" not in traced


def test_errors_say_what_was_given(rng):
    q, k, v = arrays(rng)
    with pytest.raises(ValueError, match=r"query \[B,Lq,H,D\].*\(2, 24, 3, 8\), \(2, 24, 3, 4\)"):
        attention(q, k[..., :4], v[..., :4])
    with pytest.raises(ValueError, match="share a dtype, got float32, bfloat16"):
        attention(q, k.astype(jnp.bfloat16), v)
    with pytest.raises(ValueError, match=r"broadcastable to \[B,H,Lq,Lk\] = \(2, 3, 24, 24\), got bool \(24, 23\)"):
        attention(q, k, v, mask=np.ones((24, 23), bool))
    with pytest.raises(ValueError, match="got float32"):
        attention(q, k, v, mask=np.ones((24, 24), np.float32))
    with pytest.raises(ValueError, match=r"one of .'blocked', 'cudnn', 'flash'. or None, got 'xla'"):
        attention(q, k, v, implementation="xla")
    with pytest.raises(ValueError, match="cuDNN attention takes bfloat16 or float16, got float32"):
        attention(q, k, v, implementation="cudnn")
    with pytest.raises(ValueError, match=r"masks \[B,1,1,Lk\]"):
        attention(q, k, v, mask=np.ones((24, 24), bool), implementation="flash")
