"""The report's tests and its survival curves: each optimizer beside the baseline."""

import math

from matplotlib.figure import Figure

from experiments.differences import holm
from experiments.figures import legend_line, new_figure, optimizer_color, optimizer_label
from experiments.grok import statistics
from experiments.grok.report_data import Run
from experiments.grok.statistics import Ratio
from experiments.pages import number

BASELINE = "adamw"

COLUMNS = (
    "over", "task", "softmax", "observations", "ratio of epochs", "95 % interval",
    "Mann–Whitney p", "after Holm", "log-rank p", "Welch t",
)  # fmt: skip


def epochs(
    run: Run, optimizer: str, panel: tuple[str, str], field: str = "grok_epoch_sustained"
) -> dict[int, int | None]:
    """Grokking epoch by seed of an optimizer's finished cells in a panel."""
    return {
        row["seed"]: row[field]
        for row in run.rows
        if (row["task"], row["softmax"], row["optimizer"]) == (*panel, optimizer)
    }


def tests(run: Run) -> list[list[str]]:
    """Rows of the table of tests, in the order of `COLUMNS`; none without the baseline."""
    panels, others = run.panels(), [name for name in run.optimizers() if name != BASELINE]
    if BASELINE not in run.optimizers():
        return []
    p_values: dict[str, float] = {}
    for fast in others:
        for panel in panels:
            slow = epochs(run, BASELINE, panel)
            if (p := statistics.mann_whitney(slow, epochs(run, fast, panel))) is not None:
                p_values[f"{fast}/{panel}"] = p
    corrected = holm(p_values)
    rows = []
    for fast in others:
        pairs = [(epochs(run, BASELINE, panel), epochs(run, fast, panel)) for panel in panels]
        for panel, pair in zip(panels, pairs, strict=True):
            key = f"{fast}/{panel}"
            of_panel = _texts(statistics.ratio([pair], run.budget))
            tested = [_p(p_values.get(key)), _p(corrected.get(key)), "–", "–"]
            rows.append([optimizer_label(fast), *panel, *of_panel, *tested])
        if len(panels) > 1:
            pooled = _texts(statistics.ratio(pairs, run.budget))
            tested = ["–", "–", _p(_log_rank(run, fast)), _welch(run, fast)]
            rows.append([optimizer_label(fast), "all", "all", *pooled, *tested])
    return rows


def pooled(run: Run, optimizer: str, field: str) -> list[int | None]:
    """Grokking epochs of all finished cells of an optimizer."""
    return [row[field] for row in run.rows if row["optimizer"] == optimizer]


def _log_rank(run: Run, fast: str) -> float | None:
    both = (pooled(run, name, "grok_epoch_sustained") for name in (BASELINE, fast))
    return statistics.log_rank(*both, run.budget)


def _welch(run: Run, fast: str) -> str:
    found = statistics.welch(*(pooled(run, name, "grok_epoch") for name in (BASELINE, fast)))
    return "–" if found is None else f"{found.t:.2f} (p {_p(found.p)}, {found.degrees:.0f} df)"


def _texts(found: Ratio | None) -> list[str]:
    if found is None:
        return ["0", "–", "–"]
    bound = " (bound)" if found.bounded else ""
    interval = "–" if math.isnan(found.low) else f"{found.low:.2f} to {found.high:.2f}"
    return [number(found.observations), f"{found.value:.2f}{bound}", interval]


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.0e}"


def survival_figure(run: Run) -> Figure:
    """Share of cells that have not grokked, against epoch: a curve for each optimizer."""
    figure = new_figure(6.6, 3.6)
    axes = figure.subplots()
    for name in run.optimizers():
        cells = pooled(run, name, "grok_epoch_sustained")
        if not cells:
            continue
        times, shares = statistics.survival(cells, run.budget)
        percent = [100 * share for share in shares]
        axes.step(times, percent, where="post", color=optimizer_color(name), lw=1.8)
    axes.set(xlim=(0, run.budget), ylim=(0, 102), xlabel="epoch", ylabel="not yet grokked (%)")
    handles = [legend_line(_label(run, n), optimizer_color(n), lw=4) for n in run.optimizers()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _label(run: Run, optimizer: str) -> str:
    cells = sum(row["optimizer"] == optimizer for row in run.rows)
    return f"{optimizer_label(optimizer)}, n = {cells}"
