"""What a model's layers get and answer, looked at layer by layer in two models at once."""

import ctypes
import dataclasses
import math
import sys
import warnings
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from falcon_jax.compression.following import Following, following
from falcon_jax.compression.plan import PlanRow
from falcon_jax.frameworks.layers import Inputs
from falcon_jax.frameworks.program import Network, Program, Site
from falcon_jax.native.joining import with_native_steps
from falcon_jax.native.library import multiplies_bfloat16
from falcon_jax.native.library import serve as kernels_serve
from falcon_jax.ops.geometry import ConvSpec

_HELD = 3 << 27  # bytes of activations that are kept between two layers
_OFTEN = 8  # times from which on compiling for the kernels, with the weights, is worth it

Call = tuple[int, int | None]  # a site, and which of its mapped calls


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """A layer, or one of a stack.

    Attributes:
        row: of the plan.
        index: in the stack; None of a layer of its own.
        calls: of the layer; those of every shape of inputs are alike.
    """

    row: PlanRow
    index: int | None
    calls: tuple[Call, ...]

    @property
    def name(self) -> str:
        """What it is called before people."""
        return self.row.path or "(model)"


@dataclasses.dataclass
class _Batch:
    """A batch, and how far the compressed model was carried out."""

    inputs: list[Array]
    state: dict[Any, Array]


class Computation:
    """A function of a model's variables and arrays, by native kernels where they are built.

    Args:
        function: of the variables by name, and of a list of arrays.
        variables: of the model; for the kernels, constants.
        times: that it is called.
        roughly: whether a few digits are enough, as bfloat16 has them.
    """

    def __init__(
        self,
        function: Callable[[Mapping[str, Array], Sequence[Array]], Any],
        variables: Mapping[str, Array],
        *,
        times: int,
        roughly: bool = False,
    ):
        self._native = times >= _OFTEN and kernels_serve()
        self._variables = variables
        steps = with_native_steps(
            lambda *arrays: function(variables, arrays),
            bfloat16=roughly and self._native and multiplies_bfloat16(),
        )
        self._compiled = jax.jit(steps if self._native else function)

    def __call__(self, arrays: Sequence[Array]) -> Any:
        """Return the function's value once it is computed: batches are not in memory together."""
        found = self._compiled(*(arrays if self._native else (self._variables, arrays)))
        return jax.block_until_ready(found)


class Run:
    """Both models' programs for inputs of one shape, and how far the compressed was carried out."""

    def __init__(self, original: Program, small: Program):
        self.original, self.small = original, small
        self.batches: list[_Batch] = []
        self.after: dict[int, tuple[Following, Following]] = {}

    def add(self, inputs: Inputs) -> None:
        """Add a batch, before anything is computed of it."""
        arrays = [jnp.asarray(array) for array in inputs.arrays]
        self.batches.append(_Batch(arrays, self.small.start(arrays)))

    def advance(self, units: Sequence[Unit], *, to_outputs: bool = False) -> None:
        """Compute what the compressed model's layers get, and what is needed from there on.

        Args:
            units: that are still to be looked at.
            to_outputs: whether the outputs are, too.
        """
        start = self.small.sites[units[0].calls[0][0]].start
        outputs = self.small.outputs if to_outputs else ()
        most, least = (
            self.small.frontier(start, [*self._inputs(some), *outputs])
            for some in (units, units[:1])
        )
        held = _held(len(self.batches), most, least)
        values = self.computed(
            [(batch, needed) for batch, needed in zip(self.batches, held, strict=True)]
        )
        for batch, needed, found in zip(self.batches, held, values, strict=True):
            inputs = {v: batch.state[v] for v in self.small.inputs}
            batch.state = inputs | dict(zip(needed, found, strict=True))
        return_freed_memory()

    def _inputs(self, units: Sequence[Unit]) -> list[Any]:
        return [self.small.sites[site].input for unit in units for site, _ in unit.calls]

    def computed(self, wanted: Sequence[tuple[_Batch, Sequence[Any]]]) -> Iterator[Sequence[Array]]:
        """Yield variables of the compressed model for batches, from where these were carried."""
        keys = [(tuple(needed), tuple(batch.state)) for batch, needed in wanted]
        computations: dict[Any, Computation] = {}
        for (batch, needed), key in zip(wanted, keys, strict=True):
            if not needed:
                yield ()
                continue
            if key not in computations:
                program = self.small
                computations[key] = Computation(
                    program.pure(*key), program.variables(*key), times=keys.count(key)
                )
            yield computations[key](list(batch.state.values()))

    def following(self, site: int) -> tuple[Following, Following]:
        """Return what follows a call in the original, and in the compressed model."""
        if site not in self.after:
            pair = self.original.sites[site], self.small.sites[site]
            self.after[site] = following(self.original, pair[0]), following(self.small, pair[1])
        return self.after[site]


def _held(count: int, most: Sequence[Any], least: Sequence[Any]) -> list[Sequence[Any]]:
    """Return which variables are held of each batch, within the limit.

    Args:
        count: of batches.
        most: what all layers to come need.
        least: what the next one needs; for another one, the rest is computed again.
    """
    far, near = (sum(v.aval.size * v.aval.dtype.itemsize for v in each) for each in (most, least))
    if count * far <= _HELD:
        return [most] * count
    whole = max(0, _HELD - count * near) // max(1, far - near)
    rest = min(count - whole, (_HELD - whole * far) // max(1, near))
    return [most] * whole + [least] * rest + [()] * (count - whole - rest)


def return_freed_memory() -> None:
    """Return to the system what was freed; glibc would keep gigabytes between its chunks."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def runs_of(
    original: Network, small: Network, paths: Collection[str], batches: Iterable[Any]
) -> list[Run]:
    """Return both models' programs for every shape of inputs, with the batches of that shape.

    Args:
        original: a model taken apart.
        small: another one that calls layers of the same paths, or the same.
        paths: of the layers that are looked at.
        batches: inputs of both.

    Raises:
        ValueError: if there are no batches, or they do not fit.
    """
    runs: list[tuple[Inputs, Run]] = []
    for batch in batches:
        inputs = Inputs.of(batch)
        shapes = inputs.shapes
        run = next((run for known, run in runs if known == shapes), None)
        if run is None:
            program = original.program(shapes, paths)
            same = program if small is original else small.program(shapes, paths)
            run = Run(program, same)
            runs.append((shapes, run))
        run.add(inputs)
    if not runs:
        raise ValueError("at least one batch of inputs is needed; got none.")
    return [run for _, run in runs]


def units_of(runs: Sequence[Run], layers: Sequence[PlanRow], original: Network) -> list[Unit]:
    """Return the layers, in the order of their first use; tell of those that cannot be seen.

    Args:
        runs: of the models.
        layers: the rows of a plan that are looked at.
        original: the model whose runs they are.

    Raises:
        ValueError: if the models do not call them alike, or none can be seen.

    Warns:
        UserWarning: naming those that cannot.
    """
    rows = {row.path: row for row in layers}
    program = runs[0].original
    reasons = dict.fromkeys(program.hidden, "is called inside a loop or a branch")
    for run in runs:
        pairs = [
            [(s.path, s.input_shape[1:], s.output_shape[1:]) for s in p.sites]
            for p in (run.original, run.small)
        ]
        same = [s.path for s in run.original.sites] == [s.path for s in program.sites]
        if pairs[0] != pairs[1] or not same:
            raise ValueError(
                "the two models do not call their layers alike for all batches; give the model "
                "that was compressed, and what compress(model, plan) returned."
            )
    calls: dict[tuple[str, int | None], list[Call]] = {}
    for index, site in enumerate(program.sites):
        mapped = site.kernel.aval.shape[:-1]
        if mapped and (
            site.output.aval.shape[:-1] != mapped or site.input.aval.shape[:-1] not in ((), mapped)
        ):
            reasons[site.path] = "is mapped over in two ways"
        elif site.path not in reasons:
            for place, layer in _layers_of(site, program, rows[site.path], original):
                calls.setdefault((site.path, layer), []).append((index, place))
    for path in rows:
        if not any(path == known for known, _ in calls):
            reasons.setdefault(path, "is not called")
    told = "; ".join(f"{path or '(model)'} {reason}" for path, reason in reasons.items())
    units = [
        Unit(row=rows[path], index=index, calls=tuple(found))
        for (path, index), found in calls.items()
        if path not in reasons
    ]
    if not units:
        raise ValueError(f"no layer of the plan can be looked at: {told}.")
    if reasons:
        warnings.warn(f"layers stay as they were: {told}.", stacklevel=3)
    return units


def _layers_of(
    site: Site, program: Program, row: PlanRow, original: Network
) -> Iterator[tuple[int | None, int | None]]:
    """Yield, for each mapped call at a site, its place and which layer of the stack it uses."""
    name = original.name(row.path, "kernel")
    kernel = original.values[name]
    stack = kernel.shape[: kernel.ndim - len(row.spec.kernel_shape)]
    if not stack:
        yield None, None
        return
    # What is left of a kernel that holds the number of its layer tells which one is used.
    numbers = jnp.arange(math.prod(stack)).reshape(*stack, *(1,) * len(row.spec.kernel_shape))
    values = original.values | {name: jnp.broadcast_to(numbers, kernel.shape).astype(kernel.dtype)}
    (used,) = program.compute([site.kernel], {}, values)
    if used.ndim == 1:
        yield None, int(used[0])
        return
    for place, number in enumerate(used.reshape(-1, used.shape[-1])[:, 0]):
        yield place, int(number)


def mean_after(unit: Unit, runs: Sequence[Run]) -> str | None:
    """Return the variable that is subtracted from a layer's answers and nothing else, or None."""
    means = {run.following(site)[1].mean for run in runs for site, _ in unit.calls}
    (mean,) = means if len(means) == 1 else (None,)
    if mean is None or len(unit.calls) > 1 or unit.index is not None:
        return None
    return mean if all(run.small.used_once(mean) for run in runs) else None


def examples_of(site: Site, spec: ConvSpec) -> int:
    """Return the examples of a call, of mapped axes that all use one kernel, too."""
    mapped = () if site.kernel.aval.ndim > 1 else site.output.aval.shape[:-1]
    return math.prod((*mapped, *site.output_shape[: -1 - len(spec.kernel_size)]))


def place_in_stack(network: Network, row: PlanRow, index: int) -> tuple[int, ...]:
    """Return where in a stack of kernels the one of a number stands."""
    kernel = network.params(row.path)["kernel"]
    stack = kernel.shape[: kernel.ndim - len(row.spec.kernel_shape)]
    return tuple(int(i) for i in np.unravel_index(index, stack))


def part(value: Array, place: tuple[int, ...] | None) -> Array:
    """Return what stands at a place of a stack; all, of what is not stacked."""
    return jnp.asarray(value if place is None else value[place])


def put(
    values: MutableMapping[str, Array], name: str, new: Array, place: tuple[int, ...] | None
) -> None:
    """Change a variable, at a place of a stack or as a whole; it keeps its type."""
    old = jnp.asarray(values[name])
    new = new.astype(old.dtype)
    values[name] = new if place is None else old.at[place].set(new)
