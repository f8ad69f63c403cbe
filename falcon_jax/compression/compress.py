"""`compress`: carry a plan out on a model."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PRNGKeyArray

from falcon_jax.compression.plan import Plan, PlanRow
from falcon_jax.frameworks.inspection import Model, inspect_model
from falcon_jax.frameworks.layers import Layer
from falcon_jax.frameworks.nnx import arrays, map_modules, with_arrays
from falcon_jax.methods.base import Method, Params
from falcon_jax.methods.fit import Solver, check_finite
from falcon_jax.nn.compressed import CompressedModule, Definition
from falcon_jax.nn.method_conv import conv_like, fit_stacked
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.wording import differences


@overload
def compress(
    model: nnx.Module,
    plan: Plan,
    variables: None = None,
    *,
    solver: Solver | None = None,
    key: PRNGKeyArray | None = None,
) -> nnx.Module: ...
@overload
def compress(
    model: nn.Module,
    plan: Plan,
    variables: Mapping[str, Any],
    *,
    solver: Solver | None = None,
    key: PRNGKeyArray | None = None,
) -> tuple[CompressedModule, Mapping[str, Any]]: ...
def compress(
    model: Model,
    plan: Plan,
    variables: Mapping[str, Any] | None = None,
    *,
    solver: Solver | None = None,
    key: PRNGKeyArray | None = None,
) -> nnx.Module | tuple[CompressedModule, Mapping[str, Any]]:
    """Return a copy of a model with convolutions replaced as a plan says.

    Strides, padding, dilations, groups, bias, types and everything else of the model are taken
    over; kernels are fitted.

    Args:
        model: the model that the plan was made for; it is not changed.
        plan: what to do.
        variables: of a Linen module; they are not changed.
        solver: how to fit; the plan's own if not given. ``random`` rebuilds the architecture
            without a fit, to load parameters into.
        key: where ``adamw`` and ``random`` start from; ``jax.random.key(0)`` if not given.

    Returns:
        The compressed NNX model; or a Linen module that is used as the original, and its variables.

    Raises:
        ValueError: if the plan does not fit the model, saying where, or a kernel is not finite.
    """
    if isinstance(model, nn.Module) and variables is None:
        raise ValueError("the parameters of a Linen module are in its variables; give them, too.")
    # An NNX model need not be traced again.
    inputs = None if isinstance(model, nnx.Module) else plan.inputs
    inspected = inspect_model(model, inputs, variables)
    check_plan(plan, inspected.layers)
    kernels = {r.path: k for r in plan.replaced if (k := inspected.kernels.get(r.path)) is not None}
    if len(kernels) < len(plan.replaced):
        raise ValueError("the model has shapes in place of kernels; give one that has arrays.")
    for path, kernel in kernels.items():
        check_finite(kernel, f"the kernel of {path!r}")
    key = jax.random.key(0) if key is None else key
    fitted = _fit_all(plan.replaced, kernels, plan.solver if solver is None else solver, key)
    if isinstance(model, nnx.Module):
        return replace_convs(model, plan, fitted)
    assert variables is not None
    return compressed_module(model, plan), _replace_params(variables, fitted)


def check_plan(plan: Plan, layers: Sequence[Layer]) -> None:
    """Raise unless a model has the convolutions that a plan replaces.

    Raises:
        ValueError: naming the first that it has not.
    """
    found = {layer.path: layer for layer in layers}
    for row in plan.replaced:
        layer = found.get(row.path)
        if layer is None or layer.spec is None:
            raise ValueError(
                f"the plan replaces {row.path!r}, but the model has no such convolution. "
                "Make a plan for this model."
            )
        if layer.spec != row.spec:
            raise ValueError(
                f"the plan says that {row.path!r} is {row.spec}, but it is {layer.spec}."
            )
        if layer.obstacle is not None:
            raise ValueError(
                f"the plan replaces {row.path!r}, which cannot be replaced: {layer.obstacle}. "
                "Make a plan for this model."
            )


def compressed_module(module: nn.Module, plan: Plan) -> CompressedModule:
    """Return the Linen module that a plan makes, without variables."""
    layers = tuple((r.path, r.method, r.spec) for r in plan.replaced if r.method is not None)
    base = _as_compressed(module)
    return base.clone(layers=(*base.layers, *layers))


def with_folded(module: nn.Module, folded: tuple[tuple[str, str], ...]) -> CompressedModule:
    """Return a Linen module without BatchNorms whose work a convolution does, without variables.

    Args:
        module: any Linen module.
        folded: paths of each BatchNorm and its convolution.
    """
    base = _as_compressed(module)
    return base.clone(folded=(*base.folded, *folded))


def _as_compressed(module: nn.Module) -> CompressedModule:
    if isinstance(module, CompressedModule):
        return module
    return CompressedModule(original=Definition(module), layers=())


def replace_convs(model: nnx.Module, plan: Plan, fitted: Mapping[str, Params]) -> nnx.Module:
    """Return a copy of an NNX model whose convolutions have a method's parameters, by path."""
    methods = {row.path: row.method for row in plan.replaced}

    def replacement(path: str, module: nnx.Module) -> nnx.Module | None:
        method = methods.get(path)
        if method is None:
            return None
        assert isinstance(module, nnx.Conv)
        return conv_like(module, method, fitted[path])

    return map_modules(replacement, model)


def _replace_params(
    variables: Mapping[str, Any], fitted: Mapping[str, Params]
) -> Mapping[str, Any]:
    """Return variables whose convolutions have a method's parameters in place of a kernel."""
    flat = flatten_dict(unfreeze(variables["params"]), keep_empty_nodes=True)
    for path, params in fitted.items():
        parts = tuple(path.split("/")) if path else ()
        del flat[*parts, "kernel"]
        flat |= {(*parts, name): value for name, value in params.items()}
    new = dict(variables) | {"params": unflatten_dict(flat)}
    return freeze(new) if isinstance(variables, FrozenDict) else new


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


def narrow(model: nnx.Module, narrower: nnx.Module) -> nnx.Module:
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
    """
    new, old = arrays(narrower), arrays(model)
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
    return with_arrays(narrower, leading)
