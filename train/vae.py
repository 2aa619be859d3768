"""Train an AutoencoderKL, which encodes images to latents and decodes them.

The loss is the mean absolute error of pixels and of the differences between neighbouring pixels (edges), plus a small
KL divergence of the latents from a standard normal distribution. A perceptual loss in the features of a frozen network
and an adversarial loss are optional. At the end, scaling_factor is measured so that scaled latents have unit variance
(unless only the decoder was trained, which leaves the latents unchanged), and the model is saved to OUTPUT/vae in
diffusers' layout. Example:

    python train/vae.py --pretrained_model_name_or_path runs/emoji/start --train_data_dir runs/emoji/data/train \\
        --resolution 64 --crop_size 32 --train_batch_size 32 --max_train_steps 2000 --learning_rate 2e-3
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffuse_jax.bounds import COUNT, NATURAL, NONNEGATIVE
from diffuse_jax.training.arguments import add_network, make_parser
from diffuse_jax.training.command import flags_first, train
from diffuse_jax.training.data.flags import add_data
from diffuse_jax.writing import path_text


@functools.cache
def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, output_dir="runs/vae")
    add_network(parser, "vae", "one of Stable Diffusion's size")
    add_data(parser, captions=False)
    what = "freeze the encoder, so that denoising networks trained on its latents remain compatible"
    parser.group("model")("--train_decoder_only", action="store_true", help=what)
    add = parser.group("images")
    add("--crop_size", type=COUNT, help="train on random square crops of this size; --resolution if omitted")
    add = parser.group("loss")
    add("--kl_weight", type=NONNEGATIVE, default=1e-4, help="weight of the KL divergence, per latent element")
    add(
        "--edge_weight", type=NONNEGATIVE, default=1.0, help="weight of the error in differences of neighbouring pixels"
    )
    add("--perceptual_weight", type=NONNEGATIVE, default=0.0, help="weight of the perceptual loss")
    add(
        "--perceptual_model_path",
        type=path_text,
        help="file of the perceptual network: torchvision's or LPIPS's VGG16, MobileNetV2, or EfficientNet-Lite0",
    )
    what = (
        "weight of the adversarial loss, on top of its adaptive balance with the other losses; 0 for no discriminator"
    )
    add("--discriminator_weight", type=NONNEGATIVE, default=0.0, help=what)
    add("--discriminator_start", type=NATURAL, default=0, help="training step from which the discriminator is used")
    add("--discriminator_layers", type=COUNT, default=3, help="strided layers; with 3, its patches are 70 pixels wide")
    add("--discriminator_channels", type=COUNT, default=64, help="channels of the discriminator's first layer")
    add = parser.group("monitoring")
    add("--validation_image", type=path_text, nargs="+", help="image files to show with their reconstructions")
    add(
        "--num_validation_images",
        type=NATURAL,
        default=4,
        help="without --validation_image, show this many images of the data set; 0 for none",
    )
    args = parser.parse_args()
    if args.crop_size is not None and args.crop_size > args.resolution:
        parser.error(f"--crop_size must be from 1 to --resolution {args.resolution}, got {args.crop_size}")
    if args.crop_size is not None and args.aspect_ratio_buckets:
        parser.error("--crop_size crops squares, --aspect_ratio_buckets other sizes; leave out one of them")
    if args.train_decoder_only and args.pretrained_model_name_or_path is None:
        parser.error("--train_decoder_only needs a trained encoder: give --pretrained_model_name_or_path")
    if (args.perceptual_weight > 0) != (args.perceptual_model_path is not None):
        parser.error("--perceptual_weight and --perceptual_model_path belong together; one of them is missing")
    return args


with flags_first(parse_args):  # JAX and the library, once the flags are known to be right
    import jax
    import numpy as np

    from diffuse_jax.models import AutoencoderKL, Params
    from diffuse_jax.models.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
    from diffuse_jax.models.presets import SD_VAE
    from diffuse_jax.sharding import readable
    from diffuse_jax.training.autoencoder import Terms, autoencoder_loss, decode, latent_deviation, split_decoder
    from diffuse_jax.training.batches import Batches, WithStepIndex
    from diffuse_jax.training.data import DataSettings, ImageSettings, batches_from, check_sides, data_from
    from diffuse_jax.training.devices import mesh_from
    from diffuse_jax.training.distributed import say
    from diffuse_jax.training.families import normalised
    from diffuse_jax.training.flags import settings_from
    from diffuse_jax.training.initial import initial_params
    from diffuse_jax.training.loop import fit
    from diffuse_jax.training.networks import configured_network, open_network
    from diffuse_jax.training.perceptual import NETWORKS, read_features
    from diffuse_jax.training.pixels import first_images, pixel_values, read_images, sheet, to_uint8
    from diffuse_jax.training.settings import ComputeSettings, DeviceSettings, NetworkSettings, RunSettings
    from diffuse_jax.training.start import check_output, check_run
    from diffuse_jax.training.upload import push_to_hub
    from diffuse_jax.weights import write_json


MEASURED = 2048
"""Number of images on whose latents ``scaling_factor`` is measured."""


def main() -> None:
    args = parse_args()
    run, network, data = settings_from(args, RunSettings), settings_from(args, NetworkSettings), data_from(args)
    mesh = mesh_from(settings_from(args, DeviceSettings))
    check_output(run)
    default = SD_VAE.replace(sample_size=data.images.resolution)
    vae = configured_network(AutoencoderKL, network, "vae", default).clone(remat=network.compute.remat)
    split = split_decoder if args.train_decoder_only else lambda params: (params, {})
    terms = with_discriminator(Terms(vae=vae, kl_weight=args.kl_weight, edge_weight=args.edge_weight), args)
    check_sizes(terms, data.images, args.crop_size)
    batches: Batches = batches_from(data, run.batch, mesh, pixel_values, crop_size=args.crop_size)
    shown = validation_images(args, data)
    discriminator = {} if terms.discriminator is None else {"discriminator": terms.discriminator.shapes()}
    check_run(run, mesh, getattr(batches, "total", None), {"vae": split(vae.shapes())[0], **discriminator})

    terms, perceptual = with_perceptual(terms, args)
    check_sizes(terms, data.images, args.crop_size)
    trained, kept = split(open_network(AutoencoderKL, network, mesh, "vae", default, run.seed)[1])
    discriminator = {name: initial_params(shapes, args.seed) for name, shapes in discriminator.items()}
    whole = lambda params: {**kept, **params["vae"]}
    fit(
        run,
        mesh,
        trainable={"vae": trained, **discriminator},
        frozen={"vae": kept, **perceptual},
        loss=functools.partial(autoencoder_loss, terms),
        batches=batches if terms.discriminator is None else WithStepIndex(batches),
        export=lambda folder, params: vae.save_pretrained(folder / "vae", whole(params)),
        validate=validation_from(shown, vae, whole),
        # Unchanged latents keep their scaling factor, with which denoising networks were trained.
        finish=None if kept else functools.partial(save_measured, run, data, vae),
        config=vars(args),
    )
    print(Path(run.output_dir) / "vae")
    push_to_hub(run.upload, run.output_dir)


def with_perceptual(terms: Terms, args: argparse.Namespace) -> tuple[Terms, Params]:
    """The terms with the frozen network of ``--perceptual_model_path``, if one is given, and its parameters."""
    if args.perceptual_model_path is None:
        return terms, {}
    say(f"loading the network of the perceptual loss from {args.perceptual_model_path}")
    features = read_features(args.perceptual_model_path)
    terms = dataclasses.replace(terms, perceptual=features.network, perceptual_weight=args.perceptual_weight)
    return terms, {"perceptual": features.params}


def with_discriminator(terms: Terms, args: argparse.Namespace) -> Terms:
    """The terms with a new discriminator, if ``--discriminator_weight`` is not 0."""
    if not args.discriminator_weight:
        return terms
    config = PatchDiscriminatorConfig(channels=args.discriminator_channels, layers=args.discriminator_layers)
    return dataclasses.replace(
        terms,
        discriminator=PatchDiscriminator(config=config, dtype=settings_from(args, ComputeSettings).dtype),
        discriminator_weight=args.discriminator_weight,
        discriminator_start=args.discriminator_start,
    )


def check_sizes(terms: Terms, images: ImageSettings, crop_size: int | None) -> None:
    """Refuse image sizes that one of the networks does not support.

    Raises:
      ValueError: the size is not supported; the message names the flag.
    """
    flag = "resolution" if crop_size is None else "crop_size"
    size, scale = images.resolution if crop_size is None else crop_size, terms.vae.config.scale
    check_sides(images, scale)
    if size % scale:
        raise ValueError(f"--{flag} must be a multiple of {scale} for this autoencoder, got {size}")
    if terms.discriminator is not None and size < terms.discriminator.config.min_size:
        raise ValueError(
            f"the discriminator needs images of at least {terms.discriminator.config.min_size} pixels, --{flag} is "
            f"{size}; use a smaller --discriminator_layers"
        )
    if terms.perceptual is not None and size < NETWORKS[terms.perceptual][1]:
        raise ValueError(f"{terms.perceptual} needs images of {NETWORKS[terms.perceptual][1]} pixels, got {size}")


def validation_images(args: argparse.Namespace, data: DataSettings) -> list[np.ndarray]:
    """The images of ``--validation_image``, or the first ones of the data set."""
    if args.validation_image:
        return read_images(args.validation_image, data)
    return list(first_images(data, args.num_validation_images))


def validation_from(
    images: list[np.ndarray], vae: AutoencoderKL, whole: Callable[[Params], Params]
) -> Callable[[Params], list[tuple[str, Any]]] | None:
    """A function that shows images above their reconstructions from the mode of the latents; None without images."""
    if not images:
        return None
    originals = np.stack(images)

    @jax.jit
    def reconstruct(params: Params, pixels: jax.Array) -> jax.Array:
        z = vae.apply({"params": params}, normalised(pixels), method="encode").mode()
        return decode(vae, params, z)

    def validate(trained: Params) -> list[tuple[str, Any]]:
        again = to_uint8(readable(reconstruct(whole(trained), originals)))
        return [("originals above reconstructions", sheet([originals, again]))]

    return validate


def save_measured(run: RunSettings, data: DataSettings, vae: AutoencoderKL, trained: Params) -> None:
    """Write the scaling factor to ``OUTPUT/vae``, measured on the latents of the first 2048 training images (or
    fewer)."""
    if jax.process_index() != 0:
        return
    deviation = latent_deviation(vae, trained["vae"], first_images(data, MEASURED), run.batch.train_batch_size)
    config = vae.config.replace(scaling_factor=round(1 / deviation, 5), sample_size=data.images.resolution)
    folder = Path(run.output_dir) / "vae"
    write_json(folder / "config.json", vae.clone(config=config).config_json())


if __name__ == "__main__":
    train(main)
