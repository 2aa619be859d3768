"""The tables of the original layout: names without a place, the published networks there and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffuse_jax.layouts import family_for
from diffuse_jax.layouts.configs import unet_config
from diffuse_jax.layouts.families import FAMILIES
from diffuse_jax.layouts.original import openclip_table, unet_table, vae_table
from diffuse_jax.layouts.rows import combine, to_diffusers, to_original
from diffuse_jax.models import presets as networks
from diffuse_jax.models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from diffuse_jax.weights import WeightsError, names
from tests.bounds import bounded


def test_pipelines_without_a_single_file_layout_are_refused() -> None:
    with pytest.raises(WeightsError, match="the components unet, vae fit none of the single-file layouts"):
        family_for({"unet": {}, "vae": {}})
    keys = ["down_blocks.0.resnets.0.conv1.weight", "time_embedding.cond_proj.weight"]
    with pytest.raises(WeightsError, match="'time_embedding.cond_proj.weight' has no name in the original layout"):
        to_original(keys, unet_table(keys))


SIZED = {
    "v1": networks.SD15_UNET,
    "v2": networks.SD20_UNET.replace(sample_size=96),
    "x4-upscaler": networks.X4_UPSCALER_UNET,
    "xl": networks.SDXL_UNET,
    "xl-refiner": networks.SDXL_REFINER_UNET,
}
SMALL_XL = networks.SDXL_UNET.replace(block_out_channels=(64, 128, 256), num_attention_heads=(1, 2, 4))
PRUNED = {  # depths within a level, of SSD-1B, Vega, KOALA 700M and 1B; no attention, nothing, attention in the middle
    "ssd": SMALL_XL.replace(
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=(1, (2, 1), 4),
        reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), 1),
    ),
    "vega": SMALL_XL.replace(mid_block_type="UNetMidBlock2D", transformer_layers_per_block=(1, 1, 2)),
    "koala-700m": SMALL_XL.replace(mid_block_type=None, layers_per_block=1, transformer_layers_per_block=(1, 2, 5)),
    "koala-1b": SMALL_XL.replace(layers_per_block=1, transformer_layers_per_block=(1, 2, 6)),
    "other upward path": SMALL_XL.replace(
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        reverse_transformer_layers_per_block=((0, 1, 2), 1, 1),
    ),
}


@pytest.mark.parametrize(
    ("family", "config"), [*SIZED.items(), *[pytest.param("xl", config, id=name) for name, config in PRUNED.items()]]
)
def test_configs_are_read_off_the_shapes(family: str, config: UNet2DConditionConfig) -> None:
    shapes = names.flatten(UNet2DConditionModel(config).shapes())
    empty = {  # arrays of the right shape that take no memory
        key: names.to_torch(path, np.broadcast_to(np.zeros((), np.float32), shapes[path].shape))
        for key, path in names.torch_keys(shapes).items()
    }
    table = unet_table(empty)
    groups = to_original(empty, table)
    members = {old: [(empty[key], operation) for key, operation in parts] for old, parts in groups.items()}
    stored = {old: combine(parts) for old, parts in members.items()}
    back = to_diffusers(stored, unet_table(groups))
    assert {key: array.shape for key, array in back.items()} == {key: array.shape for key, array in empty.items()}
    found = UNet2DConditionConfig.from_json(unet_config(back, FAMILIES[family]))
    assert found.replace(extra=config.extra) == config


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (unet_table, "down_blocks.1000000000.resnets.0.conv1.weight"),
        (unet_table, "down_blocks.0.resnets.1000000000.conv1.weight"),
        (vae_table, "encoder.down.1000000000.block.0.conv1.weight"),
        (openclip_table, "transformer.resblocks.1000000000.ln_1.weight"),
        (lambda keys: unet_config({key: np.zeros(1) for key in keys}, FAMILIES["v1"]), "down_blocks.1000000000.a"),
    ],
)
def test_an_index_that_the_keys_do_not_count_up_to(make: Any, key: str) -> None:
    with bounded(), pytest.raises(ValueError, match="1000000000"):
        make([key])
