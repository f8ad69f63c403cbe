"""The plan: layer by layer, what is replaced, at what cost and error, and what stays and why."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from falcon_jax.frameworks.interface import M, Model, defined_layers, framework_of
from falcon_jax.frameworks.layers import Inputs, Layer
from falcon_jax.methods.base import Cost, Method, Params
from falcon_jax.methods.falcon import Falcon
from falcon_jax.methods.fit import Solver, check_finite, check_solver
from falcon_jax.methods.registry import stored_method
from falcon_jax.nn.method_conv import fit_stacked, for_trained
from falcon_jax.ops.geometry import ConvSpec
from falcon_jax.paths import user_path
from falcon_jax.solvers.scale import safe_exponent, times_power_of_two
from falcon_jax.terminal import Printable, Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What happens to the convolutions that a pattern matches. The first rule that matches decides.

    Attributes:
        path: regular expression that must match the whole ``/``-joined path of the layer.
        method: what replaces the layer; None leaves it alone.
        where: further condition on the layer's `ConvSpec`.

    Raises:
        ValueError: if ``path`` is no regular expression, or another field is of a wrong type.

    >>> Rule(path=r"stem/.*", method=None).matches(
    ...     "stem/conv", ConvSpec(kernel_size=(3, 3), in_features=3, out_features=8))
    True
    """

    path: str = r".*"
    method: Method | None
    where: Callable[[ConvSpec], bool] | None = None

    def __post_init__(self):
        known = isinstance(self.path, str) and isinstance(self.method, (Method, type(None)))
        if not known or not (self.where is None or callable(self.where)):
            raise ValueError(
                "a rule has a path, a method such as Falcon(rank=2) or None, and where, a function "
                f"or None; got {self.path!r}, {self.method!r} and {self.where!r}."
            )
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(f"path {self.path!r} is no regular expression: {error}.") from None

    def matches(self, path: str, spec: ConvSpec) -> bool:
        """Say whether the rule speaks of this layer."""
        if re.fullmatch(self.path, path) is None:
            return False
        return self.where is None or self.where(spec)


def first_match(rules: Sequence[Rule], path: str, spec: ConvSpec) -> int | None:
    """Return the index of the first rule that matches a layer, or None."""
    return next((i for i, rule in enumerate(rules) if rule.matches(path, spec)), None)


def check_all_used(rules: Sequence[Rule], layers: Sequence[tuple[str, ConvSpec]]) -> None:
    """Raise if a rule matches no layer at all, not even one that an earlier rule decided.

    Raises:
        ValueError: naming the rules, and the paths that there are.
    """
    unused = [r for r in rules if not any(r.matches(path, spec) for path, spec in layers)]
    if unused:
        paths = "\n  ".join(path or "(the model itself)" for path, _ in layers)
        raise ValueError(
            f"no convolution matches {', '.join(map(_describe, unused))}. "
            f"A path must match as a whole. The paths are:\n  {paths}"
        )


def _describe(rule: Rule) -> str:
    return f"path={rule.path!r}" + (" with its condition" if rule.where else "")


DEFAULT_METHOD = Falcon(rank=1)


_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRow:
    """What happens to one convolution.

    Attributes:
        path: where it is, joined with ``/``.
        spec: its geometry.
        method: what replaces it, or None.
        reason: why it stays (``method`` is None), or a remark on the replacement, or empty.
        before: its cost; mult-adds are None if the model was not traced.
        after: its cost under the method; as before if it stays.
        error: relative error of the fitted kernel, ``||K - K'|| / ||K||``; None where not fitted.
        measured_ms: milliseconds of a forward pass of the layer, by form, as `autotune` measured
            them (of a forward and backward pass, if it was asked for that); None if it did not.

    >>> from flax import nnx
    >>> row = make_plan(nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))).rows[0]
    >>> row.method, row.reason, row.before.params
    (None, 'first convolution', 584)
    """

    path: str
    spec: ConvSpec
    method: Method | None
    reason: str
    before: Cost
    after: Cost
    error: float | None = None
    measured_ms: Mapping[str, float] | None = None

    @property
    def impl(self) -> str | None:
        """The form that the method is computed in; None without a method, or with one form only."""
        return None if self.method is None else self.method.options().get("impl")

    @property
    def energy(self) -> float | None:
        """Share of the kernel's squared norm that is kept: 1 - error^2."""
        return None if self.error is None else max(1 - self.error**2, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Printable):
    """What `compress` does to a model. Plain data: print it, save it, load it.

    Attributes:
        rows: one for every convolution, in the order of use.
        rest: cost of everything else in the model.
        solver: how kernels are fitted.
        inputs: shapes of the example inputs; None if the model was not traced, so that mult-adds
            are not known.

    >>> from flax import nnx
    >>> conv = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))
    >>> x = jax.ShapeDtypeStruct((1, 8, 8, 8), "f4")
    >>> plan = make_plan(conv, [Rule(method=Falcon(rank=2))], x)
    >>> plan.before, plan.after
    (Cost(params=584, mult_adds=37376), Cost(params=280, mult_adds=17920))
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    rows: tuple[PlanRow, ...]
    rest: Cost
    solver: Solver
    inputs: Inputs | None

    @property
    def traced(self) -> bool:
        """Whether mult-adds are known."""
        return self.inputs is not None

    @property
    def before(self) -> Cost:
        """Cost of the whole model as it is."""
        return sum((row.before for row in self.rows), self.rest)

    @property
    def after(self) -> Cost:
        """Cost of the whole model once the plan is carried out."""
        return sum((row.after for row in self.rows), self.rest)

    @property
    def replaced(self) -> tuple[PlanRow, ...]:
        """The rows of the convolutions that are replaced."""
        return tuple(row for row in self.rows if row.method is not None)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a dictionary of plain data."""
        return {
            "version": _VERSION,
            "solver": self.solver,
            "inputs": None if self.inputs is None else self.inputs.to_json(),
            "rest": dataclasses.asdict(self.rest),
            "rows": [_row_to_json(row) for row in self.rows],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Plan":
        """Return the plan that `to_json` wrote.

        Raises:
            ValueError: if the data is no plan, or one of a later version.
        """
        try:
            if data["version"] != _VERSION:
                raise ValueError(
                    f"the plan has version {data['version']}; this falcon_jax reads {_VERSION}."
                )
            return cls(
                rows=tuple(_row_from_json(row) for row in data["rows"]),
                rest=Cost(**data["rest"]),
                solver=data["solver"],
                inputs=None if data["inputs"] is None else Inputs.from_json(data["inputs"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a plan of falcon_jax: {error!r} is missing or wrong.") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        user_path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read the plan that `save` wrote.

        Raises:
            ValueError: if the file holds no plan.
            OSError: if it cannot be read.
        """
        try:
            data = json.loads(user_path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is no JSON file: {error}.") from None
        if not isinstance(data, dict):
            raise ValueError(f"{os.fspath(path)} holds no plan of falcon_jax.")
        return cls.from_json(data)

    def parts(self) -> list[Table | str]:
        """Return the table of layers."""
        header = ("layer", "kernel", "stride", "becomes", "params", "mult-adds", "error", "energy")
        lines = [(*header, "remark")]
        lines += [_cells(row, self.traced) for row in self.rows]
        lines.append(_total("everything else", self.rest, self.rest, self.traced))
        lines.append(_total("total", self.before, self.after, self.traced))
        return [Table(lines, right=range(4, 8))]


def _row_to_json(row: PlanRow) -> dict[str, Any]:
    method = None
    if row.method is not None:
        method = {"name": row.method.name, "options": row.method.options()}
    return {
        "path": row.path,
        "spec": dataclasses.asdict(row.spec),
        "method": method,
        "reason": row.reason,
        "before": dataclasses.asdict(row.before),
        "after": dataclasses.asdict(row.after),
        "error": row.error,
        "measured_ms": None if row.measured_ms is None else dict(row.measured_ms),
    }


def _row_from_json(data: Mapping[str, Any]) -> PlanRow:
    method = data["method"]
    return PlanRow(
        path=data["path"],
        spec=ConvSpec(**data["spec"]),
        method=None if method is None else stored_method(method["name"], method["options"]),
        reason=data["reason"],
        before=Cost(**data["before"]),
        after=Cost(**data["after"]),
        error=data["error"],
        measured_ms=data.get("measured_ms"),
    )


def _cells(row: PlanRow, traced: bool) -> tuple[str, ...]:
    spec = row.spec
    kernel = "x".join(map(str, (*spec.kernel_size, spec.group_in_features, spec.out_features)))
    return (
        row.path or "(model)",
        kernel,
        "x".join(map(str, sorted(set(spec.strides)))),
        "-" if row.method is None else row.method.label(),
        _change(row.before.params, row.after.params),
        _change(row.before.mult_adds, row.after.mult_adds) if traced else "",
        "" if row.error is None else f"{row.error:.4f}",
        "" if row.energy is None else f"{row.energy:.2%}",
        row.reason,
    )


def _total(label: str, before: Cost, after: Cost, traced: bool) -> tuple[str, ...]:
    change = _change(before.mult_adds, after.mult_adds) if traced else ""
    return (label, "", "", "", _change(before.params, after.params), change, "", "", "")


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"


def make_plan(
    model: Model,
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
        model: a trained NNX model, or a Linen module bound to its variables
            (``module.bind(variables)``); it is not changed. Of a module that is not bound, the plan
            has costs, but no errors.
        rules: what replaces what; the first rule that matches a layer decides, a layer that no rule
            matches stays.
        sample: example input with a leading batch axis, for mult-adds and the order of the layers;
            a tuple is spread over the model's arguments, `Inputs` has keyword arguments, too.
            Shapes suffice (``ShapeDtypeStruct``). A Linen module cannot do without.
        solver: how `compress` fits kernels. The errors shown are those of the ``exact`` solver;
            with ``random``, which does not fit, there are none.

    Returns:
        The plan.

    Raises:
        ValueError: if the model has no convolution, a rule matches nothing, the sample does
            not fit the model, or a kernel is not finite.

    >>> from flax import nnx
    >>> convs = [nnx.Conv(m, 8, (3, 3), rngs=nnx.Rngs(0)) for m in (3, 8)]
    >>> model = nnx.Sequential(*convs)
    >>> [row.path for row in make_plan(model).replaced]
    ['layers/1']
    """
    check_solver(solver)
    inputs = None if sample is None else Inputs.of(sample).shapes
    batch = 1 if inputs is None else inputs.batch
    framework = framework_of(model)
    layers = framework.find_layers(model, inputs)
    convs = [(layer, layer.spec) for layer in layers if layer.spec is not None]
    if not convs:
        raise ValueError(
            f"{type(model).__name__} has no convolution: there is nothing to compress."
        )
    paths = [(layer.path, spec) for layer, spec in convs]
    if rules is not None:
        check_all_used(rules, paths)
    kernels = {}
    if solver != "random":
        replaceable = [
            layer.path for layer, _ in convs if layer.kind == "conv" and not layer.obstacle
        ]
        found = framework.kernels(model, replaceable)
        kernels = {p: jnp.asarray(k) for p, k in found.items() if not _is_shape(k)}
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
        row = row_of(layer, spec, method, batch)
        rows.append(dataclasses.replace(row, reason=reason, error=error))
    rest = [layer for layer in layers if layer.spec is None]
    return Plan(
        rows=tuple(rows),
        rest=Cost(
            params=sum(layer.params for layer in rest),
            mult_adds=sum(layer.mult_adds(batch) for layer in rest),
        ),
        solver=solver,
        inputs=inputs,
    )


def _is_shape(array: Any) -> bool:
    return isinstance(array, jax.ShapeDtypeStruct)


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


def row_of(layer: Layer, spec: ConvSpec, method: Method | None, batch: int) -> PlanRow:
    """Return what a plan says of the cost of a layer.

    Args:
        layer: a convolution.
        spec: its geometry.
        method: what replaces it; None if it stays.
        batch: examples in the traced input.
    """
    before = Cost(params=layer.params, mult_adds=layer.mult_adds(batch))
    after = before
    if method is not None:
        after = Cost(params=layer.replaced_params(method), mult_adds=layer.mult_adds(batch, method))
    return PlanRow(path=layer.path, spec=spec, method=method, reason="", before=before, after=after)


def fit_error(kernel: Array, method: Method, spec: ConvSpec) -> float:
    """Return the relative error of the exact fit of a layer."""
    # The error does not depend on the scale; what is built at that of the largest may overflow.
    safe = times_power_of_two(kernel, -safe_exponent(kernel)).astype(kernel.dtype)
    params = fit_stacked(safe, method, spec)
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    build = functools.partial(method.kernel, spec=spec)
    for _ in range(kernel.ndim - len(spec.kernel_shape)):
        build = jax.vmap(build)
    built = build({name: value.astype(wide) for name, value in params.items()})
    trained, fitted = (np.asarray(jax.device_get(a), np.float64) for a in (safe, built))
    norm = np.linalg.norm(trained)
    return float(np.linalg.norm(trained - fitted) / (norm or 1))


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


def compressed_blank(model: M, plan: Plan) -> M:
    """Return what `compress` would make of a model, with zeros for fitted parameters.

    Raises:
        ValueError: if the plan does not fit the model.
    """
    framework: Any = framework_of(model)
    check_plan(plan, defined_layers(model, plan.inputs))
    kernels = framework.kernels(model, [row.path for row in plan.replaced])
    return framework.replace_convs(
        model, replacements(plan, {r.path: _blank(r, kernels[r.path]) for r in plan.replaced})
    )


def replacements(
    plan: Plan, params: Mapping[str, Params]
) -> dict[str, tuple[Method, ConvSpec, Params]]:
    """Return method, spec and parameters of every replaced layer, as frameworks take them."""
    return {
        r.path: (r.method, r.spec, params[r.path]) for r in plan.replaced if r.method is not None
    }


def _blank(row: PlanRow, kernel: Any) -> Params:
    method = row.method
    assert method is not None
    shapes = jax.eval_shape(lambda kernel: fit_stacked(kernel, method, row.spec), kernel)
    return {name: jnp.zeros(like.shape, like.dtype) for name, like in shapes.items()}
