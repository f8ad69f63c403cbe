"""`compress`: carry a plan out on a model."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from falcon_jax.compression.plan import Plan, PlanRow, check_plan, replacements
from falcon_jax.frameworks.interface import M, defined_layers, framework_of
from falcon_jax.methods.base import Method, Params
from falcon_jax.methods.fit import Solver, check_finite
from falcon_jax.nn.method_conv import fit_stacked
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.wording import differences


def compress(
    model: M, plan: Plan, *, solver: Solver | None = None, key: PRNGKeyArray | None = None
) -> M:
    """Return a copy of a model with convolutions replaced as a plan says.

    Strides, padding, dilations, groups, bias, types and everything else of the model are taken
    over; kernels are fitted.

    Args:
        model: the model that the plan was made for, a Linen module bound to its variables
            (``module.bind(variables)``); it is not changed.
        plan: what to do.
        solver: how to fit; the plan's own if not given. ``random`` rebuilds the architecture
            without a fit, to load parameters into.
        key: where ``adamw`` and ``random`` start from; ``jax.random.key(0)`` if not given.

    Returns:
        The compressed model, to be used as the original; a Linen module bound, so that
        ``.unbind()`` gives module and variables.

    Raises:
        ValueError: if the plan does not fit the model, saying where, a kernel is not finite, or a
            Linen module is not bound.

    >>> from flax import nnx
    >>> from falcon_jax.compression.plan import make_plan
    >>> convs = [nnx.Conv(m, 8, (3, 3), rngs=nnx.Rngs(0)) for m in (3, 8)]
    >>> model = nnx.Sequential(*convs)
    >>> small = compress(model, make_plan(model))
    >>> small(jnp.ones((1, 4, 4, 3))).shape
    (1, 4, 4, 8)
    >>> type(small.layers[1]).__name__
    'FalconConv'
    """
    framework: Any = framework_of(model)
    framework.params(model)  # a Linen module without variables is told as such
    check_plan(plan, defined_layers(model, plan.inputs))
    rows = [row for row in plan.replaced if row.method is not None]
    kernels = framework.kernels(model, [row.path for row in rows])
    if any(isinstance(k, jax.ShapeDtypeStruct) for k in kernels.values()) or len(kernels) < len(
        {row.path for row in rows}
    ):
        raise ValueError("the model has shapes in place of kernels; give one that has arrays.")
    kernels = {path: jnp.asarray(kernel) for path, kernel in kernels.items()}
    for path, kernel in kernels.items():
        check_finite(kernel, f"the kernel of {path!r}")
    key = jax.random.key(0) if key is None else key
    fitted = _fit_all(plan.replaced, kernels, plan.solver if solver is None else solver, key)
    return framework.replace_convs(model, replacements(plan, fitted))


def _fit_all(
    rows: tuple[PlanRow, ...], kernels: Mapping[str, Array], solver: Solver, key: PRNGKeyArray
) -> dict[str, Params]:
    keys = {row.path: jax.random.fold_in(key, index) for index, row in enumerate(rows)}
    fitted: dict[str, Params] = {}
    for row in rows:
        if row.path in fitted:
            continue
        assert row.method is not None
        if solver != "adamw":
            kernel = kernels[row.path]
            fitted[row.path] = fit_stacked(kernel, row.method, row.spec, solver, keys[row.path])
            continue
        # Hundreds of small steps: layers of equal geometry take them together.
        alike = [r.path for r in rows if _fits_alike(r, row, kernels)]
        stacked = _fit_together(
            jnp.stack([kernels[path] for path in alike]),
            jnp.stack([keys[path] for path in alike]),
            method=row.method,
            spec=row.spec,
        )
        for index, path in enumerate(alike):
            fitted[path] = {name: value[index] for name, value in stacked.items()}
    return fitted


def _fits_alike(a: PlanRow, b: PlanRow, kernels: Mapping[str, Array]) -> bool:
    same_kernel = kernels[a.path].shape == kernels[b.path].shape
    return same_kernel and a.method == b.method and a.spec == b.spec


@functools.partial(jax.jit, static_argnames=("method", "spec"))
def _fit_together(
    kernels: Float[Array, "layers *stacked_kernel_shape"],
    keys: Array,
    *,
    method: Method,
    spec: ConvSpec,
) -> Params:
    return jax.vmap(lambda kernel, key: fit_stacked(kernel, method, spec, "adamw", key))(
        kernels, keys
    )


def narrow(model: M, narrower: M) -> M:
    """Return a copy of a narrower model whose weights are the leading channels of a trained one.

    ``new[i, j, ...] = old[i, j, ...]`` for every index that the narrower array has. Random number
    generators keep the narrower model's state.

    Args:
        model: the trained model.
        narrower: a model of the same structure with arrays at most as large; its values do not
            matter, and it is not changed.

    Returns:
        The copy.

    Raises:
        ValueError: if the two have other variables, or an array of the narrower is larger.

    Reference:
        FALCON, Section 3.4, the width multiplier.

    >>> from flax import nnx
    >>> wide, thin = (nnx.Linear(m, 2 * m, rngs=nnx.Rngs(0)) for m in (8, 4))
    >>> bool((narrow(wide, thin).kernel[...] == wide.kernel[...][:4, :8]).all())
    True
    """
    framework: Any = framework_of(narrower)
    new, old = framework.arrays(narrower), framework_of(model).arrays(model)
    if new.keys() != old.keys():
        raise ValueError(
            "the narrower model has other variables than the trained one:\n" + differences(old, new)
        )
    leading = {}
    for name, array in new.items():
        value, shape = old[name], array.shape
        if len(shape) != value.ndim or any(a > b for a, b in zip(shape, value.shape, strict=True)):
            raise ValueError(
                f"{name} has shape {shape} in the narrower model, which does not fit into "
                f"{value.shape} of the trained one."
            )
        leading[name] = value[tuple(slice(size) for size in shape)]
    return framework.with_arrays(narrower, leading)
