"""The methods of pipelines that load IP-Adapters and set their strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from diffuse_jax.pipelines import image_adapters, image_prompts
from diffuse_jax.pipelines.image_adapters import Scale


class ImageAdapterMethods:
    """What every pipeline does with IP-Adapters. Methods that change something return a new pipeline."""

    def load_ip_adapter(
        self,
        source: str | Path | Sequence[str | Path],
        subfolder: str | Sequence[str | None] | None = None,
        weight_name: str | Sequence[str] = "diffusion_pytorch_model.safetensors",
        image_encoder_folder: str | None = "image_encoder",
        *,
        config: Mapping[str, Any] | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """A pipeline whose UNet attends to images too (IP-Adapter, Ye et al. 2023); calls take ``ip_adapter_image``.

        Lists load several adapters; those that were loaded before are replaced. The image encoder and what prepares
        images for it are loaded if the pipeline has none. A face ID adapter's LoRA becomes a live adapter ``faceid_0``
        (of the first file), active beside the others. Images, scales and masks are arguments of the compiled program.

        Args:
          source: a local folder or a Hub id, such as ``"h94/IP-Adapter"``.
          subfolder: the file's folder inside it, for example ``"models"``.
          weight_name: the file, for example ``"ip-adapter_sd15.safetensors"``; that of ``IPAdapter.save_pretrained`` by
            default.
          image_encoder_folder: the image encoder's folder inside ``subfolder``, or with a slash inside ``source``; None
            loads none.
          config: what a file does not show: ``{"shortcut": True}`` for version 2 of face ID plus.
          revision, local_files_only, token, cache_dir: as in :meth:`from_pretrained`.

        Raises:
          WeightsError: a file or the image encoder does not exist or is damaged.
          ValueError: an adapter is for another UNet, or the lists have different lengths.

        Example::

            pipe = pipe.load_ip_adapter("h94/IP-Adapter", "models", "ip-adapter_sd15.safetensors")
            image = pipe("a cat", ip_adapter_image=photo, ip_adapter_scale=0.6).images[0]
        """
        hub = {
            "revision": revision,
            "local_files_only": local_files_only,
            "token": token,
            "cache_dir": cache_dir,
        }
        return image_adapters.with_ip_adapters(self, source, subfolder, weight_name, image_encoder_folder, config, hub)

    def set_ip_adapter_scale(self, scale: Scale | Sequence[Scale]) -> Self:
        """A pipeline whose IP-Adapters act at this strength, 1 when they are loaded; compiles nothing.

        Args:
          scale: one for all, or a list with one for each adapter: a number, or numbers by block; see
            :data:`~diffuse_jax.pipelines.image_adapters.Scale`. With masks, a list for each image of an adapter:
            ``[[0.7, 0.4]]``.

        Raises:
          ValueError: there is no adapter, the list has another length, or the UNet has no such block.
        """
        return image_adapters.with_scales(self, scale)

    def unload_ip_adapter(self) -> Self:
        """A pipeline without IP-Adapters, and without the components and LoRAs that loading them added.

        Raises:
          ValueError: such a LoRA is fused.
        """
        return image_adapters.without_ip_adapters(self)

    def prepare_ip_adapter_image_embeds(
        self, ip_adapter_image: Any, *, do_classifier_free_guidance: bool = True
    ) -> list[np.ndarray]:
        """Encode images once, to pass them as ``ip_adapter_image_embeds`` to several calls.

        Args:
          ip_adapter_image: as in a call.
          do_classifier_free_guidance: whether calls have a ``guidance_scale`` above 1; the embeddings of the negative
            branch then come first.

        Returns:
          For each adapter float32 ``[2,N,D]`` (``[1,N,D]`` without guidance) or, of adapters that take hidden states,
          ``[2,N,T,D]``.

        Raises:
          ValueError: there is no image encoder, or not an image for each adapter.
        """
        return image_prompts.prepare_embeds(self, ip_adapter_image, do_classifier_free_guidance)
