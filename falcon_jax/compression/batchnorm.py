"""BatchNorm statistics estimated anew, for a network whose convolutions have just changed."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import errors, nnx
from flax import linen as nn
from flax.core import DenyList, freeze, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jaxtyping import Array, Float

from falcon_jax.frameworks.inspection import Model
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.frameworks.linen import applied
from falcon_jax.frameworks.nnx import (
    arrays,
    in_evaluation,
    map_modules,
    named_modules,
    named_variables,
    with_arrays,
)
from falcon_jax.methods.fit import check_finite

# Points seen so far, their mean and their variance, for every feature.
Moments = tuple[Float[Array, "*shape"], Float[Array, "*shape"], Float[Array, "*shape"]]
Statistics = dict[Any, Array]

M = TypeVar("M", bound=Model)

_POINTS = "falcon_jax_points"
_NAMES = (_POINTS, "mean", "var")


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
            reached, statistics are not finite, or a Linen module is not bound.

    Warns:
        UserWarning: naming the BatchNorms that no batch reached, and statistics that are not those
            of a BatchNorm of Flax; they stay as they were.
    """
    new: Any = _linen(model, batches) if isinstance(model, nn.Module) else _nnx(model, batches)
    return new


def _nnx(model: nnx.Module, batches: Iterable[Any]) -> nnx.Module:
    copy = in_evaluation(model)
    collecting = map_modules(lambda path, module: _collect(module), copy)
    norms = [path for path, m in named_modules(collecting) if isinstance(m, _Collecting)]
    rest = arrays(collecting)
    start = {(p, n): rest.pop(f"{p}/{n}".lstrip("/")) for p in norms for n in _NAMES}

    def seen(statistics: Statistics, rest: dict[str, Array], inputs: Inputs) -> Statistics:
        named = {f"{p}/{n}".lstrip("/"): value for (p, n), value in statistics.items()}
        called = with_arrays(collecting, rest | named)
        inputs.call(called)  # type: ignore[arg-type]
        modules: dict[str, Any] = dict(named_modules(called))
        return {(p, n): getattr(modules[p], n)[...] for p, n in statistics}

    _warn_of_others(
        path
        for path, variable in named_variables(collecting)
        if isinstance(variable, nnx.BatchStat) and path in rest
    )
    found = _over(batches, seen, start, rest, model) if norms else {}
    for path, norm in named_modules(copy):
        if (path, "mean") in found:
            assert isinstance(norm, nnx.BatchNorm)
            norm.mean[...] = found[path, "mean"].astype(norm.mean.dtype)
            norm.var[...] = found[path, "var"].astype(norm.var.dtype)
    return copy


class _Collecting(nnx.BatchNorm):
    """Keeps the statistics of all that it is called with; stands between a class and Flax's."""

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Any:
        """Return the input normalised by its own statistics."""
        variables = [getattr(self, name) for name in _NAMES]
        before = tuple(variable[...] for variable in variables)
        for variable in variables:  # what was there, if not finite, would stay
            variable[...] = jnp.zeros_like(variable[...])
        given, self.axis_name = self.axis_name, _known(self.axis_name)
        try:
            y = super().__call__(x, use_running_average=False, mask=mask)
            points = _points(x, self, mask, like=self.mean[...])
        finally:
            self.axis_name = given
        moments = _together(before, (points, self.mean[...], self.var[...]))
        for variable, value in zip(variables, moments, strict=True):
            variable[...] = value
        return y


def _collect(module: nnx.Module) -> None:
    """Make a BatchNorm keep the statistics of all that it is called with, from nothing on."""
    if not isinstance(module, nnx.BatchNorm):
        return
    cls = type(module)
    bases = (_Collecting,) if cls is nnx.BatchNorm else (cls, _Collecting)
    setattr(module, _POINTS, nnx.BatchStat(module.mean.get_value()))
    for name in _NAMES:
        getattr(module, name).set_value(_nothing(module.mean.get_value()))
    module.momentum, module.use_fast_variance = 0.0, False
    module.__class__ = type(cls.__name__, bases, {"__module__": cls.__module__})


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
    start = {(o, n): _nothing(flat[*o, "mean"]) for o in owners for n in _NAMES}
    others = {path: value for path, value in flat.items() if path[:-1] not in owners}

    def seen(statistics: Statistics, rest: Any, inputs: Inputs) -> Statistics:
        stats = others | {(*o, n): value for (o, n), value in statistics.items()}
        rest = {**rest, "batch_stats": unflatten_dict(stats)}

        def apply(*args: Any, **kwargs: Any) -> Any:
            with nn.intercept_methods(_Collector().intercept):
                try:
                    return applied(module, rest, *args, mutable=["batch_stats"], **kwargs)[1]
                except errors.ModifyScopeVariableError:
                    return applied(module, rest, *args, mutable=DenyList("params"), **kwargs)[1]

        new: dict[Any, Any] = flatten_dict(unfreeze(inputs.call(apply)["batch_stats"]))
        return {(o, n): new[*o, n] for o, n in statistics}

    _warn_of_others("/".join(path) for path in others)
    found = _over(batches, seen, start, given, module) if owners else {}
    new = flat | {(*o, n): found[o, n].astype(flat[*o, n].dtype) for o, n in found}
    if not new:
        return module.bind(variables)
    new = unfreeze(given) | {"batch_stats": unflatten_dict(new)}
    return module.bind(freeze(new) if type(variables) is type(freeze({})) else new)


class _Collector:
    """Makes the BatchNorms whose calls it intercepts keep the statistics of all they get."""

    def __init__(self):
        self._running: list[nn.Module] = []

    def intercept(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        norm = context.module
        if not isinstance(norm, nn.BatchNorm) or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        classes = itertools.takewhile(lambda cls: cls is not nn.BatchNorm, type(norm).__mro__)
        if self._running.count(norm) < sum("__call__" in vars(cls) for cls in classes):
            # A subclass, before it calls super().__call__.
            self._running.append(norm)
            try:
                return next_fun(*args, **kwargs)
            finally:
                self._running.pop()
        return _collected(norm, next_fun, *args, **kwargs)


def _collected(
    norm: nn.BatchNorm,
    next_fun: Callable[..., Any],
    x: Array,
    use_running_average: bool | None = None,
    **options: Any,
) -> Any:
    names = {"momentum": 0.0, "axis_name": _known(norm.axis_name), "use_fast_variance": False}
    for name, value in (names | {"use_running_average": None}).items():
        object.__setattr__(norm, name, value)  # frozen where bound; it lives as long as the call
    before = tuple(norm.get_variable("batch_stats", name) for name in _NAMES)
    for name, value in zip(_NAMES, before, strict=True):  # if not finite, it would stay
        norm.put_variable("batch_stats", name, jnp.zeros_like(value))
    y = next_fun(x, use_running_average=False, **options)
    mean, var = (norm.get_variable("batch_stats", name) for name in ("mean", "var"))
    points = _points(x, norm, options.get("mask"), like=mean)
    for name, value in zip(_NAMES, _together(before, (points, mean, var)), strict=True):
        norm.put_variable("batch_stats", name, value)
    return y


def _nothing(like: Array) -> Array:
    return jnp.zeros(like.shape, jnp.promote_types(like.dtype, jnp.float32))


def _known(axis_name: Any) -> Any:
    """Return the name of a mapped axis, or None where there is no such axis around the call."""
    try:
        lax.psum(1, () if axis_name is None else axis_name)
    except NameError:
        return None
    return axis_name


def _points(x: Array, norm: Any, mask: Array | None, *, like: Array) -> Array:
    """Return how many points of every feature there are, over all devices of a mapped axis."""
    axes = (norm.axis,) if isinstance(norm.axis, int) else tuple(norm.axis)
    features = {axis % x.ndim for axis in axes}
    if mask is None:
        points = jnp.full(like.shape, x.size // like.size, like.dtype)
    else:
        others = tuple(axis for axis in range(x.ndim) if axis not in features)
        points = jnp.sum(jnp.broadcast_to(mask, x.shape) != 0, others, dtype=like.dtype)
    if norm.axis_name is None:
        return points
    return lax.psum(points, norm.axis_name, axis_index_groups=norm.axis_index_groups)


def _together(a: Moments, b: Moments) -> Moments:
    """Return number, mean and variance of the points of two sets.

    Reference:
        Chan, Golub, LeVeque: Updating Formulae and a Pairwise Algorithm, 1979.
    """
    points = a[0] + b[0]
    share = b[0] / jnp.where(points > 0, points, 1)
    some = b[0] > 0  # those of no points at all are not numbers
    apart = jnp.where(some, b[1] - a[1], 0)
    mean = a[1] + share * apart
    var = (1 - share) * a[2] + share * jnp.where(some, b[2], 0) + share * (1 - share) * apart**2
    return points, mean, var


def _over(
    batches: Iterable[Any],
    seen: Callable[[Statistics, Any, Inputs], Statistics],
    statistics: Statistics,
    rest: Any,
    model: Model,
) -> Statistics:
    """Return the statistics after all batches, of the BatchNorms that were reached."""
    norms = sorted({path for path, _ in statistics})
    keys, values = list(statistics), list(statistics.values())
    compiled: list[tuple[Any, Callable[..., Any]]] = []
    for batch in batches:
        inputs = Inputs.of(batch)
        constants = inputs.with_arrays([None] * len(inputs.arrays))
        step = next((step for known, step in compiled if known == constants), None)
        if step is None:

            def once(values: Any, rest: Any, arrays: Any, like: Inputs = inputs.shapes) -> Any:
                new = seen(dict(zip(keys, values, strict=True)), rest, like.with_arrays(arrays))
                return [new[key] for key in keys]

            step = jax.jit(once)
            compiled.append((constants, step))
        try:
            values = step(values, rest, inputs.arrays)
        except (TypeError, ValueError, NameError, errors.FlaxError) as error:
            raise inputs.refused_by(model, error) from error
    if not compiled:
        raise ValueError("BatchNorm statistics need at least one batch of inputs; got none.")
    found = dict(zip(keys, values, strict=True))
    reached = [path for path in norms if bool(jnp.all(found[path, _POINTS] > 0))]
    _check_reached(reached, norms)
    for path in reached:
        for name in ("mean", "var"):
            check_finite(found[path, name], f"the {name} that {_shown(path)} gets")
    return {(p, n): value for (p, n), value in found.items() if p in reached and n != _POINTS}


def _check_reached(reached: Sequence[Any], norms: Sequence[Any]) -> None:
    missed = [_shown(path) for path in norms if path not in reached]
    if not reached:
        raise ValueError(
            f"no batch reaches a BatchNorm ({', '.join(missed[:5])}); give inputs that call them."
        )
    if missed:
        warnings.warn(
            f"no batch reached the BatchNorms {', '.join(missed)}; they stay as they were.",
            stacklevel=5,
        )


def _warn_of_others(paths: Iterable[str]) -> None:
    """List statistics that are not a BatchNorm's, but for those of spectral normalisation."""
    others = [path for path in paths if path.rpartition("/")[2] not in ("u", "sigma")]
    if others:
        warnings.warn(
            f"{', '.join(others)} are not the statistics of a BatchNorm of Flax; they stay as they "
            "were.",
            stacklevel=4,
        )


def _shown(path: Any) -> str:
    return (path if isinstance(path, str) else "/".join(path)) or "(model)"
