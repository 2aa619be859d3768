"""Images for a file of prompts, as a job that can be interrupted, continued and divided over processes."""

from diffuse_jax.batch.job import Report as Report
from diffuse_jax.batch.job import sample_many as sample_many
from diffuse_jax.batch.reporting import Failure as Failure
from diffuse_jax.batch.reporting import Status as Status

__all__ = ["Failure", "Report", "Status", "sample_many"]
