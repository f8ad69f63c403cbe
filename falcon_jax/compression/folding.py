"""BatchNorm folded into the convolution before it."""

import collections
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array

from falcon_jax.compression.inputs import Inputs
from falcon_jax.compression.layers import inner_jaxprs
from falcon_jax.compression.nnx_layers import map_modules, named_modules

_CONV, _NORM = "falcon_jax conv ", "falcon_jax norm "


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

    def marked(path: str, module: nnx.Module) -> None:
        if type(module) is nnx.Conv and module.mask is None:
            module.__class__ = _marking(nnx.Conv, before=None, after=_CONV + path)
        elif type(module) is nnx.BatchNorm and module.axis == -1:
            module.__class__ = _marking(nnx.BatchNorm, before=_NORM + path, after=None)

    copy = map_modules(marked, model)
    copy.eval()
    graphdef, state = nnx.split(copy)

    def forward(state: nnx.State, arrays: list[Array]) -> Any:
        return inputs.with_arrays(arrays).call(nnx.merge(graphdef, state))  # type: ignore[arg-type]

    try:
        with set_xla_metadata(falcon_jax_trace=uuid.uuid4().hex):
            jaxpr = jax.make_jaxpr(forward)(state, inputs.arrays)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be called on the sample: {error}"
        ) from error
    followed = list(_followed(jaxpr.jaxpr))
    uses = collections.Counter(_marks(jaxpr.jaxpr))
    return {
        norm: conv for norm, conv in followed if uses[_NORM + norm] == 1 and uses[_CONV + conv] == 1
    }


def _followed(jaxpr: Any) -> Iterator[tuple[str, str]]:
    """Yield BatchNorm and convolution where the one alone uses what the other gives."""
    made = {e.outvars[0]: _mark(e)[len(_CONV) :] for e in jaxpr.eqns if _mark(e).startswith(_CONV)}
    operands = [v for e in jaxpr.eqns for v in e.invars] + list(jaxpr.outvars)
    uses = collections.Counter(id(v) for v in operands)
    for eqn in jaxpr.eqns:
        x = eqn.invars[0] if eqn.invars else None
        if _mark(eqn).startswith(_NORM) and uses[id(x)] == 1:
            conv = next((path for var, path in made.items() if var is x), None)
            if conv is not None:
                yield _mark(eqn)[len(_NORM) :], conv
        for sub in inner_jaxprs(tuple(eqn.params.values())):
            yield from _followed(sub)


def _marks(jaxpr: Any) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        yield _mark(eqn)
        for sub in inner_jaxprs(tuple(eqn.params.values())):
            yield from _marks(sub)


def _mark(eqn: Any) -> str:
    return str(eqn.params.get("name", ""))


def _marking(cls: type[nnx.Module], *, before: str | None, after: str | None) -> Any:
    def call(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        x = x if before is None else checkpoint_name(x, before)
        y = cls.__call__(self, x, *args, **kwargs)  # type: ignore[operator]
        return y if after is None else checkpoint_name(y, after)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
