"""`make_plan`: look at a model and say what compression would do to it."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from falcon_jax.compression.layers import Layer, batch_size
from falcon_jax.compression.nnx_layers import find_layers, named_modules
from falcon_jax.compression.plan import Plan, PlanRow
from falcon_jax.compression.rules import DEFAULT_METHOD, Rule, check_all_used, first_match
from falcon_jax.methods import (
    ConvSpec,
    Cost,
    Method,
    Params,
    Solver,
    relative_error,
)
from falcon_jax.methods.fitting import check_finite, check_solver
from falcon_jax.nn.trained import fit_stacked


def make_plan(
    model: nnx.Module,
    rules: Sequence[Rule] | None = None,
    sample: Any | None = None,
    *,
    solver: Solver = "exact",
) -> Plan:
    """Say, layer by layer, what `compress` would replace, at what cost and error.

    Without rules, every convolution but the first with a kernel of more than one tap becomes FALCON
    of rank 1, unless that saves neither parameters nor mult-adds. Rules are obeyed even then; the
    plan remarks on it.

    Args:
        model: a trained NNX model; it is not changed.
        rules: what replaces what; the first rule that matches a layer decides, a layer that no rule
            matches stays.
        sample: example input with a leading batch axis, for mult-adds and the order of the layers;
            a tuple is spread over the model's arguments. Shapes suffice (``ShapeDtypeStruct``).
        solver: how `compress` fits kernels. The errors shown are those of the ``exact`` solver;
            with ``random``, which does not fit, there are none.

    Returns:
        The plan.

    Raises:
        ValueError: if the model has no convolution, a rule matches nothing, the sample does not fit
            the model, or a kernel is not finite.
    """
    check_solver(solver)
    batch = 1 if sample is None else batch_size(sample)
    layers = find_layers(model, sample)
    convs = [(layer, layer.spec) for layer in layers if layer.spec is not None]
    if not convs:
        raise ValueError(
            f"{type(model).__name__} has no convolution: there is nothing to compress."
        )
    paths = [(layer.path, spec) for layer, spec in convs]
    if rules is not None:
        check_all_used(rules, paths)
    kernels = _kernels(model) if solver != "random" else {}
    rows = []
    for index, (layer, spec) in enumerate(convs):
        if rules is None:
            method, reason = _decide_by_default(layer, spec, batch, first=index == 0)
        else:
            method, reason = _decide(layer, spec, rules, batch)
        error = None
        if method is not None and layer.path in kernels:
            error = fit_error(kernels[layer.path], method, spec, layer.path)
        rows.append(_row(layer, spec, method, reason, batch, error))
    rest = [layer for layer in layers if layer.spec is None]
    return Plan(
        rows=tuple(rows),
        rest=Cost(
            params=sum(layer.params for layer in rest),
            mult_adds=sum(layer.mult_adds(batch) for layer in rest),
        ),
        solver=solver,
        traced=sample is not None,
    )


def _decide(
    layer: Layer, spec: ConvSpec, rules: Sequence[Rule], batch: int
) -> tuple[Method | None, str]:
    matched = first_match(rules, layer.path, spec)
    if matched is None:
        return None, layer.obstacle or "no rule matches"
    method = rules[matched].method
    if method is None:
        return None, layer.obstacle or f"left alone by path={rules[matched].path!r}"
    obstacle = layer.obstacle or method.supports(spec)
    if obstacle is not None:
        return None, obstacle
    return method, "costs more than it saves" if _grows(layer, method, batch) else ""


def _decide_by_default(
    layer: Layer, spec: ConvSpec, batch: int, *, first: bool
) -> tuple[Method | None, str]:
    method = DEFAULT_METHOD
    obstacle = layer.obstacle or method.supports(spec)
    if obstacle is not None:
        return None, obstacle
    if first:
        return None, "first convolution"
    if _grows(layer, method, batch):
        return None, "would grow: replacing would cost more than it saves"
    return method, ""


def _grows(layer: Layer, method: Method, batch: int) -> bool:
    saves_params = layer.replaced_params(method) < layer.params
    saves_mult_adds = layer.mult_adds(batch, method) < layer.mult_adds(batch)
    return not (saves_params or saves_mult_adds)


def _row(
    layer: Layer,
    spec: ConvSpec,
    method: Method | None,
    reason: str,
    batch: int,
    error: float | None,
) -> PlanRow:
    before = Cost(params=layer.params, mult_adds=layer.mult_adds(batch))
    after = before
    if method is not None:
        after = Cost(params=layer.replaced_params(method), mult_adds=layer.mult_adds(batch, method))
    return PlanRow(
        path=layer.path,
        spec=spec,
        method=method,
        reason=reason,
        before=before,
        after=after,
        error=error,
    )


def _kernels(model: nnx.Module) -> dict[str, Array]:
    return {
        path: module.kernel[...]
        for path, module in named_modules(model)
        if isinstance(module, nnx.Conv)
    }


@functools.partial(jax.jit, static_argnames=("method", "spec"))
def _approximation_error(kernel: Array, params: Params, *, method: Method, spec: ConvSpec) -> Array:
    build = functools.partial(method.kernel, spec=spec)
    for _ in range(kernel.ndim - len(spec.kernel_shape)):
        build = jax.vmap(build)
    return relative_error(kernel, build(params))


def fit_error(kernel: Array, method: Method, spec: ConvSpec, path: str) -> float:
    """Return the relative error of the exact fit of a layer.

    Raises:
        ValueError: if the kernel is not finite, naming the layer.
    """
    check_finite(kernel, path)
    params = fit_stacked(kernel, method, spec)
    return float(_approximation_error(kernel, params, method=method, spec=spec))
