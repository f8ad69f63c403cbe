"""Any state dict into any NNX model, by one table of regular expressions."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from falcon_jax.wording import shown

Transform = Callable[[np.ndarray], np.ndarray]
Row = tuple[str, str | None] | tuple[str, str | None, Transform]

# What PyTorch calls the variables of a module, and what NNX may call them.
_LEAVES: Mapping[str, tuple[str, ...]] = {
    "weight": ("kernel", "scale", "embedding", "negative_slope"),
    "running_mean": ("mean",),
    "running_var": ("var",),
}
_COUNTER = "num_batches_tracked"
_LISTED = 200


def assign(
    model: nnx.Module,
    state_dict: Mapping[str, Any],
    table: Sequence[Row],
    *,
    keep: Sequence[str] = (),
) -> nnx.Module:
    r"""Return a model like a given one with the weights of a state dict.

    Every row of the table is a regular expression and the path that it stands for in the model,
    with ``\1`` for groups, and perhaps a function of the array. An expression matches a whole name
    (``conv1.weight``) or a whole name but its last part (``conv1``); its path is that of a variable
    (``stem/kernel``) or of a module, whose variable is found by the last part of the name: kernel,
    scale or embedding for ``weight``, mean and var for ``running_mean`` and ``running_var``. The
    first row that matches decides; with None for the path a name is left out on purpose, as
    ``num_batches_tracked`` always is.

    Without a function, arrays change from PyTorch's layout to that of the module at the path:
    kernels from outputs, inputs, space to space, inputs, outputs, grouped or not, in any number of
    dimensions; kernels of `nnx.ConvTranspose` likewise, mirrored as NNX wants them; a convolution's
    kernel for a `nnx.Linear` becomes a matrix. Everything else stays as it is.

    Args:
        model: any model; it is not changed.
        state_dict: arrays or tensors by name, such as `load_torch` returned.
        table: the rows.
        keep: regular expressions of paths of variables that stay as they are in ``model``.

    Returns:
        A new model. Floating numbers have the types of ``model``.

    Raises:
        ValueError: if a parameter or a statistic of the model gets no array, or a name has no
            place, or two have one, or shape or type differ; all of it in one message.

    >>> layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> weights = {"fc.weight": np.ones((2, 3), "f4"), "fc.bias": np.zeros(2, "f4")}
    >>> assign(layer, weights, [(r"fc\.weight", "kernel"), (r"fc\.bias", "bias")]).kernel.shape
    (3, 2)
    """
    graphdef, state = nnx.split(model)
    variables = {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(state)}
    kinds = {"/".join(map(str, path)): node for path, node in nnx.iter_modules(model)}
    problems: list[str] = []
    filled: dict[str, str] = {}
    for name, given in state_dict.items():
        row = _row_of(name, table)
        if row is None:
            if name.rpartition(".")[2] != _COUNTER:
                problems.append(f"{shown(name)} matches no row of the table")
            continue
        path, transform = row
        if path is None:
            continue
        place = _place(path, name, variables)
        if place is None:
            problems.append(f"{shown(name)} is to go to {shown(path)}, which the model has not")
        elif _kept(place, keep):
            problems.append(f"{shown(name)} is to go to {place}, which is kept")
        elif place in filled:
            problems.append(f"{shown(name)} and {shown(filled[place])} both go to {place}")
        else:
            filled[place] = name
            array = _fitting(given, variables[place], kinds[place.rpartition("/")[0]], transform)
            if isinstance(array, str):
                problems.append(f"{shown(name)} for {place} {array}")
            else:
                variables[place] = variables[place].replace(array)
    needed = (path for path, v in variables.items() if isinstance(v, nnx.Param | nnx.BatchStat))
    problems += [f"{p} gets no array" for p in needed if p not in filled and not _kept(p, keep)]
    if problems:
        more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        lines = "\n".join(f"  {line}" for line in problems[:_LISTED] + more)
        raise ValueError(f"the weights do not fit this {type(model).__name__}:\n{lines}")
    flat = {path: variables["/".join(map(str, path))] for path, _ in nnx.to_flat_state(state)}
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _row_of(name: str, table: Sequence[Row]) -> tuple[str | None, Transform | None] | None:
    """Return the path and the function for a name; None if no row matches it."""
    module = name.rpartition(".")[0]
    for pattern, path, *transform in table:
        match = re.fullmatch(pattern, name) or (module and re.fullmatch(pattern, module))
        if match:
            return path and match.expand(path), next(iter(transform), None)
    return None


def _place(path: str, name: str, variables: Mapping[str, nnx.Variable]) -> str | None:
    leaf = name.rpartition(".")[2]
    places = (path, *(f"{path}/{known}" for known in (*_LEAVES.get(leaf, ()), leaf)))
    return next((place.strip("/") for place in places if place.strip("/") in variables), None)


def _kept(path: str, keep: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in keep)


def _fitting(
    given: Any, variable: nnx.Variable, module: nnx.Module, transform: Transform | None
) -> Any:
    """Return the array for a variable, or what is wrong with it."""
    array = _numpy(given)
    if array is None:
        return f"is {type(given).__name__}, not an array"
    try:
        changed = np.asarray(
            transform(array) if transform else _in_layout_of(module, array, variable)
        )
    except (ValueError, TypeError, IndexError) as error:
        return f"cannot be transformed: {shown(error)}"
    if changed.shape != variable.shape:
        before = "" if changed.shape == array.shape else f" (of {shown(array.shape)})"
        return f"has shape {shown(changed.shape)}{before} instead of {variable.shape}"
    both_float = all(
        jnp.issubdtype(dtype, jnp.floating) for dtype in (changed.dtype, variable.dtype)
    )
    if not both_float and changed.dtype != variable.dtype:
        return f"is {changed.dtype} instead of {variable.dtype}"
    with np.errstate(over="ignore"):
        typed = changed.astype(variable.dtype)
    if both_float and not np.array_equal(np.isfinite(typed), np.isfinite(changed)):
        return f"has numbers too large for {variable.dtype}"
    return jnp.array(typed)


def _numpy(given: Any) -> np.ndarray | None:
    if hasattr(given, "detach"):
        given = given.detach().cpu()
        # NumPy has no bfloat16; every one of its numbers is a float32.
        given = given.float() if "bfloat16" in str(given.dtype) else given
    array = np.asarray(given)
    return None if array.dtype == object or array.dtype.kind in "US" else array


def _in_layout_of(module: nnx.Module, array: np.ndarray, variable: nnx.Variable) -> np.ndarray:
    if getattr(module, "kernel", None) is None or array.ndim < 2:
        return array
    space = tuple(range(2, array.ndim))
    if isinstance(module, nnx.ConvTranspose):
        if module.transpose_kernel:
            return array.transpose(*space, 1, 0)
        return np.flip(array.transpose(*space, 0, 1), tuple(range(len(space))))
    if len(variable.shape) == 2 and array.ndim > 2:
        return array.reshape(len(array), -1).T
    return array.transpose(*space, 1, 0)
