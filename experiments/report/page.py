"""The parts of a report, and its two forms: an HTML page and a table in the terminal."""

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
"""The heading on the page, the heading in the terminal ("" omits it), and the text of a row."""


class Table(NamedTuple):
    """A table of rows of any type.

    Attributes:
        columns: The columns, which turn a row into text.
        rows: The rows, one for each line.
        caption: The text above the table on the page.
        title: The title in the terminal.
        note: The text below the table in the terminal.
        names: The number of first columns that hold names, which are aligned to the left.
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
        """Returns a table of rows that are already text."""
        return cls([(h, h, itemgetter(i)) for i, h in enumerate(headings)], rows, caption, **more)

    def known(self) -> "Table":
        """Returns the table without columns that are “–” in every row."""
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
    """A figure: the name of its file, a function that draws it, its caption and its alt text."""

    name: str
    draw: Callable[[], Figure]
    caption: str
    alt: str


class Code(NamedTuple):
    """Preformatted text under a heading."""

    heading: str
    text: str


class Section(NamedTuple):
    """A heading and the items under it. A section without items is omitted.

    An item is a paragraph (str), a `Table`, a `Picture`, `Code`, bullets (a list of str),
    definitions (a dict) or verdicts (a list of objects with `claim`, `measured`, `verdict` and
    `seeds`). Empty items are omitted.
    """

    id: str
    title: str
    items: Iterable[Any]


class Report(NamedTuple):
    """The report of a folder.

    Attributes:
        study: The heading of the page.
        subtitle: The line below the heading.
        abstract: The sentences of the abstract.
        table: The table in the terminal, or anything else that rich can print.
        sections: The sections of the page.
        config, machine: The settings and the machine, shown at the end of the page.
        version: The version of the package that made the results.
        summary: The new contents of summary.json. None leaves the file as it is.
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
    """Writes summary.json, the figures, and report.html with all of them, and returns its path."""
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
    # At 96 CSS pixels per inch the page shows the figure's text at its intended size.
    return {"picture": item, "src": source, "width": round(96 * figure.get_figwidth())}


def _setting(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def together(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the settings of several runs: a value that they share once, others by run name."""
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
