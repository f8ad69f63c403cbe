"""Which form of an operation is fastest where: small tables, measured backend by backend."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

import jax

DepthwiseForm = Literal["auto", "shifted", "per_pixel", "grouped"]
DEPTHWISE_FORMS: tuple[str, ...] = get_args(DepthwiseForm)


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

    def applies(self, *, points: int, taps: int) -> bool:
        """Return whether the row speaks of such a convolution."""
        few_points = self.most_points is None or points <= self.most_points
        return few_points and (self.most_taps is None or taps <= self.most_taps)


# Measured by benchmarks/forms.py. A backend that is not here has not been measured.
_DEPTHWISE: Mapping[str, tuple[Row, ...]] = MappingProxyType(
    {
        "cpu": (
            Row(form="per_pixel", most_points=4, most_taps=25),
            Row(form="shifted"),
        ),
    }
)
_NOT_MEASURED = (Row(form="shifted"),)


def depthwise_form(*, points: int, taps: int, backend: str | None = None) -> DepthwiseForm:
    """Return the fastest form of a depthwise convolution.

    Args:
        points: of its input's or its output's map, whichever has more.
        taps: of its kernel.
        backend: ``cpu``, ``gpu``, ...; JAX's default backend if not given.

    Returns:
        The form; the one for CPUs where a backend has not been measured.
    """
    rows = _DEPTHWISE.get(backend or jax.default_backend(), _NOT_MEASURED)
    return next(row.form for row in rows if row.applies(points=points, taps=taps))
