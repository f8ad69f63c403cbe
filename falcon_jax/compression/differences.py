"""How two collections of named arrays differ, in words."""

from collections.abc import Mapping
from typing import Any

_LISTED = 20


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return what is missing, unexpected, misshapen or of another type, a line each.

    Args:
        expected: arrays, or shapes and types, by name.
        found: likewise.

    Returns:
        The lines, indented; empty if there is no difference.

    >>> import jax.numpy as jnp
    >>> print(differences({"a": jnp.ones(2), "b": jnp.ones(3)}, {"a": jnp.ones(4)}))
      b is missing
      a has shape (4,) instead of (2,)
    """
    lines = [f"{name} is missing" for name in expected if name not in found]
    lines += [f"{name} is not expected" for name in found if name not in expected]
    for name in expected:
        if name not in found:
            continue
        if tuple(found[name].shape) != tuple(expected[name].shape):
            shapes = tuple(found[name].shape), tuple(expected[name].shape)
            lines.append(f"{name} has shape {shapes[0]} instead of {shapes[1]}")
        elif found[name].dtype != expected[name].dtype:
            lines.append(f"{name} is {found[name].dtype} instead of {expected[name].dtype}")
    if len(lines) > _LISTED:
        lines = [*lines[:_LISTED], f"and {len(lines) - _LISTED} more"]
    return "\n".join(f"  {line}" for line in lines)
