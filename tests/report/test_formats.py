import pytest

from falcon_jax.report.table import (
    format_millions,
    format_milliseconds,
    format_percent,
    format_ratio,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2_610_000, "2.61M"),
        (398_136_320, "398.14M"),
        (100_000, "0.10M"),
        (99_999, "0.1M"),
        (4_210, "0.00421M"),
        (0, "0.00M"),
    ],
)
def test_millions(value, text):
    assert format_millions(value) == text


def test_ratio_percent_and_milliseconds():
    assert [format_ratio(v) for v in (7.8, 1, 0.96)] == ["7.8x", "1.0x", "1.0x"]
    assert [format_percent(v) for v in (0.975, 1, 0.12345)] == ["97.50%", "100.00%", "12.35%"]
    assert [format_milliseconds(v) for v in (3.14159, 0.5, 120)] == [
        "3.14 ms",
        "0.50 ms",
        "120.00 ms",
    ]
