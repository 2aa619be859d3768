"""The configurations that the parity benchmark and its tests compare, by family of samplers."""

from benchmarks.scheduler_cases import classic, discrete, exponential, sigma_based
from benchmarks.scheduler_cases.case import Case

FAMILIES = (classic, discrete, exponential, sigma_based)


def cases() -> list[Case]:
    """Every configuration of every family."""
    return [case for family in FAMILIES for case in family.cases()]
