"""A narrower model started from the leading channels of a trained one."""

from flax import nnx

from falcon_jax.compression.differences import differences
from falcon_jax.compression.nnx_tree import arrays, with_arrays


def narrow(model: nnx.Module, narrower: nnx.Module) -> nnx.Module:
    """Return a copy of a narrower model whose weights are the leading channels of a trained one.

    ``new[i, j, ...] = old[i, j, ...]`` for every index that the narrower array has. Random number
    generators keep the narrower model's state.

    Args:
        model: the trained model.
        narrower: a model of the same structure with arrays at most as large; its values do not
            matter, and it is not changed.

    Returns:
        The copy.

    Raises:
        ValueError: if the two have other variables, or an array of the narrower is larger.

    Reference:
        FALCON, Section 3.4, the width multiplier.
    """
    new, old = arrays(narrower), arrays(model)
    if new.keys() != old.keys():
        raise ValueError(
            "the narrower model has other variables than the trained one:\n" + differences(old, new)
        )
    leading = {}
    for name, array in new.items():
        value, shape = old[name], array.shape
        if len(shape) != value.ndim or any(a > b for a, b in zip(shape, value.shape, strict=True)):
            raise ValueError(
                f"{name} has shape {shape} in the narrower model, which does not fit into "
                f"{value.shape} of the trained one."
            )
        leading[name] = value[tuple(slice(size) for size in shape)]
    return with_arrays(narrower, leading)
