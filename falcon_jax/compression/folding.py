"""BatchNorm folded into the convolution before it."""

import collections
import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, overload

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from falcon_jax.compression.compress import with_folded
from falcon_jax.frameworks import linen as linen_layers
from falcon_jax.frameworks import nnx as nnx_layers
from falcon_jax.frameworks.inspection import Model
from falcon_jax.frameworks.layers import Inputs, Layer
from falcon_jax.frameworks.nnx import (
    ModuleCall,
    held_variables,
    in_evaluation,
    jaxpr_through,
    map_modules,
    named_modules,
)
from falcon_jax.frameworks.tracing import inner_jaxprs
from falcon_jax.methods.base import Params, scale_outputs
from falcon_jax.nn.compressed import CompressedModule, check_folded_call
from falcon_jax.nn.layers import BatchNorm
from falcon_jax.nn.method_conv import MethodConv

_BEFORE, _AFTER = "falcon_jax before ", "falcon_jax after "


def mark_call(path: str, layer: Callable[[Array], Array], x: Array) -> Array:
    """Call a convolution or a BatchNorm, its input and output under names that tell of it."""
    y = layer(checkpoint_name(x, _BEFORE + path))
    return checkpoint_name(y, _AFTER + path)


def conv_of_norm(jaxpr: Any, types: Mapping[str, DTypeLike]) -> Mapping[str, str]:
    """Return, by path of every BatchNorm that can be folded, the path of its convolution.

    Its input is the convolution's output, nothing else uses that, both are used once, and types
    stay: it gives what it takes, and the kernel's type holds as much.

    Args:
        jaxpr: of a forward pass in which convolutions and BatchNorms are called by `mark_call`.
        types: of the kernels, by path of the convolutions; all others are BatchNorms.
    """
    uses = collections.Counter(_marks(jaxpr))
    types_given = dict(_types_given(jaxpr))
    return {
        second: first
        for second, first in _followed(jaxpr)
        if second not in types
        and first in types
        and uses[_BEFORE + second] == uses[_BEFORE + first] == 1
        and types_given[first] == types_given[second]
        and jnp.promote_types(types[first], types_given[first]) == types[first]
    }


def folded_arrays(
    kernel: Float[Array, "*stack_kernel_shape"],
    bias: Float[Array, "*stack n"] | None,
    *,
    mean: Float[Array, "*stack n"],
    var: Float[Array, "*stack n"],
    scale: Float[Array, "*stack n"] | None,
    offset: Float[Array, "*stack n"] | None,
    epsilon: float,
) -> tuple[Float[Array, "*stack_kernel_shape"], Float[Array, "*stack n"]]:
    """Return kernel and bias of the convolution that does a BatchNorm's work, too.

    ``K' = K g / sqrt(v + eps)``, ``b' = (b - m) g / sqrt(v + eps) + beta``

    Args:
        kernel: of the convolution, with leading axes if layers are stacked.
        bias: of the convolution, or None.
        mean: m, the BatchNorm's.
        var: v.
        scale: g, or None.
        offset: beta, or None.
        epsilon: eps.
    """
    gain, new = gain_and_bias(bias, mean=mean, var=var, scale=scale, offset=offset, epsilon=epsilon)
    scaled = scale_outputs(kernel, gain)
    return scaled.astype(kernel.dtype), new.astype(kernel.dtype)


def gain_and_bias(
    bias: Float[Array, "*stack n"] | None,
    *,
    mean: Float[Array, "*stack n"],
    var: Float[Array, "*stack n"],
    scale: Float[Array, "*stack n"] | None,
    offset: Float[Array, "*stack n"] | None,
    epsilon: float,
) -> tuple[Float[Array, "*stack n"], Float[Array, "*stack n"]]:
    """Return what a BatchNorm multiplies each output by, and the bias; see `folded_arrays`."""
    gain = lax.rsqrt(var + epsilon)
    if scale is not None:
        gain = gain * scale
    new = (-mean if bias is None else bias - mean) * gain
    return gain, new if offset is None else new + offset


def _followed(jaxpr: Any) -> Iterator[tuple[str, str]]:
    """Yield the paths of two layers where the one alone uses what the other gives."""
    given = [eqn for eqn in jaxpr.eqns if _mark(eqn).startswith(_AFTER)]
    made = {eqn.outvars[0]: _mark(eqn)[len(_AFTER) :] for eqn in given}
    operands = [v for e in jaxpr.eqns for v in e.invars] + list(jaxpr.outvars)
    uses = collections.Counter(id(v) for v in operands)
    for eqn in jaxpr.eqns:
        x = eqn.invars[0] if eqn.invars else None
        if _mark(eqn).startswith(_BEFORE) and uses[id(x)] == 1:
            first = next((path for var, path in made.items() if var is x), None)
            if first is not None:
                yield _mark(eqn)[len(_BEFORE) :], first
        for sub in inner_jaxprs(tuple(eqn.params.values())):
            yield from _followed(sub)


def _marks(jaxpr: Any) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        yield _mark(eqn)
        for sub in inner_jaxprs(tuple(eqn.params.values())):
            yield from _marks(sub)


def _types_given(jaxpr: Any) -> Iterator[tuple[str, Any]]:
    """Yield path and output type of every layer."""
    for eqn in jaxpr.eqns:
        if _mark(eqn).startswith(_AFTER):
            yield _mark(eqn)[len(_AFTER) :], eqn.outvars[0].aval.dtype
        for sub in inner_jaxprs(tuple(eqn.params.values())):
            yield from _types_given(sub)


def _mark(eqn: Any) -> str:
    return str(eqn.params.get("name", ""))


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


@overload
def fold_batchnorm(model: nnx.Module, sample: Any, variables: None = None) -> nnx.Module: ...
@overload
def fold_batchnorm(
    model: nn.Module, sample: Any, variables: Mapping[str, Any]
) -> tuple[CompressedModule, Mapping[str, Any]]: ...
def fold_batchnorm(
    model: Model, sample: Any, variables: Mapping[str, Any] | None = None
) -> nnx.Module | tuple[CompressedModule, Mapping[str, Any]]:
    """Return a copy of a model without the BatchNorms that a convolution can do the work of.

    ``K' = K g / sqrt(v + eps)``, ``b' = (b - m) g / sqrt(v + eps) + beta``

    A BatchNorm is folded if its input is the output of a convolution of Flax, or in NNX models of
    one that FALCON, a depthwise separable method, Tucker or CP carries out, nothing else uses that
    output, and both are used once. One that normalises by the batch's own statistics in evaluation,
    too, stays, and so do those that change the type. The copy gives what the model gives in
    evaluation mode; it is for deployment or training-free compression, not for further training.

    Args:
        model: an NNX model or a Linen module; it is not changed.
        sample: what it is called with, arrays or shapes, to see what follows what; a Linen module
            in evaluation mode, such as ``falcon_jax.Inputs(x, train=False)``.
        variables: of a Linen module; they are not changed.

    Returns:
        The NNX copy in evaluation mode; or a Linen module that is used as the original, and its
        variables. BatchNorms that were not folded are left in it.

    Raises:
        ValueError: if the model cannot be called on the sample, or the sample is for training.

    Reference:
        Network Decoupling (Guo et al., BMVC 2018), Section 4.
    """
    inputs = Inputs.of(sample).shapes
    if isinstance(model, nnx.Module):
        return _fold_nnx(model, inputs)
    if variables is None:
        raise ValueError("the parameters of a Linen module are in its variables; give them, too.")
    return fold_linen(model, inputs, variables)


def _fold_nnx(model: nnx.Module, inputs: Inputs) -> nnx.Module:
    modules = dict(named_modules(model))
    holders = collections.Counter(id(v) for m in modules.values() for v in held_variables(m))
    types = {
        layer.path: _kernel_type(modules[layer.path])
        for layer in nnx_layers.find_layers(model, inputs)
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


Flat = dict[tuple[str, ...], Any]


def fold_linen(
    module: nn.Module, inputs: Inputs, variables: Mapping[str, Any]
) -> tuple[CompressedModule, Mapping[str, Any]]:
    """Return a module without the BatchNorms that a convolution can do the work of.

    Args:
        module: any Linen module.
        inputs: what it is called with, in evaluation mode.
        variables: its variables.

    Returns:
        The module, and its variables.

    Raises:
        ValueError: if the module cannot be called on the inputs, or they are for training.
    """
    layers = linen_layers.find_layers(module, inputs, variables)
    flat: Flat = flatten_dict(unfreeze(nn.meta.unbox(variables)))  # type: ignore[arg-type]
    types = {
        layer.path: flat[_at("params", layer.path, "kernel")].dtype
        for layer in layers
        if layer.kind == "conv" and layer.obstacle is None
    }
    watched = _Watch(types)
    jaxpr = linen_layers.intercepted_jaxpr(module, inputs, variables, watched.intercept)
    if watched.training and not watched.epsilons:
        raise ValueError(
            f"the sample calls {watched.training[0]!r} in training mode; BatchNorm is folded as it "
            "is in evaluation, so give a sample such as falcon_jax.Inputs(x, train=False)."
        )
    pairs = conv_of_norm(jaxpr.jaxpr, types)
    folded = tuple(
        (norm, conv)
        for norm, conv in pairs.items()
        if _fold(flat, norm, conv, epsilon=watched.epsilons[norm])
    )
    new = unflatten_dict(flat)
    return (
        with_folded(module, folded),
        freeze(new) if isinstance(variables, FrozenDict) else new,
    )


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
            if not _linen_by_running_average(module, *args, **kwargs):
                self.training.append(path)
                return next_fun(*args, **kwargs)
            self.epsilons[path] = module.epsilon
        elif type(module) is not nn.Conv or path not in self._convs:
            return next_fun(*args, **kwargs)
        x, *rest = args
        return mark_call(path, lambda x: next_fun(x, *rest, **kwargs), x)


def _linen_by_running_average(
    norm: nn.BatchNorm, x: Any, use_running_average: bool | None = None, **rest: Any
) -> bool:
    return bool(norm.use_running_average if use_running_average is None else use_running_average)


def _at(collection: str, path: str, name: str) -> tuple[str, ...]:
    return (collection, *path.split("/"), name) if path else (collection, name)


def _fold(flat: Flat, norm: str, conv: str, *, epsilon: float) -> bool:
    """Put a BatchNorm's variables into a convolution's, unless they are stacked otherwise."""
    kernel, mean = flat[_at("params", conv, "kernel")], flat[_at("batch_stats", norm, "mean")]
    stack = mean.shape[:-1]
    if kernel.shape[: len(stack)] != stack or kernel.shape[-1] != mean.shape[-1]:
        return False
    bias = flat.get(_at("params", conv, "bias"))
    scale = flat.pop(_at("params", norm, "scale"), None)
    offset = flat.pop(_at("params", norm, "bias"), None)
    new_kernel, new_bias = folded_arrays(
        jnp.asarray(kernel),
        None if bias is None else jnp.asarray(bias),
        mean=jnp.asarray(flat.pop(_at("batch_stats", norm, "mean"))),
        var=jnp.asarray(flat.pop(_at("batch_stats", norm, "var"))),
        scale=None if scale is None else jnp.asarray(scale),
        offset=None if offset is None else jnp.asarray(offset),
        epsilon=epsilon,
    )
    flat[_at("params", conv, "kernel")] = new_kernel
    flat[_at("params", conv, "bias")] = new_bias
    return True
