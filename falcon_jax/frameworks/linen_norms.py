"""BatchNorms of Linen modules: folded into the convolution before them, and their statistics."""

import itertools
from collections.abc import Callable, Container, Iterable
from typing import Any

import jax.numpy as jnp
from flax import errors
from flax import linen as nn
from flax.core import DenyList, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from falcon_jax.frameworks.layers import Inputs
from falcon_jax.frameworks.linen import applied, find_layers, intercepted_jaxpr, unbound
from falcon_jax.frameworks.norms import (
    STATISTICS,
    Statistics,
    conv_of_norm,
    gain_and_bias,
    known_axis,
    mark_call,
    nothing_seen,
    over_batches,
    points_of,
    together,
    warn_of_others,
)
from falcon_jax.methods.base import Method, Params, scale_outputs
from falcon_jax.nn.compressed import with_folded

Flat = dict[tuple[str, ...], Any]


def fold(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Return a bound module without the BatchNorms that a convolution can do the work of."""
    module, variables = unbound(model)
    flat: Flat = flatten_dict(unfreeze(nn.meta.unbox(variables)))  # type: ignore[arg-type]
    methods = {
        layer.path: layer.method
        for layer in find_layers(model, inputs)
        if layer.kind == "conv" and (layer.method or layer.obstacle is None)
    }
    types = {path: jnp.result_type(*_weights(flat, path).values()) for path in methods}
    watched = _Watch(types)
    jaxpr = intercepted_jaxpr(module, inputs, variables, watched.intercept)
    if watched.training and not watched.epsilons:
        raise ValueError(
            f"the sample calls {watched.training[0]!r} in training mode; BatchNorm is folded as it "
            "is in evaluation, so give a sample such as falcon_jax.Inputs(x, train=False)."
        )
    folded = {
        norm: conv
        for norm, conv in conv_of_norm(jaxpr.jaxpr, types).items()
        if _fold(flat, norm, conv, methods[conv], epsilon=watched.epsilons[norm])
    }
    return with_folded(module, folded).bind(unflatten_dict(flat))


class _Watch:
    """Marks the calls of some convolutions, and of every BatchNorm that is in evaluation mode."""

    def __init__(self, convs: Container[str]):
        self._convs = convs
        self.epsilons: dict[str, float] = {}
        self.training: list[str] = []

    def intercept(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        path = "/".join(module.path)
        if context.method_name != "__call__" or not args:
            return next_fun(*args, **kwargs)
        if type(module) is nn.BatchNorm and module.axis == -1:
            if not _by_running_average(module, *args, **kwargs):
                self.training.append(path)
                return next_fun(*args, **kwargs)
            self.epsilons[path] = module.epsilon
        elif type(module) is not nn.Conv or path not in self._convs:
            return next_fun(*args, **kwargs)
        x, *rest = args
        return mark_call(path, lambda x: next_fun(x, *rest, **kwargs), x)


def _by_running_average(
    norm: nn.BatchNorm, x: Any, use_running_average: bool | None = None, **rest: Any
) -> bool:
    return bool(norm.use_running_average if use_running_average is None else use_running_average)


def _at(collection: str, path: str, name: str = "") -> tuple[str, ...]:
    return (collection, *filter(None, (*path.split("/"), name)))


def _weights(flat: Flat, conv: str) -> Params:
    """Return the parameters of a convolution but its bias."""
    owner = _at("params", conv)
    return {k[-1]: jnp.asarray(v) for k, v in flat.items() if k[:-1] == owner and k[-1] != "bias"}


def _fold(flat: Flat, norm: str, conv: str, method: Method | None, *, epsilon: float) -> bool:
    """Put a BatchNorm's variables into a convolution's, unless they are stacked otherwise."""

    def array(collection: str, path: str, name: str) -> Array | None:
        value = flat.get(_at(collection, path, name))
        return None if value is None else jnp.asarray(value)

    weights, mean = _weights(flat, conv), array("batch_stats", norm, "mean")
    var, bias = array("batch_stats", norm, "var"), array("params", conv, "bias")
    assert mean is not None and var is not None
    stack = mean.shape[:-1]
    if any(value.shape[: len(stack)] != stack for value in weights.values()):
        return False
    gain, offset = gain_and_bias(
        bias,
        mean=mean,
        var=var,
        scale=array("params", norm, "scale"),
        offset=array("params", norm, "bias"),
        epsilon=epsilon,
    )
    if method is not None:
        new = method.with_gain(weights, gain)
    else:
        new = {"kernel": scale_outputs(weights["kernel"], gain)}
    if new is None or any(new[name].shape != weights[name].shape for name in weights):
        return False
    kind = jnp.result_type(*weights.values())
    for collection, names in (("params", ("scale", "bias")), ("batch_stats", ("mean", "var"))):
        for name in names:
            flat.pop(_at(collection, norm, name), None)
    for name, value in new.items():
        flat[_at("params", conv, name)] = value.astype(weights[name].dtype)
    flat[_at("params", conv, "bias")] = offset.astype(kind)
    return True


def reestimate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Return a bound module with the statistics of the given batches."""
    module, given = unbound(model)
    flat: dict[tuple[str, ...], Any] = flatten_dict(
        unfreeze(nn.meta.unbox(given.get("batch_stats", {})))
    )
    owners = [path[:-1] for path in flat if path[-1] == "mean" and (*path[:-1], "var") in flat]
    start = {(o, n): nothing_seen(flat[*o, "mean"]) for o in owners for n in STATISTICS}
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

    warn_of_others("/".join(path) for path in others)
    found = over_batches(batches, seen, start, given, module) if owners else {}
    new = flat | {(*o, n): found[o, n].astype(flat[*o, n].dtype) for o, n in found}
    if not new:
        return model
    return module.bind(dict(given) | {"batch_stats": unflatten_dict(new)})


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
    names = {"momentum": 0.0, "axis_name": known_axis(norm.axis_name), "use_fast_variance": False}
    for name, value in (names | {"use_running_average": None}).items():
        object.__setattr__(norm, name, value)  # frozen where bound; it lives as long as the call
    before = tuple(norm.get_variable("batch_stats", name) for name in STATISTICS)
    for name, value in zip(STATISTICS, before, strict=True):  # if not finite, it would stay
        norm.put_variable("batch_stats", name, jnp.zeros_like(value))
    y = next_fun(x, use_running_average=False, **options)
    mean, var = (norm.get_variable("batch_stats", name) for name in ("mean", "var"))
    points = points_of(x, norm, options.get("mask"), like=mean)
    for name, value in zip(STATISTICS, together(before, (points, mean, var)), strict=True):
        norm.put_variable("batch_stats", name, value)
    return y
