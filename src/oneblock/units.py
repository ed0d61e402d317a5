"""Numbers for people: bytes, counts, FLOPs, durations, money, ratios. Decimal prefixes, as data sheets use them."""

from __future__ import annotations


def format_scaled(x: float, unit: str, prefixes: str = " kMGTPEZY") -> str:
    """Three significant figures and a decimal prefix: 8030261248, "B" -> "8.03 GB"."""
    step = 0
    while abs(x) >= 999.5 and step < len(prefixes) - 1:
        x, step = x / 1000, step + 1
    figures = f"{x:.3g}" if abs(x) < 99.95 else f"{x:.0f}"
    return f"{figures} {prefixes[step].strip()}{unit}".rstrip()


def format_count(x: float) -> str:
    """8030261248 -> "8.03 B": thousands, millions, billions, trillions."""
    return format_scaled(x, "", " KMBT")


def format_bytes(x: float) -> str:
    """1073741824 -> "1.07 GB"."""
    return format_scaled(x, "B")


def format_flops(x: float) -> str:
    """17157062656 -> "17.2 GFLOP"."""
    return format_scaled(x, "FLOP")


def format_money(x: float) -> str:
    """Dollars: 12345.6 -> "$12,346", 1.5 -> "$1.50"."""
    return f"${x:,.0f}" if x >= 10 else f"${x:.2f}"


def format_duration(seconds: float) -> str:
    """A rough length of time: 5400 -> "1.5 hours", 3 -> "3 seconds"."""
    for name, length in (("years", 31_557_600), ("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:,.3g} {name}"
    return f"{seconds:.3g} seconds"


def format_clock(seconds: float) -> str:
    """A running time: 75 -> "1:15", 3675 -> "1:01:15"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def format_ratio(x: float, base: float) -> str:
    """How many times `base`: "64.5x"; "new" where the base is 0."""
    if x == 0 or base == 0:
        return "new" if x else ""
    times = x / base
    return f"{times:,.0f}x" if times >= 99.95 else f"{times:.3g}x"
