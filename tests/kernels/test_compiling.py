"""The options that programs are compiled with."""

from __future__ import annotations

import jax
import pytest

from diffuse_jax.kernels import compiler_options, compiling, target_platform


def test_options_belong_to_a_platform():
    assert compiler_options() is None  # on a CPU
    with target_platform("tpu"):
        assert compiler_options() == {
            "xla_tpu_run_space_to_batch": False,
            "xla_tpu_run_space_to_batch_on_new_platforms": False,
        }
        assert compiler_options(attached=True) is None


def test_a_returned_dictionary_can_be_extended_without_harm():
    with target_platform("tpu"):
        compiler_options()["xla_tpu_scoped_vmem_limit_kib"] = 1
        assert len(compiler_options()) == 2


def test_an_option_that_the_attached_compiler_does_not_know_is_left_out(monkeypatch):
    known = {"xla_cpu_enable_fast_math": False}
    monkeypatch.setitem(compiling.OPTIONS, "cpu", {"xla_no_such_option": True, **known})
    compiling._known.cache_clear()
    with pytest.warns(UserWarning, match="no option xla_no_such_option"):
        assert compiler_options() == known
    assert jax.jit(lambda x: x + 1, compiler_options=compiler_options())(1) == 2
