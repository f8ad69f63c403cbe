"""Conv units by name, for configs."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from falcon_jax.models.branch import branch_unit
from falcon_jax.models.gdg import gdg_unit
from falcon_jax.models.pdp import pdp_unit
from falcon_jax.models.pdp_split import pdp_split_unit
from falcon_jax.models.units import UnitFactory
from falcon_jax.names import no_such

_UNITS: Mapping[str, Callable[..., UnitFactory]] = MappingProxyType(
    {
        "branch": lambda: branch_unit(),
        "gdg": lambda *, groups=2: gdg_unit(groups),
        "pdp": lambda *, expansion=0.5: pdp_unit(expansion),
        "pdp_split": lambda: pdp_split_unit,
    }
)
UNIT_NAMES = tuple(_UNITS)
_OPTIONS = MappingProxyType({"gdg": ("groups",), "pdp": ("expansion",)})


def get_unit(name: str, /, **options: Any) -> UnitFactory:
    """Return the factory of a conv unit by its name.

    Args:
        name: ``branch`` (StConv-branch), ``gdg``, ``pdp`` or ``pdp_split``.
        **options: ``groups`` of ``gdg``, ``expansion`` of ``pdp``.

    Returns:
        The factory, for the ``unit`` of a model.

    Raises:
        ValueError: if there is no such unit, or it has no such option.
    """
    if not isinstance(name, str) or name not in _UNITS:
        raise ValueError(no_such("unit", name, _UNITS))
    known = _OPTIONS.get(name, ())
    unknown = sorted(set(options) - set(known))
    if unknown:
        listed = ", ".join(known) or "none"
        raise ValueError(
            f"unit {name!r} has no option {', '.join(unknown)}; its options: {listed}."
        )
    return _UNITS[name](**options)
