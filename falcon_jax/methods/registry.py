"""Methods by name, for configs, plans and the command line."""

import dataclasses
from collections.abc import Mapping
from importlib import metadata
from typing import Any, TypeVar

from falcon_jax.methods.base import Method
from falcon_jax.methods.ranks import Budget, Energy
from falcon_jax.settings import no_such

# Other packages name their method classes under this group of entry points.
ENTRY_POINTS = "falcon_jax.methods"

_METHODS: dict[str, type[Method]] = {}

M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Enter a method class under its ``name``. Use as a decorator.

    A package that is installed beside falcon_jax can name its classes under the entry-point group
    ``falcon_jax.methods`` instead of asking its users to import it.

    Args:
        cls: the class.

    Returns:
        The class as it is.

    Raises:
        ValueError: if it is no frozen dataclass that subclasses `Method`, has no name, or another
            class has the name already.

    >>> from typing import ClassVar
    >>> from unittest import mock
    >>> from falcon_jax.methods.falcon import Falcon
    >>> with mock.patch.dict(_METHODS):  # what is registered here is forgotten at the end
    ...     @register
    ...     @dataclasses.dataclass(frozen=True, kw_only=True)
    ...     class MyFalcon(Falcon):
    ...         name: ClassVar[str] = "my_falcon"
    ...     get_method("my_falcon", rank=2)
    MyFalcon(rank=2, impl='auto')
    """
    dataclass_params = getattr(cls, "__dataclass_params__", None)
    if not (isinstance(cls, type) and issubclass(cls, Method)) or not (
        dataclass_params and dataclass_params.frozen
    ):
        raise ValueError(f"a method is a frozen dataclass that subclasses Method; got {cls!r}.")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{cls.__name__} needs a name, such as name: ClassVar[str] = 'falcon'.")
    known = _METHODS.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (
        cls.__module__,
        cls.__qualname__,
    ):
        raise ValueError(
            f"{name!r} is the name of {known.__module__}.{known.__qualname__} already; give "
            f"{cls.__name__} another."
        )
    _METHODS[name] = cls
    return cls


def method_names() -> tuple[str, ...]:
    """Return the names that `get_method` knows, those of installed packages included.

    Returns:
        The names in alphabetical order.

    >>> "falcon" in method_names()
    True
    """
    outside = metadata.entry_points(group=ENTRY_POINTS).names
    return tuple(sorted({*_METHODS, *outside}))


def _method_class(name: str) -> type[Method]:
    if name not in _METHODS:
        for found in metadata.entry_points(group=ENTRY_POINTS, name=name):
            register(found.load())
    if name not in _METHODS:
        raise ValueError(no_such("method", name, method_names()))
    return _METHODS[name]


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
    return _method_class(name)(**options)


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
    if not isinstance(name, str):
        raise ValueError(no_such("method", name, method_names()))
    return tuple(field.name for field in dataclasses.fields(_method_class(name)))  # type: ignore[arg-type]


def stored_method(name: str, options: Mapping[str, Any]) -> Method:
    """Return the method that a stored plan names, without settings that it no longer has.

    Args:
        name: as in ``Falcon.name``.
        options: as `Method.options` gave them.

    Raises:
        ValueError: if there is no such method, or it never had such a setting.
    """
    former = _method_class(name).former_settings
    return get_method(name, **{n: value for n, value in options.items() if n not in former})
