"""How many images per second the input pipeline delivers, and how many a TPU v5e-8 would consume.

    python -m benchmarks.input_pipeline                 # about ten minutes, 0.6 GB of disk
    python -m benchmarks.input_pipeline --sides 512     # images of 512 pixels only

Images are JPEG files of SIDE x 1.25 SIDE pixels with soft shapes and grain, quality 90 (0.1 MB at 512 pixels), randomly
cropped to 512 x 512. Every result is the best of several rounds; worker processes have started and delivered batches
before the clock starts.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.common import write
from diffuse_jax.training.data import Example, FolderSource, Source, Transform
from diffuse_jax.training.data.cache import CachedImages, cache_images
from diffuse_jax.training.data.loader import Loader, Maker
from diffuse_jax.training.data.order import Plain
from diffuse_jax.training.data.shards import ArrayRecordSource, TarSource, write_array_record, write_tar

RESOLUTION, BATCH = 512, 16

CHIPS, PEAK_TFLOPS, UTILISATION = 8, 197.0, 0.4
"""A v5e-8 host: dense bfloat16 peak per chip, and the fraction of it that well-tuned training reaches."""


def jpeg(rng: np.random.Generator, side: int) -> bytes:
    """An image as hard to decode as a photograph: soft shapes and grain."""
    small = rng.integers(0, 256, (12, 15, 3), np.uint8)
    image = Image.fromarray(small).resize((side * 5 // 4, side), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 12, (side, side * 5 // 4, 3))
    image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.filter(ImageFilter.GaussianBlur(0.8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_sources(folder: Path, side: int, count: int) -> dict[str, Source]:
    """The same images as files, in a tar file and in an ArrayRecord file."""
    rng = np.random.default_rng(0)
    (folder / "files").mkdir(parents=True, exist_ok=True)
    rows = [(f"{i:05d}.jpg", jpeg(rng, side), f"image {i}") for i in range(count)]
    for name, image, _ in rows:
        (folder / "files" / name).write_bytes(image)
    write_tar(folder / "a.tar", rows)
    write_array_record(folder / "a.array_record", rows)
    return {
        "files": FolderSource(folder / "files", caption_column=None),
        "WebDataset": TarSource([folder / "a.tar"]),
        "ArrayRecord": ArrayRecordSource([folder / "a.array_record"]),
    }


def pixels(example: Example) -> dict[str, np.ndarray]:
    """What training scripts load: uint8, converted to float on the device."""
    return {"pixel_values": np.asarray(example.pixels)}


def latents(cache: CachedImages, example: Example) -> dict[str, np.ndarray]:
    return cache(example)


def empty_latents(examples: list[Example]) -> dict[str, np.ndarray]:
    """Zeros of the size of SD 1.5's latents: the time to read them does not depend on their values."""
    return {"moments": np.zeros((len(examples), RESOLUTION // 8, RESOLUTION // 8, 8), np.float32)}


def make_loader(source: Source, transform: Transform, finish: Any, workers: int) -> Loader:
    maker = Maker(source, transform, Plain(0, len(source), BATCH), np.arange(BATCH), finish)
    loader = Loader(maker, workers)
    for _ in range(2 * max(workers, 2)):
        next(loader)
    return loader


def speed(loader: Loader, seconds: float) -> float:
    """Images per second, measured for about ``seconds``."""
    for _ in range(6):
        next(loader)  # batches that were prefetched
    start, batches = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(loader)
        batches += 1
    return batches * BATCH / (time.perf_counter() - start)


def one_core(source: Source, transform: Transform, finish: Any) -> float:
    """Images per second of CPU time, one after another in this thread."""
    maker = Maker(source, transform, Plain(0, len(source), BATCH), np.arange(BATCH), finish)
    start = time.process_time()
    for batch in range(4):
        maker(batch * BATCH)
    return 4 * BATCH / (time.process_time() - start)


def costs() -> tuple[float, float]:
    """TFLOP of the UNet's forward pass and of the autoencoder's encoder for one 512 x 512 image in SD 1.5."""
    import jax
    import jax.numpy as jnp

    from diffuse_jax.models import AutoencoderKL, UNet2DConditionModel, presets
    from diffuse_jax.training.flops import count_flops

    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    unet, vae = UNet2DConditionModel(presets.SD15_UNET), AutoencoderKL(presets.SD_VAE)
    latents, text = shape(1, RESOLUTION // 8, RESOLUTION // 8, 4), shape(1, 77, 768)
    forward = count_flops(lambda p, *x: unet.apply({"params": p}, *x), unet.shapes(), latents, shape(1), text)
    encode = lambda p, x: vae.apply({"params": p}, x, method="encode")
    return forward / 1e12, count_flops(encode, vae.shapes(), shape(1, RESOLUTION, RESOLUTION, 3)) / 1e12


def consumed(forward: float, encode: float) -> dict[str, float]:
    """Images per second that a v5e-8 host consumes in full fine-tuning, whose step costs three forward passes."""
    available = CHIPS * PEAK_TFLOPS * UTILISATION
    return {"pixels": available / (3 * forward + encode), "latents": available / (3 * forward)}


def rows_of(side: int, needs: dict[str, float], args: argparse.Namespace) -> list[dict[str, Any]]:
    """All variants for images of one size."""
    folder = args.cache / f"{side}-{args.images}"
    sources = make_sources(folder, side, args.images)
    transform = Transform(RESOLUTION, random_flip=True)
    variants = {name: (source, transform, pixels) for name, source in sources.items()}
    if side == min(args.sides):
        cache = cache_images(folder, "latents", {}, sources["files"], transform, empty_latents)
        plain = Transform(RESOLUTION, pixels=False)
        variants["cached latents"] = (sources["files"], plain, functools.partial(latents, cache))
    rows = []
    for name, (source, how, finish) in variants.items():
        per_core = max(one_core(source, how, finish) for _ in range(args.rounds))
        row = {"data": name, "side": side, "per_second_of_one_core": round(per_core, 1)}
        for workers in args.workers:
            loader = make_loader(source, how, finish, workers)
            row[f"workers_{workers}"] = round(max(speed(loader, args.seconds) for _ in range(args.rounds)), 1)
            loader.close()
        row["cores_for_a_v5e_8"] = round(needs["latents" if name == "cached latents" else "pixels"] / per_core, 2)
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2, 4])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "diffuse_jax" / "benchmarks" / "images")
    args = parser.parse_args()
    forward, encode = costs()
    needs = consumed(forward, encode)
    rows = [row for side in args.sides for row in rows_of(side, needs, args)]
    about = (
        f"Images per second, decoded, resized to {RESOLUTION} pixels, cropped and flipped, in batches of {BATCH}, by "
        "threads of the training process (0 workers) and by worker processes; and per second of one core's CPU time. "
        f"A TPU v5e-8 host would consume {needs['pixels']:.0f} images per second in full fine-tuning of SD 1.5 at 512 "
        f"pixels ({needs['latents']:.0f} from cached latents), assuming 3 x {forward:.2f} TFLOP for the UNet's step, "
        f"{encode:.2f} for the autoencoder, and {UTILISATION:.0%} of {CHIPS} x {PEAK_TFLOPS:.0f} TFLOP/s: this is "
        "assumed, not measured. Such a host has more than a hundred virtual cores. The load average of this machine "
        f"was {os.getloadavg()[2]:.1f}, this benchmark included."
    )
    print(write("input_pipeline", "Input pipeline", about, rows, "pillow", "numpy", "grain"))


if __name__ == "__main__":
    main()
