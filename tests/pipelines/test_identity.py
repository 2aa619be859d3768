"""One compiled program serves two calls only if they compute the same, which is stricter than Python's ``==``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffuse_jax.kernels import current_platform, target_platform
from diffuse_jax.models import AutoencoderKL, AutoencoderKLConfig
from diffuse_jax.models.intercept import changed_layers
from diffuse_jax.pipelines import saved_programs
from diffuse_jax.pipelines.identity import identity
from diffuse_jax.pipelines.programs import Programs
from diffuse_jax.pipelines.saved_programs import stable_repr
from diffuse_jax.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Scale:
    factor: Any

    @property
    def half(self) -> Any:
        return self.factor / 2


def times(method: Scale, x: jax.Array) -> jax.Array:
    return x * jnp.asarray(method.factor)


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, True), (1, 1.0), (0, False), (0.0, -0.0), (1.0, np.float32(1)), ((1, 2), (True, 2)), (2, 2 + 0j)],
    ids=repr,
)
def test_values_that_python_calls_equal_are_two_programs(one: Any, other: Any) -> None:
    assert Scale(one) == Scale(other)
    assert identity(Scale(one)) != identity(Scale(other))
    programs = Programs()
    for value in (one, other, one, other):
        programs.get(times, Scale(value), None, (), (np.float32(1),))
    assert programs.compilations == 2


def test_a_nan_is_one_program() -> None:
    programs = Programs()
    for _ in range(2):
        programs.get(times, Scale(float("nan")), None, (), (np.float32(1),))
    assert programs.compilations == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "bfloat16", jnp.dtype("bfloat16")])
def test_a_dtype_is_the_same_by_any_name(dtype: Any) -> None:
    """Otherwise a network made in Python and the same one from a folder would not share programs."""
    network = AutoencoderKL(AutoencoderKLConfig(), dtype=dtype)
    opened = AutoencoderKL.from_config(AutoencoderKLConfig().to_json(), dtype="bfloat16")
    assert identity(network) == identity(opened)
    assert stable_repr(network) == stable_repr(opened)


def test_the_sign_of_zero_is_compiled_in() -> None:
    programs, x = Programs(), np.float32(1)
    results = [programs.get(times, Scale(factor), None, (), (x,))(x) for factor in (0.0, -0.0)]
    np.testing.assert_array_equal(np.signbit(results), [False, True])


def test_state_outside_of_the_fields_is_refused() -> None:
    scale = Scale(2)
    object.__setattr__(scale, "hidden", 3)
    with pytest.raises(TypeError, match="hidden is stored outside its fields"):
        identity(scale)


def test_settings_of_jax_are_part_of_a_program() -> None:
    programs, x = Programs(), np.ones((2, 2), np.float32)
    get = lambda: programs.get(times, Scale(2.0), None, (), (x,))
    plain = get()
    with jax.default_matmul_precision("highest"):
        assert get() is not plain
    with jax.default_device(jax.devices()[1]):
        assert get() is not plain
        assert get()(x).devices() == {jax.devices()[1]}
    assert get() is plain


def kernel_for(method: Scale, x: jax.Array) -> jax.Array:
    return x if current_platform() == "cpu" else -x


def test_the_platform_of_kernels_and_the_current_mesh_are_part_of_a_program() -> None:
    programs, x = Programs(), np.ones(2, np.float32)
    get = lambda: programs.get(kernel_for, Scale(2.0), None, (), (x,))
    plain = get()
    with target_platform("tpu"):
        np.testing.assert_array_equal(get()(x), -x)
    with jax.set_mesh(make_mesh(data=8)):
        assert get() is not plain
    assert get() is plain


@pytest.mark.parametrize("device", [0, 3])
def test_a_saved_program_is_found_on_the_device_that_it_was_compiled_for(device: int, tmp_path: Path) -> None:
    x = jax.device_put(jnp.ones(2), jax.devices()[device])
    saver, programs = Programs(), Programs()
    saver.get(times, Scale(2.0), None, (), (x,))
    assert len(saver.save(tmp_path)) == 1
    programs.load(tmp_path)
    assert programs.get(times, Scale(2.0), None, (), (x,))(x).devices() == x.devices()
    other = jax.device_put(x, jax.devices()[5])
    assert programs.get(times, Scale(2.0), None, (), (other,))(other).devices() == other.devices()
    assert programs.compilations == 1, "for the other device"


TRACED: list[Any] = []


def noted(method: Scale, x: jax.Array) -> jax.Array:
    TRACED.append(method)
    return times(method, x)


@pytest.mark.parametrize(("cached", "compilations"), [(False, 1), (True, 2)])
def test_a_program_is_compiled_again_for_a_file_only_if_it_may_be_from_the_cache_of_jax(
    cached: bool, compilations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_programs, "compilation_cache_in_use", lambda: cached)
    saver, programs, x = Programs(), Programs(), np.float32(1)
    TRACED.clear()
    saver.get(noted, Scale(3.0), None, (), (x,))
    saver.save(tmp_path)
    assert len(TRACED) == compilations
    programs.load(tmp_path)
    assert programs.get(noted, Scale(3.0), None, (), (x,))(x) == 3
    assert programs.compilations == 0


def test_committed_arrays_choose_the_device() -> None:
    programs, x = Programs(), jnp.ones(2)
    get = lambda array: programs.get(times, Scale(2.0), None, (), (array,))
    first = get(x)
    assert get(np.ones(2, np.float32)) is first, "NumPy arrays and uncommitted ones go where the program is"
    moved = jax.device_put(x, jax.devices()[2])
    assert get(moved)(moved).devices() == {jax.devices()[2]}


def double(call: Any) -> Any:
    return 2 * call.output()


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(1, kernel_init=nn.initializers.ones)(x)


def apply(method: Network, x: jax.Array) -> jax.Array:
    return method.init_with_output(jax.random.key(0), x)[0]


@pytest.mark.parametrize("change", [double, lambda call: 3 * call.output()], ids=["function", "lambda"])
def test_changes_of_layers_are_part_of_a_program(change: Callable[[Any], Any]) -> None:
    programs, x = Programs(), np.ones((1, 1), np.float32)
    get = lambda: programs.get(apply, Network(), None, (), (x,))
    with changed_layers(change):
        changed = get()
    plain = get()
    assert plain(x) == 1
    assert changed(x) > 1
    with changed_layers(change):
        assert get() is changed
    assert programs.compilations == 2
