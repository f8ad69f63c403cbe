"""Functions with derivatives of their own, linear ones with a transpose, and sums of many terms."""

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

# The primitive of `jvp_call`.
JVP_CALL = "falcon_jvp_call"
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
# Of settings and operands.
Plain = Callable[[Any, Arrays], Arrays]
# Of settings, operands and their tangents, None for those that stay: outputs and their tangents.
Derivative = Callable[[Any, Arrays, tuple[Array | None, ...]], tuple[Arrays, Arrays]]
Levels = tuple[tuple[bool, ...], ...]


def linear_call(
    function: Function,
    transpose: Function,
    settings: Hashable,
    residuals: Arrays,
    inputs: Arrays,
    *,
    bilinear: bool = False,
) -> Arrays:
    """Return ``function(settings, residuals, inputs)``, differentiated in reverse by ``transpose``.

    Args:
        function: linear in the inputs; defined in a module, not in a function.
        transpose: gives, for settings, residuals and arrays like the outputs, arrays like the
            inputs.
        settings: handed to both.
        residuals: what the function need not be linear in. It is differentiated by them as it is.
        inputs: what it is linear in.
        bilinear: whether it is linear in the residuals, too. In Taylor mode it is differentiated
            by them as it is if not.
    """
    return tuple(
        _linear_call.bind(
            *_equally_varying((*residuals, *inputs)),
            function=function,
            transpose=transpose,
            settings=settings,
            residual_count=len(residuals),
            bilinear=bilinear,
            levels=(),
        )
    )


def jvp_call(
    function: Plain,
    derivative: Derivative,
    settings: Hashable,
    operands: Arrays,
    *,
    bilinear: bool = False,
) -> Arrays:
    """Return ``function(settings, operands)``, differentiated forwards by ``derivative``.

    As by `jax.custom_jvp`, and by `jax.experimental.jet`, which that is not.

    Args:
        function: defined in a module, not in a function.
        derivative: gives, for settings, operands and their tangents (None for operands that stay),
            the outputs and their tangents.
        settings: handed to both.
        operands: of the function.
        bilinear: whether it is linear in each of two operands. In Taylor mode it is differentiated
            as it is if not.
    """
    return tuple(
        _jvp_call.bind(
            *_equally_varying(operands),
            function=function,
            derivative=derivative,
            settings=settings,
            bilinear=bilinear,
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


def _mapped(flat: Callable[..., Any], levels: Levels, others: int = 0) -> Callable[..., Any]:
    """Vmap a function once for each level over some of its first arguments and all others."""
    for level in levels:
        axes = [0 if mapped else None for mapped in level]
        flat = jax.vmap(flat, in_axes=(*axes, *[0] * others))
    return flat


def _evaluate(
    function: Function, settings: Hashable, residual_count: int, levels: Levels, *operands: Array
) -> Arrays:
    def flat(*operands: Array) -> Arrays:
        return function(settings, operands[:residual_count], operands[residual_count:])

    return _mapped(flat, levels, len(operands) - residual_count)(*operands)


_jitted = jax.jit(_evaluate, static_argnums=(0, 1, 2, 3), inline=True)


def _call(
    *operands: Any,  # outside of jit, JAX hands NumPy arrays on, too
    function: Function,
    transpose: Function,
    settings: Hashable,
    residual_count: int,
    bilinear: bool,
    levels: Levels,
) -> Arrays:
    return _jitted(function, settings, residual_count, levels, *operands)


def _abstract(
    *operands: Any,
    function: Function,
    transpose: Function,
    settings: Hashable,
    residual_count: int,
    bilinear: bool,
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


def _evaluate_plain(
    function: Plain, settings: Hashable, levels: Levels, *operands: Array
) -> Arrays:
    return _mapped(lambda *operands: function(settings, operands), levels)(*operands)


_jitted_plain = jax.jit(_evaluate_plain, static_argnums=(0, 1, 2), inline=True)


def _call_plain(
    *operands: Any, function: Plain, settings: Hashable, levels: Levels, **_: Any
) -> Arrays:
    return _jitted_plain(function, settings, levels, *operands)


def _abstract_plain(
    *operands: Any, function: Plain, settings: Hashable, levels: Levels, **_: Any
) -> Sequence[Any]:
    traced = _jitted_plain.trace(function, settings, levels, *operands)
    return [output.strip_weak_type() for output in traced.jaxpr.out_avals]


def _differentiate_plain(
    primals: Sequence[Array], tangents: Sequence[Any], **params: Any
) -> tuple[Arrays, Arrays]:
    moving = {i: t for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)}
    return _moved(primals, moving, **params)


def _moved(
    primals: Sequence[Array],
    tangents: Mapping[int, Array],
    *,
    derivative: Derivative,
    settings: Hashable,
    levels: Levels,
    **_: Any,
) -> tuple[Arrays, Arrays]:
    """Return outputs and their tangents, given those of some operands."""
    count, moving = len(primals), list(tangents)

    def flat(*arrays: Array) -> tuple[Arrays, Arrays]:
        moved = dict(zip(moving, arrays[count:], strict=True))
        return derivative(settings, arrays[:count], tuple(moved.get(i) for i in range(count)))

    # Tangents are mapped as their primals are.
    levels = tuple((*level, *(level[i] for i in moving)) for level in levels)
    return _mapped(flat, levels)(*primals, *tangents.values())


def _transpose_plain(
    cotangents: Sequence[Any], *operands: Any, bilinear: bool, **params: Any
) -> list[Array | None]:
    """Transpose by the one operand that is not known: a linear function is its own derivative."""
    unknown = [i for i, x in enumerate(operands) if ad.is_undefined_primal(x)]
    if not bilinear or len(unknown) > 1:
        raise NotImplementedError(f"{JVP_CALL} is not linear in what it is transposed by.")
    [place] = unknown
    zeros = jnp.zeros(operands[place].aval.shape, operands[place].aval.dtype)
    primals = [zeros if i == place else x for i, x in enumerate(operands)]
    pull = jax.linear_transpose(lambda x: _moved(primals, {place: x}, **params)[1], zeros)
    [wanted] = pull(tuple(map(ad.instantiate_zeros, cotangents)))
    return [wanted if i == place else None for i in range(len(operands))]


def _batch_plain(
    operands: Sequence[Array], axes: Sequence[int | None], *, levels: Levels, **params: Any
) -> tuple[Sequence[Array], list[int]]:
    level = tuple(d is not None for d in axes)
    moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(operands, axes, strict=True)]
    outputs = _jvp_call.bind(*moved, levels=(*levels, level), **params)
    return outputs, [0] * len(outputs)


Series = Sequence[Sequence[Array]]  # of every array, its coefficients from the first order on


def _expand(
    primals: Arrays, series: Series, *, bilinear: bool, **params: Any
) -> tuple[Arrays, Series]:
    count = params["residual_count"]
    if bilinear or not count:
        bind = functools.partial(_linear_call.bind, bilinear=bilinear, **params)
        return _expand_product(bind, count, primals, series)
    names = ("function", "settings", "residual_count", "levels")
    flat = functools.partial(_evaluate, *(params[name] for name in names))
    return jet.jet(flat, primals, series, factorial_scaled=False)


def _expand_plain(
    primals: Arrays, series: Series, *, bilinear: bool, **params: Any
) -> tuple[Arrays, Series]:
    if bilinear:
        bind = functools.partial(_jvp_call.bind, bilinear=bilinear, **params)
        return _expand_product(bind, 1, primals, series)
    names = ("function", "settings", "levels")
    flat = functools.partial(_evaluate_plain, *(params[name] for name in names))
    return jet.jet(flat, primals, series, factorial_scaled=False)


def _expand_product(
    bind: Callable[..., Sequence[Array]], count: int, primals: Arrays, series: Series
) -> tuple[Arrays, Series]:
    """Return the coefficients of what is linear in the first ``count`` operands and in the rest.

    ``y_k = sum_j f(r_j, x_{k - j})``; without first operands it is linear, ``y_k = f(x_k)``.
    """
    known = zip(primals, series, strict=True)
    orders = list(zip(*([x, *terms] for x, terms in known), strict=True))

    def order(k: int) -> list[Array]:
        pairs = [(orders[j], orders[k - j]) for j in range(k + 1 if count else 1)]
        terms = [bind(*first[:count], *second[count:]) for first, second in pairs]
        return [add_up(parts) for parts in zip(*terms, strict=True)]

    first, *others = map(order, range(len(orders)))
    return tuple(first), [[terms[i] for terms in others] for i in range(len(first))]


_linear_call = Primitive("falcon_linear_call")
_linear_call.multiple_results = True
_linear_call.def_impl(_call)
_linear_call.def_abstract_eval(_abstract)
ad.primitive_jvps[_linear_call] = _differentiate
ad.primitive_transposes[_linear_call] = _transpose
batching.primitive_batchers[_linear_call] = _batch
mlir.register_lowering(_linear_call, mlir.lower_fun(_call, multiple_results=True))

_jvp_call = Primitive(JVP_CALL)
_jvp_call.multiple_results = True
_jvp_call.def_impl(_call_plain)
_jvp_call.def_abstract_eval(_abstract_plain)
ad.primitive_jvps[_jvp_call] = _differentiate_plain
ad.primitive_transposes[_jvp_call] = _transpose_plain
batching.primitive_batchers[_jvp_call] = _batch_plain
mlir.register_lowering(_jvp_call, mlir.lower_fun(_call_plain, multiple_results=True))

with contextlib.suppress(ImportError):  # experimental: a later JAX may do without
    from jax.experimental import jet

    jet.jet_rules[_linear_call] = _expand
    jet.jet_rules[_jvp_call] = _expand_plain
