"""BatchNorm statistics estimated anew, for a network whose convolutions have just changed."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import errors, nnx
from flax import linen as nn
from flax.core import freeze, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from falcon_jax.compression.inputs import Inputs
from falcon_jax.compression.inspection import Model
from falcon_jax.compression.nnx_tree import map_modules, named_modules

# Points seen so far, their mean and their variance.
Moments = tuple[Float[Array, "*stack"], Float[Array, "*stack n"], Float[Array, "*stack n"]]

M = TypeVar("M", bound=Model)

_POINTS = "falcon_jax_points"


def reestimate_batchnorm(model: M, batches: Iterable[Any]) -> M:
    """Return a copy of a model with the BatchNorm statistics of the given batches.

    ``mean`` and ``var`` are those of all points of all batches together, so that batches may be of
    unequal size. Meanwhile every BatchNorm normalises by the statistics of its batch, whatever the
    model or the call says. No labels are used, and nothing else changes; dropout is off unless the
    call turns it on.

    Args:
        model: an NNX model, or a Linen module bound to its variables (``module.bind(variables)``);
            it is not changed.
        batches: model inputs, a few hundred examples in all: arrays, tuples that are spread over
            the arguments, or `Inputs`.

    Returns:
        The copy; an NNX model in evaluation mode, a Linen module bound.

    Raises:
        ValueError: if there is no batch, the model cannot be called on one, no BatchNorm is
            reached, or a Linen module is not bound.

    Warns:
        UserWarning: naming the BatchNorms that no batch reached; they stay as they were.
    """
    new: Any = _linen(model, batches) if isinstance(model, nn.Module) else _nnx(model, batches)
    return new


def _nnx(model: nnx.Module, batches: Iterable[Any]) -> nnx.Module:
    copy = map_modules(lambda path, module: None, model)
    copy.eval()
    if not any(isinstance(m, nnx.BatchNorm) for _, m in named_modules(copy)):
        return copy
    collecting = map_modules(lambda path, module: _collect(module), copy)
    graphdef, statistics, rest = nnx.split(collecting, nnx.BatchStat, ...)

    def seen(statistics: nnx.State, inputs: Inputs) -> nnx.State:
        merged = nnx.merge(graphdef, statistics, rest, copy=True)
        inputs.call(merged)  # type: ignore[arg-type]
        return nnx.state(merged, nnx.BatchStat)

    nnx.update(collecting, _over(batches, seen, statistics, model))
    norms: dict[str, Any] = {
        p: m for p, m in named_modules(collecting) if isinstance(m, nnx.BatchNorm)
    }
    reached = {path for path, norm in norms.items() if bool(jnp.all(norm.points[...] > 0))}
    _check_reached(reached, norms)
    for path, norm in named_modules(copy):
        if path in reached:
            assert isinstance(norm, nnx.BatchNorm)
            norm.mean[...], norm.var[...] = norms[path].mean[...], norms[path].var[...]
    return copy


def _collect(module: nnx.Module) -> None:
    """Make a BatchNorm keep the statistics of all that it is called with, from nothing on."""
    if not isinstance(module, nnx.BatchNorm):
        return
    cls: Any = type(module)

    def call(
        self: Any, x: Any, use_running_average: Any = None, *, mask: Array | None = None
    ) -> Any:
        before = (self.points[...], self.mean[...], self.var[...])
        y = cls.__call__(self, x, use_running_average=False, mask=mask)
        count = _count(x, self.mean[...].size, mask)
        points, mean, var = _together(before, (count, self.mean[...], self.var[...]))
        self.points[...], self.mean[...], self.var[...] = points, mean, var
        return y

    setattr(module, "points", nnx.BatchStat(jnp.zeros(module.mean.shape[:-1])))  # noqa: B010
    module.mean[...], module.var[...] = (jnp.zeros_like(v[...]) for v in (module.mean, module.var))
    module.momentum, module.axis_name = 0.0, None
    module.__class__ = type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def _linen(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    if model.scope is None:
        raise ValueError(
            f"{type(model).__name__} has no variables; give module.bind(variables), with its "
            "parameters and its batch_stats."
        )
    module, variables = model.unbind()
    given: Any = variables
    flat: dict[tuple[str, ...], Any] = flatten_dict(
        unfreeze(nn.meta.unbox(given.get("batch_stats", {})))
    )
    owners = [path[:-1] for path in flat if path[-1] == "mean" and (*path[:-1], "var") in flat]
    if not owners:
        return module.bind(variables)
    start = {path: jnp.zeros_like(value) for path, value in flat.items()}
    start |= {(*o, _POINTS): jnp.zeros(flat[*o, "mean"].shape[:-1]) for o in owners}

    def seen(statistics: Any, inputs: Inputs) -> Any:
        def apply(*args: Any, **kwargs: Any) -> Any:
            with nn.intercept_methods(_collecting):
                _, new = module.apply(
                    {**variables, "batch_stats": statistics},
                    *args,
                    mutable=["batch_stats"],
                    rngs={"dropout": jax.random.key(0)},
                    **kwargs,
                )
            return unfreeze(new["batch_stats"])

        return inputs.call(apply)

    found: dict[tuple[str, ...], Any] = flatten_dict(
        _over(batches, seen, unflatten_dict(start), module)
    )
    reached = {o for o in owners if bool(jnp.all(found[*o, _POINTS] > 0))}
    _check_reached({"/".join(o) for o in reached}, ["/".join(o) for o in owners])
    new = flat | {(*o, name): found[*o, name] for o in reached for name in ("mean", "var")}
    new = unfreeze(given) | {"batch_stats": unflatten_dict(new)}
    return module.bind(freeze(new) if type(variables) is type(freeze({})) else new)


def _collecting(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    norm = context.module
    if not isinstance(norm, nn.BatchNorm) or context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    given = dict(zip(("x", "use_running_average"), args, strict=False)) | kwargs
    x = given.pop("x")
    # A bound module is frozen; this one lives as long as the call.
    for name, value in (("use_running_average", None), ("momentum", 0.0), ("axis_name", None)):
        object.__setattr__(norm, name, value)
    names = (_POINTS, "mean", "var")
    before = tuple(norm.get_variable("batch_stats", name) for name in names)
    y = next_fun(x, **(given | {"use_running_average": False}))
    mean, var = (norm.get_variable("batch_stats", name) for name in names[1:])
    count = _count(x, mean.size, given.get("mask"))
    for name, value in zip(names, _together(before, (count, mean, var)), strict=True):
        norm.put_variable("batch_stats", name, value)
    return y


def _count(x: Array, features: int, mask: Array | None) -> Float[Array, ""]:
    """Return how many points of each feature there are."""
    if mask is not None:
        return jnp.sum(jnp.broadcast_to(mask, x.shape), dtype=jnp.float32) / features
    return jnp.asarray(x.size / features, jnp.float32)


def _together(a: Moments, b: Moments) -> Moments:
    """Return number, mean and variance of the points of two sets.

    Reference:
        Chan, Golub, LeVeque: Updating Formulae and a Pairwise Algorithm, 1979.
    """
    points = a[0] + b[0]
    share = b[0] / jnp.where(points > 0, points, 1)
    apart = b[1] - a[1]
    mean = a[1] + share * apart
    var = (1 - share) * a[2] + share * b[2] + share * (1 - share) * apart**2
    return points, mean.astype(a[1].dtype), var.astype(a[2].dtype)


def _over(
    batches: Iterable[Any], seen: Callable[[Any, Inputs], Any], statistics: Any, model: Model
) -> Any:
    """Return the statistics after all batches, compiled once for all that are alike."""
    compiled: list[tuple[Any, Callable[..., Any]]] = []
    for batch in batches:
        inputs = Inputs.of(batch)
        arrays = inputs.arrays
        constants = inputs.with_arrays([None] * len(arrays))
        step = next((step for known, step in compiled if known == constants), None)
        if step is None:
            step = jax.jit(
                lambda statistics, arrays, i=inputs: seen(statistics, i.with_arrays(arrays))
            )
            compiled.append((constants, step))
        try:
            statistics = step(statistics, arrays)
        except (TypeError, ValueError, errors.FlaxError) as error:
            raise inputs.refused_by(model, error) from error
    if not compiled:
        raise ValueError("BatchNorm statistics need at least one batch of inputs; got none.")
    return statistics


def _check_reached(reached: Iterable[str], norms: Iterable[str]) -> None:
    missed = sorted(set(norms) - set(reached))
    if not set(reached):
        raise ValueError(
            f"no batch reaches a BatchNorm ({', '.join(missed[:5])}); give inputs that call them."
        )
    if missed:
        warnings.warn(
            f"no batch reached the BatchNorms {', '.join(missed)}; they stay as they were.",
            stacklevel=4,
        )
