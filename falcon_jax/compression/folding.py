"""BatchNorm folded into the convolution before it."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, overload

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jaxtyping import Array

from falcon_jax.compression import nnx_layers
from falcon_jax.compression.batchnorm_pairs import conv_of_norm, gain_and_bias, mark_call
from falcon_jax.compression.inputs import Inputs
from falcon_jax.compression.inspection import Model
from falcon_jax.compression.layers import Layer
from falcon_jax.compression.linen_folding import fold_linen
from falcon_jax.compression.nnx_layers import ModuleCall, jaxpr_through
from falcon_jax.compression.nnx_tree import (
    held_variables,
    in_evaluation,
    map_modules,
    named_modules,
)
from falcon_jax.methods import Params
from falcon_jax.methods.base import scale_outputs
from falcon_jax.nn.batch_norm import BatchNorm
from falcon_jax.nn.linen_compressed import CompressedModule, check_folded_call
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

    pairs = conv_of_norm(jaxpr_through(model, inputs, chosen, marked), types)
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
