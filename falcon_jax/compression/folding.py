"""BatchNorm folded into the convolution before it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, overload

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jaxtyping import Array

from falcon_jax.compression.batchnorm_pairs import conv_of_norm, gain_and_bias, mark_call
from falcon_jax.compression.inputs import Inputs
from falcon_jax.compression.inspection import Model
from falcon_jax.compression.linen_folding import fold_linen
from falcon_jax.compression.nnx_layers import jaxpr_through
from falcon_jax.compression.nnx_tree import map_modules, named_modules
from falcon_jax.methods import Params
from falcon_jax.methods.base import scale_outputs
from falcon_jax.nn.batch_norm import BatchNorm
from falcon_jax.nn.linen_compressed import CompressedModule
from falcon_jax.nn.method_conv import MethodConv


class FoldedBatchNorm(nnx.Module):
    """What stands where a BatchNorm was: its work is done by the convolution before it."""

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Return the input as it is."""
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
    output, both are used once, and the call does not ask for the statistics of its batch. The copy
    gives what the model gives in evaluation mode; it is for deployment or training-free
    compression, not for further training.

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
    def chosen(module: nnx.Module) -> bool:
        if isinstance(module, MethodConv):
            return _with_gain(module, jnp.ones(module.spec.out_features)) is not None
        if type(module) is nnx.Conv:
            return module.mask is None
        return isinstance(module, _Averaging) and module.axis == -1

    modules = dict(named_modules(model))
    norms = {path for path, module in modules.items() if _is_batch_norm(module)}
    otherwise: set[str] = set()
    watched = map_modules(lambda path, module: _watch(path, module, otherwise), model)
    jaxpr = jaxpr_through(watched, inputs, chosen, mark_call)
    pairs = {n: c for n, c in conv_of_norm(jaxpr, norms).items() if n not in otherwise}
    norm_of_conv = {conv: modules[norm] for norm, conv in pairs.items()}

    def folded(path: str, module: nnx.Module) -> nnx.Module | None:
        if path in pairs:
            return FoldedBatchNorm()
        if path in norm_of_conv:
            norm = norm_of_conv[path]
            assert isinstance(module, (nnx.Conv, MethodConv)) and isinstance(norm, nnx.BatchNorm)
            _fold(module, norm)
        return None

    copy = map_modules(folded, model)
    copy.eval()
    return copy


class _Averaging(nnx.BatchNorm):
    """Stands before a BatchNorm's class in a copy that is traced."""


def _watch(path: str, module: nnx.Module, otherwise: set[str]) -> None:
    """Make a BatchNorm note its path where it is called for the statistics of its batch."""
    if not _is_batch_norm(module):
        return
    cls: Any = type(module)

    def call(self: Any, x: Any, use_running_average: Any = None, **options: Any) -> Any:
        average = self.use_running_average if use_running_average is None else use_running_average
        if average is not True:
            otherwise.add(path)
        return cls.__call__(self, x, use_running_average, **options)

    module.__class__ = type(cls.__name__, (_Averaging, cls), {"__call__": call})


def _is_batch_norm(module: nnx.Module) -> bool:
    return type(module) in (nnx.BatchNorm, BatchNorm)


def _with_gain(conv: MethodConv, gain: Array) -> Params | None:
    return conv.method.with_gain(conv.params, gain)


def _fold(conv: nnx.Conv | MethodConv, norm: nnx.BatchNorm) -> None:
    gain, bias = gain_and_bias(
        None if conv.bias is None else conv.bias[...],
        mean=norm.mean[...],
        var=norm.var[...],
        scale=None if norm.scale is None else norm.scale[...],
        offset=None if norm.bias is None else norm.bias[...],
        epsilon=norm.epsilon,
    )
    if not isinstance(conv, MethodConv):
        conv.kernel[...] = scale_outputs(conv.kernel[...], gain)
        dtype = conv.kernel[...].dtype
        conv.use_bias = True
    else:
        params = _with_gain(conv, gain)
        assert params is not None
        for name, value in params.items():
            getattr(conv, name)[...] = value
        dtype = next(iter(params.values())).dtype
        conv.spec = dataclasses.replace(conv.spec, use_bias=True)
    conv.bias = nnx.Param(bias.astype(dtype))
