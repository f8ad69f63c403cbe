"""Packages that only some exports need."""

import importlib
from typing import Any


def optional(module: str, what: str, extra: str) -> Any:
    """Import a package of an optional extra.

    Args:
        module: its name.
        what: needs it; the beginning of a sentence.
        extra: of falcon-jax that brings it.

    Raises:
        ImportError: saying what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f'{what} needs {package} ({error}): pip install "falcon-jax[{extra}]"'
        ) from None
