"""Train an AutoencoderKL: pictures to latents and back.

The loss is the mean absolute difference of pixels, the same of neighbouring pixels' differences (edges), and a small
divergence of the latents from a standard normal; if wanted, a distance in the features of a frozen network, and a
discriminator. At the end scaling_factor is measured, so that scaled latents have unit variance (unless only the decoder
was trained, which leaves the latents as they are); the model is saved as OUTPUT/vae in diffusers' layout. Example:

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


@functools.cache
def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, output_dir="runs/vae")
    add_network(parser, "vae", "one of Stable Diffusion's size")
    add_data(parser, captions=False)
    what = "keep the encoder, so that denoising networks that were trained on its latents still fit"
    parser.group("model")("--train_decoder_only", action="store_true", help=what)
    add = parser.group("pictures")
    add("--crop_size", type=COUNT, help="train on random squares of this size; without it, --resolution")
    add = parser.group("loss")
    add("--kl_weight", type=NONNEGATIVE, default=1e-4, help="weight of the divergence, per latent number")
    add("--edge_weight", type=NONNEGATIVE, default=1.0, help="weight of the error in differences of neighbours")
    add("--perceptual_weight", type=NONNEGATIVE, default=0.0, help="weight of the distance in a network's features")
    add("--perceptual_model_path", help="that network, frozen: torchvision's (or LPIPS's) VGG16 or MobileNetV2, a file")
    what = "weight of the adversarial term, besides the balance with the others that is found in every step; 0: none"
    add("--discriminator_weight", type=NONNEGATIVE, default=0.0, help=what)
    add("--discriminator_start", type=NATURAL, default=0, help="updates before the discriminator takes part")
    add("--discriminator_layers", type=COUNT, default=3, help="layers that halve; 3 judge patches of 70 pixels")
    add("--discriminator_channels", type=COUNT, default=64, help="channels of its first layer")
    add = parser.group("monitoring")
    add("--validation_image", nargs="+", help="picture files to show beside their reconstructions")
    add("--num_validation_images", type=NATURAL, default=4, help="without them, show so many of the data; 0: none")
    args = parser.parse_args()
    if args.crop_size is not None and args.crop_size > args.resolution:
        parser.error(f"--crop_size must be from 1 to --resolution {args.resolution}, got {args.crop_size}")
    if args.crop_size is not None and args.aspect_ratio_buckets:
        parser.error("--crop_size cuts squares, --aspect_ratio_buckets other sizes; leave out one of them")
    if args.train_decoder_only and args.pretrained_model_name_or_path is None:
        parser.error("--train_decoder_only keeps an encoder that was trained; name it: --pretrained_model_name_or_path")
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
    from diffuse_jax.training.autoencoder import Terms, autoencoder_loss, decode, decoder_alone, latent_deviation
    from diffuse_jax.training.batches import Batches, Counted
    from diffuse_jax.training.data import DataSettings, ImageSettings, batches_from, check_sides, data_from
    from diffuse_jax.training.devices import mesh_from
    from diffuse_jax.training.distributed import say
    from diffuse_jax.training.flags import settings_from
    from diffuse_jax.training.initial import initial_params
    from diffuse_jax.training.latent import normalised
    from diffuse_jax.training.loop import fit
    from diffuse_jax.training.networks import open_network
    from diffuse_jax.training.perceptual import NETWORKS, read_features
    from diffuse_jax.training.pixels import first_pictures, picture_files, pixel_values, sheet, to_uint8
    from diffuse_jax.training.settings import ComputeSettings, DeviceSettings, NetworkSettings, RunSettings
    from diffuse_jax.training.start import check_output
    from diffuse_jax.training.upload import push_to_hub
    from diffuse_jax.weights import write_json


MEASURED = 2048
"""Pictures whose latents decide ``scaling_factor``."""


def main() -> None:
    args = parse_args()
    run, network, data = settings_from(args, RunSettings), settings_from(args, NetworkSettings), data_from(args)
    mesh = mesh_from(settings_from(args, DeviceSettings))
    check_output(run)
    default = SD_VAE.replace(sample_size=data.images.resolution)
    vae, params = open_network(AutoencoderKL, network, mesh, "vae", default, run.seed)
    vae = vae.clone(remat=network.compute.remat)
    trained, kept = decoder_alone(params) if args.train_decoder_only else (params, {})
    trainable, frozen = {"vae": trained}, {"vae": kept}
    whole = lambda params: {**kept, **params["vae"]}
    terms = Terms(vae=vae, kl_weight=args.kl_weight, edge_weight=args.edge_weight)
    terms, frozen = add_perceptual(terms, frozen, args)
    terms, trainable = add_discriminator(terms, trainable, args)
    check_sizes(terms, data.images, args.crop_size)

    batches: Batches = batches_from(data, run.batch, mesh, pixel_values, crop_size=args.crop_size)
    fit(
        run,
        mesh,
        trainable=trainable,
        frozen=frozen,
        loss=functools.partial(autoencoder_loss, terms),
        batches=batches if terms.discriminator is None else Counted(batches),
        export=lambda folder, params: vae.save_pretrained(folder / "vae", whole(params)),
        validate=validation_from(args, data, vae, whole),
        # Latents that did not change keep their scaling factor: networks were trained with it.
        finish=None if kept else functools.partial(save_measured, run, data, vae),
        config=vars(args),
    )
    print(Path(run.output_dir) / "vae")
    push_to_hub(run.upload, run.output_dir)


def add_perceptual(terms: Terms, frozen: Params, args: argparse.Namespace) -> tuple[Terms, Params]:
    """With the frozen network of ``--perceptual_model_path``, where it is wanted."""
    if args.perceptual_model_path is None:
        return terms, frozen
    say(f"loading the network of the perceptual loss from {args.perceptual_model_path}")
    features = read_features(args.perceptual_model_path)
    terms = dataclasses.replace(terms, perceptual=features.network, perceptual_weight=args.perceptual_weight)
    return terms, {**frozen, "perceptual": features.params}


def add_discriminator(terms: Terms, trainable: Params, args: argparse.Namespace) -> tuple[Terms, Params]:
    """With a new discriminator, where ``--discriminator_weight`` wants one."""
    if not args.discriminator_weight:
        return terms, trainable
    config = PatchDiscriminatorConfig(channels=args.discriminator_channels, layers=args.discriminator_layers)
    network = PatchDiscriminator(config=config, dtype=settings_from(args, ComputeSettings).dtype)
    terms = dataclasses.replace(
        terms,
        discriminator=network,
        discriminator_weight=args.discriminator_weight,
        discriminator_start=args.discriminator_start,
    )
    return terms, {**trainable, "discriminator": initial_params(network.shapes(), args.seed)}


def check_sizes(terms: Terms, images: ImageSettings, crop_size: int | None) -> None:
    """Refuse pictures that a network cannot look at.

    Raises:
      ValueError: naming the flag.
    """
    flag = "resolution" if crop_size is None else "crop_size"
    size, scale = images.resolution if crop_size is None else crop_size, terms.vae.config.scale
    check_sides(images, scale)
    if size % scale:
        raise ValueError(f"--{flag} must be a multiple of {scale} for this autoencoder, got {size}")
    if terms.discriminator is not None and size < terms.discriminator.config.min_size:
        raise ValueError(
            f"the discriminator needs pictures of at least {terms.discriminator.config.min_size} pixels, --{flag} is "
            f"{size}; use a smaller --discriminator_layers"
        )
    if terms.perceptual is not None and size < NETWORKS[terms.perceptual][1]:
        raise ValueError(f"{terms.perceptual} needs pictures of {NETWORKS[terms.perceptual][1]} pixels, got {size}")


def validation_from(
    args: argparse.Namespace, data: DataSettings, vae: AutoencoderKL, whole: Callable[[Params], Params]
) -> Callable[[Params], list[tuple[str, Any]]] | None:
    """Shows pictures (above) and what the most likely latents give back of them; None where none are wanted."""
    if args.validation_image:
        pictures = picture_files(args.validation_image, data)
    else:
        pictures = list(first_pictures(data, args.num_validation_images))
    if not pictures:
        return None
    originals = np.stack(pictures)

    @jax.jit
    def reconstruct(params: Params, pixels: jax.Array) -> jax.Array:
        z = vae.apply({"params": params}, normalised(pixels), method="encode").mode()
        return decode(vae, params, z)

    def validate(trained: Params) -> list[tuple[str, Any]]:
        again = to_uint8(readable(reconstruct(whole(trained), originals)))
        return [("originals above reconstructions", sheet([originals, again]))]

    return validate


def save_measured(run: RunSettings, data: DataSettings, vae: AutoencoderKL, trained: Params) -> None:
    """Complete ``OUTPUT/vae`` by the scaling factor of (at most 2048 of) the training pictures' latents."""
    if jax.process_index() != 0:
        return
    deviation = latent_deviation(vae, trained["vae"], first_pictures(data, MEASURED), run.batch.train_batch_size)
    config = vae.config.replace(scaling_factor=round(1 / deviation, 5), sample_size=data.images.resolution)
    folder = Path(run.output_dir) / "vae"
    write_json(folder / "config.json", vae.clone(config=config).config_json())


if __name__ == "__main__":
    train(main)
