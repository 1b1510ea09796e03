"""A report's parts, and its two forms: one HTML page, and a table for the terminal."""

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import rich.table
from matplotlib.figure import Figure
from rich.text import Text

from experiments.json_files import write_json
from experiments.report.figures import figure_style, save_png

Column = tuple[str, str, Callable[[Any], str]]
"""Heading on the page, heading in the terminal ("" to leave it out), and the text of a row."""


class Table(NamedTuple):
    """A table of rows of any kind.

    Attributes:
        columns: what it has of each row.
        rows: a line each.
        caption: above it on the page.
        title: in the terminal.
        note: below it in the terminal.
        names: how many of the first columns are names, which begin at the left.
    """

    columns: Sequence[Column]
    rows: Sequence[Any]
    caption: str = ""
    title: str = ""
    note: str | None = None
    names: int = 1

    @classmethod
    def of_texts(
        cls, headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", **more: Any
    ) -> "Table":
        """Of rows that are text already."""
        return cls([(h, h, itemgetter(i)) for i, h in enumerate(headings)], rows, caption, **more)

    def known(self) -> "Table":
        """Without the columns that have nothing to say of any row."""
        columns = [c for c in self.columns if any(c[2](row) != "–" for row in self.rows)]
        return self._replace(columns=columns if self.rows else self.columns)

    @property
    def headings(self) -> list[str]:
        return [heading for heading, *_ in self.columns]

    @property
    def lines(self) -> list[list[str]]:
        return [[form(row) for *_, form in self.columns] for row in self.rows]

    def __rich__(self) -> rich.table.Table:
        table = rich.table.Table(
            title=self.title,
            title_justify="left",
            caption=self.note,
            caption_justify="left",
            box=None,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        shown = [(heading, form) for _, heading, form in self.columns if heading]
        for place, (heading, _) in enumerate(shown):
            justify = "left" if place < self.names else "right"
            table.add_column(heading, justify=justify, vertical="bottom")
        for row in self.rows:
            # Text, and not str, so that a name with brackets is not read as rich's markup.
            table.add_row(*(Text(form(row)) for _, form in shown))
        return table


class Picture(NamedTuple):
    """A figure: its file's name, what draws it, what is below it, and what it shows in words."""

    name: str
    draw: Callable[[], Figure]
    caption: str
    alt: str


class Code(NamedTuple):
    """Text as it is, under a heading."""

    heading: str
    text: str


class Section(NamedTuple):
    """A heading and what is under it; without anything it is left out.

    Items are a paragraph (str), a `Table`, a `Picture`, `Code`, bullets (a list of str),
    definitions (a dict) or verdicts (a list of objects with `claim`, `measured`, `verdict` and
    `seeds`). An item that is empty is left out.
    """

    id: str
    title: str
    items: Iterable[Any]


class Report(NamedTuple):
    """What a study tells of a folder.

    Attributes:
        study: the page's heading.
        subtitle: below it.
        abstract: sentences.
        table: what the terminal shows; or anything else that rich prints.
        sections: of the page.
        config, machine: shown at the end.
        version: of the package.
        summary: what summary.json is to have; None to leave it as it is.
    """

    study: str
    subtitle: str
    abstract: Sequence[str]
    table: Any
    sections: Sequence[Section]
    config: Mapping[str, Any]
    machine: Mapping[str, Any]
    version: str
    summary: dict[str, Any] | None = None


def write(report: Report, folder: Path) -> Path:
    """Writes the figures, report.html, which needs no second file, and summary.json."""
    if report.summary is not None:
        write_json(folder / "summary.json", report.summary)
    with figure_style():
        sections = [
            (section, [_drawn(item, folder) for item in items])
            for section in report.sections
            if (items := [item for item in section.items if item])
        ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.jinja").render(
        report=report,
        sections=sections,
        name=folder.resolve().name,
        settings={key: _setting(value) for key, value in report.config.items()},
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _drawn(item: Any, folder: Path) -> Any:
    if not isinstance(item, Picture):
        return item
    figure, path = item.draw(), folder / f"{item.name}.png"
    save_png(figure, path)
    source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
    # 96 CSS pixels to the inch: the page then shows the type at the size it was set in.
    return {"picture": item, "src": source, "width": round(96 * figure.get_figwidth())}


def _setting(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


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
