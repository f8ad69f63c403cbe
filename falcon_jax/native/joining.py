"""Convolutions of a traced model joined with what stands around them, for the compiled kernels.

What is looked for are operations of ``lax``, in `canonical_forms`: a pointwise convolution and the
depthwise ones of its channels, products with constant matrices, biases, sums with other branches,
rectifications, poolings, interpolations. Everything else is carried out as it was traced.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from falcon_jax.frameworks.tracing import inner_jaxprs, scan_parts
from falcon_jax.native import array_rules, conv_rules
from falcon_jax.native.pending import Rule, Runner
from falcon_jax.native.program import (
    CONVOLUTION,
    Operation,
    convolves_inside,
    folded,
    read_program,
)
from falcon_jax.ops.choice import canonical_forms

_MUCH = 2**18  # mult-adds of a product that takes longer than calling a kernel


def with_native_steps(forward: Callable[..., Any], *, bfloat16: bool = False) -> Callable[..., Any]:
    """Return the function whose convolutions are carried out by the compiled kernels.

    Args:
        forward: a pure function of arrays; weights are its constants.
        bfloat16: whether what is multiplied is rounded, as `Step` says.
    """

    def optimized(*arrays: Any) -> Any:
        shapes = [jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)) for a in arrays]
        if not all(isinstance(n, int) for a in shapes for n in a.shape):
            return forward(*arrays)
        with canonical_forms():
            jaxpr, structure = jax.make_jaxpr(forward, return_shape=True)(*shapes)
        if any(isinstance(constant, Tracer) for constant in jaxpr.consts):
            return forward(*arrays)  # weights that an outer trace computes
        if jaxpr.effects or convolves_inside(jaxpr.jaxpr):
            return forward(*arrays)
        program = folded(read_program(jaxpr))
        outputs = Runner(program, _RULES, bfloat16=bfloat16).run(arrays)
        return jax.tree.unflatten(jax.tree.structure(structure), outputs)

    return optimized


def _loop(runner: Runner, operation: Operation) -> bool:
    """Carry out a loop's body as a program, what the loop does not change being its constants."""
    params = operation.params
    fixed, carried = scan_parts(operation.inputs, operation.outputs, *inner_jaxprs(params["jaxpr"]))
    program = read_program(params["jaxpr"])
    for inside, outside in zip(program.inputs[:fixed], operation.inputs[:fixed], strict=True):
        inside.constant = outside.constant
    program = folded(program)
    if not any(_is_worth_a_kernel(inner) for inner in program.operations):
        return False
    arrays = [runner.array(x) for x in operation.inputs]
    around, states, rows = arrays[:fixed], arrays[fixed:][:carried], arrays[fixed:][carried:]

    def body(states: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        inside = Runner(program, runner.rules, bfloat16=runner.bfloat16)
        outputs = inside.run([*around, *states, *row])
        return outputs[:carried], outputs[carried:]

    how = {name: params[name] for name in ("length", "reverse", "unroll")}
    states, rows = jax.lax.scan(body, states, rows, **how)
    runner.made.update(zip(operation.outputs, [*states, *rows], strict=True))
    return True


def _is_worth_a_kernel(operation: Operation) -> bool:
    """Return whether it is a convolution, or a product with weights that is not small."""
    if operation.primitive.name == CONVOLUTION:
        return True
    if operation.primitive.name != "dot_general":
        return False
    x, matrix = operation.inputs
    (y,) = operation.outputs
    return matrix.constant is not None and math.prod(y.shape) * x.shape[-1] >= _MUCH


_RULES: dict[str, tuple[Rule, ...]] = {
    CONVOLUTION: (conv_rules.convolution, conv_rules.other_convolution),
    "dot_general": (array_rules.interpolation, conv_rules.product),
    "split": (conv_rules.split,),
    "add": (conv_rules.add,),
    "sub": (conv_rules.subtract,),
    "mul": (conv_rules.multiply,),
    "div": (conv_rules.divide,),
    "max": (conv_rules.maximum,),
    "broadcast_in_dim": (conv_rules.repeat,),
    "transpose": (array_rules.transpose,),
    "concatenate": (array_rules.concatenate,),
    "reduce_window_max": (conv_rules.max_pool,),
    "scan": (_loop,),
}
