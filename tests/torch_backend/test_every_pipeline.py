"""``diffuse-jax parity`` runs every registered pipeline: each class opens a folder, on both sides, and runs there.

A new class is found in the registry. It runs on one of the folders below, with what its UNet needs in ``UNETS``.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from diffuse_jax.pipelines import PIPELINES, sample
from diffuse_jax.weights import read_json, write_json

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
from diffuse_jax.torch_backend import parity, pipeline  # noqa: E402
from diffuse_jax.torch_backend.trace import RESULTS  # noqa: E402
from tests.oracle import if_folders, twins, unclip, wuerstchen  # noqa: E402
from tests.oracle.test_depth_and_latent_upscaling import K_UNET  # noqa: E402

torch, diffusers, transformers = folders.torch, folders.diffusers, folders.transformers

CLASSES = [name for name, cls in PIPELINES.items() if cls.__module__.startswith("diffuse_jax.")]

UNETS: dict[str, dict[str, Any]] = {
    "StableDiffusionInstructPix2PixPipeline": {"in_channels": 8},
    "StableDiffusionXLInstructPix2PixPipeline": {"in_channels": 8},
    "StableDiffusionUpscalePipeline": {
        "in_channels": 7,
        "num_class_embeds": 50,
        "only_cross_attention": (True, False),
    },
    "StableDiffusionDepth2ImgPipeline": {"in_channels": 5},
    "StableDiffusionLatentUpscalePipeline": K_UNET,
    "LatentConsistencyModelPipeline": {"time_cond_proj_dim": 16},
    "LatentConsistencyModelImg2ImgPipeline": {"time_cond_proj_dim": 16},
}
"""Class -> changes to the UNet of the folder."""

SCHEDULERS = {
    "StableDiffusionLatentUpscalePipeline": lambda: diffusers.EulerDiscreteScheduler(prediction_type="sample"),
    "LatentConsistencyModelPipeline": diffusers.LCMScheduler,
    "LatentConsistencyModelImg2ImgPipeline": diffusers.LCMScheduler,
}

PIXEL_SAMPLERS = {
    "ConsistencyModelPipeline": diffusers.CMStochasticIterativeScheduler,
    "KarrasVePipeline": lambda: diffusers.KarrasVeScheduler(sigma_max=1.5),
    "ScoreSdeVePipeline": lambda: diffusers.ScoreSdeVeScheduler(sigma_max=1.5),
}
"""The same for pipelines without prompts."""

PIXEL_UNETS = {"LDMSuperResolutionPipeline": {"in_channels": 6, "out_channels": 3}}
"""Class -> changes to the UNet of the same."""

Components = dict[str, tuple[str, str, Any]]
"""Component -> its library, its class in the index, and the module, or a list of modules."""


def others(xl: bool) -> Components:
    """What pipelines have beside those of text to image: two of each network that may be several."""
    config = folders.UNET_XL if xl else folders.UNET
    unet = diffusers.UNet2DConditionModel(**config)
    nets = [diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)) for _ in range(2)]
    kind = {"adapter_type": "full_adapter_xl" if xl else "full_adapter", "downscale_factor": 4 if xl else 2}
    adapters = [diffusers.T2IAdapter(channels=(32, 64), num_res_blocks=1, in_channels=c, **kind) for c in (1, 3)]
    depth = transformers.DPTForDepthEstimation(transformers.DPTConfig(**twins.DEPTH))
    return {
        "controlnet": ("diffusers", "MultiControlNetModel", [*map(folders.lively, nets)]),
        "adapter": ("diffusers", "MultiAdapter", [*map(twins.randomise, adapters)]),
        "low_res_scheduler": ("diffusers", "DDPMScheduler", diffusers.DDPMScheduler()),
        "depth_estimator": ("transformers", "DPTForDepthEstimation", twins.randomise(depth)),
        "feature_extractor": (
            "transformers",
            "DPTImageProcessor",
            transformers.DPTImageProcessor(size={"height": 32, "width": 32}),
        ),
    }


def for_variations() -> Components:
    """What image variation has in the place of a text encoder, for a UNet of this width."""
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        projection_dim=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    encoder = twins.randomise(transformers.CLIPVisionModelWithProjection(config))
    prepare = transformers.CLIPImageProcessor(size=16, crop_size=16)
    return {
        "image_encoder": ("transformers", "CLIPVisionModelWithProjection", encoder),
        "feature_extractor": ("transformers", "CLIPImageProcessor", prepare),
    }


OTHERS = {"StableDiffusionImageVariationPipeline": for_variations}


FOLDERS = {
    "LDMTextToImagePipeline": folders.latent_diffusion_text,
    "WuerstchenPriorPipeline": wuerstchen.prior_pipeline,
    "WuerstchenDecoderPipeline": wuerstchen.decoder_pipeline,
    "WuerstchenCombinedPipeline": wuerstchen.combined_pipeline,
    "KandinskyPriorPipeline": functools.partial(folders.kandinsky_prior, kind="KandinskyPriorPipeline"),
    "KandinskyV22PriorPipeline": folders.kandinsky_prior,
    "KandinskyV22PriorEmb2EmbPipeline": folders.kandinsky_prior,
    "StableUnCLIPPipeline": folders.stable_unclip,
    "StableUnCLIPImg2ImgPipeline": folders.stable_unclip_img2img,
    "UnCLIPPipeline": unclip.text_pipeline,
    "UnCLIPImageVariationPipeline": unclip.variation_pipeline,
}
"""Class -> what writes a folder that nothing else opens."""


def add(folder: Path, components: Components) -> None:
    """Write components into a folder and its index."""
    index = read_json(folder / "model_index.json")
    for name, (library, kind, found) in components.items():
        index[name] = [library, kind]
        for k, part in enumerate(found if isinstance(found, list) else [found]):
            part.save_pretrained(folder / (f"{name}_{k}" if k else name))
    write_json(folder / "model_index.json", index)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Class -> a folder that it can open."""

    @functools.cache
    def whole(xl: bool) -> Path:
        folder = tmp_path_factory.mktemp("every") / "model"
        (folders.stable_diffusion_xl if xl else folders.stable_diffusion)(folder)
        add(folder, others(xl))
        return folder

    @functools.cache
    def pixels(name: str) -> Path:
        folder = tmp_path_factory.mktemp("pixels") / "model"
        unet = twins.randomise(diffusers.UNet2DModel(**twins.PIXELS | PIXEL_UNETS.get(name, {})))
        scheduler = PIXEL_SAMPLERS.get(name, diffusers.DDIMScheduler)()
        diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
        if "vqvae" in PIPELINES[name].required:
            add(folder, {"vqvae": ("diffusers", "VQModel", twins.randomise(diffusers.VQModel(**twins.VQ)))})
        return folder

    @functools.cache
    def written(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "model"
        FOLDERS[name](folder)
        return folder

    @functools.cache
    def stage(number: int) -> Path:
        return if_folders.save(tmp_path_factory.mktemp("if") / "model", number)

    @functools.cache
    def kandinsky(name: str) -> Path:
        root = tmp_path_factory.mktemp("kandinsky")
        plain, changes = name.replace("Combined", ""), {"in_channels": 9} if "Inpaint" in name else {}
        changes |= {"in_channels": 8, "addition_embed_type": "image_hint"} if "Controlnet" in name else {}
        newer = "V22" in name
        write = folders.kandinsky_decoder if newer else folders.kandinsky21_decoder
        decoder = write(root / "decoder", plain, **changes)
        if name == plain:
            return decoder
        prior = folders.kandinsky_prior(root / "prior", f"Kandinsky{'V22' if newer else ''}PriorPipeline")
        return PIPELINES[name].from_pretrained(decoder, prior=prior).save_pretrained(root / "combined")

    def find(name: str) -> Path:
        if "movq" in PIPELINES[name].required:
            return kandinsky(name)
        if name in FOLDERS:
            return written(name)
        if name.startswith("IF"):
            return stage(2 if "Super" in name else 1)
        if "vae" not in PIPELINES[name].required:
            return pixels(name)
        folder = whole("XL" in name)
        if not {name} & {*UNETS, *SCHEDULERS, *OTHERS}:
            return folder
        own = Path(shutil.copytree(folder, tmp_path_factory.mktemp(name) / "model"))
        config = (folders.UNET_XL if "XL" in name else folders.UNET) | UNETS.get(name, {})
        torch.manual_seed(0)
        twins.randomise(diffusers.UNet2DConditionModel(**config)).save_pretrained(own / "unet")
        if name in SCHEDULERS:
            scheduler = SCHEDULERS[name]()
            add(own, {"scheduler": ("diffusers", type(scheduler).__name__, scheduler)})
        add(own, OTHERS.get(name, dict)())
        return own

    return find


REQUEST = parity.Request(["a cat", "x"], {"num_inference_steps": 4, "seed": 0})
SMALL = {name: {"height": 64, "width": 64} for name in CLASSES if "movq" in PIPELINES[name].required}
SIZES = {"StableDiffusionPanoramaPipeline": {"height": 32, "width": 160}, **SMALL}
"""Of those that do not take the checkpoint's size: three windows rather than thousands."""

ONE_IMAGE = {"RePaintPipeline", "UnCLIPImageVariationPipeline", *OTHERS}
"""Classes that take one image in the place of two prompts."""

STAGES = {"UnCLIPPipeline": ("prior", "decoder", "super_res"), "UnCLIPImageVariationPipeline": ("decoder", "super_res")}
"""The stages of classes that take the number of steps of each."""


def request(name: str) -> parity.Request:
    """What is asked of a class."""
    options = REQUEST.options | SIZES.get(name, {})
    if name in STAGES:
        steps = options.pop("num_inference_steps")
        options |= {f"{stage}_num_inference_steps": steps for stage in STAGES[name]}
    return dataclasses.replace(REQUEST, options=options)


@pytest.fixture(scope="module")
def on_torch(folder_of: Any) -> Any:
    """Class -> the pipeline with PyTorch's networks; each folder is opened once."""
    opened = functools.cache(lambda folder: pipeline.from_pretrained(folder, device="cpu"))
    return lambda name: PIPELINES[name].from_pipe(opened(folder_of(name)))


def refusal(name: str) -> str | None:
    """Why parity cannot run a class; None for the others. Compare the plain class of the same task instead."""
    if "PAG" in name or "SAG" in name:
        return "a modifier changes the layers of a UNet, which a TorchNetwork does not let it do"
    return None


@pytest.mark.parametrize("name", [name for name in CLASSES if refusal(name)])
def test_what_parity_does_not_run_says_why(name: str, on_torch: Any) -> None:
    pipe = on_torch(name)
    with pytest.raises(ValueError, match=refusal(name)):
        pipe.request(**REQUEST.arguments(pipe))


COMPARED = [name for name in CLASSES if not refusal(name)]


# Their two stages have the same networks and methods whatever the task.
ALIKE = [name for name in COMPARED if name.endswith(("Img2ImgCombinedPipeline", "InpaintCombinedPipeline"))]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in COMPARED])
def test_every_pipeline_has_images_and_counterparts_of_its_networks(name: str, on_torch: Any) -> None:
    """A call is complete without images of the user's, and PyTorch has every network and method that it needs."""
    pipe = on_torch(name)
    run = pipe.request(**request(name).arguments(pipe))
    images = 1 if name in ONE_IMAGE else 2
    traced = lambda params, rows: sample(run.method, params, rows, run.plan)
    found = jax.eval_shape(traced, pipe.params, run.rows)
    assert next(found[result] for result in RESULTS if result in found).shape[0] == images


QUICK = ("KandinskyV22PriorPipeline", "StableDiffusionXLAdapterPipeline")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow, id=n) for n in COMPARED]
)
def test_every_pipeline_computes_the_same(name: str, folder_of: Any) -> None:
    sides = parity.open_sides(str(folder_of(name)), device="cpu", pipeline_name=name)
    result = parity.check(sides, request(name))
    assert result.ok, (result.rows, result.differences)
    names = [row.name for row in result.rows]
    assert all(names.count(row) == 1 for row in names if row.startswith("adapter")), "called once for all steps"
    assert "adapter" not in sides.ours.required or "adapter.1 " in " ".join(names)
