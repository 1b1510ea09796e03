"""Formats numbers as text, alike in tables, sentences and figures."""

import math
from collections.abc import Mapping
from typing import Any

from experiments.differences import Interval


def number(value: float | None) -> str:
    """Returns a number with three significant digits, or all digits if whole; "–" for None."""
    if value is None or math.isnan(value):
        return "–"
    whole = float(value).is_integer() or abs(value) >= 1000
    return f"{value:,.0f}" if whole else f"{value:.3g}"


def flop(value: float | None) -> str:
    """Returns a number of floating-point operations with its unit, e.g. "1.2 TFLOP"."""
    if value is None or math.isnan(value):
        return "–"
    units = (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))
    unit, size = next((pair for pair in units if value >= pair[1]), units[-1])
    return f"{value / size:.3g} {unit}"


def readable(count: float) -> str:
    """Returns a number of bytes with its unit, e.g. "1.20 MB"."""
    unit, size = next(
        (pair for pair in (("GB", 1e9), ("MB", 1e6)) if count >= pair[1]), ("kB", 1e3)
    )
    return f"{count / size:.2f} {unit}"


def form(value: float | None, spec: str) -> str:
    """Returns a number in a format such as ".4f" or ".1%"; "–" if it is None or not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{spec}}".replace("%", " %")


def signed(value: float, digits: int) -> str:
    """Returns a difference with its sign, e.g. "−0.25". The sign of zero is plus."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def interval_text(found: Interval | None) -> str:
    """Returns a difference with its interval, e.g. "−0.25 [−0.26, −0.23]"; "–" for None."""
    if found is None:
        return "–"
    mean, low, high = (signed(value, 3) for value in found)
    return f"{mean} [{low}, {high}]"


def p_text(value: float | None) -> str:
    """Returns a p value with three decimal places; "–" for None."""
    return "–" if value is None else "< 0.001" if value < 1e-3 else f"{value:.3f}"


def plural(count: int, noun: str) -> str:
    """Returns a count with its noun, as in "1 cell" and "2 cells"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def told(template: str, facts: Mapping[str, Any]) -> str:
    """Returns a template with facts filled in, or "" if one of the facts is missing.

    >>> told("{config[steps]} steps", {"config": {"steps": 9}}), told("{seeds} seeds", {})
    ('9 steps', '')
    """
    try:
        return template.format_map(facts)
    except KeyError:
        return ""


def all_told(templates: Mapping[str, str], facts: Mapping[str, Any]) -> dict[str, str]:
    """Returns definitions with facts filled in, without those for which a fact is missing."""
    return {term: text for term, of in templates.items() if (text := told(of, facts))}
