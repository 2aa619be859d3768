r"""RePaint: Lugmayr et al. 2022, 'RePaint: Inpainting using Denoising Diffusion Probabilistic Models' (2201.09865).

Algorithm 1 alternates three things: a step down (line 7, here that of DDIM, Song et al. 2020, eq. 12 and 16), putting
the known part of the image in at the new noise level (lines 5 and 8), and, where a jump is due, noising all of it up
again (line 10) so that the two parts come to agree.

A step down to level :math:`(\alpha', \sigma')` gives :math:`x' = \mu + s z_1`. Noising it up to :math:`(\alpha'',
\sigma'')` gives :math:`x'' = a x' + b z_2` with :math:`a = \alpha'' / \alpha'` and :math:`b^2 = \sigma''^2 - a^2
\sigma'^2`. The noises are independent, so both together are :math:`x'' = a \mu + \sqrt{a^2 s^2 + b^2} z`: one row with
one draw, and a jump costs no evaluation. The known part :math:`\alpha' x_0 + \sigma' z_3`, noised up, is
:math:`\alpha'' x_0 + \sigma'' z`, that is ``plan.noised(x0, noise, i + 1)``, the level after the jump; so it may
as well be put in then, which is what ``plan.blend`` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from diffuse_jax.schedulers import noise_schedule as ns
from diffuse_jax.schedulers.ddim import ddim_step
from diffuse_jax.schedulers.noise_schedule import Array
from diffuse_jax.schedulers.request import MAX_STEPS
from diffuse_jax.schedulers.scheduler import Scheduler
from diffuse_jax.schedulers.table import Grid, Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class RePaintScheduler(Scheduler):
    """DDIM steps (ancestral with ``eta=1``) that jump back to more noise and are repeated; see the module.

    After every evaluation the known part of the image is put in::

        state = plan.step(state, i, output, key)
        state = plan.blend(state, i, image, noise, known)

    with fresh ``noise`` and ``known`` 1 where the image is given, 0 where it is to be painted.

    Options of :meth:`plan`: ``jump_length``, how many steps a jump goes back, and ``jump_n_sample``, how often each
    stretch of that length is run (figures 9 and 10 of the paper); 10 and 10 if not given. A jump adds the noise of
    training steps that begin at the timestep of the evaluation before it, as in diffusers, which is a little more than
    takes the sample to the level of the next evaluation; with ``as_published=True`` it is exactly that.
    """

    eta: float = 0.0
    clip_sample: bool = True

    clip_sample_range: ClassVar[float] = 1.0
    absent: ClassVar[tuple[str, ...]] = ("prediction_type", "timestep_spacing", "steps_offset")
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"beta_schedule": (*ns.BETA_SCHEDULES, "sigmoid")}
    grid_options: ClassVar[tuple[str, ...]] = ("jump_length", "jump_n_sample")
    step_options: ClassVar[tuple[str, ...]] = ("as_published",)

    def grid(
        self,
        n: int,
        *,
        timesteps: Array | None,
        sigmas: Array | None,
        jump_length: int = 10,
        jump_n_sample: int = 10,
    ) -> Grid:
        if timesteps is not None or sigmas is not None:
            raise ValueError("RePaintScheduler jumps over evenly spaced timesteps; give num_inference_steps")
        for name, value in {"jump_length": jump_length, "jump_n_sample": jump_n_sample}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        starts = range(0, n - jump_length, jump_length)
        if (most := n + len(starts) * (jump_n_sample - 1) * jump_length) > MAX_STEPS:
            raise ValueError(
                f"jump_n_sample={jump_n_sample} and jump_length={jump_length} make {most} evaluations of {n} steps, "
                f"more than {MAX_STEPS}; use a smaller jump_n_sample"
            )
        stride = self.num_train_timesteps // n
        index = stride * np.array(_walk(n, jump_length, jump_n_sample))
        levels = self.train_levels()
        target = np.where((index >= stride)[:, None], levels[index - stride], (1.0, 0.0))
        return Grid(index.astype(np.float64), levels[index], target, stride=stride)

    def evaluations(self, grid: Grid, begin: int, as_published: bool = False) -> Iterator[Row]:
        """``grid.target`` is where a step goes, ``grid.source`` of the next evaluation where a jump takes it then."""
        n, stride = len(grid.timesteps), grid.stride or 1
        for i in range(begin, n):
            e = self.evaluation(grid.timesteps[i], grid.source[i])
            mean, std = ddim_step(e, grid.target[i], self.eta)
            (alpha, sigma), up = grid.target[i], grid.source[i + 1] if i + 1 < n else grid.target[i]
            start, following = int(grid.timesteps[i]), int(grid.timesteps[min(i + 1, n - 1)])
            if following > start - stride and i + 1 < n and not as_published:  # a jump
                a2 = self.alpha_bar[following + stride - 1] / (self.alpha_bar[start - 1] if start > 0 else 1.0)
                up = np.sqrt([a2 * alpha**2, 1 - a2 * alpha**2])
            a = up[0] / alpha
            b2 = max(0.0, up[1] ** 2 - (a * sigma) ** 2)
            yield e.row(a * mean + np.sqrt((a * std) ** 2 + b2) * e.noise, known=up)


def _walk(n: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """The steps to evaluate, of ``n - 1`` to 0: down, with jumps from every ``jump_length``-th one.

    A jump comes after the evaluation at its step and goes ``jump_length`` up from where that has led.
    """
    left = dict.fromkeys(range(0, n - jump_length, jump_length), jump_n_sample - 1)
    walk, step = [], n
    while step > 0:
        step -= 1
        walk.append(step)
        if left.get(step, 0) > 0:
            left[step] -= 1
            step += jump_length
    return walk
