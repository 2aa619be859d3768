"""A method: the parts that a run is composed of, and the pure function that executes it.

A *part* is a frozen dataclass: networks and choices, no arrays. All data of a request, and all that parts compute
before the loop, are *rows*: a dict of arrays with one row per image. Rows and the sampler's plan are arguments of the
compiled program, so another prompt, image, strength, scale, sampler or number of steps never compiles again.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffuse_jax.models.base import Params as Params
from diffuse_jax.pipelines.identity import identity
from diffuse_jax.schedulers.plan import Plan, State
from diffuse_jax.sharding import on_automatic_axes

Rows = dict[str, Any]
"""Name -> array ``[B, ...]`` (or a tree of them), one row per image."""


class Step(NamedTuple):
    """Where a run is: the index of the evaluation, its timestep (what the network sees), and the whole plan."""

    i: Any
    t: jax.Array
    plan: Plan


@dataclasses.dataclass(frozen=True)
class Net:
    """A network, and the name under which the pipeline keeps its parameters.

    Attributes:
      name: the component's name, for example ``"unet"`` or ``"prior_text_encoder"``.
      model: the network.
      index: its place, where the component is a list of networks (several ControlNets).
    """

    name: str
    model: Any
    index: int | None = None

    @property
    def config(self) -> Any:
        """The network's configuration."""
        return self.model.config

    def apply(self, params: Params, *args: Any, **options: Any) -> Any:
        """``model.apply`` with this network's parameters, taken from ``params`` by name."""
        tree = params[self.name] if self.index is None else params[self.name][self.index]
        return self.model.apply({"params": tree}, *args, **options)


class Part:
    """Base of all parts. A subclass is a frozen dataclass whose fields are networks, other parts and settings.

    ``reads`` names the rows that the part cannot do without (``"a|b"``: one of the two), ``adds`` those that
    :meth:`prepare` adds; a method is checked against its rows before anything compiles.
    """

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    @property
    def adds(self) -> tuple[str, ...]:
        return ()

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        """The rows with what this part computes once, before the loop; by default, its inner parts do so in turn.

        Args:
          params: component name -> tree of parameters.
          rows: what there is so far; not to be changed, return another dict.
          keys: ``[B]`` typed keys, one per image; draw from them with :func:`draw`.
        """
        for part in inner_parts(self):
            rows = part.prepare(params, rows, keys)
        return rows


@dataclasses.dataclass(frozen=True)
class PlainStep(Part):
    """Advance by one evaluation: call the network, let the sampler make its step."""

    def __call__(self, denoiser: Any, params: Params, rows: Rows, state: State, step: Step, keys: jax.Array) -> State:
        """The next state.

        Args:
          denoiser: ``(params, rows, x, step) -> output``.
          params, rows: as in :meth:`Part.prepare`.
          state: the sample and what the sampler remembers.
          step: where the run is.
          keys: ``[B]``, the same in every step; the plan folds the index in.
        """
        output = denoiser(params, rows, step.plan.model_input(state, step.i), step)
        return step.plan.step(state, step.i, output.astype(jnp.float32), keys)


PLAIN_STEP = PlainStep()


@dataclasses.dataclass(frozen=True)
class Method:
    """What a run is composed of; exchange parts with ``dataclasses.replace``.

    Attributes:
      denoiser: ``(params, rows, x, step) -> output``: a network, or a wrapper around a denoiser (guidance, control).
      start: ``(plan, rows) -> State``: from noise, from an image ...
      decode: ``(params, rows, sample) -> {name: array}``: what the caller gets, one row per image.
      latent_shape: of one sample, of any rank.
      conditions: parts that only prepare rows, in order: text encoders, image encoders, masks.
      advance: ``(denoiser, params, rows, state, step, keys) -> State``: one evaluation.
    """

    denoiser: Any
    start: Any
    decode: Any
    latent_shape: tuple[int, ...]
    conditions: tuple[Any, ...] = ()
    advance: Any = PLAIN_STEP

    def __post_init__(self) -> None:
        object.__setattr__(self, "latent_shape", tuple(map(int, self.latent_shape)))  # a list would be unhashable
        object.__setattr__(self, "conditions", tuple(self.conditions))

    @property
    def parts(self) -> tuple[Part, ...]:
        """In the order in which they prepare."""
        return (*self.conditions, self.start, self.denoiser, self.advance, self.decode)

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the components whose parameters the method reads; only these go to the device."""
        return tuple(dict.fromkeys(net.name for part in self.parts for net in networks_of(part)))

    def prepare(self, params: Params, rows: Rows) -> Rows:
        """The rows with ``noise`` (unless given), ``keys`` for the steps, and what each part adds."""
        keys = image_keys(rows)
        k_init, k_loop = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        rows = rows | {"keys": k_loop}
        if rows.get("noise") is None:
            rows["noise"] = normal(k_init, self.latent_shape)
        for part in self.parts:
            rows = part.prepare(params, rows, keys)
        return rows


def inner_parts(part: Any) -> Iterator[Part]:
    """The parts among the fields of a part, in order."""
    yield from (value for value in _field_values(part) if isinstance(value, Part))


def networks_of(part: Any) -> Iterator[Net]:
    """Every network of a part and of the parts inside it."""
    for value in _field_values(part):
        if isinstance(value, Net):
            yield value
        elif isinstance(value, Part):
            yield from networks_of(value)


def all_parts(part: Part) -> Iterator[Part]:
    """All parts inside a part, then itself."""
    for inner in inner_parts(part):
        yield from all_parts(inner)
    yield part


def _field_values(part: Any) -> Iterator[Any]:
    for field in dataclasses.fields(part):
        yield from _flat(getattr(part, field.name))


def _flat(value: Any) -> Iterator[Any]:
    """What is in a tuple and in the tuples inside it; of anything else, itself."""
    if isinstance(value, tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


ALWAYS = ("noise", "keys")
"""Rows that :meth:`Method.prepare` adds itself."""


def check_rows(method: Method, rows: Rows) -> None:
    """Refuse a method whose parts read rows that neither the request has nor a part adds.

    Raises:
      ValueError: it names the part, the row and what there is.
      TypeError: it is no method, or something in it is not a part.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a Method (change one with dataclasses.replace), got {type(method).__name__}")
    for part in method.parts:
        if not (isinstance(part, Part) and dataclasses.is_dataclass(part)):
            raise TypeError(f"{part!r} is no part: a part is a frozen dataclass that inherits from Part")
        _check_comparable(part)
    _check_lengths(rows)
    known = {*rows, *ALWAYS}
    for part in (inner for outer in method.parts for inner in all_parts(outer)):
        if missing := [name for name in part.reads if not known & {*name.split("|")}]:
            wanted = ", ".join(" or ".join(map(repr, name.split("|"))) for name in missing)
            raise ValueError(f"{type(part).__name__} needs {wanted}; the request has {', '.join(sorted(known))}")
        known |= {*part.adds}


def _check_lengths(rows: Rows) -> None:
    """Refuse rows with different numbers of images."""
    leaves = jax.tree_util.tree_leaves_with_path(rows)
    lengths = {jax.tree_util.keystr(path): jnp.shape(leaf)[:1] for path, leaf in leaves}
    if len(set(lengths.values())) > 1 or () in lengths.values():
        shown = ", ".join(f"{name} {length[0] if length else 'none'}" for name, length in lengths.items())
        raise ValueError(f"every row must have one entry for each image; the rows have {shown}")


def _check_comparable(part: Part) -> None:
    try:
        hash(identity(part))
    except TypeError as error:
        raise TypeError(
            f"{type(part).__name__} cannot be compared with other parts ({error}): declare it with "
            "@dataclass(frozen=True), keep settings in fields, and arrays in rows"
        ) from None


# Randomness: every image has a key of its own


def image_keys(rows: Rows) -> jax.Array:
    """The key of each image, ``[B]``: ``rows["key"]``, or from ``seed`` and ``index``, both uint32 ``[B]``."""
    if "key" in rows:
        return rows["key"]
    return jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(rows["seed"], rows["index"])


def draw(keys: jax.Array, purpose: str, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise ``[B, *shape]`` for a part; another ``purpose`` gives independent noise.

    Args:
      keys: ``[B]``, as :meth:`Part.prepare` gets them.
      purpose: any text, for example ``"posterior"``.
      shape: of one image's noise.
    """
    return normal(keys_for(keys, purpose), shape)


def keys_for(keys: jax.Array, purpose: str) -> jax.Array:
    """``[B]`` keys derived from ``keys`` for one purpose."""
    number = zlib.crc32(purpose.encode()) | 1 << 31  # far from the small numbers that splitting a key uses
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 ``[B, *shape]``, each image from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


# The run


def sample(method: Method, params: Params, rows: Rows, plan: Plan, *, evaluations: int | None = None) -> dict[str, Any]:
    """The whole run as a pure function of arrays: what a pipeline compiles, and what you may ``jit``, ``vmap``,
    differentiate or shard.

    Args:
      method: the parts; static (hashable).
      params: component name -> tree of parameters.
      rows: the request, one row per image; see :meth:`DiffusionPipeline.request
        <diffuse_jax.pipelines.DiffusionPipeline.request>`.
      plan: of the sampler.
      evaluations: the number of network evaluations, if it is to be part of the program: the run can then be
        differentiated (by rows, parameters and noise), and each evaluation is computed again in the backward pass
        instead of being kept. It must be the plan's. None leaves the number to the plan, as data.

    Returns:
      What ``method.decode`` gives, for example ``{"images": [B,H,W,3]}``.

    Raises:
      ValueError: the rows do not fit the method, or ``evaluations`` is not the plan's number.
    """
    check_rows(method, rows)
    if evaluations is not None:
        check_evaluations(plan, evaluations)

    def run(params: Params, rows: Rows, plan: Plan) -> dict[str, Any]:
        rows, state = begin(method, params, rows, plan)
        if evaluations is None:
            loop = lambda i, state: advance(method, params, rows, plan, state, i)
            state = jax.lax.fori_loop(0, plan.num_evaluations, loop, state)
        else:
            one = jax.checkpoint(lambda state, i: advance(method, params, rows, plan, state, i))
            state, _ = jax.lax.scan(lambda s, i: (one(s, i), None), state, jnp.arange(evaluations, dtype=jnp.int32))
        return finish(method, params, rows, state)

    return on_automatic_axes(run, (params, rows, plan), batch=rows)  # parts need not say how they are sharded


def check_evaluations(plan: Plan, evaluations: int) -> None:
    """Refuse a number that is not the plan's; where the plan is traced its number is not known, and not checked."""
    if not isinstance(plan.num_evaluations, jax.core.Tracer) and int(plan.num_evaluations) != evaluations:
        raise ValueError(f"the plan has {int(plan.num_evaluations)} evaluations, got evaluations={evaluations}")


def begin(method: Method, params: Params, rows: Rows, plan: Plan) -> tuple[Rows, State]:
    """The first part of a run: the prepared rows and the first state."""
    rows = method.prepare(params, rows)
    state = method.start(plan, rows)
    if not isinstance(state, State):
        raise TypeError(
            f"{type(method.start).__name__} must return a State, as plan.init(noise) does, got {type(state).__name__}"
        )
    return rows, state


def advance(method: Method, params: Params, rows: Rows, plan: Plan, state: State, i: Any) -> State:
    """One evaluation; ``rows`` are prepared."""
    step = Step(i, plan.timestep(i), plan)
    return method.advance(method.denoiser, params, rows, state, step, rows["keys"])


def finish(method: Method, params: Params, rows: Rows, state: State) -> dict[str, Any]:
    """The last part: what the caller gets.

    Raises:
      TypeError: the decoder returns no dict.
      ValueError: a result does not have one row per image.
    """
    results, images = method.decode(params, rows, state.sample), len(rows["keys"])
    name = type(method.decode).__name__
    if not isinstance(results, dict):
        raise TypeError(f"{name} must return a dict from name to result, got {type(results).__name__}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(results):
        if jnp.shape(leaf)[:1] != (images,):
            shape = f"{jax.tree_util.keystr(path)} of shape {jnp.shape(leaf)}"
            raise ValueError(f"{name} must return one row per image; for {images} images it returned {shape}")
    return results


Replace = Callable[[Method], Method]
"""What a call takes as ``method=``: the pipeline's method -> the one to run."""
