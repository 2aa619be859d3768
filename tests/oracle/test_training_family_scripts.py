"""The training scripts with DeepFloyd IF, Kandinsky 2.2 and Würstchen, from their command lines; PyTorch diffusers
opens what they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffuse_jax import DiffusionPipeline
from tests.train.helpers import EMOJI, log, run

cases = pytest.importorskip("tests.oracle.family_cases", reason="needs PyTorch diffusers and transformers")
folders, if_folders, wuerstchen = cases.folders, cases.if_folders, cases.wuerstchen
torch, diffusers = folders.torch, folders.diffusers

DREAMBOOTH = {"instance_data_dir": EMOJI, "instance_prompt": "a cat"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of every kind."""
    at = tmp_path_factory.mktemp("models")
    wuerstchen.prior_pipeline(at / "wuerstchen")
    torch.save(cases.efficientnet.tiny(wuerstchen.PRIOR["c_in"]).state_dict(), at / "effnet.pt")
    return {
        "one": if_folders.save(at / "one", 1, unet=cases.if_unet(1)),
        "two": if_folders.save(at / "two", 2, unet=cases.if_unet(2)),
        "prior": folders.kandinsky_prior(at / "prior"),
        "decoder": folders.kandinsky_decoder(at / "decoder", **cases.ONE_LEVEL),
        "wuerstchen": at / "wuerstchen",
        "effnet": at / "effnet.pt",
    }


def train(monkeypatch: pytest.MonkeyPatch, script: str, model: Path, output: Path, **flags: Any) -> Path:
    """Two steps; every flag that is not given is that of a short run."""
    shared: dict[str, Any] = {"resolution": 16, "train_batch_size": 4, "max_train_steps": 2, "lr_warmup_steps": 0,
                              "logging_steps": 1, "report_to": "none", "learning_rate": 1e-3}  # fmt: skip
    model_and_output = {"pretrained_model_name_or_path": model, "output_dir": output}
    run(monkeypatch, script, devices=1, **shared | model_and_output | flags)
    assert len(log(output)) == 2
    return output


def state(module: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def moved(before: Any, after: Any) -> set[str]:
    """The names of parameters that are not what they were."""
    old, new = state(before), state(after)
    assert old.keys() == new.keys()
    return {name for name in old if not np.array_equal(old[name], new[name])}


@pytest.mark.slow
def test_dreambooth_with_lora_of_a_first_stage(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="PyTorch diffusers loads LoRA through peft")
    more = {"cache_text_embeddings": True, "validation_prompt": "a cat", "num_validation_images": 1,
            "validation_inference_steps": 2}  # fmt: skip
    out = train(monkeypatch, "dreambooth_lora.py", models["one"], tmp_path, **DREAMBOOTH, **more)
    assert len(list((out / "validation").rglob("*.png"))) == 1
    theirs = diffusers.IFPipeline.from_pretrained(models["one"])
    theirs.load_lora_weights(out)
    layers = {name.split(".")[-4] for name in theirs.unet.state_dict() if ".lora_" in name}
    assert layers >= {"to_q", "add_k_proj", "add_v_proj"}, "prompts reach this UNet through the last two"
    pipe = DiffusionPipeline.from_pretrained(models["one"]).load_lora_weights(out)
    assert pipe("a cat", num_inference_steps=2, seed=0).images[0].size == (16, 16)


@pytest.mark.slow
def test_dreambooth_of_a_second_stage(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "small.png")
    more = {"validation_prompt": "a cat", "num_validation_images": 1, "validation_inference_steps": 2,
            "validation_images": tmp_path / "small.png"}  # fmt: skip
    out = train(monkeypatch, "dreambooth.py", models["two"], tmp_path / "out", **DREAMBOOTH, **more)
    (shown,) = (out / "validation").rglob("*.png")
    assert Image.open(shown).size == (32, 32)
    before, after = (diffusers.IFSuperResolutionPipeline.from_pretrained(x) for x in (models["two"], out))
    assert moved(before.unet, after.unet)
    assert not moved(before.text_encoder, after.text_encoder)
    assert after.scheduler.config.variance_type == "fixed_small"
    assert after.image_noising_scheduler.config == before.image_noising_scheduler.config


def test_kandinsky_prior(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weight decay, which must not reach the statistics of the embeddings; caches change nothing."""
    flags = {"train_data_dir": EMOJI, "adam_weight_decay": 0.1, "center_crop": True}
    caches = {"cache_latents": True, "cache_text_embeddings": True}
    out = train(monkeypatch, "text_to_image.py", models["prior"], tmp_path / "plain", **flags)
    again = train(monkeypatch, "text_to_image.py", models["prior"], tmp_path / "cached", **flags, **caches)
    np.testing.assert_allclose(log(out), log(again), rtol=1e-5)
    before, after = (diffusers.KandinskyV22PriorPipeline.from_pretrained(x) for x in (models["prior"], out))
    changed = moved(before.prior, after.prior)
    assert changed
    assert not changed & {"clip_mean", "clip_std"}
    assert type(after.scheduler) is type(before.scheduler)
    assert after.scheduler.config == before.scheduler.config


@pytest.mark.slow
def test_lora_of_priors(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="PyTorch diffusers loads LoRA through peft")
    semantic = {"effnet_path": models["effnet"], "resolution": 64, "rank": 2}
    for name, flags in {"prior": {}, "wuerstchen": semantic}.items():
        script, output = "text_to_image_lora.py", tmp_path / name
        out = train(monkeypatch, script, models[name], output, train_data_dir=EMOJI, **flags)
        theirs = wuerstchen.prior_pipeline(tmp_path / "theirs") if name == "wuerstchen" else (
            diffusers.KandinskyV22PriorPipeline.from_pretrained(models[name])
        )  # fmt: skip
        theirs.prior.load_lora_adapter(out, weight_name="pytorch_lora_weights.safetensors", prefix="prior")
        assert any(".lora_" in key for key in theirs.prior.state_dict())
        pipe = DiffusionPipeline.from_pretrained(models[name])
        assert pipe.load_lora_weights(out).params["prior"] is not pipe.params["prior"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["dreambooth.py", "dreambooth_lora.py"])
@pytest.mark.parametrize("name", ["prior", "decoder", "wuerstchen"])
def test_dreambooth_of_priors_and_decoders(
    script: str, name: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prior preservation, from class images that are there."""
    own = {
        "prior": {},
        "decoder": {"pretrained_prior_model_name_or_path": models["prior"]},
        "wuerstchen": {"effnet_path": models["effnet"], "resolution": 64},
    }[name]
    kept = {"with_prior_preservation": True, "class_prompt": "a", "class_data_dir": EMOJI, "num_class_images": 12}
    out = train(monkeypatch, script, models[name], tmp_path / "out", **DREAMBOOTH, **kept, **own)
    assert all(value >= 0 for value in log(out, "prior_loss"))
    pipe = DiffusionPipeline.from_pretrained(out if script == "dreambooth.py" else models[name])
    assert script == "dreambooth.py" or pipe.load_lora_weights(out).params is not pipe.params


@pytest.mark.slow
def test_kandinsky_decoder(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"train_data_dir": EMOJI, "pretrained_prior_model_name_or_path": models["prior"], "cache_latents": True}
    out = train(monkeypatch, "text_to_image.py", models["decoder"], tmp_path, **flags)
    before, after = (diffusers.KandinskyV22Pipeline.from_pretrained(x) for x in (models["decoder"], out))
    assert moved(before.unet, after.unet)
    assert not moved(before.movq, after.movq)
    assert not (out / "image_encoder").exists()
    assert type(DiffusionPipeline.from_pretrained(out)).__name__ == "KandinskyV22Pipeline"


@pytest.mark.slow
def test_wuerstchen_prior(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"train_data_dir": EMOJI, "effnet_path": models["effnet"], "resolution": 64, "use_ema": True}
    out = train(monkeypatch, "text_to_image.py", models["wuerstchen"], tmp_path, **flags, snr_gamma=5)
    wanted = wuerstchen.network("WuerstchenPrior", wuerstchen.PRIOR)
    assert moved(wanted, type(wanted).from_pretrained(out, subfolder="prior"))
    assert type(DiffusionPipeline.from_pretrained(out)).__name__ == "WuerstchenPriorPipeline"


@pytest.mark.parametrize(
    ("script", "model", "wrong", "message"),
    [
        ("text_to_image.py", "one", {"cache_latents": True}, "--cache_latents cannot be used with IFPipeline"),
        ("text_to_image.py", "one", {"train_text_encoder": True}, "T5 stays as it is"),
        ("text_to_image.py", "one", {"class_labels_conditioning": "timesteps"}, "this is a first stage"),
        ("text_to_image.py", "one", {"resolution": 16, "effnet_path": "x.pt"}, "only a prior of Würstchen"),
        ("text_to_image.py", "prior", {"mask_column": "mask"}, "cannot be used with KandinskyV22PriorPipeline: its"),
        ("dreambooth.py", "two", {**DREAMBOOTH, "validation_prompt": "a"}, "needs --validation_images here"),
        ("dreambooth.py", "two", {**DREAMBOOTH, "resolution": 15}, "--resolution must be a multiple of 2"),
        ("dreambooth.py", "two", {**DREAMBOOTH, "with_prior_preservation": True, "class_prompt": "a",
                                  "class_data_dir": "dogs"}, "has 0 of 100 images, and a IFSuperResolutionPipeline ca"),
        ("dreambooth.py", "prior", {**DREAMBOOTH, "with_prior_preservation": True, "class_prompt": "a",
                                    "class_data_dir": "dogs"}, "KandinskyV22PriorPipeline cannot make the others"),
        ("dreambooth.py", "prior", {**DREAMBOOTH, "train_text_encoder": True}, "a prior reads CLIP's embeddings as th"),
        ("controlnet.py", "one", {"conditioning": "canny"}, "is a IFPipeline; this trainer supports"),
        ("text_to_image.py", "prior", {"noise_offset": 0.1}, "--noise_offset cannot be used with Kandinsky"),
        ("text_to_image.py", "prior", {"gradient_checkpointing": True}, "no blocks that can be recomputed"),
        ("text_to_image.py", "prior", {"validation_prompt": "a"}, "KandinskyV22CombinedPipeline"),
        ("text_to_image.py", "decoder", {}, "has no image_encoder; give --pretrained_prior_model_name_or_path"),
        ("text_to_image.py", "wuerstchen", {}, "has no effnet; give --effnet_path"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(
    script: str, model: str, wrong: dict[str, Any], message: str, models: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    data = {} if script.startswith("dreambooth") else {"train_data_dir": EMOJI}
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        train(monkeypatch, script, models[model], tmp_path / "out", **data | wrong)
    assert not (tmp_path / "out").exists()


def test_flags_of_diffusers_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    """Their command lines for DeepFloyd IF need no changes but for what has another name."""
    from diffuse_jax.training.latent_flags import latent_parser

    words = "--pretrained_model_name_or_path m --tokenizer_max_length=77 --text_encoder_use_attention_mask"
    args = latent_parser("about", output_dir="here").parse_args(
        [*words.split(), "--class_labels_conditioning=timesteps"]
    )
    assert args.class_labels_conditioning == "timesteps"
    noted = capsys.readouterr().err
    assert "--tokenizer_max_length has no effect" in noted
    assert "--text_encoder_use_attention_mask has no effect" in noted
