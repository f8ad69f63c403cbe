"""BatchNorm folded into the convolution before it."""

import collections
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from falcon_jax.compression.inputs import Inputs
from falcon_jax.compression.layers import inner_jaxprs
from falcon_jax.compression.nnx_layers import jaxpr_through, map_modules, named_modules

_BEFORE, _AFTER = "falcon_jax before ", "falcon_jax after "


class FoldedBatchNorm(nnx.Module):
    """What stands where a BatchNorm was: its work is done by the convolution before it."""

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Return the input as it is."""
        return x


def fold_batchnorm(model: nnx.Module, sample: Any) -> nnx.Module:
    """Return a copy of a model without the BatchNorms that a convolution can do the work of.

    ``K' = K g / sqrt(v + eps)``, ``b' = (b - m) g / sqrt(v + eps) + beta``

    A BatchNorm is folded if its input is the output of an ``nnx.Conv``, nothing else uses that
    output, and both are used once. The copy gives what the model gives in evaluation mode; it is
    for deployment or training-free compression, not for further training.

    Args:
        model: an NNX model; it is not changed.
        sample: what it is called with, arrays or shapes, to see what follows what.

    Returns:
        The copy, in evaluation mode. BatchNorms that were not folded are left in it.

    Raises:
        ValueError: if the model cannot be called on the sample.

    Reference:
        Network Decoupling (Guo et al., BMVC 2018), Section 4.
    """
    pairs = _conv_of_norm(model, Inputs.of(sample).shapes)
    modules = dict(named_modules(model))
    convs = {conv: modules[norm] for norm, conv in pairs.items()}

    def folded(path: str, module: nnx.Module) -> nnx.Module | None:
        if path in pairs:
            return FoldedBatchNorm()
        if path in convs:
            norm = convs[path]
            assert isinstance(module, nnx.Conv) and isinstance(norm, nnx.BatchNorm)
            _fold(module, norm)
        return None

    copy = map_modules(folded, model)
    copy.eval()
    return copy


def _fold(conv: nnx.Conv, norm: nnx.BatchNorm) -> None:
    gain = jax.lax.rsqrt(norm.var[...] + norm.epsilon)
    if norm.scale is not None:
        gain = gain * norm.scale[...]
    kernel = conv.kernel[...]
    stack = gain.ndim - 1
    axes = tuple(range(stack, kernel.ndim - 1))
    bias = jnp.zeros_like(gain) if conv.bias is None else conv.bias[...]
    bias = (bias - norm.mean[...]) * gain
    if norm.bias is not None:
        bias = bias + norm.bias[...]
    conv.kernel[...] = (kernel * jnp.expand_dims(gain, axes)).astype(kernel.dtype)
    conv.bias = nnx.Param(bias.astype(kernel.dtype))
    conv.use_bias = True


def _conv_of_norm(model: nnx.Module, inputs: Inputs) -> Mapping[str, str]:
    """Return, by path of every BatchNorm that can be folded, the path of its convolution."""

    def chosen(module: nnx.Module) -> bool:
        if type(module) is nnx.Conv:
            return module.mask is None
        return type(module) is nnx.BatchNorm and module.axis == -1

    def marked(path: str, layer: Callable[[Array], Array], x: Array) -> Array:
        y = layer(checkpoint_name(x, _BEFORE + path))
        return checkpoint_name(y, _AFTER + path)

    jaxpr = jaxpr_through(model, inputs, chosen, marked)
    kinds = {path: type(module) for path, module in named_modules(model)}
    uses = collections.Counter(_marks(jaxpr))
    return {
        norm: conv
        for norm, conv in _followed(jaxpr)
        if (kinds[norm], kinds[conv]) == (nnx.BatchNorm, nnx.Conv)
        and uses[_BEFORE + norm] == uses[_BEFORE + conv] == 1
    }


def _followed(jaxpr: Any) -> Iterator[tuple[str, str]]:
    """Yield the paths of two layers where the one alone uses what the other gives."""
    given = [eqn for eqn in jaxpr.eqns if _mark(eqn).startswith(_AFTER)]
    made = {eqn.outvars[0]: _mark(eqn)[len(_AFTER) :] for eqn in given}
    operands = [v for e in jaxpr.eqns for v in e.invars] + list(jaxpr.outvars)
    uses = collections.Counter(id(v) for v in operands)
    for eqn in jaxpr.eqns:
        x = eqn.invars[0] if eqn.invars else None
        if _mark(eqn).startswith(_BEFORE) and uses[id(x)] == 1:
            conv = next((path for var, path in made.items() if var is x), None)
            if conv is not None:
                yield _mark(eqn)[len(_BEFORE) :], conv
        for sub in inner_jaxprs(tuple(eqn.params.values())):
            yield from _followed(sub)


def _marks(jaxpr: Any) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        yield _mark(eqn)
        for sub in inner_jaxprs(tuple(eqn.params.values())):
            yield from _marks(sub)


def _mark(eqn: Any) -> str:
    return str(eqn.params.get("name", ""))
