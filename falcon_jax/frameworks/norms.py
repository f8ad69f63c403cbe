"""BatchNorm in either framework: which follows which convolution, statistics of many batches."""

import collections
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from falcon_jax.frameworks.layers import Inputs
from falcon_jax.frameworks.tracing import inner_jaxprs
from falcon_jax.methods.fit import check_finite

# Points seen so far, their mean and their variance, for every feature.
Moments = tuple[Float[Array, "*shape"], Float[Array, "*shape"], Float[Array, "*shape"]]
Statistics = dict[Any, Array]

POINTS = "falcon_jax_points"
STATISTICS = (POINTS, "mean", "var")

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


def gain_and_bias(
    bias: Float[Array, "*stack n"] | None,
    *,
    mean: Float[Array, "*stack n"],
    var: Float[Array, "*stack n"],
    scale: Float[Array, "*stack n"] | None,
    offset: Float[Array, "*stack n"] | None,
    epsilon: float,
) -> tuple[Float[Array, "*stack n"], Float[Array, "*stack n"]]:
    """Return the gain and the bias of a convolution that does the work of a BatchNorm, too.

    ``gain = g / sqrt(v + eps)``, ``b' = (b - m) gain + beta``

    Args:
        bias: of the convolution, b, or None.
        mean: m, the BatchNorm's.
        var: v.
        scale: g, or None.
        offset: beta, or None.
        epsilon: eps.
    """
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


def nothing_seen(like: Array) -> Array:
    """Return a statistic of no points, float32 or wider."""
    return jnp.zeros(like.shape, jnp.promote_types(like.dtype, jnp.float32))


def known_axis(axis_name: Any) -> Any:
    """Return the name of a mapped axis, or None where there is no such axis around the call."""
    try:
        lax.psum(1, () if axis_name is None else axis_name)
    except NameError:
        return None
    return axis_name


def points_of(x: Array, norm: Any, mask: Array | None, *, like: Array) -> Array:
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


def together(a: Moments, b: Moments) -> Moments:
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


class NotReachedError(ValueError):
    """No batch reaches a BatchNorm."""


def over_batches(
    batches: Iterable[Any],
    seen: Callable[[Statistics, Any, Inputs], Statistics],
    statistics: Statistics,
    rest: Any,
    model: Any,
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
    reached = [path for path in norms if bool(jnp.all(found[path, POINTS] > 0))]
    _check_reached(reached, norms)
    for path in reached:
        for name in ("mean", "var"):
            check_finite(found[path, name], f"the {name} that {_shown(path)} gets")
    return {(p, n): value for (p, n), value in found.items() if p in reached and n != POINTS}


def _check_reached(reached: Sequence[Any], norms: Sequence[Any]) -> None:
    missed = [_shown(path) for path in norms if path not in reached]
    if not reached:
        raise NotReachedError(
            f"no batch reaches a BatchNorm ({', '.join(missed[:5])}); give inputs that call them."
        )
    if missed:
        warnings.warn(
            f"no batch reached the BatchNorms {', '.join(missed)}; they stay as they were.",
            stacklevel=5,
        )


def warn_of_others(paths: Iterable[str]) -> None:
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
