"""What a rank can be."""

from falcon_jax.methods.spec import ConvSpec


def check_rank(rank: object) -> None:
    """Raise unless ``rank`` is a whole number of at least 1.

    Raises:
        ValueError: naming what was given.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is a whole number of at least 1; got {rank!r}.")


def rank_reason(rank: int, spec: ConvSpec) -> str | None:
    """Return why a separable method of this rank cannot replace a convolution, or None."""
    if spec.taps == 1:
        return "a 1x1 kernel has nothing to separate"
    if rank > spec.taps:
        return f"rank {rank} is more than the {spec.taps} taps, with which every kernel is exact"
    return None
