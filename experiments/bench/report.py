"""The report of the benchmark: tables and figures of every part with results in a folder."""

import importlib.metadata
import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console, Group
from rich.table import Table as RichTable

from experiments.bench import accelerators, sharding, spectra, speed
from experiments.json_files import read_json
from experiments.report.page import Code, Picture, Report, Section

# The module, the function for tables, and the title of each part, by its key in summary.json.
PARTS: dict[str, tuple[ModuleType, Callable[[Any], Any], str]] = {
    "sharding": (sharding, sharding.tables, "Cost of one step for each device of a mesh"),
    "speed": (speed, speed.table, "Time of one update on one device"),
    "spectra": (spectra, spectra.table, "Singular values after Newton–Schulz"),
    "accelerators": (accelerators, accelerators.tables, "The update compiled for accelerators"),
}


def report(folder: Path) -> Report:
    """Returns the report of the parts that were run.

    Raises:
        ValueError: summary.json is damaged.
    """
    summary = read_json(folder / "summary.json")
    found = {name: part for name, part in PARTS.items() if summary.get(name)}
    sections, printed = [], []
    for name, (module, tables, title) in found.items():
        rows = summary[name]
        printed.append(shown := tables(rows))
        # Stored results omit the curves of spectra.
        drawn = Picture(name, lambda m=module, r=rows: m.figure(r), f"{title}.", f"{title}.")
        curves = name != "spectra" or "mapped" in rows[0]
        items = [_item(of) for of in getattr(shown, "renderables", [shown])]
        sections.append(Section(name, title, [drawn if curves else None, *items]))
    return Report(
        "Benchmarks",
        f"Run {folder.resolve().name} · {', '.join(found)}",
        [f"{title}." for *_, title in found.values()],
        Group(*printed),
        sections,
        summary.get("config", {}),
        summary["machine"],
        importlib.metadata.version("muon-jax"),
    )


def _item(found: Any) -> Any:
    """Returns a table of rich as preformatted text, and other items unchanged or as text."""
    if not isinstance(found, RichTable):
        return str(found) if not hasattr(found, "columns") else found
    title, found.title = found.title, None
    out = io.StringIO()
    Console(file=out, width=160).print(found)
    return Code(str(title), out.getvalue())
