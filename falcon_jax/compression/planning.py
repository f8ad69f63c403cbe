"""`make_plan`: look at a model and say what compression would do to it."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from falcon_jax.compression.inputs import Inputs
from falcon_jax.compression.inspection import Model, inspect_model
from falcon_jax.compression.layers import Layer
from falcon_jax.compression.plan import Plan, PlanRow
from falcon_jax.compression.rules import DEFAULT_METHOD, Rule, check_all_used, first_match
from falcon_jax.fitting.scale import safe_exponent, times_power_of_two
from falcon_jax.methods import (
    ConvSpec,
    Cost,
    Method,
    Params,
    Solver,
    relative_error,
)
from falcon_jax.methods.fitting import check_finite, check_solver
from falcon_jax.nn.trained import fit_stacked, for_trained


def make_plan(
    model: Model,
    rules: Sequence[Rule] | None = None,
    sample: Any | None = None,
    variables: Mapping[str, Any] | None = None,
    *,
    solver: Solver = "exact",
) -> Plan:
    """Say, layer by layer, what `compress` would replace, at what cost and error.

    Without rules, every convolution but the first with a kernel of more than one tap becomes FALCON
    of rank 1, unless that saves neither parameters nor mult-adds. Rules are obeyed even then; the
    plan remarks on it.

    Args:
        model: a trained NNX model, or a Linen module; it is not changed.
        rules: what replaces what; the first rule that matches a layer decides, a layer that no rule
            matches stays.
        sample: example input with a leading batch axis, for mult-adds and the order of the layers;
            a tuple is spread over the model's arguments, `Inputs` has keyword arguments, too.
            Shapes suffice (``ShapeDtypeStruct``). A Linen module cannot do without.
        variables: of a Linen module; without them, the plan shows no errors.
        solver: how `compress` fits kernels. The errors shown are those of the ``exact`` solver;
            with ``random``, which does not fit, there are none.

    Returns:
        The plan.

    Raises:
        ValueError: if the model has no convolution, a rule matches nothing, sample or variables do
            not fit the model, or a kernel is not finite.
    """
    check_solver(solver)
    inputs = None if sample is None else Inputs.of(sample).shapes
    batch = 1 if inputs is None else inputs.batch
    inspected = inspect_model(model, inputs, variables)
    convs = [(layer, layer.spec) for layer in inspected.layers if layer.spec is not None]
    if not convs:
        raise ValueError(
            f"{type(model).__name__} has no convolution: there is nothing to compress."
        )
    paths = [(layer.path, spec) for layer, spec in convs]
    if rules is not None:
        check_all_used(rules, paths)
    kernels = inspected.kernels if solver != "random" else {}
    rows = []
    for index, (layer, spec) in enumerate(convs):
        if rules is None:
            method, reason = _decide_by_default(layer, spec, first=index == 0)
        else:
            method, reason = _decide(layer, spec, rules)
        error = None
        if method is not None:
            kernel = kernels.get(layer.path)
            method = _for_layer(method, spec, kernel, layer.path)
            if _grows(layer, method, batch):
                method, reason = _growing(method, by_rule=rules is not None)
            if method is not None and kernel is not None:
                error = fit_error(kernel, method, spec)
        rows.append(_row(layer, spec, method, reason, batch, error))
    rest = [layer for layer in inspected.layers if layer.spec is None]
    return Plan(
        rows=tuple(rows),
        rest=Cost(
            params=sum(layer.params for layer in rest),
            mult_adds=sum(layer.mult_adds(batch) for layer in rest),
        ),
        solver=solver,
        inputs=inputs,
    )


def _for_layer(method: Method, spec: ConvSpec, kernel: Array | None, path: str) -> Method:
    if kernel is None:
        return method.for_layer(spec)
    check_finite(kernel, f"the kernel of {path!r}")
    return for_trained(method, kernel, spec)


def _decide(layer: Layer, spec: ConvSpec, rules: Sequence[Rule]) -> tuple[Method | None, str]:
    matched = first_match(rules, layer.path, spec)
    if matched is None:
        return None, layer.obstacle or "no rule matches"
    method = rules[matched].method
    if method is None:
        return None, layer.obstacle or f"left alone by path={rules[matched].path!r}"
    obstacle = layer.obstacle or method.supports(spec)
    return (None, obstacle) if obstacle is not None else (method, "")


def _decide_by_default(layer: Layer, spec: ConvSpec, *, first: bool) -> tuple[Method | None, str]:
    obstacle = layer.obstacle or DEFAULT_METHOD.supports(spec)
    if obstacle is not None:
        return None, obstacle
    return (None, "first convolution") if first else (DEFAULT_METHOD, "")


def _growing(method: Method, *, by_rule: bool) -> tuple[Method | None, str]:
    if by_rule:
        return method, "costs more than it saves"
    return None, "would grow: replacing would cost more than it saves"


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


@functools.partial(jax.jit, static_argnames=("method", "spec"))
def _approximation_error(kernel: Array, params: Params, *, method: Method, spec: ConvSpec) -> Array:
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    params = {name: value.astype(wide) for name, value in params.items()}
    build = functools.partial(method.kernel, spec=spec)
    for _ in range(kernel.ndim - len(spec.kernel_shape)):
        build = jax.vmap(build)
    return relative_error(kernel, build(params))


def fit_error(kernel: Array, method: Method, spec: ConvSpec) -> float:
    """Return the relative error of the exact fit of a layer."""
    # The error does not depend on the scale; what is built at that of the largest may overflow.
    safe = times_power_of_two(kernel, -safe_exponent(kernel)).astype(kernel.dtype)
    params = fit_stacked(safe, method, spec)
    return float(_approximation_error(safe, params, method=method, spec=spec))
