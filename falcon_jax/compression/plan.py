"""The plan: layer by layer, what is replaced, at what cost and error, and what stays and why."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from falcon_jax.compression.alignment import aligned
from falcon_jax.compression.inputs import Inputs
from falcon_jax.methods import ConvSpec, Cost, Method, Solver, get_method
from falcon_jax.paths import user_path

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
class Plan:
    """What `compress` does to a model. Plain data: print it, save it, load it.

    Attributes:
        rows: one for every convolution, in the order of use.
        rest: cost of everything else in the model.
        solver: how kernels are fitted.
        inputs: shapes of the example inputs; None if the model was not traced, so that mult-adds
            are not known.
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

    def __str__(self) -> str:
        header = ("layer", "kernel", "stride", "becomes", "params", "mult-adds", "error", "energy")
        lines = [(*header, "remark")]
        lines += [_cells(row, self.traced) for row in self.rows]
        lines.append(_total("everything else", self.rest, self.rest, self.traced))
        lines.append(_total("total", self.before, self.after, self.traced))
        return aligned(lines, right=range(4, 8))


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
        method=None if method is None else get_method(method["name"], **method["options"]),
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
