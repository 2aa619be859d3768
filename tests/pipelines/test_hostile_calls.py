"""What is wrong about a call is said in one line that names the argument, before anything is compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffuse_jax.models import CLIPVisionModelWithProjection, PriorTransformer, UNet2DConfig, UNet2DModel
from diffuse_jax.pipelines import (
    AutoPipelineForImage2Image,
    ConsistencyModelPipeline,
    IFImg2ImgPipeline,
    IFInpaintingSuperResolutionPipeline,
    KandinskyV22PriorEmb2EmbPipeline,
    KarrasEDMPipeline,
    KarrasVePipeline,
    LatentConsistencyModelImg2ImgPipeline,
    RePaintPipeline,
    StableDiffusionDiffEditPipeline,
    StableDiffusionImg2ImgPipeline,
)
from diffuse_jax.pipelines.diffedit import masking
from diffuse_jax.pipelines.families.prior import given_text
from diffuse_jax.pipelines.programs import Programs
from diffuse_jax.schedulers import (
    CMStochasticIterativeScheduler,
    KarrasEDMScheduler,
    KarrasVeScheduler,
    LCMScheduler,
    RePaintScheduler,
)
from tests.oracle.pixel_unets import PIXELS
from tests.pipelines import tiny, tiny_if, tiny_stages

PLAIN = tiny.pipeline()
PARTS = tiny_stages.Parts(PLAIN)
KARLO, VARIATION = PARTS.karlo()
STABLE_UNCLIP, _ = PARTS.stable_unclip()
KANDINSKY, KANDINSKY_22 = PARTS.kandinsky()
WUERSTCHEN = PARTS.wuerstchen()
EDIT = StableDiffusionDiffEditPipeline.from_pipe(PLAIN)
STAGES = [stage.replace(programs=Programs()) for stage in tiny_if.cascade(PLAIN)]
SHORT: dict[str, Any] = {"prompt": "a", "num_inference_steps": 4}
SMALL, LARGE = Image.new("RGB", (16, 16)), Image.new("RGB", (32, 32))
EMBEDS = dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), np.zeros((1, 77, 24), np.float32))
NAN = np.full((1, 77, 24), np.nan, np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (SHORT | {"modifiers": 3}, "modifiers must be one or several of pipelines.modifiers, got 3"),
        (SHORT | {"modifiers": [len, 3]}, r"modifiers must be one or several .*, got \[<built-in function len>, 3\]"),
        (SHORT | {"method": 3}, "method must be a function from the pipeline's method to another, got 3"),
        (SHORT | {"rows": [1]}, r"rows must be a dict, name -> array .*, got \[1\]"),
        (EMBEDS | {"prompt_embeds": 5.0}, "prompt_embeds must be an array with an entry for each prompt, got 5.0"),
        (EMBEDS | {"prompt_embeds": NAN[:0]}, "prompt_embeds must be an array with an entry for each prompt"),
        (EMBEDS | {"negative_prompt_embeds": NAN}, "negative_prompt_embeds must be finite; 1848 of 1848 numbers"),
        (SHORT | {"latents": np.full((1, 16, 16, 3), np.inf)}, "latents must be finite; 768 of 768"),
        (SHORT | {"callback_on_step_end": 3}, "callback_on_step_end must be a function, got 3"),
    ],
)
def test_a_call(call: dict[str, Any], message: str) -> None:
    first = STAGES[0]
    with pytest.raises((ValueError, TypeError), match=message):
        first(**call)
    assert first.programs.compilations == 0


ENCODED = {"text_embeds": np.zeros((1, 16)), "last_hidden_state": np.zeros((1, 16, 16))}
MASK = np.ones((1, 16), bool)
SEVERAL: list[tuple[Any, dict[str, Any], str]] = [
    (KARLO, {"prompt": None}, "prompt must be a string or a list of at least one string, got None"),
    (KARLO, {"prior_num_inference_steps": 0}, "^prior_num_inference_steps must be a whole number from 1 to 1000"),
    (KARLO, {"decoder_num_inference_steps": 2000}, "^decoder_num_inference_steps must be a whole number"),
    (KARLO, {"super_res_num_inference_steps": -1}, "^super_res_num_inference_steps must be a whole number"),
    (KARLO, {"prior_guidance_scale": [1, 2]}, "^prior_guidance_scale has 2 entries for 1 images"),
    (KARLO, {"decoder_latents": np.zeros((1, 3))}, r"^decoder_latents must be \(1, 8, 8, 3\)"),
    (KARLO, {"modifiers": 3}, "^modifiers must be one or several"),
    (KARLO, {"method": 3}, "^method must be a function"),
    (KARLO, {"rows": [1]}, "^rows must be a dict"),
    (KARLO, {"callback_on_step_end": 3}, "^callback_on_step_end must be a function, got 3"),
    (KARLO, {"batch_size": 0}, "^batch_size must be at least 1, got 0"),
    (KARLO, {"seed": -1}, r"^a seed must be an integer from 0 to 4294967295, got -1$"),
    (KARLO, {"text_model_output": ENCODED}, "give prompt, or text_model_output and text_attention_mask, not both"),
    (KARLO, {"prompt": None, "text_model_output": ENCODED}, "belong together; text_attention_mask is missing"),
    (KARLO, {"prompt": None, "text_attention_mask": MASK}, "belong together; text_model_output is missing"),
    (
        KARLO,
        {"prompt": None, "text_model_output": ENCODED, "text_attention_mask": MASK[:, 1:]},
        r"text_attention_mask must be \[1, 16\] \(padded to 16 tokens\), got \[1, 15\]",
    ),
    (
        KARLO,
        {"prompt": None, "text_model_output": (np.zeros((2, 16)), np.zeros((1, 16, 16))), "text_attention_mask": MASK},
        r"text_model_output.last_hidden_state must be \[2, 16, 16\]",
    ),
    (
        KARLO,
        {"prompt": None, "text_model_output": 3, "text_attention_mask": MASK},
        "text_model_output must have text_embeds and last_hidden_state, got 3",
    ),
    (
        KARLO,
        {"prompt": None, "text_model_output": ENCODED, "text_attention_mask": MASK * 0.5},
        "text_attention_mask must be True for tokens and False for padding",
    ),
    (
        KARLO,
        {"prompt": None, "text_model_output": ENCODED, "text_attention_mask": [[True], [True, False]]},
        "text_attention_mask must be a number, or a list of numbers",
    ),
    (STABLE_UNCLIP, {"guidance_rescale": 2}, "guidance_rescale must be from 0 to 1, got 2"),
    (STABLE_UNCLIP, {"prior_latents": np.zeros((1, 3))}, r"^prior_latents must be \(1, 16\)"),
    (KANDINSKY, {"prior_num_inference_steps": 0}, "^prior_num_inference_steps must be a whole number"),
    (KANDINSKY, {"prior_guidance_scale": [1, 2]}, "^prior_guidance_scale has 2 entries"),
    (KANDINSKY_22, {"prior_callback_on_step_end": 3}, "^prior_callback_on_step_end must be a function, got 3"),
    (KANDINSKY_22, {"modifiers": 3}, "^modifiers must be one or several"),
    (KANDINSKY_22, {"height": 60000, "width": 60000}, "an image may have 268435456 pixels, got 60000x60000"),
    (KANDINSKY_22, {"height": 0}, "height must be from 1 to 65536, got 0"),
    (WUERSTCHEN, {"height": 60000, "width": 60000}, "an image may have 268435456 pixels, got 60000x60000"),
    (WUERSTCHEN, {"prior_num_inference_steps": 0}, "^prior_num_inference_steps must be a whole number"),
    (WUERSTCHEN, {"prior_timesteps": [0.5, 2]}, "^prior_timesteps must"),
    (WUERSTCHEN, {"decoder_timesteps": []}, "^decoder_timesteps must"),
    (WUERSTCHEN, {"decoder_guidance_scale": [1, 2]}, "^decoder_guidance_scale has 2 entries"),
    (WUERSTCHEN, {"prior_callback_on_step_end": 3}, "^prior_callback_on_step_end must be a function, got 3"),
]


@pytest.mark.parametrize(("pipe", "call", "message"), SEVERAL)
def test_pipelines_of_several_stages(pipe: Any, call: dict[str, Any], message: str) -> None:
    """An argument has the name that the call gives it, not that of the stage; and no stage has run."""
    size = {"height": 128, "width": 128} if pipe is WUERSTCHEN else {}
    given = {
        name: value for name, value in {"prompt": "a", **size, **call}.items() if value is not None or pipe is KARLO
    }
    with pytest.raises((ValueError, TypeError), match=message) as found:
        pipe(**given)
    assert "\n" not in str(found.value)
    assert pipe.programs.compilations == 0


def test_results_of_a_text_encoder() -> None:
    """Ours, diffusers' (a dict), and a pair."""
    encoder, params = KARLO.components["text_encoder"], KARLO.params["text_encoder"]
    output = encoder.apply({"params": params}, np.ones((2, 16), np.int32))
    for found in (output, output._asdict(), (output.text_embeds, output.last_hidden_state, "more")):
        text = given_text(KARLO, found, np.ones((2, 16)))
        np.testing.assert_array_equal(text["pooled"], output.text_embeds)
        np.testing.assert_array_equal(text["states"], output.last_hidden_state)
        assert text["mask"].dtype == bool


def test_networks_of_several_checkpoints() -> None:
    """Widths are compared before a stage runs; what is not compared, the network itself says in one line."""
    other = PARTS.filled(PriorTransformer(tiny_stages.PRIOR.replace(embedding_dim=24)))
    seeing = PARTS.filled(CLIPVisionModelWithProjection(tiny_stages.VISION.replace(projection_dim=24)))
    for make, message in [
        (lambda: KARLO.replace(prior=other).request("a"), "the text_encoder has embeddings of width 16, and the prior"),
        (lambda: VARIATION.replace(image_encoder=seeing).request(SMALL), "the image_encoder has embeddings of width"),
        (lambda: KANDINSKY.replace(prior_prior=other).request("a"), "of width 24"),
        (lambda: KANDINSKY_22.prior_pipe.replace(image_encoder=seeing).request("a"), "the image_encoder has .* 24"),
        (lambda: KARLO.components["prior"].apply(
            {"params": KARLO.params["prior"]}, np.zeros((1, 16)), 0, np.zeros((1, 16)), np.zeros((1, 16, 24))),
         r"PriorTransformer: the kernel of encoder_hidden_states_proj has shape \(16, 16\), and this input would need"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make()
    assert KARLO.programs.compilations == KANDINSKY.programs.compilations == 0


def test_stages_of_other_classes() -> None:
    prior, decoder, kind = KANDINSKY_22.prior_pipe, KANDINSKY_22.decoder_pipe, type(KANDINSKY_22)
    for make, message in [
        (lambda: kind.from_stages(decoder, prior), "prior must be a KandinskyV22PriorPipeline, got a KandinskyV22Pipe"),
        (lambda: kind.from_stages(prior, "x"), "decoder must be an open KandinskyV22Pipeline, got 'x'"),
        (lambda: kind.from_pipe(decoder, prior=decoder), "prior must be a KandinskyV22PriorPipeline, got a"),
        (lambda: kind.from_pretrained("x", prior=decoder), "prior must be a KandinskyV22PriorPipeline, got a"),
        (lambda: kind.from_pretrained("x", prior=3), "prior must be an open KandinskyV22PriorPipeline, got 3"),
        (lambda: kind.from_stages(WUERSTCHEN.prior_pipe, decoder), "which has no image_encoder and no image_processor"),
    ]:
        with pytest.raises(TypeError, match=message):
            make()


def test_stages_of_another_family_with_the_same_components(tmp_path: Path) -> None:
    """The priors of Kandinsky 2.1 and 2.2 have the same components; a decoder of 2.1 has all those of 2.2."""
    first, second = KANDINSKY.prior_pipe, KANDINSKY_22.prior_pipe
    kind, refused = (
        type(KANDINSKY_22),
        "^prior must be a KandinskyV22PriorPipeline, got a KandinskyPriorPipeline",
    )
    folder = first.save_pretrained(tmp_path / "prior")
    for make, message in [
        (lambda: kind.from_stages(first, KANDINSKY_22.decoder_pipe), refused),
        (lambda: kind.from_pipe(KANDINSKY_22.decoder_pipe, prior=first), refused),
        (lambda: kind.from_pretrained("x", prior=first), refused),
        (lambda: kind.from_pretrained("x", prior=folder), refused),
        (lambda: type(KANDINSKY).from_stages(second, KANDINSKY.decoder_pipe), "^prior must be a KandinskyPriorPipe"),
        (
            lambda: kind.from_stages(second, KANDINSKY.decoder_pipe),
            "^decoder must be a KandinskyV22Pipeline, got a",
        ),
    ]:
        with pytest.raises(TypeError, match=message) as found:
            make()
        assert "\n" not in str(found.value)
    nearby = KandinskyV22PriorEmb2EmbPipeline.from_pipe(second)
    assert kind.from_stages(nearby, KANDINSKY_22.decoder_pipe).prior_pipe.params["prior"] is second.params["prior"]


def test_embeddings_and_images_of_priors() -> None:
    prior = KANDINSKY_22.prior_pipe
    nearby = KandinskyV22PriorEmb2EmbPipeline.from_pipe(prior)
    with pytest.raises(
        ValueError, match=r"image \(as embeddings\) must be floating-point \[N,16\], got float32 \[1, 15\]"
    ):
        nearby.request("a", np.zeros((1, 15), np.float32))
    with pytest.raises(TypeError, match="image must be a PIL image, .*, got an empty list"):
        VARIATION.request([])
    with pytest.raises(TypeError, match="an image of images_and_prompts must be a PIL image"):
        prior.interpolate(["a", 3], [0.5, 0.5])
    with pytest.raises(ValueError, match="each entry of images_and_prompts must be one image, got 2"):
        prior.interpolate(["a", [SMALL, SMALL]], [0.5, 0.5])
    assert prior.programs.compilations == 0


def test_latents_in_the_place_of_an_image_are_finite() -> None:
    kandinsky: Any = AutoPipelineForImage2Image.from_pipe(KANDINSKY_22)
    for pipe, size in (
        (StableDiffusionImg2ImgPipeline.from_pipe(PLAIN), {}),
        (kandinsky, {"height": 16, "width": 16}),
    ):
        with pytest.raises(ValueError, match="image must be finite; 256 of 256 numbers are not"):
            pipe.request("a", np.full((1, 8, 8, 4), np.nan, np.float32), **size)
        assert pipe.programs.compilations == 0


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda: STAGES[0].request("a" * 200), False),
        (lambda: KANDINSKY.prior_pipe.request("a" * 40), False),
        (lambda: KANDINSKY.decoder_pipe.request("a" * 200, np.zeros((1, 16), np.float32), guidance_scale=1.0), False),
        (lambda: PLAIN.request("a" * 40), True),
        (lambda: EDIT.request(SMALL, "a" * 40, "b", compose=masking), True),
    ],
    ids=["IF", "prior", "Kandinsky 2.1", "Stable Diffusion", "mask of DiffEdit"],
)
def test_a_long_prompt_is_told_what_the_call_takes(make: Any, hint: bool) -> None:
    with pytest.warns(UserWarning, match="tokens too long") as found:
        make()
    assert all(("long_prompts=True" in str(warning.message)) is hint for warning in found)


def test_masks_of_long_prompts() -> None:
    rows = EDIT.request(SMALL, "a" * 40, "b", compose=masking, long_prompts=True).rows
    assert rows["ids"]["text_encoder"].values.shape[-2:] == (3, 16)


@pytest.mark.parametrize("scale", [-0.1, 1.5, [0.5]])
def test_rescaling(scale: Any) -> None:
    call = SHORT | {"guidance_rescale": scale, "num_images_per_prompt": 2}
    with pytest.raises(ValueError, match=r"^guidance_rescale (must be from 0 to 1, got|has 1 entries for 2 images)"):
        PLAIN.request(**call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt must be an integer"),
        ({"do_classifier_free_guidance": "no"}, "do_classifier_free_guidance must be True or False, got 'no'"),
        ({"clean_caption": "no"}, "clean_caption must be True or False, got 'no'"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 entries for 1 prompts"),
    ],
)
def test_encoding_prompts(call: dict[str, Any], message: str) -> None:
    first = STAGES[0]
    with pytest.raises((ValueError, TypeError), match=message):
        first.encode_prompt("a", **call)
    assert first.programs.compilations == 0


def test_an_array_whose_size_the_network_does_not_take_is_named() -> None:
    """Its height and width are no arguments of the call. Nothing is known about where its channels are."""
    unet = STAGES[0].components["unet"]
    deep = unet.clone(config=unet.config.replace(**tiny_if.SHARED | {
        "block_out_channels": (16, 16), "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    }))  # fmt: skip
    assert deep.config.divisor == 2
    pipe = IFImg2ImgPipeline.from_pipe(STAGES[0], unet=(deep, {}))
    for shape in ((15, 16, 3), (3, 16, 16), (0, 0, 3)):
        message = f"image is {shape[0]}x{shape[1]} pixels .*takes multiples of 2; resize it, or pass a PIL image"
        with pytest.raises(ValueError, match=message):
            pipe.request(**SHORT, image=np.zeros(shape, np.float32))
    repaint = IFInpaintingSuperResolutionPipeline.from_pipe(STAGES[1], unet=(deep, {}))
    with pytest.raises(ValueError, match="original_image is 31x32 pixels"):
        repaint.request(**SHORT, image=SMALL, mask_image=LARGE, original_image=np.zeros((31, 32, 3), np.float32))


@pytest.mark.parametrize("strength", [0, 1.5, -1])
def test_a_strength_has_the_name_of_its_argument(strength: float) -> None:
    latents, mask = np.zeros((1, 3, 8, 8, 4), np.float32), np.ones((8, 8), np.float32)
    with pytest.raises(ValueError, match=r"^inpaint_strength must lie in \(0, 1\], got"):
        EDIT.request(**SHORT, mask_image=mask, image_latents=latents, inpaint_strength=strength)
    with pytest.raises(ValueError, match=r"^inpaint_strength must lie in \(0, 1\], got"):
        EDIT.invert("a", SMALL, inpaint_strength=strength)
    with pytest.raises(ValueError, match=r"^mask_encode_strength must lie in \(0, 1\], got"):
        EDIT.generate_mask(SMALL, "a", "b", mask_encode_strength=strength)
    distilled = LatentConsistencyModelImg2ImgPipeline.from_pipe(PLAIN.replace(scheduler=LCMScheduler()))
    with pytest.raises(ValueError, match=r"^strength must lie in \(0, 1\], got"):
        distilled.request("a", SMALL, strength=strength)
    assert EDIT.programs.compilations == 0


def test_a_strength_that_leaves_no_steps_has_the_name_of_its_argument() -> None:
    latents, mask = np.zeros((1, 3, 8, 8, 4), np.float32), np.ones((8, 8), np.float32)
    with pytest.raises(ValueError, match="^inpaint_strength=0.01 of 4 steps leaves none to run; use a strength of at"):
        EDIT.request(**SHORT, mask_image=mask, image_latents=latents, inpaint_strength=0.01)
    with pytest.raises(ValueError, match="^inpaint_strength=0.01 of 4 steps leaves none to run"):
        EDIT.invert("a", SMALL, inpaint_strength=0.01, num_inference_steps=4)
    with pytest.raises(ValueError, match="^mask_encode_strength=0.01 of 4 steps leaves none to run"):
        EDIT.generate_mask(SMALL, "a", "b", mask_encode_strength=0.01, num_inference_steps=4)
    assert EDIT.programs.compilations == 0


def pixels(kind: Any, scheduler: Any, **config: Any) -> Any:
    """A pipeline over pixels whose requests are made and never run."""
    network = UNet2DModel(UNet2DConfig(**PIXELS | config))
    return kind({"unet": network, "scheduler": scheduler}, {"unet": {}}, programs=Programs())


CLASSES = {
    name: pixels(kind, scheduler, num_class_embeds=10)
    for name, kind, scheduler in (
        ("consistency model", ConsistencyModelPipeline, CMStochasticIterativeScheduler()),
        ("EDM", KarrasEDMPipeline, KarrasEDMScheduler()),
    )
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (10, "class_labels must be integers from 0 to 9, got 10$"),
        (-1, "class_labels must be integers from 0 to 9, got -1$"),
        (2**40, "class_labels must be integers from 0 to 9, got 1099511627776$"),
        (1.5, "class_labels must be integers from 0 to 9, got 1.5$"),
        ("cat", "class_labels must be an array of numbers, got 'cat'$"),
        ([None], r"class_labels must be an array of numbers, got \[None\]$"),
        (True, "class_labels must be an array of numbers, got True$"),
        ([[1], [2, 3]], r"class_labels must be an array of numbers, got \[\[1\], \[2, 3\]\]$"),
        (float("nan"), "class_labels must be finite; 1 of 1 numbers are not$"),
        ([1, 2], r"class_labels has shape \(2,\) for 1 images; give one label or one per image$"),
    ],
)
def test_labels_of_classes(name: str, labels: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        CLASSES[name].request(class_labels=labels)


@pytest.mark.parametrize(("kind", "shape"), [("timestep", (2,)), ("identity", (2, 64))])
def test_classes_without_a_table_are_real_numbers(kind: str, shape: tuple[int, ...]) -> None:
    pipe = pixels(ConsistencyModelPipeline, CMStochasticIterativeScheduler(), class_embed_type=kind)
    labels = np.linspace(0, 1, np.prod(shape), dtype=np.float32).reshape(shape)
    np.testing.assert_array_equal(pipe.request(2, class_labels=labels).rows["class_labels"], labels)
    with pytest.raises(ValueError, match="this network needs class_labels"):
        pipe.request(2)


def test_options_of_samplers_over_pixels() -> None:
    stochastic = pixels(KarrasVePipeline, KarrasVeScheduler())
    with pytest.raises(ValueError, match="KarrasVeScheduler has no option eta; its options: as_published$"):
        stochastic.request(eta=0.5)
    repaint = pixels(RePaintPipeline, RePaintScheduler())
    for call, message in [
        ({"jump_length": 0}, "^jump_length must be at least 1, got 0$"),
        ({"jump_n_sample": 10**6}, "^jump_n_sample=1000000 and jump_length=10 make 2"),
        ({"eta": float("nan")}, "^eta must be a finite number, got nan$"),
        ({"timesteps": [9, 5]}, "RePaintScheduler jumps over evenly spaced timesteps; give num_inference_steps$"),
    ]:
        with pytest.raises(ValueError, match=message):
            repaint.request(image=LARGE, mask_image=LARGE, **call)
