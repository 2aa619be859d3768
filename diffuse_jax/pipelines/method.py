"""A method: the parts that make up a sampling run, and the pure function that executes it.

A *part* is a frozen dataclass that holds networks and settings, but no arrays. The data of a request, and everything
that parts compute before the loop, are *rows*: a dict of arrays with one row per image. Rows and the sampler's plan are
arguments of the compiled program, so changing the prompt, image, strength, scale, sampler or number of steps does not
recompile.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffuse_jax.models.base import Params as Params
from diffuse_jax.pipelines.identity import identity
from diffuse_jax.schedulers.plan import Plan, State
from diffuse_jax.sharding import on_automatic_axes

Rows = dict[str, Any]
"""Name -> array ``[B, ...]`` or a tree of such arrays, with one row per image."""


class Kept:
    """What parts keep from one evaluation to the next: name -> array (or a tree of them).

    It exists while one evaluation is traced; :func:`advance` carries the values over.
    """

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self.values = dict(values or {})

    def read(self, name: str, like: Any) -> Any:
        """The value of the previous evaluation; before the first one, zeros of the shapes and dtypes of ``like``."""
        return self.values.get(name, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like))

    def write(self, name: str, value: Any) -> None:
        """Keep a value for the next evaluation; its shape must not change."""
        self.values[name] = value

    def take(self, name: str) -> Any:
        """A value that another part wrote in this evaluation, removed: it is not kept."""
        return self.values.pop(name)


class Step(NamedTuple):
    """The position in a run.

    Attributes:
      i: the index of the evaluation.
      t: the timestep that the network gets.
      plan: the sampler's whole plan.
      kept: values that parts keep between evaluations; a part that writes them says so in :attr:`Part.keeps`.
    """

    i: Any
    t: jax.Array
    plan: Plan
    kept: Kept


@dataclasses.dataclass(frozen=True)
class Net:
    """A network, and the component name under which the pipeline stores its parameters.

    Attributes:
      name: the component's name, for example ``"unet"`` or ``"prior_text_encoder"``.
      model: the network.
      index: its position, if the component is a list of networks (several ControlNets).
    """

    name: str
    model: Any
    index: int | None = None

    @property
    def config(self) -> Any:
        """The network's configuration."""
        return self.model.config

    @property
    def reads(self) -> tuple[str, ...]:
        """The names among the parameters that it needs."""
        return (self.name,)

    def apply(self, params: Params, *args: Any, **options: Any) -> Any:
        """``model.apply`` with this network's parameters, taken from ``params`` by name."""
        tree = params[self.name] if self.index is None else params[self.name][self.index]
        return self.model.apply({"params": tree}, *args, **options)


class Part:
    """Base class of all parts. A subclass is a frozen dataclass whose fields are networks, other parts and settings.

    ``reads`` names the rows that the part requires (``"a|b"`` means either of the two), ``adds`` those that
    :meth:`prepare` adds. A method is checked against the rows before anything is compiled. ``keeps`` says whether the
    part keeps values in ``step.kept``.
    """

    @property
    def keeps(self) -> bool:
        return False

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    @property
    def adds(self) -> tuple[str, ...]:
        return ()

    def prepare(self, params: Params, rows: Rows, keys: jax.Array) -> Rows:
        """Return the rows with what this part computes once, before the loop. By default, each inner part prepares in
        turn.

        Args:
          params: component name -> tree of parameters.
          rows: the rows so far. Do not modify them; return a new dict.
          keys: ``[B]`` typed keys, one per image; sample noise from them with :func:`draw`.
        """
        for part in inner_parts(self):
            rows = part.prepare(params, rows, keys)
        return rows


@dataclasses.dataclass(frozen=True)
class PlainStep(Part):
    """Advance by one evaluation: call the network, then take the sampler's step.

    If the request has a row ``step_noise [B,N, ...]``, with ``N`` at least the number of evaluations, the sampler's
    noise is taken from it.
    """

    def __call__(self, denoiser: Any, params: Params, rows: Rows, state: State, step: Step, keys: jax.Array) -> State:
        """The next state.

        Args:
          denoiser: ``(params, rows, x, step) -> output``.
          params, rows: as in :meth:`Part.prepare`.
          state: the sample and the sampler's memory of earlier outputs.
          step: the position in the run.
          keys: ``[B]``, the same at every step; the plan folds in the step index.
        """
        output = denoiser(params, rows, step.plan.model_input(state, step.i), step)
        noise = rows.get(noise_row("step"))
        given = None if noise is None else jax.lax.dynamic_index_in_dim(noise, step.i, 1, keepdims=False)
        return step.plan.step(state, step.i, output.astype(jnp.float32), keys, noise=given)


PLAIN_STEP = PlainStep()


@dataclasses.dataclass(frozen=True)
class Method:
    """The parts that make up a run; swap them with ``dataclasses.replace``.

    Attributes:
      denoiser: ``(params, rows, x, step) -> output``: a network, or a wrapper around a denoiser (guidance, control).
      start: ``(plan, rows) -> State``: the initial state, from noise or from an image.
      decode: ``(params, rows, sample) -> {name: array}``: the results, one row per image.
      latent_shape: shape of one sample, of any rank.
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
        """All parts, in the order in which they prepare rows."""
        return (*self.conditions, self.start, self.denoiser, self.advance, self.decode)

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the components whose parameters the method reads; only these are put on the device."""
        return tuple(dict.fromkeys(name for part in self.parts for net in networks_of(part) for name in net.reads))

    def prepare(self, params: Params, rows: Rows) -> Rows:
        """Return the rows with ``noise`` (unless given), ``keys`` for the steps, and what each part adds."""
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
    """All networks of a part and of the parts inside it."""
    for value in _field_values(part):
        if isinstance(value, Net):
            yield value
        elif isinstance(value, Part):
            yield from networks_of(value)


def all_parts(part: Part) -> Iterator[Part]:
    """All parts nested inside a part, then the part itself."""
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


PREPARED = ("noise", "keys")
"""Rows that :meth:`Method.prepare` adds for every method."""


def check_rows(method: Method, rows: Rows) -> None:
    """Check that every row that a part of the method reads is in the request or added by an earlier part.

    Raises:
      ValueError: a row is missing (the message names the part, the row and the available rows), or rows differ in their
        number of images.
      TypeError: it is not a method, or something in it is not a part or cannot be compared with other parts.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a Method (change one with dataclasses.replace), got {type(method).__name__}")
    for part in method.parts:
        if not (isinstance(part, Part) and dataclasses.is_dataclass(part)):
            raise TypeError(f"{part!r} is not a part; a part is a frozen dataclass that inherits from Part")
        _check_comparable(part)
    _check_lengths(rows)
    known = {*rows, *PREPARED}
    for part in (inner for outer in method.parts for inner in all_parts(outer)):
        if missing := [name for name in part.reads if not known & {*name.split("|")}]:
            wanted = ", ".join(" or ".join(map(repr, name.split("|"))) for name in missing)
            raise ValueError(f"{type(part).__name__} needs {wanted}; the request has {', '.join(sorted(known))}")
        known |= {*part.adds}


def _check_lengths(rows: Rows) -> None:
    """Check that all rows have the same number of images."""
    leaves = jax.tree_util.tree_leaves_with_path(rows)
    lengths = {jax.tree_util.keystr(path): jnp.shape(leaf)[:1] for path, leaf in leaves}
    if len(set(lengths.values())) > 1 or () in lengths.values():
        shown = ", ".join(f"{name} {length[0] if length else 'none'}" for name, length in lengths.items())
        raise ValueError(f"every row must have one entry per image; the rows have {shown}")


def _check_comparable(part: Part) -> None:
    try:
        hash(identity(part))
    except TypeError as error:
        raise TypeError(
            f"{type(part).__name__} cannot be compared with other parts ({error}): declare it with "
            "@dataclass(frozen=True), and put settings in fields and arrays in rows"
        ) from None


# Randomness: each image has its own key


def image_keys(rows: Rows) -> jax.Array:
    """The key of each image, ``[B]``: ``rows["key"]`` if given, else from ``seed`` and ``index``, both uint32
    ``[B]``."""
    if "key" in rows:
        return rows["key"]
    return jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(rows["seed"], rows["index"])


def draw(keys: jax.Array, purpose: str, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise ``[B, *shape]`` for a part; different purposes give independent noise.

    Args:
      keys: ``[B]``, as passed to :meth:`Part.prepare`.
      purpose: any string, for example ``"posterior"``.
      shape: shape of the noise for one image.
    """
    return normal(keys_for(keys, purpose), shape)


def noise_row(purpose: str) -> str:
    """The name of the row with noise for a purpose, where a request brings it: ``masked_image_noise``."""
    return f"{purpose.replace(' ', '_')}_noise"


def keys_for(keys: jax.Array, purpose: str) -> jax.Array:
    """Keys ``[B]`` derived from ``keys`` for one purpose."""
    number = zlib.crc32(purpose.encode()) | 1 << 31  # far from the small integers that splitting a key uses
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise ``[B, *shape]`` in float32, each image from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


# The run


def sample(
    method: Method,
    params: Params,
    rows: Rows,
    plan: Plan,
    *,
    evaluations: int | None = None,
    gradient_evaluations: int | None = None,
) -> dict[str, Any]:
    """The whole sampling run as a pure function of arrays: the function that a pipeline compiles, and that you can
    ``jit``, ``vmap``, differentiate or shard.

    Args:
      method: the parts; static (hashable).
      params: component name -> tree of parameters.
      rows: the request, one row per image; see :meth:`DiffusionPipeline.request
        <diffuse_jax.pipelines.DiffusionPipeline.request>`.
      plan: the sampler's plan.
      evaluations: the number of network evaluations as a static value, equal to the plan's. The run can then be
        differentiated with respect to rows, parameters and noise; each evaluation is recomputed in the backward pass
        instead of being stored. If None, the number is taken from the plan at run time.
      gradient_evaluations: with ``evaluations``, differentiate through this many of the last ones and through decoding
        only; the sample before them counts as a constant (DRaFT-K, Clark et al. 2023, arXiv 2309.17400). All if None.

    Returns:
      What ``method.decode`` returns, for example ``{"images": [B,H,W,3]}``.

    Raises:
      ValueError: the rows do not fit the method, ``evaluations`` differs from the plan's number, or
        ``gradient_evaluations`` is not from 0 to ``evaluations``.
    """
    check_rows(method, rows)
    if evaluations is not None:
        check_evaluations(plan, evaluations)
    if gradient_evaluations is not None and not 0 <= gradient_evaluations <= (evaluations or 0):
        wanted = f"from 0 to evaluations={evaluations}"
        raise ValueError(f"gradient_evaluations must be {wanted}, got {gradient_evaluations}")

    def run(params: Params, rows: Rows, plan: Plan) -> dict[str, Any]:
        rows, state = begin(method, params, rows, plan)
        if evaluations is None:
            loop = lambda i, state: advance(method, params, rows, plan, state, i)
            state = jax.lax.fori_loop(0, plan.num_evaluations, loop, state)
        else:
            first = 0 if gradient_evaluations is None else evaluations - gradient_evaluations
            if first:  # no gradient
                held = jax.lax.stop_gradient((params, rows, state))
                loop = lambda i, state: advance(method, held[0], held[1], plan, state, i)
                state = jax.lax.stop_gradient(jax.lax.fori_loop(0, first, loop, held[2]))
            one = jax.checkpoint(lambda state, i: advance(method, params, rows, plan, state, i))
            indices = jnp.arange(first, evaluations, dtype=jnp.int32)
            state, _ = jax.lax.scan(lambda s, i: (one(s, i), None), state, indices)
        return finish(method, params, rows, state)

    return on_automatic_axes(run, (params, rows, plan), batch=rows)  # parts need not say how they are sharded


def check_evaluations(plan: Plan, evaluations: int) -> None:
    """Check that the number of evaluations is the plan's; a traced plan does not know its number and is not checked.

    Raises:
      ValueError: the numbers differ.
    """
    if not isinstance(plan.num_evaluations, jax.core.Tracer) and int(plan.num_evaluations) != evaluations:
        raise ValueError(f"the plan has {int(plan.num_evaluations)} evaluations, got evaluations={evaluations}")


def begin(method: Method, params: Params, rows: Rows, plan: Plan) -> tuple[Rows, State]:
    """The beginning of a run: the prepared rows and the initial state."""
    rows = method.prepare(params, rows)
    state = method.start(plan, rows)
    if not isinstance(state, State):
        raise TypeError(
            f"{type(method.start).__name__} must return a State, as plan.init(noise) does, got {type(state).__name__}"
        )
    if any(part.keeps for outer in method.parts for part in all_parts(outer)):
        kept = jax.eval_shape(lambda s: advance(method, params, rows, plan, s, jnp.int32(0)).kept, state)
        state = state._replace(kept=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kept))
    return rows, state


def advance(method: Method, params: Params, rows: Rows, plan: Plan, state: State, i: Any) -> State:
    """One evaluation, from prepared rows."""
    kept = Kept(state.kept)
    step = Step(i, plan.timestep(i), plan, kept)
    state = method.advance(method.denoiser, params, rows, state, step, rows["keys"])
    return state._replace(kept=kept.values) if kept.values else state


def finish(method: Method, params: Params, rows: Rows, state: State) -> dict[str, Any]:
    """The end of a run: the decoded results.

    Raises:
      TypeError: the decoder does not return a dict.
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
"""The type of the ``method=`` argument of a call: a function from the pipeline's method to the one to run."""
