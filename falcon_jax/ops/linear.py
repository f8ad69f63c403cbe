"""Linear functions with a transpose of their own, and sums of many terms."""

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

# The scope of a depthwise convolution, whose multiply-adds no single operation tells.
PRODUCTS = "falcon_jax depthwise products"


def accumulator(*arrays: Array) -> jnp.dtype:
    """Return the type that products are summed in: half-precision terms in float32."""
    dtype = jnp.result_type(*arrays)
    with jax.numpy_dtype_promotion("standard"):  # a choice, which strict promotion is not about
        return jnp.promote_types(dtype, jnp.float32)


def add_up(terms: Iterable[Array]) -> Array:
    """Return the sum of at least one term."""
    first, *rest = terms
    return functools.reduce(jnp.add, rest, first)


Arrays = tuple[Array, ...]
# Of settings, residuals and linear inputs.
Function = Callable[[Any, Arrays, Arrays], Arrays]
Levels = tuple[tuple[bool, ...], ...]


def linear_call(
    function: Function,
    transpose: Function,
    settings: Hashable,
    residuals: Arrays,
    inputs: Arrays,
) -> Arrays:
    """Return ``function(settings, residuals, inputs)``, differentiated in reverse by ``transpose``.

    Args:
        function: linear in the inputs; defined in a module, not in a function.
        transpose: gives, for settings, residuals and arrays like the outputs, arrays like the
            inputs.
        settings: handed to both.
        residuals: what the function need not be linear in. It is differentiated by them as it is.
        inputs: what it is linear in.
    """
    return tuple(
        _linear_call.bind(
            *_equally_varying((*residuals, *inputs)),
            function=function,
            transpose=transpose,
            settings=settings,
            residual_count=len(residuals),
            levels=(),
        )
    )


def _equally_varying(arrays: Arrays) -> Arrays:
    """Let all arrays vary over the same axes of a ``shard_map``, or transposes lack a sum."""
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    every = frozenset().union(*varying)
    return tuple(
        lax.pcast(array, tuple(sorted(every - own)), to="varying") if every - own else array
        for array, own in zip(arrays, varying, strict=True)
    )


def _evaluate(
    function: Function, settings: Hashable, residual_count: int, levels: Levels, *operands: Array
) -> Arrays:
    """Call the function, vmapped once for each level over the inputs and some of the residuals."""

    def flat(*operands: Array) -> Arrays:
        return function(settings, operands[:residual_count], operands[residual_count:])

    for level in levels:
        axes = [0 if mapped else None for mapped in level]
        flat = jax.vmap(flat, in_axes=(*axes, *[0] * (len(operands) - residual_count)))
    return flat(*operands)


_jitted = jax.jit(_evaluate, static_argnums=(0, 1, 2, 3), inline=True)


def _call(
    *operands: Any,  # outside of jit, JAX hands NumPy arrays on, too
    function: Function,
    transpose: Function,
    settings: Hashable,
    residual_count: int,
    levels: Levels,
) -> Arrays:
    return _jitted(function, settings, residual_count, levels, *operands)


def _abstract(
    *operands: Any,
    function: Function,
    transpose: Function,
    settings: Hashable,
    residual_count: int,
    levels: Levels,
) -> Sequence[Any]:
    traced = _jitted.trace(function, settings, residual_count, levels, *operands)
    return [output.strip_weak_type() for output in traced.jaxpr.out_avals]


def _differentiate(
    primals: Sequence[Array], tangents: Sequence[Any], **params: Any
) -> tuple[Arrays, Arrays]:
    count = params["residual_count"]
    residuals, inputs = primals[:count], primals[count:]
    terms = []
    if not all(isinstance(t, ad.Zero) for t in tangents[count:]):
        terms.append(
            _linear_call.bind(*residuals, *map(ad.instantiate_zeros, tangents[count:]), **params)
        )
    moving = [i for i, t in enumerate(tangents[:count]) if not isinstance(t, ad.Zero)]
    if moving:

        def of_residuals(*moved: Array) -> Arrays:
            values = dict(zip(moving, moved, strict=True))
            operands = [values.get(i, residual) for i, residual in enumerate(residuals)]
            return _evaluate(
                params["function"], params["settings"], count, params["levels"], *operands, *inputs
            )

        at = tuple(residuals[i] for i in moving)
        terms.append(jax.jvp(of_residuals, at, tuple(tangents[i] for i in moving))[1])
    sums = tuple(functools.reduce(jnp.add, parts) for parts in zip(*terms, strict=True))
    return tuple(_linear_call.bind(*primals, **params)), sums


def _transpose(
    cotangents: Sequence[Any],
    *operands: Any,
    function: Function,
    transpose: Function,
    residual_count: int,
    **params: Any,
) -> list[Array | None]:
    residuals, inputs = operands[:residual_count], operands[residual_count:]
    given = _linear_call.bind(
        *residuals,
        *map(ad.instantiate_zeros, cotangents),
        function=transpose,
        transpose=function,
        residual_count=residual_count,
        **params,
    )
    wanted = (
        cotangent if ad.is_undefined_primal(x) else None
        for x, cotangent in zip(inputs, given, strict=True)
    )
    return [*[None] * residual_count, *wanted]


def _batch(
    operands: Sequence[Array],
    axes: Sequence[int | None],
    *,
    residual_count: int,
    levels: Levels,
    **params: Any,
) -> tuple[Sequence[Array], list[int]]:
    size = next(x.shape[d] for x, d in zip(operands, axes, strict=True) if d is not None)
    level = tuple(d is not None for d in axes[:residual_count])
    moved = [
        jnp.moveaxis(x, d, 0)
        if d is not None
        else x
        if i < residual_count
        else jnp.broadcast_to(jnp.expand_dims(x, 0), (size, *x.shape))
        for i, (x, d) in enumerate(zip(operands, axes, strict=True))
    ]
    outputs = _linear_call.bind(
        *moved, residual_count=residual_count, levels=(*levels, level), **params
    )
    return outputs, [0] * len(outputs)


_linear_call = Primitive("falcon_linear_call")
_linear_call.multiple_results = True
_linear_call.def_impl(_call)
_linear_call.def_abstract_eval(_abstract)
ad.primitive_jvps[_linear_call] = _differentiate
ad.primitive_transposes[_linear_call] = _transpose
batching.primitive_batchers[_linear_call] = _batch
mlir.register_lowering(_linear_call, mlir.lower_fun(_call, multiple_results=True))
