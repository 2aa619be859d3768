"""What a file that was opened as something else holds, by its keys: for error messages."""

from __future__ import annotations

import re
from collections.abc import Iterable

NO = "which is not supported"

KINDS = (
    (r"joint_blocks\.0\.context_block\.adaLN_modulation\.1\.bias$", f"Stable Diffusion 3, {NO}"),
    (r"double_blocks\.0\.img_attn\.norm\.key_norm\.scale$", f"FLUX, {NO}"),
    (
        r"^noise_augmentor\.",
        "a whole Stable unCLIP without the statistics of image embeddings, which are a file of their own: open the "
        "folder in diffusers' layout",
    ),
    (r"^lllite_", f"a ControlNet-LLLite, {NO}"),
    (r"^lora_controlnet$", f"a Control-LoRA, {NO}"),
    (r"motion_modules\.", f"a motion module of AnimateDiff, {NO}"),
    (r"\.oft_(diag|blocks)|\.oft_[RS]\b|\.boft_", f"orthogonal fine-tuning (OFT, BOFT), {NO}"),
    (r"\.on_input$|\.ia3_", f"IA3, {NO}"),
    (r"\.[ab][12]\.weight$", f"GLoRA, {NO}"),
    (r"\.(vera_lambda_\w|hra_u|fourierft_spectrum|vector_bank)", f"VeRA, HRA, FourierFT or VB-LoRA, {NO}"),
    (r"\.lora_embedding_[AB]", f"LoRA of a token embedding, {NO}"),
    (r"\.(diff_b|lora_[AB](\.\w+)?\.bias|lora_(up|down)\.bias)$", "changed biases, which are not supported"),
    (r"\.(w_norm|b_norm)$", "changed norms, which are not supported"),
    (r"\.lokr_t1$", "a LoKr whose first factor has a core, which no trainer writes"),
    (r"^(image_proj|ip_adapter)\.", "an IP-Adapter, which load_ip_adapter of a pipeline reads"),
    (r"^(adapter\.)?body\.\d+\.", "a T2I-Adapter, which T2IAdapter.from_single_file opens"),
    (r"^(style_embedding$|transformer_layes\.)", f"a style adapter of T2I-Adapter, {NO}"),
    (r"input_hint_block\.|^controlnet_cond_embedding\.", "a ControlNet, which ControlNetModel.from_single_file opens"),
    (
        r"^(model\.diffusion_model\.)?(conv_out|out\.2)\.weight$",
        "a whole UNet, which UNet2DConditionModel.from_single_file opens",
    ),
    (
        r"(\.|_)lora([._](up|down)|_[AB](\.\w+)?)\.weight$|\.(hada|lokr)_w1",
        "a LoRA, which load_lora_weights of a pipeline reads",
    ),
    (r"_custom_diffusion\.", "weights of Custom Diffusion, which load_attn_procs of a pipeline reads"),
    (
        r"^(first_stage_model\.)?(encoder|decoder)\.conv_in\.weight$",
        "an autoencoder, which AutoencoderKL.from_single_file opens",
    ),
)
"""Keys -> what they are part of, as the end of "The file holds ..."."""


def held(keys: Iterable[str], wanted: str = "") -> str:
    """A sentence about what keys are part of, with a space before it; empty if they say nothing.

    Args:
      keys: the keys of a file, or those that could not be used.
      wanted: the first words of the kind that the file was opened as, which is left out.
    """
    names = list(keys)
    found = [
        what
        for pattern, what in KINDS
        if not (wanted and what.startswith(wanted)) and any(re.search(pattern, key) for key in names)
    ]
    return f" The file holds {', '.join(found)}." if found else ""
