"""The report's tests: each optimizer beside the baseline."""

import math
from collections.abc import Sequence

from experiments.differences import holm
from experiments.grok import statistics
from experiments.grok.config import Panel
from experiments.grok.report_data import BASELINE, Run, censored_median
from experiments.report.figures import optimizer_label
from experiments.report.text import number

COLUMNS = (
    "over", "on", "median epoch, AdamW", "its median epoch", "observations", "ratio of epochs",
    "95 % interval", "Mann–Whitney p", "after Holm", "signed-rank p", "log-rank p", "Welch t",
)  # fmt: skip

CRITERIA = {
    "memorised": "memorized_epoch",
    "first crossing": "first_crossing_epoch",
    "grok, first": "grok_epoch",
    "grok, sustained": "grok_epoch_sustained",
    "grok, near best": "grok_epoch_near_best",
}

Pair = tuple[dict[int, int | None], dict[int, int | None]]


def epochs(
    run: Run, optimizer: str, panel: Panel, field: str = "grok_epoch_sustained"
) -> dict[int, int | None]:
    """Grokking epoch by seed of an optimizer's finished cells in a panel.

    Where a setting is swept that does not concern the optimizer, those without it.
    """
    found = run.of(panel, optimizer) or run.of(panel._replace(point=""), optimizer)
    return {row["seed"]: row[field] for row in found}


def _anchor(run: Run, panel: Panel) -> Panel:
    """Where the baseline's cells are that a panel is compared with."""
    return panel if run.of(panel, BASELINE) else panel._replace(point="")


def tests(run: Run) -> list[list[str]]:
    """Rows of the table of tests, in the order of `COLUMNS`; none without the baseline.

    First all panels pooled, then those of a task, those of an output function, and each panel.
    """
    if BASELINE not in run.optimizers():
        return []
    others = [name for name in run.optimizers() if name != BASELINE]
    pairs = {(name, panel): _pair(run, name, panel) for name in others for panel in run.panels()}
    pairs = {key: pair for key, pair in pairs.items() if all(pair)}
    tested = {key: statistics.mann_whitney(*pair) for key, pair in pairs.items()}
    p_values = {f"{name}/{panel}": p for (name, panel), p in tested.items() if p is not None}
    corrected = holm(p_values)
    ranked = _signed_ranks(run, pairs, others)
    rows = []
    for on, panels in groups(run).items():
        for name in others:
            there = [panel for panel in panels if (name, panel) in pairs]
            if not there or len({_anchor(run, panel) for panel in there}) < len(there):
                continue
            own = [pairs[name, panel] for panel in there]
            row = [optimizer_label(name), on, *_medians(run, own), *_ratio(run, own)]
            key = f"{name}/{panels[0]}" if len(panels) == 1 else ""
            row += [p_text(p_values.get(key)), p_text(corrected.get(key))]
            if len(panels) > 1 and panels == run.panels() and not any(p.point for p in panels):
                row += [p_text(ranked.get(name)), p_text(_log_rank(run, name)), _welch(run, name)]
            else:
                row += ["–", "–", "–"]
            rows.append(row)
    return rows


def _signed_ranks(
    run: Run, pairs: dict[tuple[str, Panel], Pair], optimizers: Sequence[str]
) -> dict[str, float]:
    """Of each optimizer over all panels, after Holm."""
    found = {}
    for name in optimizers:
        own = [pairs[name, panel] for panel in run.panels() if (name, panel) in pairs]
        if (p := statistics.signed_rank(own, run.budget)) is not None:
            found[name] = p
    return holm(found)


def sentence(run: Run, fast: str) -> str:
    """The ratio over all panels in one sentence; "" where there is none."""
    pairs = [_pair(run, fast, panel) for panel in run.panels()]
    found = statistics.ratio([pair for pair in pairs if all(pair)], run.budget)
    if found is None or math.isnan(found.low):
        return ""
    text = (
        f"Over {found.observations} pairs of task and output function, "
        f"{optimizer_label(BASELINE)} takes {found} times the epochs of {optimizer_label(fast)}, "
        f"95 % interval {found.low:.2f} to {found.high:.2f}"
    )
    cells = "1 pair" if found.bounded == 1 else f"{found.bounded} pairs"
    counted = f"; in {cells} of trainings one is censored and counts at the budget"
    return text + (counted if found.bounded else "") + "."


def groups(run: Run) -> dict[str, list[Panel]]:
    """The panels that are looked at together, by what they are called."""
    panels = run.panels()
    tasks = list(dict.fromkeys(panel.task for panel in panels))
    kinds = list(dict.fromkeys(panel.softmax for panel in panels))
    found = {"all": panels}
    if len(kinds) > 1 and len(tasks) > 1:
        found |= {f"{task} · all": [p for p in panels if p.task == task] for task in tasks}
        found |= {f"all · {kind}": [p for p in panels if p.softmax == kind] for kind in kinds}
    found = {name: of for name, of in found.items() if len(of) > 1}
    return found | {str(panel): [panel] for panel in panels}


def criteria(run: Run) -> list[list[str]]:
    """Per optimizer the ratio over all panels, by each of `CRITERIA`; none without the baseline."""
    if BASELINE not in run.optimizers():
        return []
    rows = []
    for name in run.optimizers():
        found = []
        for field in CRITERIA.values():
            pairs = [_pair(run, name, panel, field) for panel in run.panels()]
            value, interval = _ratio(run, [pair for pair in pairs if all(pair)])[1:]
            found.append(value if interval == "–" else f"{value} [{interval}]")
        if name != BASELINE:
            rows.append([optimizer_label(name), *found])
    return rows


def _pair(run: Run, name: str, panel: Panel, field: str = "grok_epoch_sustained") -> Pair:
    own = {row["seed"]: row[field] for row in run.of(panel, name)}
    return epochs(run, BASELINE, panel, field), own


def _medians(run: Run, pairs: Sequence[Pair]) -> list[str]:
    """The median epoch of either optimizer, and how many of its cells are censored."""
    texts = []
    for which in (0, 1):
        values = [epoch for pair in pairs for epoch in pair[which].values()]
        median = censored_median(values, [run.budget] * len(values))
        censored = sum(epoch is None for epoch in values)
        texts.append(
            median.text() + (f" ({censored} of {len(values)} censored)" if censored else "")
        )
    return texts


def _both(run: Run, fast: str, field: str) -> list[list[int | None]]:
    """Epochs of all finished cells of the baseline and of another optimizer."""
    return [[row[field] for row in run.of(None, name)] for name in (BASELINE, fast)]


def _log_rank(run: Run, fast: str) -> float | None:
    return statistics.log_rank(*_both(run, fast, "grok_epoch_sustained"), run.budget)


def _welch(run: Run, fast: str) -> str:
    found = statistics.welch(*_both(run, fast, "grok_epoch"))
    return "–" if found is None else f"{found.t:.2f} (p {p_text(found.p)}, {found.degrees:.0f} df)"


def _ratio(run: Run, pairs: Sequence[Pair]) -> list[str]:
    found = statistics.ratio(pairs, run.budget)
    if found is None:
        return ["0", "–", "–"]
    interval = "–" if math.isnan(found.low) else f"{found.low:.2f} to {found.high:.2f}"
    return [number(found.observations), str(found), interval]


def p_text(value: float | None) -> str:
    """A p value for readers."""
    if value is None:
        return "–"
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.0e}"
