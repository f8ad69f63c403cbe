"""`compress`: carry a plan out on a model."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from falcon_jax.compression.nnx_layers import map_modules, named_modules
from falcon_jax.compression.plan import Plan, PlanRow
from falcon_jax.methods import ConvSpec, Method, Params, Solver
from falcon_jax.methods.fitting import check_finite
from falcon_jax.nn.nnx import conv_like
from falcon_jax.nn.trained import conv_spec, fit_stacked


def compress(
    model: nnx.Module,
    plan: Plan,
    *,
    solver: Solver | None = None,
    key: PRNGKeyArray | None = None,
) -> nnx.Module:
    """Return a copy of a model with convolutions replaced as a plan says.

    Strides, padding, dilations, groups, bias, types and everything else of the model are taken
    over; kernels are fitted.

    Args:
        model: the model that the plan was made for; it is not changed.
        plan: what to do.
        solver: how to fit; the plan's own if not given. ``random`` rebuilds the architecture
            without a fit, to load parameters into.
        key: where ``adamw`` and ``random`` start from; ``jax.random.key(0)`` if not given.

    Returns:
        The compressed model.

    Raises:
        ValueError: if the plan does not fit the model, saying where, or a kernel is not finite.
    """
    modules = dict(named_modules(model))
    kernels = {row.path: _kernel(modules, row) for row in plan.replaced}
    key = jax.random.key(0) if key is None else key
    fitted = _fit_all(plan.replaced, kernels, plan.solver if solver is None else solver, key)
    methods = {row.path: row.method for row in plan.replaced}

    def replacement(path: str, module: nnx.Module) -> nnx.Module | None:
        method = methods.get(path)
        if method is None:
            return None
        assert isinstance(module, nnx.Conv)
        return conv_like(module, method, fitted[path])

    return map_modules(replacement, model)


def _kernel(modules: Mapping[str, nnx.Module], row: PlanRow) -> Array:
    module = modules.get(row.path)
    if module is None:
        raise ValueError(
            f"the plan replaces {row.path!r}, but the model has no such layer. "
            "Make a plan for this model."
        )
    if type(module) is not nnx.Conv:
        raise ValueError(
            f"the plan replaces {row.path!r}, which is a {type(module).__name__} in this model, "
            "not an nnx.Conv. Make a plan for this model."
        )
    spec = conv_spec(module)
    if spec != row.spec:
        raise ValueError(f"the plan says that {row.path!r} is {row.spec}, but it is {spec}.")
    check_finite(module.kernel[...], f"the kernel of {row.path!r}")
    return module.kernel[...]


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
