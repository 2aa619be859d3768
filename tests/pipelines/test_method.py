"""Methods as users compose them: custom parts, pure functions, samples of any rank, several stages."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffuse_jax.config import Config
from diffuse_jax.models import Model
from diffuse_jax.pipelines import (
    DiffusionPipeline,
    Method,
    Net,
    Output,
    Part,
    PlainStep,
    Request,
    draw,
    run,
    sample,
    saved_programs,
)
from diffuse_jax.pipelines import method as verbs
from diffuse_jax.pipelines.family import given_rows
from diffuse_jax.pipelines.method import PLAIN_STEP
from diffuse_jax.pipelines.parts import Branches, ClassifierFree, Controlled, FromNoise, Guidance, Raw, branches
from diffuse_jax.pipelines.programs import Programs
from diffuse_jax.pipelines.tasks import below_guidance
from diffuse_jax.schedulers import DDIMScheduler, EulerDiscreteScheduler
from tests.pipelines.tiny import pipeline

REQUEST = {"num_inference_steps": 3, "seed": 0, "output_type": "np"}


@pytest.fixture(scope="module")
def pipe() -> DiffusionPipeline:
    return pipeline()


# A network of another kind: vectors, in two stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorConfig(Config):
    class_name: ClassVar[str] = "VectorNet"
    width: int = 4
    context: int = 0


class VectorNet(Model):
    """A denoiser of vectors ``[B,width]``, conditioned on other vectors."""

    config: VectorConfig = VectorConfig()
    config_class: ClassVar[type[Config]] = VectorConfig

    def example_inputs(self) -> dict[str, Any]:
        shape = lambda width: jax.ShapeDtypeStruct((1, width), jnp.float32)
        return {"x": shape(self.config.width), "t": jax.ShapeDtypeStruct((), jnp.float32)} | (
            {"context": shape(self.config.context)} if self.config.context else {}
        )

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, context: jax.Array | None = None) -> jax.Array:
        given = [x, jnp.broadcast_to(t / 1000, (*x.shape[:-1], 1))]
        if context is not None:
            given.append(
                jnp.broadcast_to(context.reshape(len(x), *(1,) * (x.ndim - 2), -1), (*x.shape[:-1], context.shape[-1]))
            )
        kernel = self.param("kernel", nn.initializers.zeros_init(), (sum(g.shape[-1] for g in given), x.shape[-1]))
        return jnp.tanh(jnp.concatenate(given, -1) @ kernel)


@dataclasses.dataclass(frozen=True)
class Denoiser(Part):
    net: Net
    context: str | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return () if self.context is None else (self.context,)

    def __call__(self, params: Any, rows: Any, x: jax.Array, step: Any) -> jax.Array:
        return self.net.apply(params, x, step.t, *([rows[self.context]] if self.context else []))


@dataclasses.dataclass(frozen=True)
class Described(Part):
    """Two results: the sample, and its norm."""

    def __call__(self, params: Any, rows: Any, sample: jax.Array) -> dict[str, Any]:
        return {"embedding": sample, "norm": jnp.linalg.norm(sample.reshape(len(sample), -1), axis=1)}


class TwoStagePipeline(DiffusionPipeline):
    """A prior that makes an embedding, and a decoder that makes a video of vectors from it."""

    required = ("prior_net", "net", "scheduler")

    def stage(self, name: str, seed: int, shape: tuple[int, ...], context: str | None = None) -> Request:
        method = Method(Denoiser(Net(name, self.components[name]), context), FromNoise(), Described(), shape)
        rows = {"seed": np.full(2, seed, np.uint32), "index": np.arange(2, dtype=np.uint32)}
        return Request(method, rows, self.scheduler.plan(4))

    def __call__(self, seed: int = 0, **running: Any) -> Output:
        prior = run(self, self.stage("prior_net", seed, (4,)))
        request = self.stage("net", seed, (3, 2, 5), "embedding")
        return run(self, request._replace(rows=request.rows | {"embedding": prior.embedding}), **running)


def two_stages(**options: Any) -> TwoStagePipeline:
    rng = np.random.default_rng(0)
    nets = {"prior_net": VectorNet(VectorConfig()), "net": VectorNet(VectorConfig(width=5, context=4))}
    fill = lambda tree: jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), jnp.float32), tree)
    params = {name: fill(net.shapes()) for name, net in nets.items()}
    return TwoStagePipeline({**nets, "scheduler": DDIMScheduler()}, params, programs=Programs(), **options)


def test_rows_of_different_lengths_are_refused() -> None:
    pipe = two_stages()
    request = pipe.stage("prior_net", 0, (4,))
    for amount in (np.zeros(3), np.float32(1.0)):
        with pytest.raises(ValueError, match=r"every row must have one entry per image.*'amount'\] (3|none)"):
            run(pipe, request._replace(rows={"amount": amount, **request.rows}))
    assert pipe.programs.compilations == 0


def test_samples_of_any_rank_several_results_and_a_trajectory():
    """The first stage denoises vectors, the second videos of them; the first one's result is a row of the second."""
    pipe = two_stages()
    out = pipe(return_trajectory=True)
    assert out.embedding.shape == (2, 3, 2, 5)
    assert out.norm.shape == (2,)
    np.testing.assert_allclose(out.norm, np.linalg.norm(np.asarray(out.embedding).reshape(2, -1), axis=1), rtol=1e-6)
    assert out.trajectory.shape == (2, 5, 3, 2, 5)
    np.testing.assert_array_equal(out.trajectory[:, -1], out.embedding)
    np.testing.assert_allclose(pipe().embedding, out.embedding, rtol=1e-5, atol=1e-6)
    with pytest.raises(AttributeError, match="the output has no 'images'; it has embedding, norm"):
        pipe().images  # noqa: B018


def test_a_program_gets_only_the_parameters_that_its_method_reads():
    pipe, seen = two_stages(), []
    get = pipe.programs.get
    pipe.programs.get = lambda *a: (seen.append(sorted(a[4][0])), get(*a))[1]  # type: ignore[method-assign]
    pipe()
    assert seen == [["prior_net"], ["net"]]


def test_offloaded_parameters_stay_on_the_host_until_their_stage_runs():
    pipe = two_stages()
    wanted, moved = pipe().embedding, pipe.offload("prior_net")
    assert isinstance(moved.params["prior_net"]["kernel"], np.ndarray)
    assert moved.params["net"]["kernel"] is pipe.params["net"]["kernel"]
    before = pipe.programs.compilations
    np.testing.assert_array_equal(moved().embedding, wanted)
    assert pipe.programs.compilations == before, "the same programs"
    with pytest.raises(TypeError, match="no network 'unet'; it has prior_net, net"):
        pipe.offload("unet")


def test_a_custom_pipeline_of_custom_networks_saves_and_opens_again(tmp_path: Path):
    """Names with a prefix are components like others; the class names lead back to this module."""
    pipe = two_stages()
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is TwoStagePipeline
    assert again.components["net"] == pipe.components["net"]
    np.testing.assert_array_equal(again().embedding, pipe().embedding)


# Guidance, starts and steps from outside


@dataclasses.dataclass(frozen=True)
class Interval(Guidance):
    """Guidance only in the first steps, by a scale for each image (Kynkäänniemi et al. 2024)."""

    inner: Any

    @property
    def reads(self) -> tuple[str, ...]:
        return "guidance_scale", "until"

    def __call__(self, params: Any, rows: Any, x: jax.Array, step: Any) -> jax.Array:
        negative, positive = branches(self.inner, params, rows, x, step)
        scale = jnp.where(step.i < rows["until"], rows["guidance_scale"], 1.0).reshape(-1, 1, 1, 1)
        return negative + scale * (positive - negative)


def with_interval(m: Method) -> Method:
    return dataclasses.replace(m, denoiser=Interval(m.denoiser.inner))


def test_custom_guidance_with_its_own_row(pipe: DiffusionPipeline):
    """All steps: what classifier-free guidance gives. None: what a scale of 1 gives. The number is data."""
    images = lambda **change: pipe(["a", "b"], **REQUEST | {"guidance_scale": 4.0} | change).images
    count = pipe.programs.compilations
    always = images(method=with_interval, rows={"until": [9, 9]})
    assert pipe.programs.compilations == count + 1
    both = images(method=with_interval, rows={"until": [9, 0]})
    assert pipe.programs.compilations == count + 1
    np.testing.assert_allclose(always, images(), atol=2e-5)
    np.testing.assert_allclose(both[0], always[0], atol=2e-5)
    np.testing.assert_allclose(both[1], images(guidance_scale=[4.0, 1.0])[1], atol=2e-5)


def test_a_controlnet_goes_inside_custom_guidance():
    wrapped = below_guidance(Interval(PLAIN_STEP), lambda denoiser: Controlled(denoiser, ()))
    assert wrapped == Interval(Controlled(PLAIN_STEP, ()))
    rows = {"states": Branches(jnp.zeros((1, 2, 3, 4)))}
    with pytest.raises(TypeError, match="must inherit from diffuse_jax.pipelines.parts.Guidance"):
        wrapped.inner({}, rows, jnp.zeros((1, 8, 8, 4)), None)


@dataclasses.dataclass(frozen=True)
class FromBlend(Part):
    """Start from noise that is partly shared by all images."""

    share: float

    def prepare(self, params: Any, rows: Any, keys: jax.Array) -> Any:
        own, common = draw(keys, "own", (8, 8, 4)), jax.random.normal(jax.random.key(1), (8, 8, 4))
        return rows | {"blend": self.share**0.5 * common[None] + (1 - self.share) ** 0.5 * own}

    @property
    def adds(self) -> tuple[str, ...]:
        return ("blend",)

    def __call__(self, plan: Any, rows: Any) -> Any:
        return plan.init(rows["blend"])


def test_a_custom_start_draws_noise_for_each_image_separately(pipe: DiffusionPipeline):
    request = REQUEST | {"seed": [5, 6, 7], "method": lambda m: dataclasses.replace(m, start=FromBlend(0.5))}
    together = pipe(["x"] * 3, **request).images
    alone = pipe("x", **request | {"seed": [6]}).images
    np.testing.assert_allclose(together[1], alone[0], atol=2e-5)
    assert np.abs(together[0] - together[1]).mean() > 0.01


def test_what_does_not_fit_is_said_before_anything_compiles(pipe: DiffusionPipeline):
    count = pipe.programs.compilations
    for method, message in [
        (with_interval, "Interval needs 'until'; the request has .*guidance_scale"),
        (lambda m: dataclasses.replace(m, denoiser=lambda *a: 0), "is not a part"),
        (lambda m: dataclasses.replace(m, start=Listed([1])), "Listed cannot be compared .*arrays in rows"),
        (lambda m: None, "must be a Method .*got NoneType"),
        (lambda m: m.denoiser, "must be a Method .*got ClassifierFree"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            pipe("a", method=method, **REQUEST)
    for value, problem in [([1, 2], r"one entry for each of 1 images, got \(2,\)"), (["a"], "be numbers")]:
        with pytest.raises(ValueError, match=rf"rows\['until'\] must (have )?{problem}"):
            pipe("a", method=with_interval, rows={"until": value}, **REQUEST)
    for key in (jax.random.PRNGKey(0), jax.random.split(jax.random.key(0)), 3):
        with pytest.raises(TypeError, match="key must be one typed key, as jax.random.key"):
            pipe("a", num_inference_steps=3, key=key)
    assert pipe.programs.compilations == count


def test_what_parts_return_is_checked_where_they_return_it(rng: np.random.Generator):
    pipe = two_stages()
    request = pipe.stage("prior_net", 0, (4,))
    for part, error in [
        ({"start": Returns("noise")}, "Returns must return a State, as plan.init"),
        ({"decode": Returns()}, "Returns must return a dict"),
        (
            {"decode": Summed()},
            r"Summed must return one row per image; for 2 images it returned \['sum'\] of shape \(\)",
        ),
    ]:
        with pytest.raises((TypeError, ValueError), match=error):
            run(pipe, request._replace(method=dataclasses.replace(request.method, **part)))


@dataclasses.dataclass(frozen=True)
class Returns(Part):
    """A start that returns a row, a decoder that returns the sample."""

    row: str = ""

    def __call__(self, *given: Any) -> Any:
        return given[-1][self.row] if self.row else given[-1]


@dataclasses.dataclass(frozen=True)
class Summed(Part):
    def __call__(self, params: Any, rows: Any, sample: jax.Array) -> Any:
        return {"sum": sample.sum()}


@dataclasses.dataclass(frozen=True)
class Named(Part):
    """Denoisers by name, of which one is used."""

    members: tuple[tuple[str, Any], ...]

    def __call__(self, params: Any, rows: Any, x: jax.Array, step: Any) -> jax.Array:
        return dict(self.members)["main"](params, rows, x, step)


def test_networks_are_found_in_tuples_of_tuples():
    pipe = two_stages()
    request = pipe.stage("prior_net", 0, [4])  # type: ignore[arg-type]  # as users write it
    method = dataclasses.replace(request.method, denoiser=Named((("main", request.method.denoiser),)))
    assert method.networks == ("prior_net",)
    nested = run(pipe, request._replace(method=method))
    np.testing.assert_array_equal(nested.embedding, run(pipe, request).embedding)


def test_given_rows_may_be_trees_and_keys():
    keys = jax.random.split(jax.random.key(0), 2)
    rows = given_rows({"a": {"b": [1, 2], "keys": keys}, "c": Branches(np.zeros((2, 3, 4)))}, 2)
    assert jax.tree.map(np.shape, rows) == {"a": {"b": (2,), "keys": (2,)}, "c": Branches((2, 3, 4))}
    with pytest.raises(ValueError, match=r"rows\['a'\]\['b'\] must have one entry for each of 3 images, got \(2,\)"):
        given_rows(rows, 3)


def test_one_program_is_compiled_once_for_all_threads():
    pipe = two_stages()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda seed: run(pipe, pipe.stage("prior_net", seed, (4,))), range(4)))
    assert pipe.programs.compilations == 1
    assert len({out.norm[0].item() for out in results}) == 4


@dataclasses.dataclass(frozen=True)
class Listed(Part):
    value: Any

    def __call__(self, plan: Any, rows: Any) -> Any:
        return plan.init(rows["noise"])


def scaled_by(factor: float) -> type[Part]:
    """A class of one name for each factor, as a notebook's cell makes when it is run again."""

    @dataclasses.dataclass(frozen=True)
    class Scaled(Part):
        def __call__(self, plan: Any, rows: Any) -> Any:
            return plan.init(factor * rows["noise"])

    return Scaled


@dataclasses.dataclass(frozen=True)
class Calls(Part):
    """A part with a function inside."""

    function: Callable[[Any], Any]

    def __call__(self, plan: Any, rows: Any) -> Any:
        return plan.init(self.function(rows["noise"]))


def test_two_classes_of_one_name_and_two_closures_are_two_programs(pipe: DiffusionPipeline, tmp_path: Path):
    request = REQUEST | {"output_type": "latent"}
    images = lambda start, p=pipe: p("a", method=lambda m: dataclasses.replace(m, start=start), **request).images
    one, two = (scaled_by(factor)() for factor in (1.0, 0.2))
    assert np.abs(images(one) - images(two)).mean() > 0.01
    closures = [lambda x, f=factor: f * x for factor in (1.0, 0.2)]
    np.testing.assert_array_equal(images(Calls(closures[1])), images(two))
    np.testing.assert_array_equal(images(Calls(closures[0])), images(one))
    fresh = pipe.replace(programs=Programs())
    images(Calls(closures[0]), fresh)
    with pytest.warns(UserWarning, match=r"a program was not saved: .*<lambda> is a closure"):
        assert fresh.save_compiled(tmp_path) == []


def plain(x: Any) -> Any:
    return x


def times(factor: float) -> Callable[[Any], Any]:
    """A closure that says that it is another function, as decorators do."""
    return functools.wraps(plain)(lambda x: factor * x)


def test_what_only_claims_a_name_is_not_saved_under_it():
    assert saved_programs.stable_repr(Calls(plain)) != saved_programs.stable_repr(Calls(draw))
    made = dataclasses.make_dataclass("Calls", [], bases=(Part,), frozen=True)
    made.__module__ = __name__
    for part in (Calls(times(2.0)), Calls(functools.wraps(jnp.ndim)(lambda x: x)), made()):
        with pytest.raises(saved_programs.UnstableReprError, match="the name does not identify it"):
            saved_programs.stable_repr(part)


# Programs in files


def test_programs_with_several_results_are_saved_too(tmp_path: Path):
    pipe = two_stages()
    wanted = pipe(return_trajectory=True)
    assert len(pipe.save_compiled(tmp_path)) == 4  # the first stage; begin, advance and finish of the second
    again = two_stages().load_compiled(tmp_path)
    np.testing.assert_array_equal(again(return_trajectory=True).embedding, wanted.embedding)
    assert again.programs.compilations == 0


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders have no owners here")
def test_programs_can_be_read_again_whatever_the_umask(tmp_path: Path):
    pipe = two_stages().load_compiled(tmp_path)  # there are none; what is compiled now can be saved as it is
    pipe()
    for umask in (0o000, 0o002, 0o077):
        before = os.umask(umask)
        try:
            pipe.save_compiled(tmp_path / f"{umask:o}")
            again = two_stages().load_compiled(tmp_path / f"{umask:o}")
            again()
        finally:
            os.umask(before)
        assert again.programs.compilations == 0, oct(umask)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders have no owners here")
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path):
    pipe = two_stages()
    pipe()
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    for use in (pipe.save_compiled, pipe.load_compiled):
        with pytest.raises(PermissionError, match="open: other users can write to it.*chmod go-w"):
            use(open_folder)
    folder = tmp_path / "own"
    files = pipe.save_compiled(folder)
    files[0].chmod(0o666)
    again = two_stages().load_compiled(folder)
    with pytest.raises(PermissionError, match="other users can write to it"):
        again()


def test_a_damaged_file_is_compiled_again(tmp_path: Path, rng: np.random.Generator):
    pipe = two_stages()
    wanted = pipe().embedding
    for file in pipe.save_compiled(tmp_path):
        data = bytearray(file.read_bytes())
        data[int(rng.integers(100, len(data)))] ^= 1
        file.write_bytes(data)
    again = two_stages().load_compiled(tmp_path)
    with pytest.warns(UserWarning, match="compiled again: the file is damaged"):
        np.testing.assert_array_equal(again().embedding, wanted)
    assert again.programs.compilations == 2


def test_nothing_of_a_program_is_unpacked_before_its_checksum_is_right(tmp_path: Path, monkeypatch):
    """Flipped bits and cuts all over a file; what is checked first is code no more than any other bytes."""
    body = pickle.dumps((b"program" * 20, None))
    whole = saved_programs.MAGIC + hashlib.sha256(body).digest() + body
    unpacked = []
    monkeypatch.setattr(saved_programs.pickle, "loads", unpacked.append)
    damaged = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    file = tmp_path / "a.jaxprogram"
    for data in (*damaged, *(whole[:size] for size in range(0, len(whole), 7)), whole + b"0"):
        file.write_bytes(data)
        with pytest.warns(UserWarning, match=r"a\.jaxprogram could not be loaded.* the file is damaged"):
            assert saved_programs.read(file, (), None) is None
    assert unpacked == []
    file.write_bytes(whole)
    with pytest.warns(UserWarning, match="could not be loaded"):
        saved_programs.read(file, (), None)
    assert unpacked == [body]


# The pure function


def test_sample_is_the_run_behind_the_call_and_can_be_compiled_and_mapped(pipe: DiffusionPipeline):
    request = pipe.request(["a", "b"], **REQUEST)
    jitted = jax.jit(sample, static_argnums=0)
    images = jitted(request.method, pipe.params, request.rows, request.plan)["images"]
    np.testing.assert_allclose(images, pipe(["a", "b"], **REQUEST).images, atol=2e-5)

    plans = [EulerDiscreteScheduler.from_config(pipe.scheduler).plan(n) for n in (2, 3)]
    rows = request.rows | {"noise": np.zeros((2, *request.method.latent_shape), np.float32) + 0.1}
    one = lambda plan: sample(request.method, pipe.params, rows, plan, evaluations=None)["images"]
    mapped = jax.jit(jax.vmap(one))(jax.tree.map(lambda *x: np.stack(x), *plans))
    for k, plan in enumerate(plans):
        np.testing.assert_allclose(mapped[k], jax.jit(one)(plan), atol=2e-4)


def test_sample_runs_on_the_explicit_axes_of_its_arguments(pipe: DiffusionPipeline):
    request = pipe.request(["a", "b"], **REQUEST)
    mesh = jax.make_mesh((2,), ("data",))
    assert mesh.axis_types == (AxisType.Explicit,)
    by_image, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    rows = jax.device_put(request.rows, by_image)
    params, plan = jax.device_put(({name: pipe.params[name] for name in request.method.networks}, request.plan), whole)
    images = jax.jit(sample, static_argnums=0)(request.method, params, rows, plan)["images"]
    assert images.sharding.is_equivalent_to(by_image, images.ndim)
    np.testing.assert_allclose(images, pipe(["a", "b"], **REQUEST).images, atol=2e-5)


def test_a_run_of_a_fixed_number_of_steps_is_differentiable(pipe: DiffusionPipeline, rng: np.random.Generator):
    """By the noise, by the prompt embeddings and by parameters; checked by finite differences along one direction."""
    states = rng.standard_normal((1, 16, 16)).astype(np.float32)
    request = pipe.request(prompt_embeds=states, negative_prompt_embeds=0 * states, guidance_scale=3.0, **REQUEST)
    noise = rng.standard_normal((1, *request.method.latent_shape)).astype(np.float32)
    kernel = lambda tree: tree["unet"]["mid_block"]["resnets_0"]["conv1"]["kernel"]

    def loss(noise: Any, embeds: Any, weights: Any, plan: Any) -> jax.Array:
        unet = pipe.params["unet"]
        middle = unet["mid_block"]["resnets_0"]
        changed = middle | {"conv1": middle["conv1"] | {"kernel": weights}}
        params = pipe.params | {"unet": unet | {"mid_block": unet["mid_block"] | {"resnets_0": changed}}}
        rows = request.rows | {"noise": noise, "states": Branches(embeds)}
        return jnp.mean(sample(request.method, params, rows, plan, evaluations=3)["images"] ** 2)

    values = (jnp.asarray(noise), jnp.asarray(request.rows["states"].values), jnp.asarray(kernel(pipe.params)))
    value = jax.jit(loss)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*values, request.plan)
    for k, gradient in enumerate(gradients):
        direction = np.asarray(gradient) / np.linalg.norm(gradient)
        moved = lambda h, k=k, d=direction: value(
            *(v + h * d if i == k else v for i, v in enumerate(values)), request.plan
        )
        h = 1e-2 * float(np.linalg.norm(values[k])) / 3
        slope = float(moved(h) - moved(-h)) / (2 * h)
        assert slope == pytest.approx(float(np.linalg.norm(gradient)), rel=0.03), k
    with pytest.raises(ValueError, match="the plan has 3 evaluations, got evaluations=4"):
        sample(request.method, pipe.params, request.rows, request.plan, evaluations=4)


def test_noise_of_each_purpose_and_image_is_its_own():
    keys = jax.vmap(jax.random.key)(jnp.arange(3, dtype=jnp.uint32))
    first, second = draw(keys, "a", (5,)), draw(keys, "b", (5,))
    np.testing.assert_array_equal(first[1], draw(keys[1:2], "a", (5,))[0])
    assert not np.allclose(first, second)
    assert not np.allclose(first[0], first[1])


def test_a_wrapper_prepares_what_is_inside_it():
    order = []

    @dataclasses.dataclass(frozen=True)
    class Noted(Part):
        name: str
        inner: Any = None

        def prepare(self, params: Any, rows: Any, keys: Any) -> Any:
            order.append(self.name)
            return super().prepare(params, rows, keys)

    method = Method(
        ClassifierFree(Noted("outer", Noted("inner"))), FromNoise(), Raw(), (2,), (Noted("first"),), PlainStep()
    )
    method.prepare({}, {"seed": np.zeros(1, np.uint32), "index": np.zeros(1, np.uint32)})
    assert order == ["first", "outer", "inner"]
    assert [type(p).__name__ for p in verbs.all_parts(method.denoiser)] == [
        "Noted",
        "Noted",
        "Linear",
        "ClassifierFree",
    ]
