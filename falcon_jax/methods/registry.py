"""Methods by name, for configs, plans and the command line."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from falcon_jax.methods.base import Method
from falcon_jax.methods.channel_ranks import Budget
from falcon_jax.methods.ranks import Energy
from falcon_jax.names import no_such

_METHODS: dict[str, type[Method]] = {}

M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Enter a method class under its ``name``. Use as a decorator."""
    _METHODS[cls.name] = cls
    return cls


def method_names() -> tuple[str, ...]:
    """Return the names that `get_method` knows."""
    return tuple(sorted(_METHODS))


def get_method(name: str, /, **options: Any) -> Method:
    """Return a method by its name.

    Args:
        name: as in ``Falcon.name``.
        **options: the method's settings, e.g. ``rank=2``.

    Returns:
        The method.

    Raises:
        ValueError: if there is no such method, or it has no such setting.

    >>> get_method("falcon", rank=2)
    Falcon(rank=2, impl='auto')
    """
    known = method_settings(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"method {name!r} has no setting {', '.join(unknown)}; it has {', '.join(known)}."
        )
    return _METHODS[name](**options)


def method_from(given: Mapping[str, Any]) -> Method:
    """Return the method that plain data, of a config or a plan, describes.

    Args:
        given: the name under ``method``, and settings; ``energy`` and ``budget`` stand for the
            ranks of these names where the method has no such setting.

    Raises:
        ValueError: if there is no such method, or it has no such setting.

    >>> method_from({"method": "tucker", "budget": 8.0})
    Tucker(rank=Budget(ratio=8.0))
    """
    options = dict(given)
    if "method" not in options:
        raise ValueError(f"the name of a method is missing: give it as 'method' in {options}.")
    name = options.pop("method")
    settings = method_settings(name)
    for short, rank in (("energy", Energy), ("budget", Budget)):
        if short in options and short not in settings:
            if "rank" in options:
                raise ValueError(f"give either rank or {short}, not both")
            options["rank"] = rank(options.pop(short))
    return get_method(name, **options)


def method_settings(name: str) -> tuple[str, ...]:
    """Return the settings that a method has.

    Args:
        name: as in ``Falcon.name``.

    Raises:
        ValueError: if there is no such method.
    """
    if not isinstance(name, str) or name not in _METHODS:
        raise ValueError(no_such("method", name, method_names()))
    return tuple(field.name for field in dataclasses.fields(_METHODS[name]))  # type: ignore[arg-type]
