"""The device side of a job: which images share a program, sizes that fit into memory, and equal pixels everywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image as Pillow

from diffuse_jax import StableDiffusionImg2ImgPipeline
from diffuse_jax.adapters import lora
from diffuse_jax.adapters.lora_file import save_lora
from diffuse_jax.batch import device as devices
from diffuse_jax.batch import sample_many
from diffuse_jax.batch.device import MOST, Clock, Device
from diffuse_jax.batch.jobs import Image, Rules
from diffuse_jax.sharding import make_mesh
from tests.pipelines import tiny


def images(*rows: dict[str, Any]) -> list[Image]:
    rules = Rules({}, 0, (), {})
    jobs = [rules.job(number, {"prompt": "a cat", **row}) for number, row in enumerate(rows, 1)]
    return [Image(job, seed) for job in jobs for seed in job.seeds]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline()


def pixels(output: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Pillow.open(path)) for path in output.rglob("*.png")}


PROMPTS = [{"prompt": f"cat {i}", "guidance_scale": 2.0 + i} for i in range(7)]


def test_pixels_do_not_depend_on_the_mesh(tmp_path: Path, pipe: Any) -> None:
    """Bit for bit: with one image for each device, every device runs the same program as one alone does."""
    steps = {"num_inference_steps": 2, "guidance_scale": 3.0}
    alone = sample_many(pipe, PROMPTS, tmp_path / "one", batch_size=1, **steps)
    assert (alone.made, alone.failed) == (7, 0)
    before = pipe.programs.compilations
    mesh = make_mesh(devices=jax.devices()[:4])
    sample_many(pipe.replace(mesh=mesh), PROMPTS, tmp_path / "four", batch_size=4, **steps)
    assert pipe.programs.compilations == before + 1, "the last batch of three is padded, not compiled"
    one, four = pixels(tmp_path / "one"), pixels(tmp_path / "four")
    assert len(one) == 7
    assert len({image.tobytes() for image in one.values()}) == 7
    for name, image in one.items():
        np.testing.assert_array_equal(image, four[name])
    record = json.loads((tmp_path / "one" / "00000" / "metadata.jsonl").read_text().splitlines()[0])
    mesh = make_mesh(devices=jax.devices()[:1])
    call = {"seed": [record["seed"]], "guidance_scale": record["guidance_scale"], "num_inference_steps": 2}
    again = pipe.replace(mesh=mesh)(record["prompt"], **call).images[0]
    np.testing.assert_array_equal(np.asarray(again), one[record["file_name"]])


def lora_file(pipe: Any, path: Path, rank: int) -> str:
    """A LoRA file for the UNet's attention."""
    pairs = lora.init(pipe.components["unet"].shapes(), rank, jax.random.key(rank), r"to_[qv]$")
    save_lora(path, {"unet": jax.tree.map(lambda x: np.full(x.shape, 0.01, np.float32), pairs)})
    return str(path)


def test_lora_weights_are_data(pipe: Any, tmp_path: Path) -> None:
    """Rows with other weights of a file share its batches, rows with other files of the same rank its program."""
    a, b = (lora_file(pipe, tmp_path / f"style-{name}", 2) for name in "ab")
    device = Device(pipe, 4)
    weak, strong, other, mixed, none = images(
        {"lora": {a: 0.2}}, {"lora": {a: 1}}, {"lora": b}, {"lora": {a: 1, b: 2}}, {}
    )
    assert device.group(weak) == device.group(strong)
    assert len({device.group(image) for image in (weak, other, mixed, none)}) == 4
    batch = device.batch([weak, strong])
    np.testing.assert_allclose(batch.request.rows["lora_scale"], [0.2, 1.0])
    signature = lambda image: device.batch([image]).pipe.signature_of(device.batch([image]).pipe.params)
    assert signature(weak) == signature(other) != signature(mixed)
    assert device.batch([none]).pipe is device.pipe
    with pytest.raises((ValueError, OSError), match="none"):
        device.batch(images({"lora": str(tmp_path / "none")}))
    device.close()


def test_images_of_one_program_share_a_kind(pipe: Any) -> None:
    """Prompts, scales and steps are data; size and guidance are not."""
    device = Device(pipe, 2)
    kind = lambda *rows: device.batch(images(*rows)).kind
    plain = kind({"guidance_scale": 3})
    assert kind({"guidance_scale": 9, "prompt": "a dog"}, {"guidance_scale": 2}) == plain
    assert kind({"guidance_scale": 3, "negative_prompt": "blurry", "num_inference_steps": 7}) == plain
    assert kind({"guidance_scale": 3, "height": 32}) != plain
    assert kind({"guidance_scale": 1}) != plain
    device.close()


def test_a_prompt_is_not_padded_by_longer_ones(pipe: Any) -> None:
    """The network would see the empty chunks, so a prompt has company of as many chunks alone."""
    device = Device(pipe, 2)
    short, other, long = images(*({"prompt": text, "long_prompts": True} for text in ("a cat", "a dog", "word " * 12)))
    assert device.group(short) == device.group(other) != device.group(long)
    with pytest.raises(ValueError, match="bracket|parenthes|closed|'\\('"):
        device.group(images({"prompt": "(a cat", "prompt_syntax": "compel"})[0])
    device.close()


def memory_error() -> Exception:
    return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")


@pytest.fixture
def fake_calls(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Device calls that make grey images, up to a size at which memory ends; says which sizes were tried."""
    state = SimpleNamespace(sizes=[], fits=10**6, at_once=False, needs=100.0)

    def call(pipe: Any, request: Any, begin: int, end: int, size: int) -> Any:
        def run() -> dict[str, Any]:
            state.sizes.append(size)
            if size > state.fits and state.at_once:
                raise memory_error()
            return {"images": None if size > state.fits else np.full((size, 4, 4, 3), begin, np.uint8)}

        return SimpleNamespace(memory_analysis=lambda: None), run

    def ready(results: dict[str, Any]) -> None:
        if results["images"] is None:
            raise memory_error()

    monkeypatch.setattr(devices, "device_call", call)
    monkeypatch.setattr(devices.jax, "block_until_ready", ready)
    return state


def made(device: Device, rows: Sequence[Image]) -> list[str]:
    return [one.image.key for call in device.start(device.batch(rows)) for one in device.finish(call)]


@pytest.mark.parametrize("at_once", [True, False])
def test_auto_halves_the_size_until_it_fits(pipe: Any, fake_calls: SimpleNamespace, at_once: bool) -> None:
    """Whether the error comes from the call or later, every image is made once, and later batches start smaller."""
    fake_calls.fits, fake_calls.at_once = 1, at_once
    device = Device(pipe, "auto")
    rows = images(*[{}] * 4)
    with pytest.warns(UserWarning, match="do not fit into memory; going on with [12]"):
        assert made(device, rows) == [image.key for image in rows]
    assert fake_calls.sizes == [4, 2, 1, 1, 1, 1]
    assert made(device, rows) == [image.key for image in rows]
    assert fake_calls.sizes[6:] == [1, 1, 1, 1]
    device.close()


def test_a_size_that_the_user_chose_is_not_changed(pipe: Any, fake_calls: SimpleNamespace) -> None:
    fake_calls.fits = 1
    device = Device(pipe, 4)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        made(device, images(*[{}] * 4))
    device.close()


def test_auto_asks_the_compiler_what_fits(
    pipe: Any, fake_calls: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One small program says what an image needs; other sizes of image follow from it without another."""
    monkeypatch.setattr(devices, "free_memory", lambda pipe: 4000.0)
    asked: list[Any] = []
    monkeypatch.setattr(devices, "needed_memory", lambda program: (asked.append(program), 100.0)[1])
    device = Device(pipe, "auto")
    device._measures, device.largest = True, MOST
    assert device.size(device.batch(images({}))) == 32  # 0.85 of 40
    assert device.size(device.batch(images({"height": 32, "width": 32}))) == 8
    assert device.size(device.batch(images({"height": 16, "width": 16}))) == 32
    assert len(asked) == 1
    device.close()


def test_a_clock_counts_the_time_without_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(devices.time, "perf_counter", lambda: now[0])
    clock = Clock()
    for at, step in ((1, "begin"), (2, "begin"), (4, "end"), (5, "end"), (6, "begin"), (9, "end")):
        now[0] = float(at)
        clock.begin(0.0) if step == "begin" else clock.end()
    assert (clock.waited, clock.seconds) == (1.0, 8.0)
    now[0] = 20.0
    clock.begin(10.0)  # compiled for ten of the eleven seconds
    assert clock.waited == 2.0


def test_pipelines_that_need_images_are_refused(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="from prompts alone, but StableDiffusionImg2ImgPipeline needs images"):
        sample_many(StableDiffusionImg2ImgPipeline.from_pipe(pipe), ["a"], tmp_path)
    with pytest.raises(TypeError, match="no argument guidence"):
        sample_many(pipe, ["a"], tmp_path, guidence=2)
