"""Draw the gallery of the documentation with the shipped model: ``docs/images/gallery_*.webp``.

Nothing is picked: prompts, seeds and settings stand below. Example:

    python docs/gallery.py            # all that need only the shipped model
    python docs/gallery.py --only steps previews
    python docs/gallery.py --only control loras --trained runs/gallery --data_dir runs/emoji/data
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gallery_sheets import SETTINGS, Sheet, draw, in_rows, thing
from gallery_tasks import IMAGE_PARTS, TRAINED_PARTS

from diffuse_jax import DiffusionPipeline, DPMSolverMultistepScheduler
from diffuse_jax.pipelines import Net
from diffuse_jax.pipelines.parts.decode import decode_latents
from diffuse_jax.weights.files import atomic_file

FOLDER = Path(__file__).resolve().parent / "images"
STYLES = ("noto", "blob", "fluent", "fluent flat", "twemoji", "emojione", "fxemoji", "streamline")


def main() -> None:
    args = parse_args()
    pipe = DiffusionPipeline.from_pretrained(args.model)
    for name in args.only:
        path = Path(args.output_dir) / f"gallery_{name}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            sheet = TRAINED_PARTS[name](pipe, args) if name in TRAINED_PARTS else PARTS[name](pipe)
            draw(sheet).save(file, format="WEBP", quality=86, method=6)
        print(path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="diffuse-jax/emoji", help="pipeline folder (default: the shipped model)")
    parser.add_argument("--output_dir", default=FOLDER, help="where the images go (default: docs/images)")
    known = [*PARTS, *TRAINED_PARTS]
    parser.add_argument("--only", nargs="+", choices=known, default=list(PARTS), help=f"default: {' '.join(PARTS)}")
    what = f"folder with the networks that the page of the gallery trains (for {', '.join(TRAINED_PARTS)})"
    parser.add_argument("--trained", default="runs/gallery", help=what)
    made = "data of make_dataset.py (for control, lcm and reward)"
    parser.add_argument("--data_dir", default="runs/emoji/data", help=made)
    parser.add_argument("--edits_dir", default="runs/emoji/edits", help="data of make_edits.py (for edits)")
    what = "folder of make_examples.py (for custom)"
    parser.add_argument("--examples_dir", default="runs/emoji/examples", help=what)
    return parser.parse_args()


def styles(pipe: Any) -> Sheet:
    """Rows of things, columns of styles, one noise."""
    things = ("red apple", "grinning face", "dog face", "red heart", "mushroom", "cat face")
    prompts = [f"{thing}, {style} style" for thing in things for style in STYLES]
    return Sheet(in_rows(pipe(prompts, seed=[5] * len(prompts), **SETTINGS).images), things, STYLES)


def guidance(pipe: Any) -> Sheet:
    """The same noise with rising guidance, the last row also rescaled."""
    scales = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0, 14.0]
    prompts = ["red heart, fluent style", "dog face, noto style", "grinning face, twemoji style"]
    repeated = [prompt for prompt in (*prompts, prompts[-1]) for _ in scales]
    rescale = [0.0] * 24 + [0.7] * 8
    given = SETTINGS | {"guidance_scale": scales * 4, "guidance_rescale": rescale}
    beside = [*map(thing, prompts), f"{thing(prompts[-1])}, rescaled"]
    return Sheet(in_rows(pipe(repeated, seed=[3] * 32, **given).images), beside, [f"{scale:g}" for scale in scales])


def steps(pipe: Any) -> Sheet:
    """The same noise with rising numbers of steps."""
    pipe = pipe.replace(scheduler=DPMSolverMultistepScheduler.from_config(pipe.scheduler))
    prompts = ["watermelon, noto style", "cat face, twemoji style", "bear, fluent style"]
    counts = (2, 3, 4, 6, 8, 12, 16, 25)
    columns = [pipe(prompts, seed=[1] * 3, **SETTINGS | {"num_inference_steps": count}).images for count in counts]
    return Sheet([list(row) for row in zip(*columns)], [*map(thing, prompts)], [f"{count} steps" for count in counts])


def previews(pipe: Any) -> Sheet:
    """What the network takes the clean image for, after each of sixteen steps."""
    plan, found = pipe.scheduler.plan(16), []
    before: dict[str, Any] = {}

    def note(pipe: Any, i: int, timestep: float, values: dict[str, Any]) -> None:
        # The step from one sample to the next says what the clean sample was taken for: DDIM draws no noise.
        found.append(clean_between(plan, i, before["latents"], values["latents"]))
        before["latents"] = values["latents"]

    prompt, size = "a red apple, noto style", pipe.components["unet"].config.sample_size
    noise = np.random.default_rng(0).standard_normal((1, size, size, 4), np.float32)
    before["latents"] = plan.init(noise).sample
    pipe(prompt, latents=noise, callback_on_step_end=note, **SETTINGS | {"num_inference_steps": 16})
    images = decode_latents(Net("vae", pipe.components["vae"]), pipe.params, jnp.concatenate(found))
    return Sheet(in_rows(np.asarray(images)), ("steps 1 to 8", "steps 9 to 16"))


def clean_between(plan: Any, i: int, here: Any, there: Any) -> Any:
    """The clean sample on the line that DDIM follows: ``x = alpha x0 + sigma eps`` at both ends, solved for ``x0``."""
    (alpha, sigma), (alpha_next, sigma_next) = plan.levels[i], plan.levels[i + 1]
    return (sigma * there - sigma_next * here) / (sigma * alpha_next - sigma_next * alpha)


def between(pipe: Any) -> Sheet:
    """Prompt embeddings interpolated from one prompt to another."""
    pairs = [
        ("red apple, noto style", "grinning face, noto style"),
        ("dog face, fluent style", "cat face, fluent style"),
        ("red heart, twemoji style", "watermelon, noto style"),
    ]
    share = np.linspace(0, 1, 8)[:, None, None]
    first, second = (encoded(pipe, [pair[i] for pair in pairs]) for i in (0, 1))
    embeddings = np.concatenate([(1 - share) * a + share * b for a, b in zip(first, second)])
    images = pipe(prompt_embeds=embeddings.astype(np.float32), seed=[0] * len(embeddings), **SETTINGS).images
    return Sheet(in_rows(images), [" to ".join(map(thing, pair)) for pair in pairs], [f"{a:.0%}" for a in share.flat])


def encoded(pipe: Any, prompts: Sequence[str]) -> np.ndarray:
    """Prompt embeddings ``[prompts, tokens, width]``."""
    tokenizer, encoder = pipe.components["tokenizer"], pipe.components["text_encoder"]
    length = encoder.config.max_position_embeddings
    ids = tokenizer(list(prompts), padding="max_length", max_length=length, return_tensors="np")["input_ids"]
    return np.asarray(encoder.apply({"params": pipe.params["text_encoder"]}, jnp.asarray(ids)).last_hidden_state)


PARTS: dict[str, Callable[[Any], Sheet]] = {
    part.__name__: part for part in (styles, guidance, steps, previews, between)
} | IMAGE_PARTS

if __name__ == "__main__":
    main()
