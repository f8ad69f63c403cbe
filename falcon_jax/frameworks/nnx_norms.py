"""BatchNorms of NNX models: folded into the convolution before them, and their statistics."""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from falcon_jax.frameworks.layers import Inputs, Layer
from falcon_jax.frameworks.nnx import ModuleCall, arrays, find_layers, jaxpr_through, with_arrays
from falcon_jax.frameworks.nnx_tree import (
    held_variables,
    in_evaluation,
    map_modules,
    named_modules,
    named_variables,
)
from falcon_jax.frameworks.norms import (
    POINTS,
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
from falcon_jax.methods.base import Params, scale_outputs
from falcon_jax.nn.compressed import check_folded_call
from falcon_jax.nn.layers import BatchNorm
from falcon_jax.nn.method_conv import MethodConv


class FoldedBatchNorm(nnx.Module):
    """What stands where a BatchNorm was: its work is done by the convolution before it."""

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Return the input as it is.

        Raises:
            ValueError: if it is called for training.
        """
        check_folded_call(use_running_average)
        return x


def fold(model: nnx.Module, inputs: Inputs) -> nnx.Module:
    """Return a copy without the BatchNorms that a convolution can do the work of."""
    modules = dict(named_modules(model))
    holders = collections.Counter(id(v) for m in modules.values() for v in held_variables(m))
    types = {
        layer.path: _kernel_type(modules[layer.path])
        for layer in find_layers(model, inputs)
        if _takes_gain(layer, modules[layer.path])
        and all(holders[id(v)] == 1 for v in held_variables(modules[layer.path]))
    }

    def marked(path: str, call: ModuleCall, x: Any) -> Any:
        norm = _is_batch_norm(modules[path])
        known = _by_running_average(call) if norm else path in types
        return mark_call(path, call, x) if known else call(x)

    def chosen(module: nnx.Module) -> bool:
        return isinstance(module, nnx.Conv) or _is_batch_norm(module)

    pairs = conv_of_norm(jaxpr_through(model, inputs, chosen, marked).jaxpr, types)
    new = {conv: _folded(modules[conv], modules[norm]) for norm, conv in pairs.items()}
    new = {conv: values for conv, values in new.items() if values is not None}

    def folded(path: str, module: nnx.Module) -> nnx.Module | None:
        if pairs.get(path) in new:
            return FoldedBatchNorm()
        if path in new:
            assert isinstance(module, nnx.Conv)
            _put(module, *new[path])
        return None

    return in_evaluation(map_modules(folded, model))


def _is_batch_norm(module: nnx.Module) -> bool:
    return type(module) in (nnx.BatchNorm, BatchNorm)


def _by_running_average(call: ModuleCall) -> bool:
    given = call.kwargs.get("use_running_average", call.args[0] if call.args else None)
    average = call.module.use_running_average if given is None else given
    return call.module.axis == -1 and bool(average)


def _takes_gain(layer: Layer, module: nnx.Module) -> bool:
    if isinstance(module, MethodConv):
        return _with_gain(module, jnp.ones(module.spec.out_features)) is not None
    return type(module) is nnx.Conv and layer.obstacle is None


def _with_gain(conv: MethodConv, gain: Array) -> Params | None:
    return conv.method.with_gain(conv.params, gain)


def _params(conv: nnx.Module) -> Params:
    assert isinstance(conv, nnx.Conv)
    return conv.params if isinstance(conv, MethodConv) else {"kernel": conv.kernel[...]}


def _kernel_type(conv: nnx.Module) -> Any:
    return jnp.result_type(*_params(conv).values())


def _folded(conv: nnx.Module, norm: nnx.Module) -> tuple[Params, Array] | None:
    """Return parameters and bias of a convolution that does a BatchNorm's work, too.

    None if the two are stacked along different axes.
    """
    assert isinstance(conv, nnx.Conv) and isinstance(norm, nnx.BatchNorm)
    gain, bias = gain_and_bias(
        None if conv.bias is None else conv.bias[...],
        mean=norm.mean[...],
        var=norm.var[...],
        scale=None if norm.scale is None else norm.scale[...],
        offset=None if norm.bias is None else norm.bias[...],
        epsilon=norm.epsilon,
    )
    params, stack = _params(conv), gain.shape[:-1]
    if any(value.shape[: len(stack)] != stack for value in params.values()):
        return None
    if isinstance(conv, MethodConv):
        new = _with_gain(conv, gain)
        assert new is not None
    else:
        new = {"kernel": scale_outputs(params["kernel"], gain)}
    if any(new[name].shape != params[name].shape for name in params):
        return None
    return new, bias.astype(_kernel_type(conv))


def _put(conv: nnx.Conv, params: Params, bias: Array) -> None:
    for name, value in params.items():
        getattr(conv, name)[...] = value
    conv.bias = nnx.Param(bias)
    if isinstance(conv, MethodConv):
        conv.spec = dataclasses.replace(conv.spec, use_bias=True)
    else:
        conv.use_bias = True


def reestimate(model: nnx.Module, batches: Iterable[Any]) -> nnx.Module:
    """Return a copy in evaluation mode with the statistics of the given batches."""
    copy = in_evaluation(model)
    collecting = map_modules(lambda path, module: _collect(module), copy)
    norms = [path for path, m in named_modules(collecting) if isinstance(m, _Collecting)]
    rest = arrays(collecting)
    start = {(p, n): rest.pop(f"{p}/{n}".lstrip("/")) for p in norms for n in STATISTICS}

    def seen(statistics: Statistics, rest: dict[str, Array], inputs: Inputs) -> Statistics:
        named = {f"{p}/{n}".lstrip("/"): value for (p, n), value in statistics.items()}
        called = with_arrays(collecting, rest | named)
        inputs.call(called)  # type: ignore[arg-type]
        modules: dict[str, Any] = dict(named_modules(called))
        return {(p, n): getattr(modules[p], n)[...] for p, n in statistics}

    warn_of_others(
        path
        for path, variable in named_variables(collecting)
        if isinstance(variable, nnx.BatchStat) and path in rest
    )
    found = over_batches(batches, seen, start, rest, model) if norms else {}
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
        variables = [getattr(self, name) for name in STATISTICS]
        before = tuple(variable[...] for variable in variables)
        for variable in variables:  # what was there, if not finite, would stay
            variable[...] = jnp.zeros_like(variable[...])
        given, self.axis_name = self.axis_name, known_axis(self.axis_name)
        try:
            y = super().__call__(x, use_running_average=False, mask=mask)
            points = points_of(x, self, mask, like=self.mean[...])
        finally:
            self.axis_name = given
        moments = together(before, (points, self.mean[...], self.var[...]))
        for variable, value in zip(variables, moments, strict=True):
            variable[...] = value
        return y


def _collect(module: nnx.Module) -> None:
    """Make a BatchNorm keep the statistics of all that it is called with, from nothing on."""
    if not isinstance(module, nnx.BatchNorm):
        return
    cls = type(module)
    bases = (_Collecting,) if cls is nnx.BatchNorm else (cls, _Collecting)
    setattr(module, POINTS, nnx.BatchStat(module.mean.get_value()))
    for name in STATISTICS:
        getattr(module, name).set_value(nothing_seen(module.mean.get_value()))
    module.momentum, module.use_fast_variance = 0.0, False
    module.__class__ = type(cls.__name__, bases, {"__module__": cls.__module__})
