"""Numbers for people."""

from __future__ import annotations

from oneblock.units import (
    format_bytes,
    format_clock,
    format_count,
    format_duration,
    format_flops,
    format_money,
    format_ratio,
)


def test_numbers_in_a_few_characters() -> None:
    assert format_count(8_030_261_248) == "8.03 B"
    assert format_count(999) == "999" and format_count(999_600) == "1 M"
    assert format_bytes(42_949_672_960) == "42.9 GB"
    assert format_flops(3.14e23) == "314 ZFLOP"
    assert format_money(5.217) == "$5.22" and format_money(14510.7) == "$14,511"


def test_ratios() -> None:
    assert [format_ratio(*x) for x in ((64.53, 1), (0, 1), (2, 0), (30264.2, 1))] == ["64.5x", "", "new", "30,264x"]


def test_times() -> None:
    assert [format_duration(x) for x in (45, 5400, 86400 * 30)] == ["45 seconds", "1.5 hours", "30 days"]
    assert [format_clock(x) for x in (7, 75, 3675)] == ["0:07", "1:15", "1:01:15"]
