"""Where a model is looked for when it does not lie in a local folder."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from diffuse_jax import weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubSettings:
    """Which version of a model is taken from the Hub, and where downloads are kept.

    Attributes:
      revision: branch, tag or commit; the main branch if None.
      variant: which weight files to read, such as "fp16"; those without a variant if None. Also of local folders.
      cache_dir: where downloads are kept; the Hub's own folder if None.
      hub_token: access token; the one that `hf auth login` stored if None.
    """

    revision: str | None = None
    variant: str | None = None
    cache_dir: str | Path | None = None
    hub_token: str | None = dataclasses.field(default=None, repr=False)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of :func:`diffuse_jax.weights.resolve` and all that open models by it."""
        return {
            "revision": self.revision,
            "variant": self.variant,
            "cache_dir": self.cache_dir,
            "token": self.hub_token,
        }


@functools.lru_cache(maxsize=32)
def model_folder(source: str | Path, hub: HubSettings, skip: frozenset[str] = frozenset()) -> Path:
    """The local folder of a model. A run gets the same one whenever it asks, even if a branch on the Hub moves.

    Raises:
      WeightsError: as :func:`diffuse_jax.weights.resolve`.
    """
    return weights.resolve(source, **hub.options, skip=skip)
