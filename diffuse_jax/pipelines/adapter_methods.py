"""The methods of pipelines that load, mix, fuse and remove adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from diffuse_jax.adapters.lora_file import FILE, read_adapter
from diffuse_jax.adapters.lora_writer import write_adapter
from diffuse_jax.adapters.named import Adapters, Weight, checked
from diffuse_jax.pipelines import adapting
from diffuse_jax.writing import expanded

Names = str | Sequence[str]


class AdapterMethods:
    """What every pipeline does with adapters. Each method returns a new pipeline; this one is unchanged."""

    adapters: Adapters
    params: Mapping[str, Any]

    def load_lora_weights(
        self,
        source: str | Path,
        *,
        adapter_name: str | None = None,
        scale: float = 1.0,
        weight_name: str | None = None,
        strict: bool = True,
        max_rank: int = 0,
    ) -> Self:
        """A pipeline with LoRA weights: merged into its networks, or, with a name, live beside them.

        A merged adapter costs nothing in sampling, which suits one that stays. Several can be merged one after another,
        and merging one again with the negated scale removes it. A live adapter is an argument of the compiled program:
        its weight can be changed, and other adapters can take its place, without compiling.

        Args:
          source: a LoRA, LoHa, LoKr or DoRA file of diffusers, PEFT, kohya's scripts or other trainers
            (``.safetensors``, ``.bin``, ``.pt``), or its folder.
          adapter_name: the name of a live adapter, which becomes the only active one (:meth:`set_adapters` mixes
            several); None merges.
          scale: strength; 0 has no effect.
          weight_name: the file in the folder, if there are several.
          strict: refuse files with keys that belong to no layer; otherwise these are left out with one warning.
          max_rank: reserve room for live adapters of up to this rank, or of this adapter's rank if it is larger. The
            room of a layer never shrinks; when it grows, the program is compiled again.

        Raises:
          WeightsError: the file does not exist, or does not fit the pipeline's networks.
          ValueError: the name is taken.
        """
        options: dict[str, Any] = {"weight_name": weight_name, "strict": strict}
        if adapter_name is None:
            if max_rank:
                raise ValueError("max_rank is for live adapters; give adapter_name too")
            return self._replaced(**adapting.with_lora(self, source, scale, **options))
        adapter = read_adapter(source, adapting.adaptable(self), **options)
        loaded = self.adapters.loaded(adapter_name, adapter, max_rank)
        return self._with(dataclasses.replace(loaded, weights={adapter_name: checked(scale)}))

    def set_adapters(
        self, adapter_names: Names, adapter_weights: Weight | Sequence[Weight | None] | None = None
    ) -> Self:
        """A pipeline in which exactly these live adapters are active.

        Args:
          adapter_names: one name or several.
          adapter_weights: one weight for all, or one each; None is 1. A weight is a number, or numbers by network and
            block; see :data:`~diffuse_jax.adapters.named.Weight`.

        Raises:
          ValueError: a name is unknown, or the weights do not fit.
        """
        return self._with(self.adapters.active(adapter_names, adapter_weights))

    def enable_lora(self) -> Self:
        """A pipeline in which the active adapters act again."""
        return self._with(dataclasses.replace(self.adapters, enabled=True))

    def disable_lora(self) -> Self:
        """A pipeline in which no live adapter acts; names and weights are kept."""
        return self._with(dataclasses.replace(self.adapters, enabled=False))

    def delete_adapters(self, adapter_names: Names) -> Self:
        """A pipeline without these live adapters.

        Raises:
          ValueError: a name is unknown, or its adapter is fused.
        """
        return self._with(self.adapters.without(adapter_names))

    def unload_lora_weights(self) -> Self:
        """A pipeline without live adapters and without the room that they took. What is merged stays merged."""
        return self._with(Adapters())

    def get_active_adapters(self) -> list[str]:
        """The names of the active live adapters."""
        return [*self.adapters.weights]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Network -> the names of its live adapters."""
        found: dict[str, list[str]] = {}
        for name, adapter in self.adapters.named.items():
            for network in adapter:
                found.setdefault(network, []).append(name)
        return found

    def fuse_lora(
        self, *, lora_scale: float = 1.0, adapter_names: Names | None = None, safe_fusing: bool = False
    ) -> Self:
        """A pipeline with live adapters merged into its kernels, with their weights; :meth:`unfuse_lora` undoes it.

        The original kernels are kept, so this takes the memory of the changed layers once more.

        Args:
          lora_scale: a factor of all weights.
          adapter_names: which adapters, with a weight of 1 if they are not active; the active ones if None.
          safe_fusing: refuse kernels that are not finite afterwards.

        Raises:
          ValueError: there is no such adapter, it is fused already, or ``safe_fusing`` found NaN or infinity.
        """
        return adapting.fused(self, lora_scale, adapter_names, safe_fusing)

    def unfuse_lora(self) -> Self:
        """A pipeline with the kernels from before :meth:`fuse_lora`, bit for bit, and its adapters live again.

        Raises:
          ValueError: nothing is fused.
        """
        return adapting.unfused(self)

    def save_lora_weights(self, folder: str | Path, adapter_name: str | None = None, *, to: str = "diffusers") -> Path:
        """Write a live adapter as ``pytorch_lora_weights.safetensors``, without its weight, and return the file.

        Args:
          folder: created if needed.
          adapter_name: which adapter; may be None if there is only one.
          to: the layout, ``"diffusers"``, ``"peft"`` or ``"kohya"``.

        Raises:
          ValueError: there is no such adapter, or the layout is unknown.
          WeightsError: the layout cannot hold an adapter of this kind.
        """
        names = [*self.adapters.named] if adapter_name is None else [adapter_name]
        self.adapters.check(names)
        if len(names) != 1:
            have = f"there are {', '.join(names)}" if names else "there is none"
            raise ValueError(f"adapter_name must say which live adapter to save; {have}")
        two = "text_encoder_2" in self.params
        return write_adapter(expanded(folder) / FILE, self.adapters.named[names[0]], to, two_encoders=two)

    def load_attn_procs(self, source: str | Path, *, weight_name: str | None = None) -> Self:
        """A pipeline whose UNet has the cross-attention of a Custom Diffusion file (Kumari et al. 2023).

        Its new words are in files of their own; see :meth:`load_textual_inversion`.

        Args:
          source: ``pytorch_custom_diffusion_weights.safetensors`` or ``.bin``, or its folder.
          weight_name: the file in the folder, if it has another name.

        Raises:
          WeightsError: the file does not exist, holds something else, or does not fit the UNet.
          ValueError: the pipeline has no UNet.
        """
        return self._replaced(**adapting.with_attention(self, source, weight_name))

    def load_textual_inversion(self, source: str | Path, *, token: str | None = None) -> Self:
        """A pipeline with one more word in its vocabulary (textual inversion).

        Args:
          source: ``learned_embeds.safetensors``, a ``.bin`` or ``.pt`` file, or a folder with one of these. For models
            with two text encoders, the file has ``clip_l`` and ``clip_g``.
          token: the placeholder token; if None, the one in the file, or the file's name if it has none.

        Raises:
          WeightsError: the file does not exist, or does not contain the embeddings of exactly one word.
          ValueError: the word is already known, or the embeddings do not fit the pipeline's text encoders.
        """
        return self._replaced(**adapting.with_word(self, source, token))

    def _with(self, adapters: Adapters) -> Self:
        return adapting.with_adapters(self, adapters)

    def _replaced(self, **changes: Any) -> Self:
        pipe: Any = self
        return pipe.replace(**changes)
