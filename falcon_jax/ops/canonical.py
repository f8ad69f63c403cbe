"""One operation of ``lax`` for each of ours, for who reads what was traced.

The operations of this package take the form that is fastest where they run: a convolution may be a
sum of slices. Another runtime knows its own fast forms, and recognises a convolution only if it is
given one.
"""

import contextlib
import contextvars
from collections.abc import Iterator

_CANONICAL = contextvars.ContextVar("falcon_jax_canonical", default=False)


@contextlib.contextmanager
def canonical_forms() -> Iterator[None]:
    """Make every operation traced in this context the one of ``lax`` that stands for it.

    Results differ from those of other forms by rounding only. What was traced before, and is in
    JAX's cache, stays.
    """
    token = _CANONICAL.set(True)
    try:
        yield
    finally:
        _CANONICAL.reset(token)


def is_canonical() -> bool:
    """Return whether this is the context of `canonical_forms`."""
    return _CANONICAL.get()
