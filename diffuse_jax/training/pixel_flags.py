"""Flags of the objectives of unconditional training, each of which has its own."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping

from diffuse_jax.bounds import COUNT
from diffuse_jax.training.arguments import add_objective
from diffuse_jax.training.flags import Parser
from diffuse_jax.training.settings import EdmSettings, FlowSettings, ObjectiveSettings
from diffuse_jax.training.settings.methods import WEIGHTING_SCHEMES

FOR_ALL = ("noise_offset", "input_perturbation")
"""Settings of the loss that every objective has."""

OWN: Mapping[str, tuple[str, ...]] = {
    "ddpm": (
        "prediction_type",
        "ddpm_num_steps",
        "ddpm_beta_schedule",
        *(field.name for field in dataclasses.fields(ObjectiveSettings) if field.name not in FOR_ALL),
    ),
    "edm": tuple(field.name for field in dataclasses.fields(EdmSettings)),
    "flow_matching": tuple(field.name for field in dataclasses.fields(FlowSettings)),
}
"""Value of ``--objective`` -> the flags that only it has."""

SCHEMES: Mapping[str, tuple[str, ...]] = {"logit_normal": ("logit_mean", "logit_std"), "mode": ("mode_scale",)}
"""Weighting scheme of flow matching -> the flags that only it has."""


def add_objectives(parser: Parser) -> None:
    """Add ``--objective`` and the flags of every one."""
    add = parser.group("loss")
    what = "what the network learns: the noise of DDPM, the preconditioned one of EDM, or the velocity of flow matching"
    add("--objective", choices=tuple(OWN), default="ddpm", help=what)
    what = "ddpm: what the network predicts; if omitted, that of the pretrained pipeline, or epsilon"
    add("--prediction_type", choices=("epsilon", "v_prediction", "sample"), help=what)
    what = "ddpm: number of training timesteps; if omitted, that of the pretrained pipeline, or 1000"
    add("--ddpm_num_steps", type=COUNT, help=what)
    what = "ddpm: noise schedule; if omitted, that of the pretrained pipeline, or linear"
    add("--ddpm_beta_schedule", help=what)
    add_objective(parser)
    add = parser.group("loss", EdmSettings, FlowSettings)
    add("--p_mean", help="edm: mean of the logarithm of the noise level")
    add("--p_std", help="edm: standard deviation of the logarithm of the noise level")
    what = "edm: standard deviation of the pixels, in [-1, 1]; if omitted, that of the pretrained pipeline, or 0.5"
    add("--sigma_data", help=what)
    what = "flow_matching: distribution of the times (none: uniform), or with the last two weights"
    add("--weighting_scheme", choices=WEIGHTING_SCHEMES, help=what)
    add("--logit_mean", help="logit_normal: mean of the normal numbers; positive ones favour little noise")
    add("--logit_std", help="logit_normal: standard deviation of the normal numbers")
    add("--mode_scale", help="mode: how much the middle is favoured; negative numbers favour both ends")
    what = "flow_matching: shift of the levels towards noise; if omitted, that of the pretrained pipeline, or 1"
    add("--flow_shift", help=what)


def check_objective(parser: Parser, args: argparse.Namespace) -> None:
    """Exit with a message if flags are given that the objective, or the weighting scheme, does not have."""
    given = lambda names: (name for name in names if getattr(args, name) != parser.get_default(name))
    for kind, names in OWN.items():
        for name in given(names if kind != args.objective else ()):
            parser.error(f"--{name} is a flag of --objective {kind}; leave it out with {args.objective}")
    for scheme, names in SCHEMES.items():
        for name in given(names if scheme != args.weighting_scheme else ()):
            chosen = args.weighting_scheme
            parser.error(f"--{name} is a flag of --weighting_scheme {scheme}; leave it out with {chosen}")
