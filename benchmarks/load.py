"""How long it takes to load parameters from a folder, and how much memory that needs on top of the parameters.

    python benchmarks/load.py                       # all subjects, 3.4 GB of disk and memory for the largest
    python benchmarks/load.py --subjects tiny 50m   # some of them

Each load has its own process; sides take turns. Imports are not counted, but tracing the shapes is. Peak memory is
what the process holds beyond its memory before the load: anonymous pages (``RssAnon``), without the pages of the mapped
file, and all pages (``VmHWM``), which include those as long as they are mapped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import write
from folders import make_folder

SUBJECTS = {"tiny": "pipeline, 1.3 M", "50m": "pipeline, 51 M", "sd15-unet": "SD 1.5 UNet, 860 M"}
NETWORKS = ("unet", "vae", "text_encoder")


def make_subject(name: str, cache: Path) -> Path:
    """The folder to load, written at first use."""
    return make_unet(cache / name) if name == "sd15-unet" else make_folder(name, cache)


def make_unet(folder: Path) -> Path:
    """A folder with nothing but a UNet of SD 1.5's size, in float32: 3.4 GB."""
    if (folder / "unet" / "config.json").exists():
        return folder
    from diffuse_jax.models import UNet2DConditionModel, presets
    from diffuse_jax.weights import names, write_json
    from diffuse_jax.weights.safetensors import write_safetensors

    model = UNet2DConditionModel(presets.SD15_UNET)
    shapes = names.flatten(model.shapes())
    numbers = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    specs = {
        key: (np.dtype(np.float32), names.to_torch(path, np.broadcast_to(0, shapes[path].shape)).shape)
        for key, path in sorted(names.torch_keys(shapes).items())
    }
    arrays: Iterator[np.ndarray] = (np.resize(numbers[i:], shape) for i, (_, shape) in enumerate(specs.values()))
    write_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors", specs, arrays)
    write_json(folder / "unet" / "config.json", model.config_json())
    return folder


def load_ours(folder: Path) -> tuple[Callable[[], Any], Callable[[Any], list[int]]]:
    """A function that loads the networks of a folder, and one that gives the bytes of each loaded tensor."""
    import jax

    from diffuse_jax.models import AutoencoderKL, UNet2DConditionModel
    from diffuse_jax.text import CLIPTextModel

    jax.devices()
    classes = dict(zip(NETWORKS, (UNet2DConditionModel, AutoencoderKL, CLIPTextModel), strict=True))
    parts = {name: cls for name, cls in classes.items() if (folder / name).is_dir()}

    def load() -> Any:
        return jax.block_until_ready([cls.from_pretrained(folder, subfolder=n)[1] for n, cls in parts.items()])

    return load, lambda params: [leaf.nbytes for leaf in jax.tree.leaves(params)]


def load_pytorch(folder: Path) -> tuple[Callable[[], Any], Callable[[Any], list[int]]]:
    """The same with PyTorch diffusers and transformers."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    classes = dict(zip(NETWORKS, (UNet2DConditionModel, AutoencoderKL, CLIPTextModel), strict=True))
    parts = {name: cls for name, cls in classes.items() if (folder / name).is_dir()}

    def load() -> Any:
        return [cls.from_pretrained(folder, subfolder=name) for name, cls in parts.items()]

    return load, lambda modules: [p.nbytes for module in modules for p in module.parameters()]


SIDES = {"diffuse_jax": load_ours, "PyTorch": load_pytorch}


def status(field: str) -> int:
    """A field of ``/proc/self/status``, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{field}:")[1].split()[0])


def watch(peak: list[int], stop: threading.Event) -> None:
    """Record the largest ``RssAnon``, polled five hundred times a second."""
    while not stop.wait(0.002):
        peak[0] = max(peak[0], status("RssAnon"))


def measure(side: str, folder: Path) -> dict[str, float]:
    """One load in this process."""
    load, sizes_of = SIDES[side](folder)
    before, stop = status("RssAnon"), threading.Event()
    highest_before = status("VmRSS")
    peak = [before]
    watcher = threading.Thread(target=watch, args=(peak, stop), daemon=True)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    result = load()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    stop.set()
    watcher.join()
    sizes = sizes_of(result)
    return {
        "seconds": wall,
        "cpu": cpu,
        "bytes": sum(sizes),
        "largest": max(sizes),
        "anonymous": peak[0] - before,
        "all": status("VmHWM") - highest_before,
    }


def summarise(subject: str, side: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    """A row of the table; the memory limit is 1.15 x the result plus its largest tensor."""
    size, largest = runs[0]["bytes"], runs[0]["largest"]
    return {
        "loads": SUBJECTS[subject],
        "side": side,
        "megabytes": round(size / 1e6, 1),
        "seconds_min": round(min(run["seconds"] for run in runs), 3),
        "seconds_median": round(statistics.median(run["seconds"] for run in runs), 3),
        "processor_seconds": round(min(run["cpu"] for run in runs), 3),
        "own_memory_over_result": round(max(run["anonymous"] for run in runs) / size, 3),
        "all_memory_over_result": round(max(run["all"] for run in runs) / size, 3),
        "limit": round(1.15 + largest / size, 3),
    }


def one_process(side: str, folder: Path) -> dict[str, float]:
    """:func:`measure` in a fresh process."""
    command = [sys.executable, __file__, "--measure", side, "--folder", str(folder)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} on {folder} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "diffuse_jax" / "benchmarks")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder)))
        return
    rows = []
    for subject in args.subjects:
        folder = make_subject(subject, args.cache)
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in args.sides}
        for i in range(args.rounds + 1):
            for side, measured in runs.items():
                run = one_process(side, folder)
                measured += [run] if i else []  # the first round brings the files into the page cache
        rows += [summarise(subject, side, measured) for side, measured in runs.items()]
        print(json.dumps(rows[-len(runs) :], indent=1), flush=True)
    about = (
        "From a folder on disk to parameters ready for use, after imports, files in the page cache. Own memory "
        "is the peak of what the process holds beyond its memory before, without pages of mapped files; all memory "
        "includes those. PyTorch maps the file and reads a tensor at its first use, so its loading reads nothing; here "
        "every tensor is read, transposed and ready. "
        f"The load average was {os.getloadavg()[2]:.1f}, this benchmark included; if that exceeds the number of cores, "
        "processor seconds say more than seconds."
    )
    print(write("load", "Loading", about, rows, "jax", "flax", "torch", "diffusers", "transformers"))


if __name__ == "__main__":
    main()
