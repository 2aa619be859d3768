"""T2I-Adapters with Stable Diffusion and SDXL, against PyTorch diffusers with its own noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.pipelines.programs import Programs

folders = pytest.importorskip("tests.oracle.folders", reason="needs PyTorch diffusers and transformers")
from tests.oracle.test_editing_pipelines import EDGE, NEGATIVE, SHORT, compare, opened  # noqa: E402

torch, diffusers = folders.torch, folders.diffusers

KINDS = {
    "StableDiffusionAdapterPipeline": {"adapter_type": "full_adapter", "downscale_factor": 2},
    "StableDiffusionXLAdapterPipeline": {"adapter_type": "full_adapter_xl", "downscale_factor": 4},
}


def adapter(seed: int, **config: Any) -> Any:
    """An adapter with features that matter."""
    torch.manual_seed(seed)
    made = folders.lively(diffusers.T2IAdapter(channels=(32, 64), num_res_blocks=1, **config))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.5)
    return made


def together(adapters: list[Any]) -> Any:
    return diffusers.MultiAdapter(adapters) if len(adapters) > 1 else adapters[0]


def saved(name: str, count: int, folder: Path) -> Path:
    """A folder with one adapter, or with one for grey images and one for colours."""
    make = folders.stable_diffusion_xl if "XL" in name else folders.stable_diffusion
    plain = make(folder.with_name("plain"))
    adapters = [adapter(k, in_channels=(1, 3)[k] if count > 1 else 3, **KINDS[name]) for k in range(count)]
    parts = {} if "XL" in name else {"safety_checker": None, "feature_extractor": None}
    cls = getattr(diffusers, name)
    cls.from_pretrained(plain, adapter=together(adapters), **parts).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "count"), [*zip(KINDS, (1, 2), strict=True)])
def test_adapters(name: str, count: int, tmp_path: Path) -> None:
    folder = saved(name, count, tmp_path / "model")
    images: list[Image.Image] = folders.images(3, EDGE)
    several = count > 1
    # PyTorch takes images as they are: one of an adapter for grey images has to be grey.
    given = {"image": [[image.convert("L") for image in images[:2]], images[1:]] if several else images[:2]}
    # PyTorch opens the first of several only; each is in a folder of its own.
    nets = [diffusers.T2IAdapter.from_pretrained(path) for path in sorted(folder.glob("adapter*"))]
    adapters = {"adapter": together(nets)} if several else {}
    pipe, twin = opened(name, folder, **adapters)
    request = SHORT | NEGATIVE | given | {"adapter_conditioning_scale": [1.0, 0.5] if several else 1.0}
    compare(pipe, twin, **request)
    scale = [0.3, 1.5] if several else 0.4
    compare(pipe, twin, **request | {"adapter_conditioning_scale": scale, "num_inference_steps": 6})
    if "XL" in name:
        compare(pipe, twin, **request | {"adapter_conditioning_factor": 0.5})
        compare(pipe, twin, **request | {"denoising_end": 0.6, "num_inference_steps": 6})
    assert pipe.programs.compilations == 1, "scales and factors are data"
    if not several:
        compare(pipe, twin, **request | {"guidance_scale": 1.0})
        again = DiffusionPipeline.from_pretrained(pipe.save_pretrained(tmp_path / "again")).replace(programs=Programs())
        assert type(again) is type(pipe)
        assert again.components["adapter"] == pipe.components["adapter"]
