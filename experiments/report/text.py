"""Numbers as text, the same in tables, sentences and figures."""

import math
from collections.abc import Mapping
from typing import Any

from experiments.differences import Interval


def number(value: float | None) -> str:
    """A number to three significant digits, whole numbers in full; "–" for none."""
    if value is None or math.isnan(value):
        return "–"
    whole = float(value).is_integer() or abs(value) >= 1000
    return f"{value:,.0f}" if whole else f"{value:.3g}"


def flop(value: float | None) -> str:
    """A count of floating-point operations with its unit, e.g. "1.2 TFLOP"."""
    if value is None or math.isnan(value):
        return "–"
    units = (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))
    unit, size = next((pair for pair in units if value >= pair[1]), units[-1])
    return f"{value / size:.3g} {unit}"


def readable(count: float) -> str:
    """Bytes, as text."""
    unit, size = next(
        (pair for pair in (("GB", 1e9), ("MB", 1e6)) if count >= pair[1]), ("kB", 1e3)
    )
    return f"{count / size:.2f} {unit}"


def form(value: float | None, spec: str) -> str:
    """A number in a format, as ".4f" or ".1%"; "–" for none and what is not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{spec}}".replace("%", " %")


def signed(value: float, digits: int) -> str:
    """A difference, e.g. "−0.25"; zero has a plus."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def interval_text(found: Interval | None) -> str:
    """A difference with its interval, e.g. "−0.25 [−0.26, −0.23]"."""
    if found is None:
        return "–"
    mean, low, high = (signed(value, 3) for value in found)
    return f"{mean} [{low}, {high}]"


def p_text(value: float | None) -> str:
    """A p value to three places."""
    return "–" if value is None else "< 0.001" if value < 1e-3 else f"{value:.3f}"


def plural(count: int, noun: str) -> str:
    """As "1 cell" and "2 cells"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def told(template: str, facts: Mapping[str, Any]) -> str:
    """A template with facts in its places; "" where one of them is not known.

    >>> told("{config[steps]} steps", {"config": {"steps": 9}}), told("{seeds} seeds", {})
    ('9 steps', '')
    """
    try:
        return template.format_map(facts)
    except KeyError:
        return ""


def all_told(templates: Mapping[str, str], facts: Mapping[str, Any]) -> dict[str, str]:
    """Definitions with facts in their places, without those of which one is not known."""
    return {term: text for term, of in templates.items() if (text := told(of, facts))}
