"""Train an unconditional denoising network on pixels: DDPM (Ho et al. 2020), EDM (Karras et al. 2022) or flow matching
(Liu et al. 2023).

The result, and every checkpoint-N, is a pipeline folder in diffusers' layout. Example:

    python train/unconditional.py --train_data_dir my-images --resolution 64 --center_crop --random_flip --use_ema
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any

from diffuse_jax.bounds import COUNT, NATURAL
from diffuse_jax.training.arguments import add_network, make_parser
from diffuse_jax.training.command import flags_first, train
from diffuse_jax.training.data.flags import add_data
from diffuse_jax.training.pixel_flags import add_objectives, check_objective


@functools.cache
def parse_args() -> argparse.Namespace:
    parser = make_parser(
        __doc__,
        output_dir="runs/unconditional",
        lr_scheduler="cosine",
        adam_beta1=0.95,
        adam_weight_decay=1e-6,
        ema_inv_gamma=1.0,
        ema_power=0.75,
        validation_epochs=10,
    )
    add_network(parser, "unet", "one of 114 million parameters")
    add_data(parser, captions=False, resolution=64)
    add_objectives(parser)
    add = parser.group("monitoring")
    add("--eval_batch_size", type=NATURAL, default=16, help="images to sample at each validation; 0 for none")
    what = "sampling steps of validation images; 1000 if omitted, 50 for other objectives than ddpm"
    add("--ddpm_num_inference_steps", "--validation_inference_steps", type=COUNT, help=what)
    args = parser.parse_args()
    check_objective(parser, args)
    if args.aspect_ratio_buckets:
        parser.error("--aspect_ratio_buckets: the pipeline generates squares of --resolution; leave it out")
    if args.validation_steps is not None:
        args.validation_epochs = None
    return args


with flags_first(parse_args):  # JAX and the library, once the flags are known to be right
    import jax
    from jax.sharding import Mesh

    from diffuse_jax.models import Params, UNet2DModel
    from diffuse_jax.models.presets import DDPM_256_UNET
    from diffuse_jax.models.unet_2d import UNet2DConfig
    from diffuse_jax.pipelines import DDPMPipeline
    from diffuse_jax.schedulers import Scheduler
    from diffuse_jax.training.data import batches_from, check_first, data_from, source_from, warn_of_size
    from diffuse_jax.training.devices import mesh_from
    from diffuse_jax.training.families import normalised
    from diffuse_jax.training.flags import settings_from
    from diffuse_jax.training.loop import fit
    from diffuse_jax.training.networks import configured_network, open_network
    from diffuse_jax.training.objective import Objective, draw, errors, noised
    from diffuse_jax.training.pixel_objectives import (
        KINDS,
        check_resumed,
        kind_of,
        pixel_objective,
        scheduler_of,
    )
    from diffuse_jax.training.pixels import pixel_values
    from diffuse_jax.training.settings import (
        DeviceSettings,
        EdmSettings,
        FlowSettings,
        NetworkSettings,
        ObjectiveSettings,
        RunSettings,
    )
    from diffuse_jax.training.start import check_output, check_run, starting_point
    from diffuse_jax.training.state import Metrics
    from diffuse_jax.training.upload import push_to_hub


LEVELS = ("block_out_channels", "down_block_types", "up_block_types")
DEFAULT = UNet2DConfig(**{name: getattr(DDPM_256_UNET, name) for name in LEVELS})
"""The network that is trained by default: DDPM's for 256 pixels with today's defaults, 114 million parameters."""


def main() -> None:
    args = parse_args()
    run, network, data = settings_from(args, RunSettings), settings_from(args, NetworkSettings), data_from(args)
    mesh = mesh_from(settings_from(args, DeviceSettings))
    check_output(run)
    unet = configured_network(UNet2DModel, network, "unet", DEFAULT)
    warn_of_size(data.images, unet.config.sample_size)
    unet = unet.clone(config=unet.config.replace(sample_size=data.images.resolution), remat=network.compute.remat)
    check_network(unet.config)
    learned = settings_from(args, ObjectiveSettings)
    edm, flow = settings_from(args, EdmSettings), settings_from(args, FlowSettings)
    changes = changes_of(args)
    scheduler = scheduler_of(args.objective, network, {name: value for name, (_, value) in changes.items()})
    check_resumed(starting_point(run), scheduler, {name: flag for name, (flag, _) in changes.items()})
    objective = pixel_objective(scheduler, learned, edm, flow)
    validate = validation_from(args, unet, scheduler, mesh)
    source = None if data.streaming else source_from(data)
    if source is not None:
        check_first(data, source)
    batches = batches_from(data, run.batch, mesh, pixel_values, source=source)
    check_run(run, mesh, getattr(batches, "total", None), unet.shapes())
    _, params = open_network(UNet2DModel, network, mesh, "unet", DEFAULT, run.seed)
    fit(
        run,
        mesh,
        trainable=params,
        frozen={},
        loss=functools.partial(pixel_loss, unet, objective),
        batches=batches,
        export=lambda folder, params: pipeline(unet, scheduler, params).save_pretrained(folder),
        validate=validate,
        config=vars(args),
    )
    print(run.output_dir)
    push_to_hub(run.upload, run.output_dir)


def check_network(config: UNet2DConfig) -> None:
    """Refuse networks that this loss does not support.

    Raises:
      ValueError: the network is not supported; the message names the reason.
    """
    if (config.in_channels, config.out_channels) != (3, 3):
        channels = f"in_channels={config.in_channels} and out_channels={config.out_channels}"
        raise ValueError(f"the network must have 3 input and 3 output channels, its config has {channels}")
    if config.has_classes:
        raise ValueError(
            "the network needs class labels, which this trainer does not have; remove them from its config"
        )
    size, factor = config.sample_size, 2 ** (len(config.block_out_channels) - 1)
    if not isinstance(size, int) or size % factor:
        raise ValueError(f"--resolution must be a multiple of {factor} for this network, got {size}")


def changes_of(args: argparse.Namespace) -> dict[str, tuple[str, Any]]:
    """Fields of the scheduler -> the flags that set them, and their values; None leaves them as they are."""
    return {
        "num_train_timesteps": ("--ddpm_num_steps", args.ddpm_num_steps),
        "beta_schedule": ("--ddpm_beta_schedule", args.ddpm_beta_schedule),
        "prediction_type": ("--prediction_type", args.prediction_type),
        "sigma_data": ("--sigma_data", args.sigma_data),
        "shift": ("--flow_shift", args.flow_shift),
    }


def pixel_loss(
    unet: UNet2DModel,
    objective: Objective,
    params: Params,
    frozen: Params,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
) -> tuple[jax.Array, Metrics]:
    """Squared error of the prediction at random timesteps (for DDPM: Ho et al. 2020, algorithm 1).

    ``batch`` has ``pixel_values`` uint8 ``[B,H,W,3]``.
    """
    x0 = normalised(batch["pixel_values"])
    drawn = draw(objective, key, x0)
    prediction = unet.apply({"params": params}, noised(objective, x0, drawn), drawn.t)
    return errors(objective, prediction, x0, drawn)


def pipeline(unet: UNet2DModel, scheduler: Scheduler, params: Params, mesh: Mesh | None = None) -> DDPMPipeline:
    """The pipeline that is saved, and that generates validation images."""
    return KINDS[kind_of(scheduler)].pipeline({"unet": unet, "scheduler": scheduler}, {"unet": params}, mesh=mesh)


def validation_from(
    args: argparse.Namespace, unet: UNet2DModel, scheduler: Scheduler, mesh: Mesh
) -> Callable[[Params], list[tuple[str, Any]]] | None:
    """A function that generates ``--eval_batch_size`` images, always from the same noise; None if that is 0."""
    if args.eval_batch_size == 0:
        return None
    steps = args.ddpm_num_inference_steps or KINDS[args.objective].steps
    if args.objective == "ddpm":
        steps = min(steps, scheduler.num_train_timesteps)
    scheduler.plan(steps)  # raises here instead of at the first validation

    def validate(params: Params) -> list[tuple[str, Any]]:
        pipe = pipeline(unet, scheduler, params, mesh)
        images = pipe(args.eval_batch_size, num_inference_steps=steps, seed=args.seed).images
        return [("sample", image) for image in images]

    return validate


if __name__ == "__main__":
    train(main)
