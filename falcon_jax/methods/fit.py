"""`fit`: one trained kernel in, the parameters of a method out, by a solver of one's choice."""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from falcon_jax.methods.base import Method, Params, check_form
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.solvers.adamw import AdamWSettings, fit_adamw
from falcon_jax.solvers.scale import at_safe_scale, largest_exponent, times_power_of_two

Solver = Literal["exact", "adamw", "random"]

_ADAMW_REACH = 10  # powers of two from 1, beyond which steps of the paper's size lead nowhere


def fit(
    kernel: Float[ArrayLike, "*kernel_shape"],
    method: Method,
    solver: Solver = "exact",
    *,
    spec: ConvSpec | None = None,
    key: PRNGKeyArray | None = None,
    settings: AdamWSettings | None = None,
) -> Params:
    """Fit a method to a trained kernel.

    ``min_params || kernel - method.kernel(params) ||_F``

    A pure function of ``kernel``: works under jit, vmap and grad. The parameters are finite if the
    kernel is, however large or small.

    Args:
        kernel: trained kernel of shape ``(*kernel_size, M / groups, N)``.
        method: what to fit, e.g. ``Falcon(rank=2)``.
        solver: ``exact`` (closed form, the optimum), ``adamw`` (the paper's iteration) or
            ``random`` (no fit: initial parameters, the paper's "without fitting").
        spec: the convolution that the kernel belongs to; only its feature groups matter here. A
            plain one if not given.
        key: where ``adamw`` and ``random`` start from; ``jax.random.key(0)`` if not given.
        settings: of ``adamw``.

    Returns:
        The method's parameters, in the type of ``kernel``.

    Raises:
        ValueError: if the method cannot replace the convolution, the kernel does not belong to
            ``spec`` or holds a value that is not finite, its type cannot hold the parameters, or
            there is no such solver.

    Reference:
        FALCON, Algorithm 1, stage 1.

    >>> from falcon_jax.methods.falcon import Falcon
    >>> sorted((k, v.shape) for k, v in fit(jnp.ones((3, 3, 4, 8)), Falcon(rank=2)).items())
    [('depthwise', (3, 3, 2, 8)), ('pointwise', (4, 2, 8))]
    """
    kernel = jnp.asarray(kernel)
    if spec is None:
        spec = ConvSpec.of_kernel(kernel.shape)
    if not isinstance(method, Method):
        raise ValueError(f"method is one such as Falcon(rank=2); got {method!r}.")
    method.require(spec)
    check_kernel(kernel, spec)
    if settings is not None and solver != "adamw":
        raise ValueError(f"settings are for solver='adamw'; solver={solver!r} has none.")
    check_solver(solver)
    params = _fit(kernel, method, solver, spec, key, settings)
    if not all(isinstance(p, Tracer) or np.isfinite(np.asarray(p)).all() for p in params.values()):
        raise ValueError(
            f"the parameters of {method} for this kernel are not finite in {kernel.dtype}; scale "
            "the kernel down, or fit it in a wider type, such as kernel.astype('float32')."
        )
    return params


def _fit(
    kernel: Array,
    method: Method,
    solver: Solver,
    spec: ConvSpec,
    key: PRNGKeyArray | None,
    settings: AdamWSettings | None,
) -> Params:
    if solver == "exact":
        return at_safe_scale(lambda k: method.fit(k, spec), kernel, method.factors(spec))
    method = method.for_layer(spec, kernel[None])
    initial = method.init(jax.random.key(0) if key is None else key, spec)
    if solver == "random":
        return {name: value.astype(kernel.dtype) for name, value in initial.items()}
    build = functools.partial(method.kernel, spec=spec)
    return at_safe_scale(
        lambda k: fit_adamw(k, initial, build, settings)[0],
        kernel,
        method.factors(spec),
        near=_ADAMW_REACH,
    )


def check_solver(solver: str) -> None:
    """Raise ValueError unless there is a solver of this name."""
    if solver not in get_args(Solver):
        raise ValueError(f"solver is one of {', '.join(get_args(Solver))}; got {solver!r}.")


def check_kernel(kernel: Float[Array, "*kernel_shape"], spec: ConvSpec) -> None:
    """Raise unless a kernel belongs to ``spec`` and is finite (where that can be seen).

    Args:
        kernel: trained.
        spec: the convolution.

    Returns:
        Nothing.

    Raises:
        ValueError: saying what is wrong.

    >>> spec = ConvSpec(kernel_size=(3,), in_features=4, out_features=8)
    >>> check_kernel(jnp.ones((3, 4, 8)), spec)
    >>> check_kernel(jnp.ones((4, 8)), spec)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: the kernel has shape (4, 8), but the convolution's kernels have shape (3, 4, 8): ...
    """
    check_form(kernel, spec)
    check_finite(kernel, "the kernel")


def check_finite(values: Float[Array, "*shape"], name: str) -> None:
    """Raise if an array holds a value that is not finite; under a trace, nothing is checked.

    Raises:
        ValueError: naming the array.
    """
    if isinstance(values, Tracer):
        return
    known = np.asarray(jax.device_get(values))
    if not np.isfinite(known.astype(np.promote_types(known.dtype, np.float32))).all():
        raise ValueError(
            f"{name} holds values that are not finite; the weights are damaged or training "
            "diverged. Load or train the model again."
        )


def relative_error(
    kernel: Float[ArrayLike, "*kernel_shape"], approximation: Float[ArrayLike, "*kernel_shape"]
) -> Float[Array, ""]:
    """Return ``|| kernel - approximation ||_F / || kernel ||_F``, 0 for two zero kernels.

    Args:
        kernel: the trained kernel.
        approximation: of the same shape.

    Returns:
        A scalar; the energy kept is 1 minus its square.

    Raises:
        ValueError: if the shapes differ, or a value is not real or, in float32, not finite.

    >>> float(relative_error(jnp.array([4.0, 3.0]), jnp.array([4.0, 0.0]))).__round__(6)
    0.6
    """
    k, a = jnp.asarray(kernel), jnp.asarray(approximation)
    if k.shape != a.shape or jnp.iscomplexobj(k) or jnp.iscomplexobj(a):
        raise ValueError(
            "relative_error compares two arrays of real numbers of one shape; got "
            f"{k.dtype}{list(k.shape)} and {a.dtype}{list(a.shape)}."
        )
    dtype = jnp.promote_types(k.dtype, jnp.float32)
    k, a = k.astype(dtype), a.astype(dtype)
    check_finite(k, "the kernel")
    check_finite(a, "the approximation")
    # At the scale of the larger one, where squares are in range.
    exponent = largest_exponent(k, a)
    k, a = times_power_of_two(k, -exponent), times_power_of_two(a, -exponent)
    norm = jnp.sqrt(jnp.sum(k * k))
    error = jnp.sqrt(jnp.sum((k - a) ** 2))
    return jnp.where(norm > 0, error / jnp.where(norm > 0, norm, 1), error)
