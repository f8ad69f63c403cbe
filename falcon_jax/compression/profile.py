"""Parameters, mult-adds and measured latency of a model, layer by layer."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from falcon_jax.frameworks.interface import Model, framework_of
from falcon_jax.frameworks.layers import Inputs, Layer
from falcon_jax.terminal import Printable, Table


def measure_latency(model: Model, sample: Any, *, repeats: int = 10) -> float:
    """Return the median time of a compiled forward pass.

    NNX models run in evaluation mode. Linen modules run as the sample says, for example
    ``Inputs(x, train=False)``.

    Args:
        model: any NNX model, or a Linen module bound to its variables; it is not changed.
        sample: input with a leading batch axis; a tuple is spread over the arguments.
        repeats: passes that are timed, after two that are not.

    Returns:
        Milliseconds for the whole batch.

    Raises:
        ValueError: if a Linen module is not bound.
    """
    inputs = Inputs.of(sample)
    inference = framework_of(model).inference(model)

    def forward(state: Any, arrays: list[Any]) -> Any:
        return inputs.with_arrays(arrays).call(
            lambda *args, **kwargs: inference.call(state, *args, **kwargs)[0]
        )

    compiled = jax.jit(forward)
    return median_ms(lambda: compiled(inference.state, inputs.arrays), repeats=repeats)


def median_ms(run: Callable[[], Any], *, repeats: int = 10) -> float:
    """Return the median milliseconds of runs until their results are there, after two more."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """One layer's cost.

    Attributes:
        path: where the layer is.
        kind: ``conv``, ``conv_transpose``, ``linear`` or ``other``.
        method: what carries a compressed convolution out; empty for others.
        params: trainable parameters.
        mult_adds: for one example; 0 for BatchNorm, activations and pooling, which count nothing.
        remark: why parameters have no mult-adds; or what products that belong to no layer are.
    """

    path: str
    kind: str
    method: str
    params: int
    mult_adds: int
    remark: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile(Printable):
    """A model's cost.

    Attributes:
        rows: one for every layer with parameters, in the order of use.
        latency_ms: milliseconds of a forward pass of the sample; None if not measured.
        as_paper_counts: totals ``(params, mult_adds)`` under the conventions of the paper's tables:
            a replaced layer has no bias, and one BatchNorm (2 N parameters) that is never used.

    >>> from flax import nnx
    >>> model = nnx.Sequential(*(nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2)))
    >>> print(profile(model, jax.ShapeDtypeStruct((1, 4), "f4")))
    layer     kind    params  mult-adds
    layers/0  linear      20         20
    layers/1  linear      20         20
    total                 40         40
    """

    rows: tuple[ProfileRow, ...]
    latency_ms: float | None
    as_paper_counts: tuple[int, int]

    @property
    def params(self) -> int:
        """Trainable parameters of the model."""
        return sum(row.params for row in self.rows)

    @property
    def mult_adds(self) -> int:
        """Mult-adds for one example."""
        return sum(row.mult_adds for row in self.rows)

    def parts(self) -> list[Table | str]:
        """Return the table of layers, and the latency if it was measured."""
        lines = [("layer", "kind", "params", "mult-adds")]
        lines += [
            (r.path or "(model)", r.method or r.kind, f"{r.params:,}", f"{r.mult_adds:,}")
            for r in self.rows
        ]
        lines.append(("total", "", f"{self.params:,}", f"{self.mult_adds:,}"))
        latency = [] if self.latency_ms is None else [f"latency {self.latency_ms:.2f} ms"]
        return [Table(lines, right=(2, 3)), *latency]


def profile(model: Model, sample: Any, *, latency: bool = False) -> Profile:
    """Count a model's parameters and mult-adds, and measure its latency if asked.

    Counted analytically, as the paper does: multiply-adds of convolutions and fully connected
    layers, plus one per output element for a bias; nothing for BatchNorm, activations and pooling.
    Other matrix products and convolutions, such as those of attention, count as the trace has them,
    under the module whose parameters take part, or else in a row of their own.

    Args:
        model: any NNX model or Linen module; one that is not bound has shapes, which suffice to
            count. It is not changed.
        sample: example input with a leading batch axis; a tuple is spread over the arguments,
            `Inputs` has keyword arguments, too.
        latency: whether to run the model on the sample and measure the time.

    Returns:
        The rows and totals.

    Raises:
        ValueError: if the sample does not fit the model.

    >>> from flax import nnx
    >>> layer = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    >>> cost = profile(layer, jax.ShapeDtypeStruct((1, 8, 8, 3), "f4"))
    >>> cost.params, cost.mult_adds
    (112, 7168)
    """
    inputs = Inputs.of(sample)
    batch = inputs.batch
    layers = framework_of(model).find_layers(model, inputs)
    rows = tuple(
        ProfileRow(
            path=layer.path,
            kind=layer.kind,
            method="" if layer.method is None else str(layer.method),
            params=layer.params,
            mult_adds=layer.mult_adds(batch),
            remark=layer.remark,
        )
        for layer in layers
    )
    adjust = [_paper_adjustment(layer, batch) for layer in layers if layer.method is not None]
    return Profile(
        rows=rows,
        latency_ms=measure_latency(model, inputs) if latency else None,
        as_paper_counts=(
            sum(r.params for r in rows) + sum(a for a, _ in adjust),
            sum(r.mult_adds for r in rows) + sum(b for _, b in adjust),
        ),
    )


def _paper_adjustment(layer: Layer, batch: int) -> tuple[int, int]:
    assert layer.spec is not None
    n = layer.spec.out_features
    if not layer.spec.use_bias:
        return 2 * n, 0
    unbiased = dataclasses.replace(layer, spec=dataclasses.replace(layer.spec, use_bias=False))
    return 2 * n - n, unbiased.mult_adds(batch) - layer.mult_adds(batch)
