"""What a run of a latent trainer can be refused for is checked before weights are downloaded or read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from diffuse_jax.pipelines import DiffusionPipeline
from diffuse_jax.training.cached import check_inputs
from diffuse_jax.training.data import (
    DataSettings,
    Source,
    check_first,
    counts_from,
    source_from,
    stream_from,
    warn_of_size,
)
from diffuse_jax.training.families import refuse_settings, trained_family
from diffuse_jax.training.objective import objective_from
from diffuse_jax.training.settings import ModelSettings, ObjectiveSettings, RunSettings, ValidationSettings
from diffuse_jax.training.start import check_run
from diffuse_jax.training.validation import validation_from


def checked_source(
    run: RunSettings,
    model: ModelSettings,
    data: DataSettings,
    learned: ObjectiveSettings,
    mesh: Mesh,
    pipe: DiffusionPipeline,
    *,
    trainable: Mapping[str, Any],
    shown: ValidationSettings | None = None,
    source: Source | None = None,
    times: int = 1,
) -> Source | None:
    """Open the data set of a run, and check all settings against it, the model's configurations and the checkpoint.

    Warns if the training resolution is not the model's.

    Args:
      run: settings of the run.
      model: where the pipeline comes from.
      data: the data set, and what to cache.
      learned: the loss.
      mesh: the mesh of the run.
      pipe: that of :func:`~diffuse_jax.training.latent_model.configured_from`; its parameters are only shapes.
      trainable: shapes of the parameters to train, by network.
      shown: the validation images; None if they are checked elsewhere.
      source: a source to use instead of the one that the settings describe.
      times: number of times the source is repeated.

    Returns:
      The source, for :func:`~diffuse_jax.training.cached.inputs_from`; None for a stream.

    Raises:
      ValueError, FileNotFoundError, FileExistsError, ImportError: as for the functions that use these settings.
    """
    family = trained_family(pipe)
    refuse_settings(family, pipe, model, data, learned, *([] if shown is None else [shown]))
    check_inputs(data, pipe, trainable)
    warn_of_size(data.images, family.size(pipe))
    objective_from(learned, pipe.scheduler)
    if shown is not None:
        validation_from(shown, model, pipe, lambda trained: trained)
    if source is None and data.streaming:
        examples = stream_from(data).count
    else:
        source = source_from(data) if source is None else source
        examples = sum(counts_from(data, source)) * times
        check_first(data, source)
    check_run(run, mesh, examples, trainable)
    return source
