"""What the public names are, and where the reference documents each."""

import importlib
import types

MODULES = (
    "falcon_jax",
    "falcon_jax.methods",
    "falcon_jax.export",
    "falcon_jax.convert",
    "falcon_jax.models",
    "falcon_jax.native",
    "falcon_jax.ops",
    "falcon_jax.linen",
)
REAL = {"falcon_jax.linen": "falcon_jax.nn.linen"}  # where a module is, if not where it is reached


def public_names(module):
    """Return the public names of a module: its ``__all__``, or what it re-exports or defines.

    >>> public_names("falcon_jax.convert")
    ['assign', 'convert_file', 'falcon', 'load_torch', 'torchvision']
    """
    found = importlib.import_module(REAL.get(module, module))
    if hasattr(found, "__all__"):
        return list(found.__all__)
    package = hasattr(found, "__path__")
    return sorted(
        name
        for name, value in vars(found).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and (package or getattr(value, "__module__", None) == found.__name__)
    )


def reference():
    """Return, by module and name, the full name under which a name is documented."""
    first, entries = {}, {}
    for module in MODULES:
        found = importlib.import_module(REAL.get(module, module))
        for name in public_names(module):
            value = getattr(found, name)
            place = f"{module}.{name}"
            if not isinstance(value, types.ModuleType | str):
                # Aliases of types may be equal without being the same: their names tell them apart.
                place = first.setdefault((name, id(value)), place)
            entries[module, name] = value, place
    return entries
