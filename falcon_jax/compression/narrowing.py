"""A narrower model started from the leading channels of a trained one."""

from typing import Any

from flax import nnx

from falcon_jax.compression.differences import differences
from falcon_jax.compression.nnx_tree import map_modules, weights


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
    copy = map_modules(lambda path, module: None, narrower)
    new, old = weights(copy), weights(model)
    if new.keys() != old.keys():
        raise ValueError(
            "the narrower model has other variables than the trained one:\n"
            + differences(_values(old), _values(new))
        )
    for name, variable in new.items():
        value, shape = old[name].get_value(), variable.get_value().shape
        if len(shape) != value.ndim or any(a > b for a, b in zip(shape, value.shape, strict=True)):
            raise ValueError(
                f"{name} has shape {shape} in the narrower model, which does not fit into "
                f"{value.shape} of the trained one."
            )
        variable.set_value(value[tuple(slice(size) for size in shape)])
    return copy


def _values(variables: dict[str, nnx.Variable]) -> dict[str, Any]:
    return {name: variable.get_value() for name, variable in variables.items()}
