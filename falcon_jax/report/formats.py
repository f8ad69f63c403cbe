"""Numbers as people read them."""

from __future__ import annotations

from typing import SupportsFloat


def format_millions(value: SupportsFloat) -> str:
    """A count in millions, two decimals, or three digits below 0.1M.

    >>> format_millions(2_610_000), format_millions(4_210)
    ('2.61M', '0.00421M')

    Args:
        value: the count, in units.

    Returns:
        the text.
    """
    millions = float(value) / 1e6
    return f"{millions:.2f}M" if abs(millions) >= 0.1 or millions == 0 else f"{millions:.3g}M"


def format_ratio(value: SupportsFloat) -> str:
    """A ratio with one decimal.

    >>> format_ratio(7.8)
    '7.8x'

    Args:
        value: the ratio.

    Returns:
        the text.
    """
    return f"{float(value):.1f}x"


def format_percent(value: SupportsFloat) -> str:
    """A fraction as a percentage with two decimals.

    >>> format_percent(0.975)
    '97.50%'

    Args:
        value: the fraction.

    Returns:
        the text.
    """
    return f"{float(value):.2%}"


def format_milliseconds(value: SupportsFloat) -> str:
    """A time in milliseconds with two decimals.

    >>> format_milliseconds(3.14159)
    '3.14 ms'

    Args:
        value: the time, milliseconds.

    Returns:
        the text.
    """
    return f"{float(value):.2f} ms"
