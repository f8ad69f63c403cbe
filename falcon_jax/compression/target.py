"""`Target`: what a compressed model should come to."""

import dataclasses
import math
from typing import Literal

from falcon_jax.settings import is_number

Quantity = Literal["params", "mult_adds", "latency_ms"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What a compressed model should come to; one of these.

    Attributes:
        params: share of the original's parameters if at most 1, else their number.
        mult_adds: likewise, of the mult-adds for one example.
        latency: share of the original's latency, measured on this device.
        latency_ms: milliseconds for the sample, measured on this device.
        loss: of the outputs f, ``E ||f - f'||^2 / E ||f - E f||^2``, as it is predicted; with as
            few mult-adds as possible.

    Raises:
        ValueError: if not exactly one is given, or it is out of range.

    >>> Target(mult_adds=0.15)
    Target(mult_adds=0.15)
    """

    params: float | int | None = None
    mult_adds: float | int | None = None
    latency: float | int | None = None
    latency_ms: float | int | None = None
    loss: float | int | None = None

    def __post_init__(self):
        given = self._given()
        if len(given) != 1:
            told = ", ".join(given) or "nothing"
            raise ValueError(
                "a target is one of params=, mult_adds=, latency=, latency_ms= and loss=, such as "
                f"Target(mult_adds=0.15); got {told}."
            )
        ((name, value),) = given.items()
        bound = " and at most 1" if name == "latency" else ""
        wrong = not is_number(value) or value <= 0 or (name == "latency" and value > 1)
        if wrong:
            raise ValueError(f"{name} of a target is a number above 0{bound}; got {value!r}.")

    def _given(self) -> dict[str, float | int]:
        return {k: v for k, v in vars(self).items() if v is not None}

    @property
    def quantity(self) -> Quantity:
        """What is to be small."""
        if self.latency is not None or self.latency_ms is not None:
            return "latency_ms"
        return "mult_adds" if self.params is None else "params"

    def __repr__(self) -> str:
        return f"Target({', '.join(f'{k}={v!r}' for k, v in self._given().items())})"

    def budget(self, original: float) -> float:
        """Return what a model may cost at most, given what the original costs."""
        if self.latency_ms is not None:
            return float(self.latency_ms)
        share = next((v for v in (self.latency, self.params, self.mult_adds) if v), math.inf)
        return float(share * original if share <= 1 else share)
