"""Single files in the original layout: published names, configurations read off tensors, files that do not fit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffuse_jax import layouts
from diffuse_jax.convert import open_source
from diffuse_jax.layouts import family_for, read_single_file, write_single_file
from diffuse_jax.schedulers import Scheduler
from diffuse_jax.weights import WeightsError, match
from diffuse_jax.weights.safetensors import read_safetensors, write_safetensors
from tests.layouts.families import FAMILIES, family_tensors
from tests.weights.tiny import same_bits
from tests.weights.torch_files import mapping, number, storage, tensor, text, write_zip


@pytest.mark.parametrize("name", FAMILIES)
def test_writing_and_reading_gives_the_same_tensors_and_configs(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors = family_tensors(name, rng)
    scheduler = {"scheduler": dict(layouts.FAMILIES[name].scheduler)}
    assert family_for({part: model.config_json() for part, model in FAMILIES[name].items()}, scheduler) == name
    write_single_file(tmp_path / "a.safetensors", tensors, name)
    file = read_single_file(tmp_path / "a.safetensors")
    assert file.family == name
    assert file.networks.keys() == tensors.keys()
    for part, model in FAMILIES[name].items():
        read = file.networks[part]
        assert read.checkpoint.tensors.keys() == tensors[part].keys()
        for key, array in tensors[part].items():
            assert same_bits(read.checkpoint.tensors[key], array), key
        again = type(model).from_config(read.config)
        assert again.config == model.config.replace(extra=again.config.extra)
        match(read.checkpoint, model.shapes(), label=part)


KEYS = {
    "v1": [
        "model.diffusion_model.time_embed.2.weight",
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight",
        "model.diffusion_model.input_blocks.2.0.op.bias",
        "model.diffusion_model.input_blocks.3.0.skip_connection.weight",
        "model.diffusion_model.middle_block.2.out_layers.3.bias",
        "model.diffusion_model.output_blocks.1.1.conv.weight",
        "model.diffusion_model.output_blocks.3.1.proj_out.weight",
        "model.diffusion_model.out.0.weight",
        "first_stage_model.encoder.down.0.downsample.conv.weight",
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
        "first_stage_model.decoder.up.1.upsample.conv.weight",
        "first_stage_model.decoder.mid.attn_1.proj_out.weight",
        "first_stage_model.post_quant_conv.bias",
        "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight",
    ],
    "v2": [
        "cond_stage_model.model.positional_embedding",
        "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_bias",
        "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight",
        "cond_stage_model.model.ln_final.weight",
    ],
    "x4-upscaler": ["model.diffusion_model.label_emb.weight", "model.diffusion_model.output_blocks.1.2.conv.weight"],
    "xl": [
        "model.diffusion_model.label_emb.0.2.bias",
        "model.diffusion_model.input_blocks.3.1.transformer_blocks.1.attn2.to_k.weight",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.token_embedding.weight",
    ],
    "xl-refiner": ["conditioner.embedders.0.model.transformer.resblocks.0.attn.in_proj_weight"],
}


@pytest.mark.parametrize("name", KEYS)
def test_names_and_shapes_are_those_of_published_files(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    write_single_file(tmp_path / "a.safetensors", family_tensors(name, rng), name)
    stored = read_safetensors(tmp_path / "a.safetensors")
    assert [key for key in KEYS[name] if key not in stored] == []
    assert stored["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    fused = [array.shape for key, array in stored.items() if key.endswith("0.attn.in_proj_weight")]
    assert fused == ([] if name == "v1" else [(192, 64)])


def test_sd_turbo_is_recognised_by_its_sampler_and_prediction() -> None:
    networks = {part: model.config_json() for part, model in FAMILIES["v2"].items()}
    trailing = dict(layouts.FAMILIES["v2-turbo"].scheduler)
    assert family_for(networks, {"scheduler": trailing}) == "v2-turbo"
    assert family_for(networks, {"scheduler": trailing | {"prediction_type": "v_prediction"}}) == "v2"
    assert family_for(networks) == "v2"


def stored_family(name: str, rng: np.random.Generator, folder: Path) -> dict[str, np.ndarray]:
    write_single_file(folder / "plain.safetensors", family_tensors(name, rng), name)
    return read_safetensors(folder / "plain.safetensors")


def save(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    path = folder / "model.safetensors"
    write_safetensors(path, {key: (a.dtype, a.shape) for key, a in tensors.items()}, tensors.values())
    return path


def write_state_dict(path: Path, tensors: dict[str, np.ndarray], **others: bytes) -> None:
    """A ``.ckpt`` with these tensors and other values; the storage ``step`` holds one number."""
    program, storages = b"", {"step": np.float32(875000).tobytes()}
    for i, (key, array) in enumerate(tensors.items()):
        strides = tuple(s // 4 for s in array.strides)
        program += text(key) + tensor(storage(str(i), array.size), 0, array.shape, strides)
        storages[str(i)] = array.tobytes()
    write_zip(path, mapping(state_dict=b"}(" + program + b"u", **others), storages)


@pytest.mark.parametrize("suffix", [".SAFETENSORS", ".CKPT"])
def test_suffixes_may_be_capitals(suffix: str, tmp_path: Path, rng: np.random.Generator) -> None:
    stored = stored_family("v1", rng, tmp_path)
    path = tmp_path / f"MODEL{suffix}"
    if suffix == ".CKPT":
        write_state_dict(path, stored)
    else:
        save(tmp_path, stored).rename(path)
    assert read_single_file(path).family == "v1"
    assert open_source(path).class_name == "StableDiffusionPipeline"


def test_what_training_left_behind_is_not_read(tmp_path: Path, rng: np.random.Generator) -> None:
    stored = stored_family("v1", rng, tmp_path)
    leftovers = (
        "betas",
        "alphas_cumprod_prev",
        "model_ema.decay",
        "first_stage_model.loss.logvar",
        "posterior_variance",
        "optimizer_states.0.state.0.exp_avg",
        "cond_stage_model.logit_scale",
        "cond_stage_model.transformer.logit_scale",
        "cond_stage_model.transformer.text_projection.weight",
        "cond_stage_model.transformer.vision_model.embeddings.class_embedding",
    )
    extra = dict.fromkeys(leftovers, np.zeros(3, np.float32))
    extra["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(16)
    read = read_single_file(save(tmp_path, stored | extra))
    assert read.class_name == "StableDiffusionPipeline"
    assert read.schedulers["scheduler"]["_class_name"] == "PNDMScheduler"
    assert read.networks["unet"].checkpoint.files["conv_in.weight"].name == "model.safetensors"


def test_averaged_weights(tmp_path: Path, rng: np.random.Generator) -> None:
    stored = stored_family("v1", rng, tmp_path)
    prefix = "model.diffusion_model."
    averages = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): array + 1
        for key, array in stored.items()
        if key.startswith(prefix)
    }
    path = save(tmp_path, stored | averages)
    plain, averaged = (read_single_file(path, ema=ema).networks["unet"].checkpoint.tensors for ema in (False, True))
    assert all(same_bits(averaged[key], plain[key] + 1) for key in plain)
    with pytest.raises(WeightsError, match="has no EMA weights"):
        read_single_file(save(tmp_path, dict(stored)), ema=True)


def test_the_last_layer_and_the_projection_of_a_whole_openclip_are_left_out(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    stored = stored_family("v2", rng, tmp_path)
    layer = "cond_stage_model.model.transformer.resblocks.1."
    last = {key.replace("blocks.1.", "blocks.2."): array for key, array in stored.items() if key.startswith(layer)}
    last["cond_stage_model.model.text_projection"] = np.zeros((64, 64), np.float32)
    last["cond_stage_model.model.logit_scale"] = np.zeros((), np.float32)
    text_encoder = read_single_file(save(tmp_path, stored | last)).networks["text_encoder"]
    assert text_encoder.config["num_hidden_layers"] == 2
    assert text_encoder.config["architectures"] == ["CLIPTextModel"]
    match(text_encoder.checkpoint, FAMILIES["v2"]["text_encoder"].shapes(), label="text_encoder")


def test_prediction_type_of_stable_diffusion_2(tmp_path: Path, rng: np.random.Generator) -> None:
    stored = stored_family("v2", rng, tmp_path)
    path = save(tmp_path, stored)
    kinds = {None: ("v_prediction", 96), "epsilon": ("epsilon", 64)}
    for asked, (kind, size) in kinds.items():
        file = read_single_file(path, prediction_type=asked)
        assert file.schedulers["scheduler"]["prediction_type"] == kind
        assert file.networks["unet"].config["sample_size"] == size
    # A .ckpt remembers how long it was trained, which tells the two kinds apart.
    tensor_step = tensor(storage("step", 1), 0, (), ())  # as some trainers store it; it says nothing here
    for step, kind in ((number(875000), "epsilon"), (number(140000), "v_prediction"), (tensor_step, "v_prediction")):
        write_state_dict(tmp_path / "model.ckpt", stored, global_step=step)
        assert read_single_file(tmp_path / "model.ckpt").schedulers["scheduler"]["prediction_type"] == kind


def test_inpainting_is_recognised_by_its_channels(tmp_path: Path, rng: np.random.Generator) -> None:
    stored = stored_family("v1", rng, tmp_path)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    for channels, kind in ((9, "StableDiffusionInpaintPipeline"), (8, "StableDiffusionInstructPix2PixPipeline")):
        file = read_single_file(save(tmp_path, stored | {key: np.zeros((32, channels, 3, 3), np.float32)}))
        assert (file.class_name, file.networks["unet"].config["in_channels"]) == (kind, channels)
    with pytest.raises(WeightsError, match="the UNet has 6 input channels"):
        read_single_file(save(tmp_path, stored | {key: np.zeros((32, 6, 3, 3), np.float32)}))


def test_stable_diffusion_2_predicts_noise_where_it_inpaints(tmp_path: Path, rng: np.random.Generator) -> None:
    inpaint = {"model.diffusion_model.input_blocks.0.0.weight": np.zeros((32, 9, 3, 3), np.float32)}
    file = read_single_file(save(tmp_path, stored_family("v2", rng, tmp_path) | inpaint))
    assert file.schedulers["scheduler"]["prediction_type"] == "epsilon"
    assert [file.networks[part].config["sample_size"] for part in ("unet", "vae")] == [64, 512]


def test_values_of_the_caller_replace_those_read_off_the_tensors(tmp_path: Path, rng: np.random.Generator) -> None:
    stored_family("v1", rng, tmp_path)
    file = read_single_file(tmp_path / "plain.safetensors", configs={"unet": {"attention_head_dim": 4}})
    assert file.networks["unet"].config["attention_head_dim"] == 4


def test_what_tensors_do_not_say_is_kept_in_the_metadata(tmp_path: Path, rng: np.random.Generator) -> None:
    path, tensors = tmp_path / "a.safetensors", family_tensors("v1", rng)
    configs, schedulers = {"unet": {"attention_head_dim": 4}}, {"scheduler": {"_class_name": "DDIMScheduler"}}
    write_single_file(path, tensors, "v1", configs=configs, schedulers=schedulers)
    file = read_single_file(path)
    assert file.networks["unet"].config["attention_head_dim"] == 4
    assert file.schedulers == schedulers
    assert read_single_file(path, prediction_type="epsilon").schedulers["scheduler"]["_class_name"] == "PNDMScheduler"
    again = read_single_file(path, configs={"unet": {"attention_head_dim": 2}})
    assert again.networks["unet"].config["attention_head_dim"] == 2
    stored = read_safetensors(path)
    specs = {key: (a.dtype, a.shape) for key, a in stored.items()}
    for damaged in ("{", "3", '{"configs": 3}', '{"configs": {"unet": 3}, "schedulers": {}}'):
        write_safetensors(tmp_path / "b.safetensors", specs, stored.values(), {"diffuse_jax": damaged})
        with pytest.raises(WeightsError, match=r"b\.safetensors: the configurations in its metadata"):
            read_single_file(tmp_path / "b.safetensors")


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a tensor of nobody": (
        {"lora.weight": np.zeros(2, np.float32)},
        "1 tensors belong to no component of v1 files, e.g. 'lora.weight'",
    ),
    "no autoencoder": ({"first_stage_model.": None}, "missing are for v1: vae (first_stage_model.*); for"),
    "no text encoder": ({"cond_stage_model.": None}, "for v1: text_encoder (cond_stage_model.transformer.*)"),
    "no UNet": ({"model.diffusion_model.": None}, "missing are for v1: unet (model.diffusion_model.*); for"),
    "one key of another family": (
        {"conditioner.embedders.0.model.ln_final.weight": np.zeros(64, np.float32)},
        "1 tensors belong to no component of v1 files, e.g. 'conditioner.embedders.0.model.ln_final.weight'",
    ),
    "half a UNet": (
        {"model.diffusion_model.input_blocks.1": None},
        "unet: cannot infer its configuration from its tensors",
    ),
    "no embeddings": (
        {"cond_stage_model.transformer.text_model.embeddings": None},
        "text_encoder: cannot infer its configuration",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_files_that_are_not_pipelines_are_refused(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    changes, message = BROKEN[kind]
    stored = stored_family("v1", rng, tmp_path)
    gone = tuple(prefix for prefix, array in changes.items() if array is None)
    stored = {key: array for key, array in stored.items() if not (gone and key.startswith(gone))}
    stored |= {key: array for key, array in changes.items() if array is not None}
    with pytest.raises(WeightsError, match=r"model\.safetensors: ") as error:
        read_single_file(save(tmp_path, stored))
    assert message in str(error.value)


def test_text_encoders_without_their_first_level_are_read(tmp_path: Path, rng: np.random.Generator) -> None:
    """Files of 2022 that were trained further with the transformers of that time."""
    stored = stored_family("v1", rng, tmp_path)
    old = {key.replace(".transformer.text_model.", ".transformer."): array for key, array in stored.items()}
    assert old.keys() != stored.keys()
    found = [read_single_file(save(tmp_path, tensors)).networks["text_encoder"] for tensors in (old, stored)]
    assert found[0].config == found[1].config
    assert found[0].checkpoint.tensors.keys() == found[1].checkpoint.tensors.keys()


def test_a_folder_is_not_a_single_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is a folder, but a single-file checkpoint is needed"):
        read_single_file(tmp_path)
    with pytest.raises(WeightsError, match=r"nowhere\.ckpt: no such file"):
        read_single_file(tmp_path / "nowhere.ckpt")
    (tmp_path / "link.ckpt").symlink_to(tmp_path / "link.ckpt")
    with pytest.raises(WeightsError, match=r"link\.ckpt: is a link that leads to no file"):
        read_single_file(tmp_path / "link.ckpt")
    os.mkfifo(tmp_path / "pipe.ckpt")
    for read in (read_single_file, open_source):
        with pytest.raises(WeightsError, match=r"pipe\.ckpt: is not a regular file"):
            read(tmp_path / "pipe.ckpt")
    for address in ("https://huggingface.co/owner/name/blob/main/a.safetensors", "hf.co/owner/name/a.safetensors"):
        with pytest.raises(WeightsError, match="is an address, but a local file is needed; download it"):
            read_single_file(address)


def test_a_missing_tensor_is_named_when_it_is_matched(tmp_path: Path, rng: np.random.Generator) -> None:
    stored = stored_family("v1", rng, tmp_path)
    del stored["model.diffusion_model.out.2.bias"]
    stored["model.diffusion_model.out.3.bias"] = np.zeros(4, np.float32)
    part = read_single_file(save(tmp_path, stored)).networks["unet"]
    with pytest.raises(WeightsError) as error:
        match(part.checkpoint, FAMILIES["v1"]["unet"].shapes(), label="unet")
    assert str(error.value) == (
        "unet: 1 missing, 1 unexpected, e.g. 'conv_out.bias' for conv_out/bias; 'out.3.bias' matches nothing"
    )


def test_the_error_says_what_is_missing_for_every_family(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as error:
        read_single_file(save(tmp_path, {"w": np.zeros(2, np.float32)}))
    for name in FAMILIES:
        assert f"for {name}: unet (model.diffusion_model.*), vae (first_stage_model.*), text_encoder" in str(
            error.value
        )
    assert "can be passed to from_single_file, for example vae=(model, params)" in str(error.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_given_need_not_be_in_the_file(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Each component alone, and all but the UNet, which then says which family it is."""
    stored = stored_family(name, rng, tmp_path)
    places = layouts.FAMILIES[name].places
    parts = list(places)
    for given in ([part] for part in parts), [parts[1:]]:
        for names in given:
            gone = tuple(places[part][0] for part in names)
            path = save(tmp_path, {key: array for key, array in stored.items() if not key.startswith(gone)})
            configs = {part: FAMILIES[name][part].config_json() for part in names}
            file = read_single_file(path, given=configs)
            # SD Turbo differs from 2.x only in the prefix of its text encoder's names.
            family = "v2" if name == "v2-turbo" and "text_encoder" in names else name
            assert (file.family, [*file.networks]) == (family, [part for part in parts if part not in names])
            with pytest.raises(WeightsError, match=rf"for {name}: {names[0]} \("):
                read_single_file(path)


def test_what_is_given_is_not_looked_at(tmp_path: Path, rng: np.random.Generator) -> None:
    stored = stored_family("v1", rng, tmp_path) | {"first_stage_model.of.another.kind": np.zeros(2, np.float32)}
    del stored["first_stage_model.encoder.conv_in.weight"]
    assert [*read_single_file(save(tmp_path, stored), given={"vae": {}}).networks] == ["unet", "text_encoder"]


def test_a_text_encoder_of_another_family_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    stored = stored_family("v1", rng, tmp_path)
    gone = {key: array for key, array in stored.items() if not key.startswith("cond_stage_model.")}
    with pytest.raises(WeightsError, match="for v1: a place for text_encoder_2"):
        read_single_file(save(tmp_path, gone), given={"text_encoder": {}, "text_encoder_2": {}})


@pytest.mark.parametrize("name", ["xl", "v1"])
@pytest.mark.parametrize("markers", [("v_pred",), ("v_pred", "ztsnr")])
def test_marker_tensors_say_what_is_predicted(
    name: str, markers: tuple[str, ...], tmp_path: Path, rng: np.random.Generator
) -> None:
    stored = stored_family(name, rng, tmp_path)
    path = save(tmp_path, stored | dict.fromkeys(markers, np.zeros(0, np.float32)))
    config = read_single_file(path).schedulers["scheduler"]
    scheduler = Scheduler.from_config(config)
    assert scheduler.prediction_type == "v_prediction"
    assert getattr(scheduler, "rescale_betas_zero_snr", False) is ("ztsnr" in markers)
    assert type(scheduler).__name__ == (
        "EulerDiscreteScheduler" if name == "xl" else "DDIMScheduler" if "ztsnr" in markers else "PNDMScheduler"
    )
    asked = read_single_file(path, prediction_type="epsilon").schedulers["scheduler"]
    assert asked["prediction_type"] == "epsilon", "the caller has the last word"
    tensors = family_tensors(name, rng)
    write_single_file(tmp_path / "again.safetensors", tensors, name, schedulers={"scheduler": config})
    assert {"v_pred", "ztsnr"} & read_safetensors(tmp_path / "again.safetensors").keys() == {*markers}
    assert read_single_file(tmp_path / "again.safetensors").schedulers["scheduler"] == config


def test_playgrounds_markers_have_the_statistics_of_its_latents(tmp_path: Path, rng: np.random.Generator) -> None:
    stored = stored_family("xl", rng, tmp_path)
    mean, std = np.array([-1.5, 1.75, -1.25, 2.5], np.float16), np.array([8.5, 6, 6.5, 5.25], np.float16)
    file = read_single_file(save(tmp_path, stored | {"edm_mean": mean[None, :, None, None], "edm_std": std}))
    vae, scheduler = file.networks["vae"].config, file.schedulers["scheduler"]
    assert (vae["latents_mean"], vae["latents_std"], vae["scaling_factor"]) == ([*mean], [*std], 0.5)
    assert type(Scheduler.from_config(scheduler)).__name__ == "EDMDPMSolverMultistepScheduler"
    assert (file.class_name, scheduler["sigma_data"], scheduler["sigma_max"]) == ("StableDiffusionXLPipeline", 0.5, 80)
    configs = {part: network.config for part, network in file.networks.items()}
    write_single_file(
        tmp_path / "b.safetensors", family_tensors("xl", rng), "xl", configs=configs, schedulers=file.schedulers
    )
    again = read_safetensors(tmp_path / "b.safetensors")
    assert again.keys() == {*stored, "edm_mean", "edm_std"}
    assert np.array_equal(again["edm_mean"], mean.astype(np.float32))
    for wrong, message in (
        ({"edm_mean": mean}, "'edm_std' is missing"),
        ({"edm_mean": mean[:3], "edm_std": std}, "'edm_mean' must hold 4 finite numbers"),
        ({"edm_mean": mean, "edm_std": std * np.float16(np.nan)}, "'edm_std' must hold 4 finite numbers"),
        ({"edm_mean": mean, "edm_std": std * 0}, "'edm_std' must hold numbers above 0"),
        ({"edm_vpred.sigma_min": np.float32(1)[None]}, "but not 'edm_vpred.sigma_max'"),
        ({"edm_vpred.sigma_max": np.float32(0)[None]}, "'edm_vpred.sigma_max' must be above 'edm_vpred.sigma_min'"),
    ):
        with pytest.raises(WeightsError, match=message):
            read_single_file(save(tmp_path, stored | wrong))
    with pytest.raises(WeightsError, match="'edm_mean', which marks files of Stable Diffusion XL"):
        read_single_file(save(tmp_path, stored_family("v1", rng, tmp_path) | {"edm_mean": mean, "edm_std": std}))


@pytest.mark.parametrize("channels", [4, 8])
def test_cosxls_markers_have_its_noise_levels(channels: int, tmp_path: Path, rng: np.random.Generator) -> None:
    first = {"model.diffusion_model.input_blocks.0.0.weight": np.zeros((32, channels, 3, 3), np.float32)}
    marks = {"edm_vpred.sigma_max": np.float32(120).reshape(()), "edm_vpred.sigma_min": np.float32(0.002).reshape(())}
    stored = stored_family("xl", rng, tmp_path) | first | marks
    file = read_single_file(save(tmp_path, stored))
    scheduler = Scheduler.from_config(file.schedulers["scheduler"])
    assert (type(scheduler).__name__, scheduler.prediction_type) == ("EDMEulerScheduler", "v_prediction")
    assert (scheduler.sigma_max, scheduler.sigma_data, scheduler.sigma_schedule) == (120, 1, "exponential")
    edit = "StableDiffusionXLInstructPix2PixPipeline"
    assert file.class_name == {4: "StableDiffusionXLPipeline", 8: edit}[channels]
    assert file.options.get("is_cosxl_edit", False) is (channels == 8)
    tensors = {part: dict(network.checkpoint.tensors) for part, network in file.networks.items()}
    write_single_file(tmp_path / "b.safetensors", tensors, "xl", schedulers=file.schedulers)
    again = read_safetensors(tmp_path / "b.safetensors")
    assert again.keys() == stored.keys()
    assert all(same_bits(again[key], array) for key, array in stored.items())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [np.float16])
def test_a_file_is_written_as_it_was_read(name: str, dtype: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    write_single_file(tmp_path / "a.safetensors", family_tensors(name, rng, dtype), name)
    file = read_single_file(tmp_path / "a.safetensors")
    tensors = {part: dict(network.checkpoint.tensors) for part, network in file.networks.items()}
    family = family_for({part: network.config for part, network in file.networks.items()}, file.schedulers)
    write_single_file(tmp_path / "b.safetensors", tensors, family, schedulers=file.schedulers)
    stored, again = (read_safetensors(tmp_path / f"{letter}.safetensors") for letter in "ab")
    assert stored.keys() == again.keys()
    assert all(same_bits(again[key], array) for key, array in stored.items())


def test_a_depth_model_holds_its_estimator(tmp_path: Path, rng: np.random.Generator) -> None:
    """Names of MiDaS, written from its code (dpt_depth.py and timm's hybrid backbone)."""
    stored = stored_family("v2-depth", rng, tmp_path)
    start = "depth_model.model."
    for key, shape in {
        "pretrained.model.cls_token": (1, 1, 64),
        "pretrained.model.blocks.1.attn.qkv.weight": (192, 64),
        "pretrained.model.patch_embed.backbone.stages.1.blocks.0.downsample.conv.weight": (128, 128, 1, 1),
        "pretrained.model.patch_embed.backbone.stem.norm.bias": (32,),
        "pretrained.act_postprocess3.0.project.0.weight": (64, 128),
        "pretrained.act_postprocess4.4.weight": (32, 32, 3, 3),
        "scratch.layer1_rn.weight": (16, 128, 3, 3),
        "scratch.refinenet1.resConfUnit2.conv1.weight": (16, 16, 3, 3),
        "scratch.refinenet4.out_conv.bias": (16,),
        "scratch.output_conv.4.weight": (1, 32, 1, 1),
    }.items():
        assert stored[start + key].shape == shape, key
    head = {f"{start}pretrained.model.head.weight": np.zeros((10, 64), np.float32)}
    assert read_single_file(save(tmp_path, stored | head)).class_name == "StableDiffusionDepth2ImgPipeline"
    gone = {key: array for key, array in stored.items() if not key.startswith(start)}
    with pytest.raises(
        WeightsError, match=r"the UNet has 5 input channels; .* for v2-depth: depth_estimator \(depth_mod"
    ):
        read_single_file(save(tmp_path, gone))
