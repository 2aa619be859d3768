"""The command line: usage, exit status, what goes to stdout and what to stderr."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import jax
import numpy as np
import pytest
from PIL import Image

import diffuse_jax
from diffuse_jax import cli, image_flags, output
from tests.pipelines import tiny

COMMANDS = ("generate", "convert", "convert-lora", "extract-lora", "merge", "parity", "env")
ROOT = Path(__file__).resolve().parents[1]


class FakePipeline:
    """In place of a pipeline: records how it was opened and called; returns one grey image per prompt and repeat."""

    def __init__(self, scheduler: object = None) -> None:
        self.scheduler = scheduler
        self.calls: list[dict[str, Any]] = []

    def replace(self, **changes: Any) -> FakePipeline:
        self.__dict__.update(changes)
        return self

    def __call__(self, prompt: str | list[str], num_images_per_prompt: int = 1, **call: Any) -> SimpleNamespace:
        self.calls.append({"prompt": prompt, "num_images_per_prompt": num_images_per_prompt, **call})
        count = (1 if isinstance(prompt, str) else len(prompt)) * num_images_per_prompt
        seed = call.get("seed", 12345)
        seeds = seed if isinstance(seed, list) else [seed] * count
        return SimpleNamespace(images=[Image.new("RGB", (8, 8), "grey")] * count, seeds=seeds)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    fake = FakePipeline()

    def opener(kind: str) -> Any:
        def open_it(source: str, **options: Any) -> FakePipeline:
            fake.opened, fake.source, fake.options = kind, source, options
            return fake

        return open_it

    kinds = {kind: opener(kind) for kind in ("from_pretrained", "from_single_file")}
    monkeypatch.setitem(vars(diffuse_jax), "DiffusionPipeline", SimpleNamespace(**kinds))

    def check_call(args: argparse.Namespace, call: dict[str, Any]) -> None:
        """What needs no model."""
        cli.how_to_open(args)
        if args.scheduler is not None:
            cli.scheduler_class(args.scheduler)

    monkeypatch.setattr(cli, "check_call", check_call)
    return fake


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def examples(text: str) -> list[list[str]]:
    """The words after ``diffuse-jax`` of every command line in a text; a backslash continues a line."""
    lines = re.findall(r"^\s*(?:\$ )?diffuse-jax ([^\n]*)", text.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(command, "--help")
    assert stop.value.code == 0
    found = examples(capsys.readouterr().out.partition("example:")[2])
    assert [words[0] for words in found] == [command]
    cli.build_parser().parse_args(found[0])


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_command_lines_of_the_documentation_parse(page: Path) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for words in examples("".join(blocks)):
        if not {"--help", "--version"} & set(words):
            cli.build_parser().parse_args(words)


@pytest.mark.parametrize("command", ["generate", "parity"])
def test_every_number_has_bounds(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    commands = next(action for action in cli.build_parser()._actions if action.dest == "command")
    parser = commands.choices[command]  # type: ignore[index, call-overload]
    numeric = [action for action in parser._actions if action.metavar in ("N", "X", "PIXELS")]
    assert len(numeric) > 8
    for action in numeric:
        flag = action.option_strings[0]
        for text in ("nan", "inf", "-inf", "many", *(["-1"] if action.metavar != "X" else [])):
            with pytest.raises(SystemExit):
                parser.parse_args([f"{flag}={text}"])
            assert re.search(rf"argument {flag}: must be a .*number.*, got {text}\n", capsys.readouterr().err)


def test_no_path_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    """It would mean the current folder."""
    commands = next(action for action in cli.build_parser()._actions if action.dest == "command").choices
    kinds = ("DIR", "FILE", "SOURCE", "SRC", "DST", "MODEL", "BASE", "TUNED", "PATH[=SCALE]")
    found = 0
    for name in COMMANDS:
        for action in commands[name]._actions:  # type: ignore[index, call-overload]
            if action.metavar in kinds:
                found += 1
                with pytest.raises(argparse.ArgumentTypeError, match="a path must not be empty"):
                    action.type("")
    assert found > 25
    with pytest.raises(SystemExit) as stop:
        run("generate", "--prompt", "x", "--output", "")
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("argument --output: a path must not be empty; the current folder is '.'\n")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("paint",),
        ("generate",),
        ("generate", "--prompt", "x", "--height", "0"),
        ("convert", "a"),
        ("parity",),
        ("env", "--fast"),
    ],
)
def test_wrong_usage_is_status_2(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: diffuse-jax")


def test_generate_passes_only_what_was_given(
    pipeline: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", "--prompt", "a cat", "--seed", 7, "--output", tmp_path) == 0
    assert (pipeline.source, pipeline.options) == ("diffuse-jax/emoji", {})
    assert pipeline.calls == [{"prompt": "a cat", "seed": 7, "num_images_per_prompt": 1}]
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'image-0001.png'}\n"
    assert re.search(r"^seed 7: load \d.*s, compile \d.*s, sample \d.*s", err, re.MULTILINE)


def test_generate_passes_every_flag(pipeline: FakePipeline, tmp_path: Path) -> None:
    flags = ["--num-inference-steps", 3, "--guidance-scale", 2.5, "--height", 64, "--width", 32, "--dtype", "bfloat16"]
    flags += ["--num-images-per-prompt", 2, "--negative-prompt", "blurry", "--variant", "fp16", "--revision", "main"]
    flags += ["--guidance-rescale", 0.7, "--clip-skip", 1, "--batch-size", 2, "--progress-bar"]
    flags += ["--prompt-syntax", "a1111", "--long-prompts"]
    prompts = ["--prompt", "a cat", "--prompt", "a dog"]
    assert run("generate", *prompts, *flags, "--seed", 1, 2, 3, 4, "--model", "some/where", "--output", tmp_path) == 0
    assert pipeline.source == "some/where"
    assert pipeline.options == {"dtype": "bfloat16", "variant": "fp16", "revision": "main"}
    call = {"num_inference_steps": 3, "guidance_scale": 2.5, "height": 64, "width": 32, "num_images_per_prompt": 2}
    call |= {"guidance_rescale": 0.7, "clip_skip": 1, "batch_size": 2, "progress_bar": True, "seed": [1, 2, 3, 4]}
    call |= {"prompt_syntax": "a1111", "long_prompts": True}
    assert pipeline.calls == [{**call, "prompt": ["a cat", "a dog"], "negative_prompt": "blurry"}]
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_the_safety_checker_is_left_out_on_request(pipeline: FakePipeline, tmp_path: Path) -> None:
    words = ("generate", "--prompt", "a cat", "--no-safety-checker", "--output", tmp_path, "--model")
    assert run(*words, "folder") == 0
    assert pipeline.options == {"safety_checker": None, "requires_safety_checker": False}
    assert run(*words, "model.safetensors") == 0
    assert pipeline.options == {}, "a single file has none"


def test_the_home_folder_is_found_where_the_shell_leaves_it(
    pipeline: FakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run("generate", "--prompt", "a cat", "--output=~/x", "--model=~/model") == 0
    assert (tmp_path / "x" / "image-0001.png").is_file()
    assert not (tmp_path / "~").exists()
    assert pipeline.source == str(tmp_path / "model")


def test_a_single_file_is_opened_as_one(
    pipeline: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("generate", "--prompt", "a cat", "--output", tmp_path, "--model")
    flags = ("--tokenizer", "words", "--prediction-type", "v_prediction")
    assert run(*words, "model.safetensors", *flags) == 0
    assert (pipeline.opened, pipeline.source) == ("from_single_file", "model.safetensors")
    assert run(*words, "model.CKPT") == 0
    assert (pipeline.opened, pipeline.source) == ("from_single_file", "model.CKPT")
    assert run(*words, "model.safetensors", *flags) == 0
    assert pipeline.options == {"tokenizer": "words", "prediction_type": "v_prediction"}
    assert run(*words, "model.ckpt", "--variant", "fp16") == 1
    assert "--variant: not for a single file" in capsys.readouterr().err
    assert run(*words, "folder", *flags) == 1
    assert "--tokenizer, --prediction-type: not for a folder" in capsys.readouterr().err


def test_without_a_seed_a_random_one_is_reported(
    pipeline: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", "--prompt", "a cat", "--output", tmp_path) == 0
    assert "seed" not in pipeline.calls[0]
    assert "seed 12345:" in capsys.readouterr().err


def test_generate_gives_the_images_of_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tiny.pipeline()
    pipe.save_pretrained(tmp_path / "model")
    long = "so long a prompt that the last words are cut off"
    words = ["--prompt", "a cat", "--prompt", long, "--seed", 3, 4, "--num-inference-steps", 2, "--scheduler", "ddim"]
    assert run("generate", "--model", tmp_path / "model", *words, "--output", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert re.search(r"^warning: the prompt is \d+ tokens too long", err, re.MULTILINE)
    with pytest.warns(UserWarning, match="too long"):
        expected = pipe(["a cat", long], seed=[3, 4], num_inference_steps=2).images
    for path, image in zip(out.split(), expected, strict=True):
        difference = np.asarray(Image.open(path)).astype(int) - np.asarray(image)
        assert np.abs(difference).max() <= 1


def test_an_image_records_how_it_was_generated(tmp_path: Path) -> None:
    tiny.pipeline().save_pretrained(tmp_path / "model")
    words = ["--prompt", "a cat", "--prompt", "ein Hündchen", "--negative-prompt", "blurry", "--seed", 3, 4]
    words += ["--num-inference-steps", 2, "--scheduler", "ddim", "--guidance-scale", 2.5, "--noise", "cuda"]
    assert run("generate", "--model", tmp_path / "model", *words, "--output", tmp_path / "out") == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert [(line["file_name"], line["text"], line["seed"]) for line in lines] == [
        ("image-0001.png", "a cat", 3),
        ("image-0002.png", "ein Hündchen", 4),
    ]
    info = Image.open(tmp_path / "out" / "image-0002.png").info
    settings = json.loads(info["diffuse_jax"])
    assert (settings["scheduler"], settings["num_inference_steps"], settings["guidance_scale"]) == (
        "DDIMScheduler",
        2,
        2.5,
    )
    assert info["parameters"].splitlines()[:2] == ["ein Hündchen", "Negative prompt: blurry"]
    assert (
        info["parameters"]
        .splitlines()[2]
        .startswith("Steps: 2, Sampler: DDIMScheduler, CFG scale: 2.5, Seed: 4, Size: 16x16")
    )
    assert settings["noise"] == "cuda"
    assert info["parameters"].endswith("RNG: NV")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, a ControlNet ``net``, and images."""
    folder = tmp_path_factory.mktemp("drawn")
    pipe = tiny.pipeline()
    pipe.save_pretrained(folder / "model")
    net, params = diffuse_jax.ControlNetModel.from_unet(
        pipe.components["unet"], pipe.params["unet"], conditioning_embedding_out_channels=(4, 8)
    )
    net.save_pretrained(folder / "net", params)
    rng = np.random.default_rng(0)
    for name in ("photo", "edges"):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{name}.png")
    Image.fromarray(np.eye(16, dtype=bool)).save(folder / "mask.png")
    return folder


@pytest.mark.parametrize(
    ("flags", "kind", "images"),
    [
        (["--image"], "Img2Img", {"image": "photo"}),
        (["--image", "--mask-image"], "Inpaint", {"image": "photo", "mask_image": "mask"}),
        (["--control-image"], "ControlNet", {"image": "edges"}),
        (["--image", "--control-image"], "ControlNetImg2Img", {"image": "photo", "control_image": "edges"}),
    ],
)
def test_images_choose_the_pipeline(flags: list[str], kind: str, images: dict[str, str], drawn: Path) -> None:
    """The request is that of the class for these images."""
    files = {"--image": "photo.png", "--mask-image": "mask.png", "--control-image": "edges.png"}
    words = [str(word) for flag in flags for word in (flag, drawn / files[flag])]
    words += ["--controlnet", str(drawn / "net")] if "ControlNet" in kind else []
    args = cli.build_parser().parse_args(["generate", "--prompt", "a cat", *words])
    pipe, given = image_flags.for_images(tiny.pipeline(), args)
    assert type(pipe).__name__ == f"StableDiffusion{kind}Pipeline"
    assert given.keys() == images.keys()
    for name, file in images.items():
        np.testing.assert_array_equal(given[name], Image.open(drawn / f"{file}.png").convert("RGB"))
    pipe.request("a cat", **given)


def test_an_image_is_changed_from_the_command_line(drawn: Path, tmp_path: Path) -> None:
    words = ["--image", drawn / "photo.png", "--strength", 0.5, "--num-inference-steps", 2, "--seed", 3]
    assert run("generate", "--model", drawn / "model", "--prompt", "a", *words, "--output", tmp_path / "out") == 0
    pipe = diffuse_jax.AutoPipelineForImage2Image.from_pretrained(drawn / "model")
    (wanted,) = pipe("a", image=Image.open(drawn / "photo.png"), strength=0.5, num_inference_steps=2, seed=3).images
    made = Image.open(tmp_path / "out" / "image-0001.png")
    assert np.abs(np.asarray(made).astype(int) - np.asarray(wanted)).max() <= 1
    settings = json.loads(made.info["diffuse_jax"])
    assert (settings["strength"], settings["image"]) == (0.5, [str(drawn / "photo.png")])


def test_images_that_nothing_takes_are_refused(drawn: Path, tmp_path: Path, capsys: Any) -> None:
    words = ("generate", "--model", drawn / "model", "--prompt", "a", "--output", tmp_path)
    for flags, message in (
        (("--control-image", drawn / "edges.png"), "--control-image needs --controlnet"),
        (("--controlnet", drawn / "net"), "--controlnet needs --control-image"),
        (("--depth-map", drawn / "edges.png"), "--depth-map takes a .npy file"),
        (("--strength", 0.5), "has no argument strength"),
        (("--ema",), "--ema: not for a folder"),
    ):
        assert run(*words, *flags) == 1
        assert message in capsys.readouterr().err


def test_adapters_and_a_mesh_from_the_command_line(pipeline: FakePipeline, tmp_path: Path, capsys: Any) -> None:
    loaded: list[tuple[str, float]] = []
    pipeline.load_lora_weights = lambda source, scale: (loaded.append((source, scale)), pipeline)[1]  # type: ignore[attr-defined]
    words = ("generate", "--prompt", "a cat", "--output", tmp_path)
    assert run(*words, "--lora", "a.safetensors", "--lora", "b=0.5", "--mesh", "data=4,fsdp=2") == 0
    assert loaded == [("a.safetensors", 1.0), ("b", 0.5)]
    assert pipeline.options["mesh"] == "data=4,fsdp=2"
    for wrong, message in (("model=2", "no axis 'model'; there are data, fsdp"), ("4", "pairs such as data=4,fsdp=2")):
        with pytest.raises(SystemExit):
            run(*words, "--mesh", wrong)
        assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_loaded(
    pipeline: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run("generate", "--prompt", "a cat", "--output", tmp_path / "file") == 1
    assert "file" in capsys.readouterr().err
    assert not pipeline.calls


def test_images_are_added_never_overwritten(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first = output.save_images([red], tmp_path / "new")
    second = output.save_images([blue, blue], tmp_path / "new")
    assert [p.name for p in first + second] == ["image-0001.png", "image-0002.png", "image-0003.png"]
    assert Image.open(first[0]).getpixel((0, 0)) == (255, 0, 0)
    assert len(list((tmp_path / "new").iterdir())) == 3


@pytest.mark.parametrize(
    "text", ["two\nlines", "a, b: c\nSteps: 20", "a\0b", b"caf\xe9".decode(errors="surrogateescape"), "e\u0301"]
)
def test_any_text_is_stored_with_an_image(text: str, tmp_path: Path) -> None:
    """Names of models are paths, whose bytes need not be UTF-8; as settings of the web UI they are quoted."""
    settings = {"prompt": text, "seed": 3, "model": text}
    (path,) = output.save_images([Image.new("L", (2, 2))], tmp_path, [settings])
    info = Image.open(path).info
    assert json.loads(info["diffuse_jax"]) == settings
    lines = (tmp_path / "metadata.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line)["model"] for line in lines[:-1]] == [text]
    pairs = info["parameters"].splitlines()[-1]
    assert pairs.startswith("Seed: 3, Size: 2x2, Model: ")
    if "\n" in text:
        assert pairs.endswith(json.dumps(text))
    assert "\0" not in info["parameters"]


def test_several_writers_share_a_folder(tmp_path: Path) -> None:
    """Four at once, thirty images each: none is lost, and each line of the metadata names its own image."""

    def write(k: int) -> list[Path]:
        made = lambda i: [{"prompt": f"{k} {i}", "seed": i}]
        return [output.save_images([Image.new("L", (2, 2), 60 * k + i)], tmp_path, made(i))[0] for i in range(30)]

    with ThreadPoolExecutor(4) as pool:
        found = [path for paths in pool.map(write, range(4)) for path in paths]
    assert len({*found}) == 120 == len(list(tmp_path.glob("*.png")))
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 120
    for line in lines:
        k, i = map(int, line["text"].split())
        assert Image.open(tmp_path / line["file_name"]).getpixel((0, 0)) == 60 * k + i


def test_a_failed_save_leaves_no_image(tmp_path: Path) -> None:
    class Broken:
        def save(self, file: IO[bytes], **options: Any) -> None:
            file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        output.save_images([Broken()], tmp_path)  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no folder 'x'"), 1), (TypeError("no folder 'x'"), 1), (KeyboardInterrupt(), 130)]
)
def test_errors_are_one_line_and_a_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DIFFUSE_JAX_DEBUG", raising=False)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli, "convert", fail)
    assert run("convert", "x", "y") == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err in ("diffuse-jax convert: no folder 'x'\n", "interrupted\n")


def test_convert_passes_only_what_was_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    home = importlib.import_module("diffuse_jax.convert")
    monkeypatch.setattr(home, "convert", lambda *args, **options: calls.append((args, options)))
    assert run("convert", "a", "b") == 0
    assert (
        run("convert", "a.ckpt", "b", "--to", "flax-msgpack", "--dtype", "float16", "--prediction-type", "epsilon") == 0
    )
    options = {"to": "flax-msgpack", "dtype": "float16", "prediction_type": "epsilon"}
    assert calls == [(("a", "b"), {"to": "diffusers"}), (("a.ckpt", "b"), options)]
    assert capsys.readouterr().out == "b\nb\n"


def test_choices_are_those_of_the_library() -> None:
    home = importlib.import_module("diffuse_jax.convert")
    assert set(cli.LAYOUTS) == set(home.LAYOUTS)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFUSE_JAX_DEBUG", "1")
    monkeypatch.setattr(cli, "save_images", lambda *_: (_ for _ in ()).throw(ValueError("full")))
    monkeypatch.setattr(cli, "convert", lambda *_: cli.save_images([], tmp_path))
    with pytest.raises(ValueError, match="full"):
        run("convert", "x", "y")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddim", "DDIMScheduler"),
        ("EulerDiscreteScheduler", "EulerDiscreteScheduler"),
        ("euler-ancestral-discrete", "EulerAncestralDiscreteScheduler"),
        ("dpm_solver_multistep", "DPMSolverMultistepScheduler"),
    ],
)
def test_scheduler_names(name: str, expected: str) -> None:
    assert cli.scheduler_class(name) is getattr(diffuse_jax, expected)


def test_an_unknown_scheduler_names_the_known(
    pipeline: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", "--prompt", "x", "--scheduler", "runge", "--output", tmp_path) == 1
    err = capsys.readouterr().err
    assert "'runge'" in err
    assert "DDIMScheduler" in err
    assert "loading" not in err


def test_compile_seconds_unites_nested_traces() -> None:
    @jax.jit
    def inner(x: jax.Array) -> jax.Array:
        return jax.numpy.sin(x) + 3.25

    @jax.jit
    def outer(x: jax.Array) -> jax.Array:
        return inner(inner(x) * 2)

    import time

    start = time.perf_counter()
    with cli.compile_seconds() as seconds:
        before = seconds()
        outer(jax.numpy.ones(3)).block_until_ready()
        total = time.perf_counter() - start
    assert before == 0
    assert 0 < seconds() <= total


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFUSE_JAX_CACHE", str(tmp_path / "mine"))
    assert cli.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("DIFFUSE_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cli.cache_folder() == tmp_path / "xdg" / "diffuse_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.cache_folder() == tmp_path / ".cache" / "diffuse_jax"


@pytest.mark.parametrize("command", [["generate", "--prompt", "a red apple"], ["parity", "diffuse-jax/emoji"]])
@pytest.mark.parametrize(("words", "variable"), [([], "1"), (["--no-compilation-cache"], "1"), ([], "off")])
def test_commands_keep_what_jax_compiles(
    command: list[str], words: list[str], variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Unless the flag or the variable says no."""
    folders: list[Path] = []
    monkeypatch.setattr(cli, "use_compilation_cache", folders.append)
    monkeypatch.setenv("DIFFUSE_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("DIFFUSE_JAX_COMPILATION_CACHE", variable)
    wanted = cli.keep_compilations(cli.build_parser().parse_args([*command, *words]))
    assert wanted == (not words and variable == "1")
    assert folders == [tmp_path / "xla"] * wanted


def test_env_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffuse_jax", "env"],
        env={**os.environ, "DIFFUSE_JAX_CACHE": str(tmp_path), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    report = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert report["diffuse_jax"] == diffuse_jax.__version__
    assert report["jax"] == jax.__version__
    assert report["cache"] == str(tmp_path)
    assert report["devices"].startswith("1 x ")
    assert set(report) >= {f"extra {name}" for name in cli.EXTRAS}


def test_env_shows_where_parameters_go_on_devices_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Every parameter is listed once, and the columns of bytes add up to the totals."""
    assert run("env", "--mesh", "fsdp=16,tensor=4", "--dtype", "bfloat16") == 0
    *_, table, totals, last = capsys.readouterr().out.split("\n\n")
    head, *rows = [re.split(r" {2,}", line) for line in table.splitlines()]
    assert head == ["parameter", "shape", "logical axes", "cut along", "bytes per device"]
    by_path = {row[0]: row[1:] for row in rows}
    query = "unet/down_blocks_1/attentions_0/transformer_blocks_0/attn1/to_q/kernel"
    assert by_path[query] == ["96x96", "embed,heads", "fsdp,tensor", "288"]
    assert by_path["unet/conv_norm_out/bias"][1:3] == ["-", "-"]
    number = lambda text: int(text.replace(",", ""))
    sizes = {line.split()[0]: [number(n) for n in line.split()[1:]] for line in totals.splitlines()[1:]}
    unet = [number(row[-1]) for path, row in by_path.items() if path.startswith("unet/")]
    assert sizes["unet"] == [4_808_692, 2 * 4_808_692, sum(unet)]
    assert sizes["total"][2] == sum(number(row[-1]) for row in by_path.values()) < sizes["total"][1] / 4
    assert "on 64 devices (fsdp 16, tensor 4)" in last


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """The shipped model, twice, from an empty cache folder: the same image, compiled once."""
    command = [sys.executable, "-m", "diffuse_jax", "generate", "--prompt", "a red apple, noto style", "--seed", "0"]
    command += ["--num-inference-steps", "5", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "DIFFUSE_JAX_CACHE": str(tmp_path / "cache"), "XLA_FLAGS": ""}
    environment.pop("DIFFUSE_JAX_COMPILATION_CACHE", None)
    reports = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr for _ in range(2)
    ]
    first, second = (float(re.search(r"compile (\S+) s", report)[1]) for report in reports)
    assert second < 1 < first
    one, two = (Image.open(path) for path in sorted((tmp_path / "out").glob("*.png")))
    assert one.tobytes() == two.tobytes()
    assert len(list((tmp_path / "cache" / "programs").iterdir())) == 1


@pytest.mark.slow
def test_what_is_warmed_up_is_not_compiled_again(tmp_path: Path) -> None:
    environment = {**os.environ, "DIFFUSE_JAX_CACHE": str(tmp_path / "cache"), "XLA_FLAGS": ""}
    environment.pop("DIFFUSE_JAX_COMPILATION_CACHE", None)
    call = lambda *words: subprocess.run(
        [sys.executable, "-m", "diffuse_jax", *words], env=environment, capture_output=True, text=True, check=True
    )
    size = ["--height", "32", "--width", "32"]
    files = call("warmup", *size, "--images", "1", "2").stdout.split()
    assert len(files) == 2
    assert all(Path(file).parent == tmp_path / "cache" / "programs" for file in files)
    assert call("warmup", *size, "--images", "1", "2").stdout == ""
    prompts = ["--prompt", "a red apple, noto style", "--prompt", "pizza, noto style", "--num-inference-steps", "2"]
    made = call("generate", *size, *prompts, "--output", str(tmp_path / "out"))
    assert float(re.search(r"compile (\S+) s", made.stderr)[1]) < 1


def test_nothing_is_warmed_up_where_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIFFUSE_JAX_COMPILATION_CACHE", "0")
    assert run("warmup") == 1
    assert "DIFFUSE_JAX_COMPILATION_CACHE turns off what warmup fills" in capsys.readouterr().err
