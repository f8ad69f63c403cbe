"""Which BatchNorm follows which convolution, and the convolution that is both."""

import collections
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from falcon_jax.compression.tracing import inner_jaxprs
from falcon_jax.methods.base import scale_outputs

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
