"""Which form an operation takes: the fastest where it runs, or the one of ``lax``.

What is fastest stands in small tables, measured backend by backend. For who reads what was traced
there is one operation of ``lax`` for each of ours: another runtime knows its own fast forms, and
recognises a convolution only if it is given one.
"""

import contextlib
import contextvars
import dataclasses
import uuid
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Literal, get_args

import jax
from jax.experimental.xla_metadata import set_xla_metadata

DepthwiseForm = Literal["auto", "shifted", "per_pixel", "grouped"]
DEPTHWISE_FORMS: tuple[str, ...] = get_args(DepthwiseForm)
FalconForm = Literal["separable", "wide", "gep"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A form and up to where it is the fastest; of several rows the first that applies counts.

    Attributes:
        form: the form.
        most_points: of the input's and the output's map; None for any.
        most_taps: of the kernel; None for any.
    """

    form: DepthwiseForm
    most_points: int | None = None
    most_taps: int | None = None

    def applies(self, *, points: int | None, taps: int) -> bool:
        """Return whether the row speaks of such a convolution."""
        few_points = self.most_points is None or (points is not None and points <= self.most_points)
        return few_points and (self.most_taps is None or taps <= self.most_taps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FalconRow:
    """What decides between the forms of a rank-k pointwise-then-depthwise convolution.

    Attributes:
        wide_elements: up to so many elements between pointwise and depthwise, one matrix product
            for all terms is faster than one a term.
        depthwise_channels: a depthwise step takes the time of so many further input channels.
        standard_share: a standard convolution takes this share of the time that its mult-adds
            would take in a matrix product.
        dense_points: below so many points (of all images) building the kernel takes too long.
    """

    wide_elements: int
    depthwise_channels: float | int
    standard_share: float | int
    dense_points: int


# Measured by benchmarks/forms.py. A backend that is not here has not been measured.
_DEPTHWISE: Mapping[str, tuple[Row, ...]] = MappingProxyType(
    {
        "cpu": (
            Row(form="per_pixel", most_points=9, most_taps=25),
            Row(form="shifted"),
        ),
    }
)
_NOT_MEASURED = (Row(form="shifted"),)
_FALCON: Mapping[str, FalconRow] = MappingProxyType(
    {
        "cpu": FalconRow(
            wide_elements=2**18, depthwise_channels=50, standard_share=0.8, dense_points=256
        ),
    }
)


def depthwise_form(*, points: int | None, taps: int, backend: str | None = None) -> DepthwiseForm:
    """Return the fastest form of a depthwise convolution.

    Args:
        points: of its input's or its output's map, whichever has more; None if not known, as in
            exported functions.
        taps: of its kernel.
        backend: ``cpu``, ``gpu``, ...; JAX's default backend if not given.

    Returns:
        The form; the one for CPUs where a backend has not been measured.
    """
    rows = _DEPTHWISE.get(backend or jax.default_backend(), _NOT_MEASURED)
    return next(row.form for row in rows if row.applies(points=points, taps=taps))


def falcon_form(
    *,
    points: int | None,
    taps: int,
    in_features: int,
    out_features: int,
    rank: int,
    backend: str | None = None,
) -> FalconForm:
    """Return the fastest form of a rank-k pointwise-then-depthwise convolution.

    Args:
        points: of all images of the batch together; None if not known, as in exported functions.
        taps: of the kernel.
        in_features: of a group.
        out_features: output channels.
        rank: number k of terms.
        backend: ``cpu``, ``gpu``, ...; JAX's default backend if not given.

    Returns:
        ``wide``, ``gep`` or ``separable``; the last where a backend has not been measured.
    """
    row = _FALCON.get(backend or jax.default_backend())
    if row is None:
        return "separable"
    separable = rank * (in_features + row.depthwise_channels)
    dense = taps * in_features * row.standard_share
    if separable > dense and (points is None or points >= row.dense_points):
        return "gep"
    few = points is not None and points * rank * out_features <= row.wide_elements
    return "wide" if few and rank > 1 else "separable"


_CANONICAL = contextvars.ContextVar("falcon_jax_canonical", default=False)


@contextlib.contextmanager
def canonical_forms() -> Iterator[None]:
    """Make every operation traced in this context the one of ``lax`` that stands for it.

    Results differ from those of other forms by rounding only.
    """
    token = _CANONICAL.set(True)
    try:
        # In a context that never was before, JAX's cache holds nothing of jitted parts.
        with set_xla_metadata(falcon_jax_forms=uuid.uuid4().hex):
            yield
    finally:
        _CANONICAL.reset(token)


def is_canonical() -> bool:
    """Return whether this is the context of `canonical_forms`."""
    return _CANONICAL.get()
