"""What to say of a name that is not known."""

import difflib
from collections.abc import Iterable


def no_such(kind: str, name: str, known: Iterable[str]) -> str:
    """Return a sentence that lists the known names, and the nearest.

    >>> no_such("method", "falcn", ["cp", "falcon"])
    "no method is called 'falcn'; there are cp, falcon. Did you mean 'falcon'?"
    """
    near = _nearest(name, known)
    hint = f" Did you mean {near!r}?" if near else ""
    return f"no {kind} is called {name!r}; there are {', '.join(known)}.{hint}"


def unknown_field(dotted: str, value: str, known: Iterable[str]) -> str:
    """Return a sentence on a field of a config whose value, or part of whose name, is not known.

    >>> unknown_field("config.data.source", "digit", ["digits", "idx"])
    "config.data.source: there is no 'digit'; there are digits, idx; did you mean 'digits'?"
    """
    near = _nearest(value, known)
    hint = f"; did you mean {near!r}?" if near else ""
    listed = ", ".join(known) or "no fields below it"
    return f"{dotted}: there is no {value!r}; there are {listed}{hint}"


def _nearest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1)), None)
