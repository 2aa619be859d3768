"""The ``diffuse-jax`` command: ``generate``, ``warmup``, ``convert``, ``parity``, ``env``, those of
:mod:`weights_commands`, and ``runs``.

Results go to stdout or to files, messages to stderr, and the exit status is 0 only on success. Building the parser
imports nothing heavy, so ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffuse_jax
from diffuse_jax import batch_command, runs_command, weights_commands
from diffuse_jax.bounds import COUNT, FINITE, SHARE, TORCH_SEED, number
from diffuse_jax.command import run_command, silent_without_readers
from diffuse_jax.image_flags import IMAGES, NUMBERS, add_flags, configured_controlnet, for_images
from diffuse_jax.mesh_axes import mesh_text
from diffuse_jax.output import save_images, writable
from diffuse_jax.timing import compile_seconds
from diffuse_jax.torch_backend import command as parity_command
from diffuse_jax.training import watch
from diffuse_jax.writing import expanded, path_flag, path_text

SHIPPED_MODEL = "diffuse-jax/emoji"
DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("diffusers", "flax-msgpack", "single-file")
PREDICTIONS = ("epsilon", "v_prediction")
EXTRAS = {
    "train": ("datasets", "grain", "tensorboard", "resvg-py"),
    "torch": ("torch", "diffusers", "accelerate", "peft"),
    "parquet": ("pyarrow",),
    "docs": ("sphinx", "myst-nb", "sphinx-book-theme"),
    "dev": ("pytest", "hypothesis", "ruff", "mypy"),
}
REQUIRED = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "numpy",
    "safetensors",
    "huggingface_hub",
)
SMALLER = {
    "generate": "try --batch-size 1, a smaller --height and --width, --dtype bfloat16, or more devices with --mesh",
    "parity": "try a smaller --height and --width, --batch-size or --resolution",
}
"""What helps against a lack of memory, by command."""
FROM_FOLDER = ("dtype", "revision", "variant")
FROM_SINGLE_FILE = ("dtype", "revision", "tokenizer", "prediction_type", "ema")
TO_CONVERT = ("dtype", "variant", "prediction_type", "tokenizer")
TO_CALL = (
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "guidance_rescale",
    "clip_skip",
    "prompt_syntax",
    "long_prompts",
    "num_images_per_prompt",
    "batch_size",
    "seed",
    "noise",
    "progress_bar",
    *NUMBERS,
)

OF_PROGRAMS = (
    "height",
    "width",
    "guidance_scale",
    "guidance_rescale",
    "clip_skip",
    "prompt_syntax",
    "long_prompts",
    "noise",
    *NUMBERS,
)
"""Arguments of a call that ``warmup`` passes on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted, 141 unread.

    Args:
      argv: the arguments after ``diffuse-jax``; those of the process if None.
    """
    with silent_without_readers():  # of --help
        args = build_parser().parse_args(argv)
    smaller = SMALLER.get(args.command, "")
    try:
        status = run_command(f"diffuse-jax {args.command}", lambda: args.run(args), argv, smaller=smaller)
    except SystemExit as ended:
        if not watch.failed():
            raise
        status = ended.code if isinstance(ended.code, int) else 1
    if watch.failed():
        watch.leave(status)
    return status


def say(message: str) -> None:
    """Print a message to the user on stderr."""
    print(message, file=sys.stderr, flush=True)


def generate(args: argparse.Namespace) -> None:
    """Generate images from prompts: paths to stdout, timings to stderr."""
    batch_command.check_flags(args)
    keep = keep_compilations(args)
    if args.prompts_file is not None:
        call = given(args, TO_CALL)

        def open_it() -> Any:  # after the processes have joined, which comes before anything that JAX does
            check_call(args, call | {"prompt": ""})
            return ready_pipeline(args, keep, local_mesh(args.mesh))[0]

        batch_command.generate(args, call, open_it, lambda pipe: keep_programs(pipe, keep))
        return
    call = {name: one_or_list(value) for name, value in given(args, TO_CALL).items()}

    folder = writable(args.output)  # fail here rather than after minutes of sampling
    check_call(args, call)
    start = time.perf_counter()
    pipe, images = ready_pipeline(args, keep, args.mesh)
    call |= images
    loaded = time.perf_counter()
    say(f"sampling {len(args.prompt) * call.get('num_images_per_prompt', 1)} image(s); the first run compiles")
    with compile_seconds() as compiling:
        out = pipe(**call)
    done = time.perf_counter()

    for path in save_images(out.images, folder, image_settings(args, pipe, out.seeds)):
        print(path)
    keep_programs(pipe, keep)
    sampling = done - loaded - compiling()
    seeds = " ".join(map(str, dict.fromkeys(out.seeds)))
    say(
        f"seed {seeds}: load {loaded - start:.1f} s, compile {compiling():.1f} s, "
        f"sample {sampling:.1f} s ({sampling / len(out.images):.2f} s per image)"
    )


def warmup(args: argparse.Namespace) -> None:
    """Compile the programs of calls without running them, and keep them: the new files to stdout, times to stderr."""
    if not compilation_cache_wanted():
        raise ValueError("DIFFUSE_JAX_COMPILATION_CACHE turns off what warmup fills; unset it")
    use_compilation_cache(cache_folder() / "xla")
    check_call(args, given(args, OF_PROGRAMS) | {"prompt": ""})
    pipe, images = ready_pipeline(args, True, args.mesh)
    call = given(args, OF_PROGRAMS) | images
    for count in dict.fromkeys(args.images):
        start = time.perf_counter()
        pipe.compile(**call, num_images_per_prompt=count)
        say(f"program for {count} image(s): {time.perf_counter() - start:.1f} s")
    for path in pipe.save_compiled(cache_folder() / "programs"):
        print(path)


def ready_pipeline(args: argparse.Namespace, keep: bool, mesh: Any) -> tuple[Any, dict[str, Any]]:
    """The pipeline with the sampler, the LoRA files and the task of the flags, and the images for its call.

    Programs that were kept are loaded into it.
    """
    say(f"loading {args.model}")
    pipe = with_sampler(open_pipeline(args, mesh), args)
    for source, scale in args.lora or ():
        pipe = pipe.load_lora_weights(source, scale=scale)
    pipe, images = for_images(pipe, args)
    if keep:
        pipe.load_compiled(cache_folder() / "programs")
    return pipe, images


def check_call(args: argparse.Namespace, call: dict[str, Any]) -> None:
    """Check a call and all files that the flags name, by configurations alone: no weights are downloaded or read.

    Args:
      args: the flags.
      call: the arguments of the call, without the images of the flags.

    Raises:
      ValueError, TypeError, OSError: as for opening the pipeline and for its call.
    """
    if args.scheduler is not None:
        scheduler_class(args.scheduler)
    options, off = how_to_open(args)
    from diffuse_jax.adapters.lora_file import read_adapter
    from diffuse_jax.pipelines.adapting import adaptable
    from diffuse_jax.pipelines.configured import configured_pipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come with the call itself
        known = {name: value for name, value in options.items() if name not in ("dtype", "variant")}
        pipe = with_sampler(configured_pipeline(args.model, **known, **off), args)
        for source, _ in args.lora or ():
            read_adapter(source, adaptable(pipe))
        pipe, images = for_images(pipe, args, configured_controlnet)
        of_run = ("batch_size", "progress_bar")
        pipe.request(**{name: value for name, value in call.items() if name not in of_run}, **images)


def with_sampler(pipe: Any, args: argparse.Namespace) -> Any:
    """The pipeline with the sampler of the flags, if they name one."""
    if args.scheduler is None:
        return pipe
    return pipe.replace(scheduler=scheduler_class(args.scheduler).from_config(pipe.scheduler))


def keep_programs(pipe: Any, keep: bool) -> None:
    """Keep the compiled programs on disk, if that is wanted."""
    if keep:
        pipe.save_compiled(cache_folder() / "programs")


def open_pipeline(args: argparse.Namespace, mesh: Any) -> Any:
    """The model's pipeline, from a single file in the original layout, a folder or the Hub."""
    options, off = how_to_open(args)
    pipeline = diffuse_jax.DiffusionPipeline
    open_it = pipeline.from_single_file if is_single(args.model) else pipeline.from_pretrained
    on_mesh = {} if mesh is None else {"mesh": mesh}
    return open_it(args.model, **options, **on_mesh, **off)


def is_single(model: str) -> bool:
    """Whether a model is a single file, by its name."""
    return Path(model).suffix.lower() in (".safetensors", ".ckpt")


def how_to_open(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options with which the model is opened, and the components that it is opened without.

    Raises:
      ValueError: a flag is not for this kind of model.
    """
    single = is_single(args.model)
    allowed, others = (FROM_SINGLE_FILE, FROM_FOLDER) if single else (FROM_FOLDER, FROM_SINGLE_FILE)
    if wrong := given(args, [name for name in others if name not in allowed]):
        flags = ", ".join("--" + name.replace("_", "-") for name in wrong)
        raise ValueError(f"{flags}: not for {'a single file' if single else 'a folder or a Hub id'}")
    off: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    return given(args, allowed), off if args.no_safety_checker and not single else {}


def image_settings(args: argparse.Namespace, pipe: Any, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The settings to store with each image."""
    copies = args.num_images_per_prompt or 1
    sizes = ("height", "width", "num_inference_steps")
    names = ("noise", "guidance_rescale", "clip_skip", "prompt_syntax", "long_prompts", *sizes, "guidance_scale")
    shared = {"model": str(args.model), "scheduler": type(pipe.scheduler).__name__, **given(args, names)}
    shared |= given(args, (*NUMBERS, *IMAGES, "controlnet"))
    if args.lora:
        shared["lora"] = {str(source): scale for source, scale in args.lora}
    negatives = args.negative_prompt or [""]
    prompts = [(prompt, negatives[k % len(negatives)]) for k, prompt in enumerate(args.prompt)]
    each = [pair for pair in prompts for _ in range(copies)]
    return [
        {"prompt": prompt, "negative_prompt": negative, "seed": int(seed), **shared}
        for (prompt, negative), seed in zip(each, seeds, strict=True)
    ]


def lora_source(text: str) -> tuple[str, float]:
    """An argparse type: ``PATH`` or ``PATH=SCALE``."""
    source, _, scale = text.rpartition("=")
    try:
        return (path_text(source), float(scale)) if source else (path_text(text), 1.0)
    except ValueError:
        return path_text(text), 1.0


def local_mesh(text: str | None) -> Any:
    """The mesh of ``--mesh`` over the devices of this process; without the flag, images are divided over all of them.

    Raises:
      ValueError: the sizes do not fit the number of devices.
    """
    import jax

    from diffuse_jax.mesh_axes import parse_axes, with_data
    from diffuse_jax.sharding import make_mesh

    return make_mesh(**with_data(parse_axes(text or "data=-1")), devices=jax.local_devices())


def given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The named arguments that the user gave; all others keep the checkpoint's defaults."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def one_or_list(value: Any) -> Any:
    """The only element of a list of one, because a single prompt or seed applies to all images."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def scheduler_names() -> dict[str, str]:
    """Lower-case short name -> class name, e.g. ``eulerdiscrete`` -> ``EulerDiscreteScheduler``."""
    names = [name for name in diffuse_jax.__all__ if name.endswith("Scheduler")]
    return {name.removesuffix("Scheduler").lower(): name for name in names}


def scheduler_class(name: str) -> Any:
    """The scheduler called ``name``: a class name with or without ``Scheduler``; case and dashes do not matter."""
    names = scheduler_names()
    short = re.sub(r"[-_ ]", "", name).lower().removesuffix("scheduler")
    if short not in names:
        raise ValueError(f"no scheduler is called {name!r}; there are {', '.join(sorted(names.values()))}")
    return getattr(diffuse_jax, names[short])


def cache_folder() -> Path:
    """``$DIFFUSE_JAX_CACHE``, else ``$XDG_CACHE_HOME/diffuse_jax``, else ``~/.cache/diffuse_jax``."""
    if folder := os.environ.get("DIFFUSE_JAX_CACHE"):
        return expanded(folder)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "diffuse_jax"


def compilation_cache_wanted() -> bool:
    """False when ``DIFFUSE_JAX_COMPILATION_CACHE`` is 0, off, false or no."""
    return os.environ.get("DIFFUSE_JAX_COMPILATION_CACHE", "1").lower() not in ("0", "off", "false", "no")


def keep_compilations(args: argparse.Namespace) -> bool:
    """Whether to keep compiled programs on disk; if so, this also turns on JAX's compilation cache."""
    wanted = not args.no_compilation_cache and compilation_cache_wanted()
    if wanted:
        use_compilation_cache(cache_folder() / "xla")
    return wanted


def use_compilation_cache(folder: Path) -> None:
    """Use ``folder`` as JAX's compilation cache, unless ``JAX_COMPILATION_CACHE_DIR`` is set."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def convert(args: argparse.Namespace) -> None:
    """Convert a checkpoint to another layout and print the path of the result."""
    from diffuse_jax.convert import convert as convert_checkpoint

    start = time.perf_counter()
    convert_checkpoint(args.src, args.dst, to=args.to, **given(args, TO_CONVERT))
    print(args.dst)
    say(f"converted and verified in {time.perf_counter() - start:.1f} s")


def parity(args: argparse.Namespace) -> None:
    """Compare a checkpoint here and in PyTorch: print a table, and fail if the results differ."""
    keep_compilations(args)
    parity_command.run(args, None if args.scheduler is None else scheduler_class(args.scheduler))


def env(args: argparse.Namespace) -> None:
    """Print what a bug report needs, one ``name: value`` per line; with a mesh or a model, also where parameters go."""
    import jax

    print(f"diffuse_jax: {diffuse_jax.__version__}")
    print(f"python: {platform.python_version()} on {platform.platform()}")
    for name in REQUIRED:
        print(f"{name}: {version(name)}")
    devices = jax.devices()
    print(f"devices: {len(devices)} x {devices[0].device_kind} ({devices[0].platform})")
    print(f"cache: {cache_folder()}")
    print(f"compilation cache: {'on' if compilation_cache_wanted() else 'off'}")
    for extra, names in EXTRAS.items():
        found = ", ".join(f"{name} {version(name)}" for name in names)
        print(f"extra {extra}: {found}")
    if args.mesh is not None or args.model is not None:
        from diffuse_jax.placement_table import print_placement

        model, mesh = args.model or SHIPPED_MODEL, args.mesh or "data=1"
        print_placement(model, mesh, **given(args, ("dtype", "revision")))


def version(name: str) -> str:
    """The installed version of a distribution, or ``missing``; the package itself is not imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``args.run`` is the function that does the work."""
    parser = argparse.ArgumentParser(
        prog="diffuse-jax",
        description="Diffusion models in JAX.",
        epilog='example:\n  diffuse-jax generate --prompt "a red apple, noto style"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"diffuse-jax {diffuse_jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_generate(commands)
    add_warmup(commands)
    add_convert(commands)
    weights_commands.add_commands(commands, add_command, DTYPES)
    add_parity(commands)
    runs_command.add_commands(commands, add_command)
    add_env(commands)
    return parser


def add_command(commands: Any, name: str, run: Any, purpose: str, example: str) -> argparse.ArgumentParser:
    """Add the command ``name``, which calls ``run(args)``; its help ends with the example."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        epilog=f"example:\n  {example}\n\n--debug shows the traceback of an error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    command.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    return command


def add_generate(commands: Any) -> None:
    example = 'diffuse-jax generate --prompt "a red apple, noto style" --num-inference-steps 20 --seed 0'
    command = add_command(commands, "generate", generate, "generate images from prompts", example)
    add, source = command.add_argument, command.add_mutually_exclusive_group(required=True).add_argument
    source("--prompt", action="append", metavar="TEXT", help="prompt; repeat for several")
    about = "a prompt per line or row (.txt, .jsonl, .csv, .parquet): a job that can be interrupted and continued"
    source("--prompts-file", type=path_flag, metavar="FILE", help=about)
    add("--negative-prompt", action="append", metavar="TEXT", help="negative prompt; once, or once per prompt")
    add_model_flags(add)
    add("--num-inference-steps", type=number(COUNT), metavar="N", help="denoising steps")
    add("--num-images-per-prompt", type=number(COUNT), metavar="N", help="images per prompt")
    about = "maximum number of images at once (default: all; with --prompts-file: auto, what fits into memory)"
    add("--batch-size", type=batch_command.batch_size, metavar="N", help=about)
    about = "one seed, or one per image (default: random, and reported); with --prompts-file, row n has SEED + n"
    add("--seed", type=number(TORCH_SEED), nargs="+", metavar="N", help=about)
    add_program_flags(add)
    add("--lora", type=lora_source, action="append", metavar="PATH[=SCALE]", help="LoRA weights; repeat for several")
    add(
        "--output",
        type=path_flag,
        default=Path("outputs"),
        metavar="DIR",
        help="where the PNGs go (default: %(default)s)",
    )
    add(
        "--progress-bar",
        action="store_true",
        default=None,
        help="show a progress bar; each step then runs as a separate program",
    )
    batch_command.add_flags(command)
    add_no_compilation_cache(add)


def add_model_flags(add: Any) -> None:
    """Add the flags of :func:`open_pipeline` and the sampler."""
    about = "folder, Hub id or single file (default: %(default)s)"
    add("--model", type=path_text, default=SHIPPED_MODEL, metavar="SOURCE", help=about)
    add("--variant", metavar="NAME", help="variant of the weight files, e.g. fp16")
    add("--revision", metavar="NAME", help="branch, tag or commit on the Hub")
    add(
        "--tokenizer",
        type=path_text,
        metavar="SOURCE",
        help="folder or Hub id with the tokenizer that a single file lacks",
    )
    add("--prediction-type", choices=PREDICTIONS, help="prediction type, if a single file does not say it")
    add("--ema", action="store_true", default=None, help="use the averaged weights of a single file for training")
    add("--dtype", choices=DTYPES, help="dtype that the networks compute in")
    add("--scheduler", metavar="NAME", help="scheduler to use instead of the model's, e.g. EulerDiscrete or ddim")
    add("--mesh", type=mesh_text, metavar="AXES", help="device mesh, e.g. data=4 or data=2,fsdp=4")
    add("--no-safety-checker", action="store_true", help="do not load the model's safety checker")


def add_program_flags(add: Any) -> None:
    """Add the flags of a call that its compiled program depends on, besides the number of images."""
    add("--noise", choices=("torch", "cuda"), help="draw the noise that PyTorch draws for the seed, on CPU or GPU")
    add("--height", type=number(COUNT), metavar="PIXELS", help="height of the images")
    add("--width", type=number(COUNT), metavar="PIXELS", help="width of the images")
    add("--guidance-scale", type=number(FINITE), metavar="X", help="strength of the guidance; 1 or less turns it off")
    add(
        "--guidance-rescale",
        type=number(SHARE),
        metavar="X",
        help="0 to 1; reduces the overexposure of strong guidance",
    )
    add("--clip-skip", type=number(COUNT), metavar="N", help="skip the last N layers of the text encoder")
    about = "read weights in prompts: (word:1.2) and BREAK of a1111, word++ and .blend() of compel (default: none)"
    add("--prompt-syntax", choices=("a1111", "compel"), help=about)
    about = "encode prompts of any length, in chunks, instead of cutting what does not fit"
    add("--long-prompts", action="store_true", default=None, help=about)
    add_flags(add)


def add_warmup(commands: Any) -> None:
    purpose = "compile what generate would compile, and keep it for later processes"
    example = "diffuse-jax warmup --model stabilityai/stable-diffusion-xl-base-1.0 --dtype bfloat16 --images 1 4"
    command = add_command(commands, "warmup", warmup, purpose, example)
    command.set_defaults(lora=None)  # weights are data, so a program fits every LoRA that generate merges
    add = command.add_argument
    about = "numbers of images of a call, a program for each (default: 1)"
    add("--images", type=number(COUNT), nargs="+", default=[1], metavar="N", help=about)
    add_model_flags(add)
    add_program_flags(add)


def add_no_compilation_cache(add: Any) -> None:
    add("--no-compilation-cache", action="store_true", help="do not keep compiled programs on disk")


def add_convert(commands: Any) -> None:
    example = "diffuse-jax convert model.safetensors model-folder --tokenizer openai/clip-vit-large-patch14"
    add = add_command(
        commands, "convert", convert, "convert a checkpoint to another layout and verify the result", example
    ).add_argument
    add("src", type=path_text, metavar="SRC", help="folder, single .safetensors or .ckpt file, or Hub id")
    add("dst", type=path_text, metavar="DST", help="folder or file to write")
    add("--to", choices=LAYOUTS, default="diffusers", help="layout to write (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="cast floating-point tensors (default: unchanged)")
    add("--variant", metavar="NAME", help="variant of the weight files to read, e.g. fp16")
    add("--prediction-type", choices=PREDICTIONS, help="prediction type, if a single file does not say it")
    add(
        "--tokenizer",
        type=path_text,
        metavar="SOURCE",
        help="folder or Hub id with the tokenizer that a single file lacks",
    )


def add_parity(commands: Any) -> None:
    example = "diffuse-jax parity diffuse-jax/emoji --num-inference-steps 4 --report outputs/parity"
    purpose = "compare a checkpoint's results with PyTorch's"
    command = add_command(commands, "parity", parity, purpose, example)
    parity_command.add_flags(command, DTYPES)
    add_no_compilation_cache(command.add_argument)


def add_env(commands: Any) -> None:
    purpose = "show versions, devices, cache folder and optional packages, and how a mesh divides a model"
    example = "diffuse-jax env --mesh fsdp=8 --model stabilityai/stable-diffusion-xl-base-1.0"
    add = add_command(commands, "env", env, purpose, example).add_argument
    about = "show where each parameter goes on this mesh, e.g. data=2,fsdp=4; its devices need not be there"
    add("--mesh", type=mesh_text, metavar="AXES", help=about)
    about = f"folder, Hub id or single file to show, whose weights are not read (default: {SHIPPED_MODEL})"
    add("--model", type=path_text, metavar="SOURCE", help=about)
    add("--revision", metavar="NAME", help="branch, tag or commit on the Hub")
    add("--dtype", choices=DTYPES, help="dtype of the parameters (default: float32)")
