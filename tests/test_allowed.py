"""Every field of every configuration refuses what is not of its kind or range, naming class, field and value."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated, Any

import pytest

from diffuse_jax import schedulers
from diffuse_jax.allowed import Layers, Levels, Positive, Range, Rule, Signed, rule_of, rules_of
from diffuse_jax.config import Config
from diffuse_jax.models import (
    ADMUNet,
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    CLIPVisionModel,
    ConsistencyDecoderVAE,
    ControlNetModel,
    DPTForDepthEstimation,
    IPAdapter,
    Model,
    PaellaVQModel,
    PriorTransformer,
    StableUnCLIPImageNormalizer,
    T2IAdapter,
    UnCLIPTextProjModel,
    UNet2DConditionConfig,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
    WuerstchenDiffNeXt,
    WuerstchenPrior,
)
from diffuse_jax.models.discriminator import PatchDiscriminatorConfig
from diffuse_jax.schedulers import DDIMScheduler, DPMSolverMultistepScheduler
from diffuse_jax.text import CLIPTextConfig, CLIPTextModel, LDMBertModel, MultilingualCLIP
from diffuse_jax.weights import WeightsError
from tests.bounds import bounded
from tests.schedulers.samplers import EVERY, REQUIRED

NETWORKS: list[type[Model]] = [
    *(PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior),
    *(AsymmetricAutoencoderKL, AutoencoderTiny, ConsistencyDecoderVAE, DPTForDepthEstimation, IPAdapter, T2IAdapter),
    PriorTransformer,
    *(StableUnCLIPImageNormalizer, UnCLIPTextProjModel),
    *(ADMUNet, AutoencoderKL, CLIPTextModel, CLIPVisionModel, ControlNetModel, UNet2DConditionModel, UNet2DModel),
    *(LDMBertModel, MultilingualCLIP, VQModel),
]
CONFIGS: dict[str, type[Config]] = {
    **{cls.__name__: cls.config_class for cls in NETWORKS},
    "PatchDiscriminator": PatchDiscriminatorConfig,
    **{name: getattr(schedulers, name) for name in EVERY},
}
HOSTILE: list[Any] = [
    *("text", 2**31 - 0.5, 10**5000, -(10**5000), float("nan"), -1e300, 1e300),
    *([[[[]]]], [0] * 100, {"a": 1}, [None], ["x"], [float("nan")]),
]
FIELDS = [(name, field) for name, cls in CONFIGS.items() for field, rule in rules_of(cls).items() if not rule.anything]


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_what_a_field_cannot_hold_is_refused(name: str, field: str) -> None:
    cls, rule = CONFIGS[name], rules_of(CONFIGS[name])[field]
    if field in getattr(cls, "absent", ()):
        return
    refused = [value for value in HOSTILE if not rule.allows(value if not isinstance(value, list) else tuple(value))]
    assert len(refused) >= 9, f"{field} takes {rule}"
    key = "attention_head_dim" if field == "num_attention_heads" and hasattr(cls, "per_level") else field
    for value in refused:
        with pytest.raises(ValueError, match=rf"{field}( must|.*make more)") as error:
            cls.from_json(REQUIRED.get(name, {}) | {key: value})
        assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [1, 65_536], [0, -1, 65_537, 1.0, True, None, "1"]),
        (float, [0, 0.5, 1e9], [-0.5, 1e10, float("inf"), float("nan"), False, None]),
        (Signed, [-3, 0.5], [-1e10, float("-inf")]),
        (bool, [True, False, None], [0, 1, "true"]),  # null in published files means false
        (str, ["", "x"], [1, None, "x" * 501]),
        (Positive, [1e-9, 1], [0, -1, float("nan")]),
        (str | None, ["x", None], [0, False]),
        (tuple[int, ...], [(), (1, 2)], [(0,), (1, "x"), (1,) * 65, 1, "1"]),
        (int | tuple[int, ...], [3, (3, 4)], [(), "3", ((3,),)][1:]),
        (tuple[int, int], [(1, 2)], [(1,), (1, 2, 3)]),
        (Annotated[float, Range(0, float("inf"))], [float("inf")], [float("nan"), -1, 10**400]),
        (Layers, [1, 64], [0, 65]),
        (Levels, [(1,) * 16], [(1,) * 17, (0,)]),
    ],
)
def test_what_annotations_mean(hint: Any, good: list[Any], bad: list[Any]) -> None:
    rule = rule_of(hint)
    assert [value for value in good if not rule.allows(value)] == []
    assert [value for value in bad if rule.allows(value)] == []


def test_an_annotation_without_a_rule_is_an_error_of_the_class() -> None:
    with pytest.raises(TypeError, match="no rule for fields annotated"):
        rule_of(dict[str, int])
    assert str(Rule(text=True, none=True)) == "text of up to 500 characters or null"
    assert str(rule_of(Layers | tuple[Layers, ...])) == (
        "a whole number from 1 to 64 or a list of up to 64 entries, each a whole number from 1 to 64"
    )


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (DDIMScheduler, {"num_train_timesteps": 2**31}, "DDIMScheduler: num_train_timesteps must be a whole number"
         " from 1 to 65,536, got 2147483648"),
        (DDIMScheduler, {"beta_start": "a"}, "beta_start must be a number from -1e+09 to 1e+09, got 'a'"),
        (DPMSolverMultistepScheduler, {"lambda_min_clipped": float("nan")}, "lambda_min_clipped must be a number from"
         " -inf to 1e+09, got nan"),
        (CLIPTextConfig, {"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 64"),
        (CLIPTextConfig, {"hidden_size": "512"}, "hidden_size must be a whole number from 1 to 65,536, got '512'"),
        (CLIPTextConfig, {"layer_norm_eps": -1e-5}, "layer_norm_eps must be a number from 0 to 1, got -1e-05"),
        (CLIPTextConfig, {"num_attention_heads": 0}, "num_attention_heads must be a whole number from 1"),
        (UNet2DConditionConfig, {"layers_per_block": 64}, "block_out_channels=(320, 640, 1280, 1280),"
         " layers_per_block=64 together make more than 192 layers"),
        (UNet2DConditionConfig, {"layers_per_block": 10**4999}, "layers_per_block must be a whole number from 1 to 64"
         " or a list of up to 64 entries, each a whole number from 1 to 64, got an integer of"),
    ],
)  # fmt: skip
def test_messages(cls: type[Config], data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        cls.from_json(data)


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (ADMUNet, {"channel_mult": []}, "channel_mult must have at least one entry"),
        (ADMUNet, {"channel_mult": [0, 1]}, "channel_mult must be a list of up to 16 entries"),
        (ADMUNet, {"channel_mult": [1e-9]}, "model_channels=128 times channel_mult must be multiples of 32, got [0]"),
        (ADMUNet, {"num_head_channels": 0}, "num_head_channels must be -1 or a whole number from 1"),
        (ADMUNet, {"num_heads": 7}, "256 channels cannot be split into heads (num_heads=7"),
        (AutoencoderKL, {"norm_num_groups": 7}, "64 channels cannot be split into 7 groups of equal size (norm_"),
        (AutoencoderKL, {"up_block_types": ["UpBlock"]}, "up_block_types must be 'UpDecoderBlock2D' at every level"),
        (ControlNetModel, {"transformer_layers_per_block": [1]}, "transformer_layers_per_block has 1 entries for 4 "),
        (UNet2DConditionModel, {"reverse_transformer_layers_per_block": [1]}, ": reverse_transformer_layers_per"),
        (UNet2DConditionModel, {"attention_head_dim": "8"}, "(files call it attention_head_dim)"),
        (UNet2DConditionModel, {"attention_head_dim": 7}, "width 320 cannot be split into 7 heads (attention_head_"),
        (DPTForDepthEstimation, {"image_size": 65_536}, "image_size=65536, patch_size=16 and reassemble_factors="),
        (DPTForDepthEstimation, {"image_size": 7}, "make maps of 0 pixels per side"),
        (CLIPTextModel, {"hidden_size": 10**4000}, "hidden_size must be a whole number from 1 to 65,536, got an int"),
    ],
)  # fmt: skip
def test_values_that_do_not_go_together_name_their_fields(
    cls: type[Model], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(cls().config_json() | changes))
    with bounded(memory=4 << 30), pytest.raises(WeightsError, match=re.escape(message)) as error:
        cls.from_config(tmp_path)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def test_an_integer_of_thousands_of_digits_names_its_field(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for value in ("1" * 5000, "[1, -" + "1" * 5000 + "]"):
        file.write_text(f'{{"act_fn": "silu", "layers_per_block": {value}, "sample_size": 64}}')
        with pytest.raises(WeightsError, match="cannot be read: layers_per_block has an integer of 5000 digits"):
            UNet2DConditionModel.from_config(tmp_path)


def test_numbers_in_files_are_accepted() -> None:
    assert DPMSolverMultistepScheduler.from_json({"lambda_min_clipped": float("-inf")}).lambda_min_clipped < -1e300
    assert CLIPTextConfig.from_json({"pad_token_id": None, "bos_token_id": None}).pad_token_id is None
    assert DDIMScheduler.from_json({"beta_end": 1, "clip_sample": None}).beta_end == 1


@pytest.mark.parametrize("cls", NETWORKS)
def test_the_file_of_a_network_is_named(cls: type[Model], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    whole = cls().config_json()
    for field in dataclasses.fields(cls.config_class):
        if field.name != "extra":
            file.write_text(json.dumps(whole | {field.name: {"a": 1}, "attention_head_dim": {"a": 1}}))
            with pytest.raises(WeightsError, match=re.escape(str(file))):
                cls.from_config(tmp_path)
    strange = {"architectures": 3} if cls.model_type else {"_class_name": [1]}
    file.write_text(json.dumps(whole | strange))
    with pytest.raises(WeightsError, match=re.escape(str(file))):
        cls.from_config(tmp_path)


def test_sizes_that_no_network_has_are_errors_of_the_file(tmp_path: Path) -> None:
    for changes in ({"norm_num_groups": 7}, {"attention_head_dim": 7}):
        file = tmp_path / "config.json"
        file.write_text(json.dumps(UNet2DConditionModel().config_json() | changes))
        with bounded(memory=8 << 30), pytest.raises(WeightsError, match=re.escape(str(file))):
            UNet2DConditionModel.from_config(tmp_path)


def test_the_file_of_a_scheduler_is_named(tmp_path: Path) -> None:
    file = tmp_path / "scheduler_config.json"
    for text in (
        *(
            '{"num_train_timesteps": 2147483648}',
            '{"beta_end": "a"}',
            '{"_use_default_values": 3}',
            '{"beta_end": NaN}',
        ),
        *('{"a": ' + "1" * 5000 + "}", "[" * 3000 + "]" * 3000, '{"a": ' + "[" * 900 + "]" * 900 + "}", "\xff"),
        '{"trained_betas": [[1]]}',
    ):
        file.write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=re.escape(str(file))):
            DDIMScheduler.from_pretrained(tmp_path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(Config):
    """A custom configuration: its author defines the range of its numbers."""

    offset: int = -3
    scale: float = -1e12
    table: Any = None
    share: Annotated[float, Range(0, 1)] = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class MyDDIM(DDIMScheduler):
    shift: float = -2.0


def test_classes_from_outside_state_their_own_ranges() -> None:
    assert Mine(offset=0, scale=-1.0, table={"any": ["thing"]}).offset == 0
    assert MyDDIM(shift=-5.0).shift == -5.0
    for make, message in [
        (lambda: Mine(offset="three"), "offset must be a whole number"),
        (lambda: Mine(share=1.5), "share must be a number from 0 to 1, got 1.5"),
        (lambda: MyDDIM(num_train_timesteps=-1), "num_train_timesteps must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
