"""`autotune`: how each layer of a plan is computed fastest, measured on the device at hand."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array

from falcon_jax.compression.plan import Plan, PlanRow, make_plan
from falcon_jax.frameworks.interface import Model, framework_of
from falcon_jax.frameworks.layers import Inputs, Layer
from falcon_jax.frameworks.tracing import Call
from falcon_jax.methods.base import Method, flatten_batch
from falcon_jax.native.joining import with_native_steps
from falcon_jax.native.library import serve as kernels_serve
from falcon_jax.ops.convolution import conv
from falcon_jax.ops.geometry import ConvSpec

Times = dict[Any, dict[Method | None, float]]  # of calls, by form; None stands for the standard

STANDARD = "standard"
REPEATS = 15
_HOPELESS = 3.0  # times the fastest, in the first run after compilation


def autotune(
    model: Model,
    sample: Any,
    plan: Plan | None = None,
    *,
    backward: bool = False,
    only_faster: bool = True,
    repeats: int = REPEATS,
) -> Plan:
    """Return a plan whose layers are computed in the form that is fastest on this device.

    Every layer that the plan replaces is timed by itself, in every form that its method has and as
    the standard convolution that it is, on random arrays of the shapes that the sample gives it.
    Where no form is faster than the standard convolution, the layer stays and the plan says so.
    Native kernels, where they are built, are what is timed forward, as `deploy` uses them.

    Args:
        model: the model before compression, NNX or bound Linen; it is not changed.
        sample: example input of the batch size to tune for.
        plan: what is replaced; `make_plan` with its defaults if not given.
        backward: whether to time forward and backward, for training.
        only_faster: whether layers stay whose every form is slower than the standard convolution;
            if not, they get their fastest form, and the plan remarks on it.
        repeats: timed runs of each form, in turns.

    Returns:
        The plan; rows have ``measured_ms``, by form, and methods the form that won.

    Raises:
        ValueError: if the plan does not fit the model, or the sample does not.

    >>> from flax import nnx
    >>> from falcon_jax import Falcon, Rule
    >>> conv = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))
    >>> x = jax.ShapeDtypeStruct((1, 8, 8, 8), "f4")
    >>> plan = autotune(conv, x, make_plan(conv, [Rule(method=Falcon())], x), repeats=2)
    >>> sorted(plan.rows[0].measured_ms)
    ['gep', 'grouped', 'separable', 'standard']
    """
    inputs = Inputs.of(sample)
    if plan is None:
        plan = make_plan(model, None, inputs)
    found = framework_of(model).find_layers(model, inputs.shapes)
    layers = {layer.path: layer for layer in found}
    known: Times = {}
    rows = []
    for row in plan.rows:
        layer = layers.get(row.path)
        if row.method is None or layer is None or not layer.calls:
            rows.append(row)
            continue
        measured = form_times(layer, row.method, known, backward=backward, repeats=repeats)
        rows.append(_decided(row, measured, only_faster=only_faster))
    return dataclasses.replace(plan, rows=tuple(rows), inputs=plan.inputs or inputs.shapes)


def form_times(
    layer: Layer, method: Method, known: Times, *, backward: bool = False, repeats: int = REPEATS
) -> dict[Method | None, float]:
    """Return the milliseconds of all calls of a layer, for each form of a method; and as it is.

    Args:
        layer: a convolution that was traced.
        method: what may replace it.
        known: what was measured before; it is added to.
        backward: whether to time forward and backward.
        repeats: timed runs of each form, in turns.
    """
    assert layer.spec is not None
    measured: dict[Method | None, float] = dict.fromkeys((None, *method.forms()), 0.0)
    for call in layer.calls:
        key = (layer.spec, method, call.input_shape)
        if key not in known:
            known[key] = _measure(method, layer.spec, call, backward, repeats)
        for form in measured:
            measured[form] += call.times * known[key][form]
    return measured


def _measure(
    method: Method, spec: ConvSpec, call: Call, backward: bool, repeats: int
) -> dict[Method | None, float]:
    """Return the least milliseconds of one call of the layer: in each form, and as it is (None).

    Forms that are hopelessly slow are run only once.
    """
    x = jax.random.normal(jax.random.key(0), call.input_shape)
    params = method.init(jax.random.key(1), spec)
    runs: dict[Method | None, Callable[[], Any]] = {
        None: _run(_standard(spec), (method.kernel(params, spec), x), backward)
    }
    for form in method.forms():
        runs[form] = _run(_applied(form, spec), (params, x), backward)
    first = {}
    for form, run in runs.items():
        run()
        first[form] = _milliseconds(run)
    fastest = min(first.values())
    hopeful = [form for form, ms in first.items() if ms <= _HOPELESS * fastest]
    times: dict[Method | None, list[float]] = {form: [] for form in hopeful}
    for _ in range(repeats):
        for form in hopeful:
            times[form].append(_milliseconds(runs[form]))
    return first | {form: min(values) for form, values in times.items() if values}


def _run(
    function: Callable[[Any, Array], Array], args: tuple[Any, Array], backward: bool
) -> Callable[[], Any]:
    def both(weights: Any, x: Array) -> Any:
        y, gradients = jax.vjp(function, weights, x)
        return y, gradients(y)

    if not backward and kernels_serve():
        weights, x = args  # as `deploy` has it: weights are constants
        deployed = jax.jit(with_native_steps(functools.partial(function, weights)))
        return lambda: jax.block_until_ready(deployed(x))
    compiled = jax.jit(both if backward else function)
    return lambda: jax.block_until_ready(compiled(*args))


def _milliseconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _applied(form: Method, spec: ConvSpec) -> Callable[[Any, Array], Array]:
    return lambda params, x: form.apply(params, x, spec)


def _standard(spec: ConvSpec) -> Callable[[Any, Array], Array]:
    def standard(kernel: Any, x: Array) -> Array:
        flat, _ = flatten_batch(x, spec)
        groups = spec.feature_group_count
        return conv(flat, kernel, **spec.geometry, feature_group_count=groups)

    return standard


def _decided(
    row: PlanRow, measured: Mapping[Method | None, float], *, only_faster: bool
) -> PlanRow:
    """Return the row with the fastest form, or without a method where there is none."""
    forms = [form for form in measured if form is not None]
    best = min(forms, key=lambda form: measured[form])
    ms = {_form_name(form): value for form, value in measured.items()}
    ratio = measured[None] / measured[best]
    if ratio > 1:
        remark = f"{_form_name(best)}: {ratio:.1f} times faster than the standard convolution"
        return dataclasses.replace(row, method=best, reason=remark, measured_ms=ms)
    remark = f"no form is faster than the standard convolution; {_form_name(best)} {1 / ratio:.1f}"
    remark += " times slower"
    if not only_faster:
        return dataclasses.replace(row, method=best, reason=remark, measured_ms=ms)
    return dataclasses.replace(
        row, method=None, reason=remark, after=row.before, error=None, measured_ms=ms
    )


def _form_name(form: Method | None) -> str:
    return STANDARD if form is None else str(form.options().get("impl", form.name))
