"""The layers that adapters are made for, for modules that load no JAX."""

from __future__ import annotations

from collections.abc import Mapping

TARGETS = r"/(to_q|to_k|to_v|to_out_0|add_k_proj|add_v_proj)$|/(q_proj|k_proj|v_proj|out_proj)$"
"""Paths of the layers that get pairs unless others are named: all projections of UNets' and of CLIP's attention."""

CUSTOM_DIFFUSION: Mapping[str, str] = {
    "crossattn_kv": r"/attn2/(to_k|to_v)/kernel$",
    "crossattn": r"/attn2/((to_q|to_k|to_v)/kernel|to_out_0/(kernel|bias))$",
}
"""What Custom Diffusion trains, by diffusers' names -> paths of these arrays: the projections of cross-attention."""

UNET_TARGETS = (
    r"/(to_q|to_k|to_v|to_out_0|proj_in|proj_out|net_0/proj|net_2)$"
    r"|/(conv1|conv2|conv_shortcut|time_emb_proj|(down|up)samplers_0/conv)$"
)
"""Paths of all layers in a UNet's blocks, dense or convolutions, which LCM-LoRA adapts."""
