"""A traced function as a list of operations, without calls and without work on constants."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from falcon_jax.frameworks.tracing import CALLS, bind, inner_jaxprs

_SAME = ("name", "copy", "copy_p")
_LARGE = 2**16  # elements: constants that only repeat smaller ones are not made that large
CONVOLUTION = "conv_general_dilated"


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the program; constants are known."""

    shape: tuple[int, ...]
    dtype: Any
    constant: Any = None  # an array that is known
    uses: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """An equation whose inputs and outputs are values."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    def carry_out(self, arrays: Sequence[Any]) -> list[Any]:
        """Return its outputs for the arrays that its inputs are."""
        return bind(self.primitive, self.params, arrays)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A function as a list of operations, calls of other functions put in their place."""

    inputs: tuple[Value, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[Value, ...]


def convolves_inside(jaxpr: Any) -> bool:
    """Return whether a loop or a branch has convolutions, whose weights may be no constants."""
    return any(
        (eqn.primitive.name not in CALLS and any(map(_convolves, _inner(eqn))))
        or (eqn.primitive.name in CALLS and any(map(convolves_inside, _inner(eqn))))
        for eqn in jaxpr.eqns
    )


def _convolves(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name == CONVOLUTION or any(map(_convolves, _inner(eqn))) for eqn in jaxpr.eqns
    )


def _inner(eqn: Any) -> Any:
    return inner_jaxprs(tuple(eqn.params.values()))


def read_program(closed: Any) -> Program:
    """Return a closed jaxpr as a program."""
    operations: list[Operation] = []

    def new(atom: Any) -> Value:
        return Value(tuple(atom.aval.shape), getattr(atom.aval, "dtype", None))

    def read(jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Value]) -> list[Value]:
        known: dict[Any, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
        for variable, constant in zip(jaxpr.constvars, constants, strict=True):
            known[variable] = new(variable)
            known[variable].constant = constant

        def value(atom: Any) -> Value:
            if not isinstance(atom, core.Literal):
                return known[atom]
            found = new(atom)
            found.constant = np.asarray(atom.val, found.dtype)
            return found

        for eqn in jaxpr.eqns:
            inputs = [value(atom) for atom in eqn.invars]
            inner = eqn.params.get(CALLS.get(eqn.primitive.name, ""))
            if eqn.primitive.name in _SAME:
                outputs = inputs
            elif inner is not None:
                closed = isinstance(inner, core.ClosedJaxpr)
                outputs = read(
                    inner.jaxpr if closed else inner, inner.consts if closed else (), inputs
                )
            else:
                outputs = [new(variable) for variable in eqn.outvars]
                operations.append(
                    Operation(
                        primitive=eqn.primitive,
                        params=eqn.params,
                        inputs=tuple(inputs),
                        outputs=tuple(outputs),
                    )
                )
            known.update(zip(eqn.outvars, outputs, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    arguments = [new(variable) for variable in closed.jaxpr.invars]
    outputs = read(closed.jaxpr, closed.consts, arguments)
    used = set(outputs)
    kept = []
    for operation in reversed(operations):
        if not used.isdisjoint(operation.outputs):
            used.update(operation.inputs)
            kept.append(operation)
    for x in (*outputs, *(x for operation in kept for x in operation.inputs)):
        x.uses += 1
    return Program(
        inputs=tuple(arguments), operations=tuple(reversed(kept)), outputs=tuple(outputs)
    )


def folded(program: Program) -> Program:
    """Return the program without operations on constants only, which are carried out at once."""
    found: set[Value] = set()
    constant, rest = [], []
    for operation in program.operations:
        known = all(x.constant is not None or x in found for x in operation.inputs)
        arrays = (*operation.inputs, *operation.outputs)
        known = known and not any(jnp.issubdtype(a.dtype, jax.dtypes.extended) for a in arrays)
        most = max((math.prod(x.shape) for x in operation.inputs), default=0)
        made = max((math.prod(y.shape) for y in operation.outputs), default=0)
        if known and made <= max(_LARGE, most):
            constant.append(operation)
            found.update(operation.outputs)
        else:
            rest.append(operation)
    used = {x for operation in rest for x in operation.inputs} | set(program.outputs)
    wanted = [y for operation in constant for y in operation.outputs if y in used]
    if wanted:

        def evaluate(arrays: list[Any]) -> list[Any]:
            values = dict(zip(given, arrays, strict=True))
            for operation in constant:
                outputs = operation.carry_out([values[x] for x in operation.inputs])
                values.update(zip(operation.outputs, outputs, strict=True))
            return [values[y] for y in wanted]

        given = list(dict.fromkeys(x for o in constant for x in o.inputs if x.constant is not None))
        with jax.ensure_compile_time_eval():
            arrays = jax.jit(evaluate)([x.constant for x in given])
        for y, array in zip(wanted, arrays, strict=True):
            y.constant = array
    return dataclasses.replace(program, operations=tuple(rest))
