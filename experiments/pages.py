"""What the report pages of all studies share: their skeleton, and numbers as text."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from experiments.figures import data_uri, optimizer_label, save_png


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


def text_table(
    title: str,
    columns: Sequence[tuple[str, str, Callable[[Any], str]]],
    items: Iterable[Any],
    caption: str | None = None,
    names: int = 1,
) -> Table:
    """The page's table for the terminal, which has the same numbers.

    Args:
        title: of the table.
        columns: heading on the page, heading here ("" to leave it out), and the text of an item.
        items: one a line.
        caption: below it.
        names: how many of the first columns are names, which begin at the left.
    """
    table = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    shown = [(heading, form) for _, heading, form in columns if heading]
    for place, (heading, _) in enumerate(shown):
        table.add_column(heading, justify="left" if place < names else "right", vertical="bottom")
    for item in items:
        # Text, and not str, so that a name with brackets is not read as rich's markup.
        table.add_row(*(Text(form(item)) for _, form in shown))
    return table


def save_figure(figure: Figure, path: Path) -> dict[str, Any]:
    """Saves a figure as PNG; what a page needs to show it."""
    save_png(figure, path)
    # 96 CSS pixels to the inch: the page then shows the type at the size it was set in.
    return {"src": data_uri(path), "width": round(96 * figure.get_figwidth())}


def write_page(
    template: Path,
    path: Path,
    *,
    study: str,
    command: str,
    config: dict[str, Any],
    **values: Any,
) -> Path:
    """Writes a run's report.html; it needs no second file.

    Args:
        template: a study's own, which extends page.html.jinja.
        path: the file to write, in the run's folder.
        study: the page's heading.
        command: the module that makes the report again.
        config: settings to show.
        **values: what the template and page.html.jinja name: `abstract`, `machine`, `version` and
            the study's own.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "flop": flop, "label": optimizer_label}
    page = environment.get_template(template.name).render(
        study=study,
        name=path.resolve().parent.name,
        again=f"python -m {command} FOLDER",
        settings={key: _setting(value) for key, value in config.items()},
        **values,
    )
    path.write_text(page, encoding="utf-8")
    return path


def together(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Settings of several by name: once what all have in common, and the rest for each."""
    values: dict[str, dict[str, Any]] = {}
    for name, own in settings.items():
        for key, value in own.items():
            values.setdefault(key, {})[name] = value
    found = {}
    for key, each in values.items():
        first, *others = each.values()
        named = "; ".join(f"{name}: {value}" for name, value in each.items())
        found[key] = named if any(other != first for other in others) else first
    return found


def _setting(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def readable(count: float) -> str:
    """Bytes, as text."""
    unit, size = next(
        (pair for pair in (("GB", 1e9), ("MB", 1e6)) if count >= pair[1]), ("kB", 1e3)
    )
    return f"{count / size:.2f} {unit}"
