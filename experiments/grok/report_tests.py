"""Comparisons with AdamW, separately for memorising, delay and grokking, and their tests."""

from collections.abc import Mapping, Sequence

from experiments.differences import holm
from experiments.grok import statistics
from experiments.grok.config import Panel
from experiments.grok.report_data import (
    BASELINE,
    FEW_OPTIMIZERS,
    SOON,
    Arm,
    Run,
    censored_median,
    value,
)
from experiments.report.names import optimizer_label
from experiments.report.page import Column, Table
from experiments.report.text import number, p_text, plural

SUSTAINED = "grok, sustained"
DELAY = "delay + 1"
# The fields of a training that are compared, by their names in the report.
CRITERIA = {
    "memorised": "memorized_epoch",
    DELAY: "delay",
    "first crossing": "first_crossing_epoch",
    "grok, first": "grok_epoch",
    SUSTAINED: "grok_epoch_sustained",
    "grok, near best": "grok_epoch_near_best",
}
DELAYS: tuple[Column, ...] = tuple(
    (heading, heading, form)
    for heading, form in (
        ("optimizer", lambda arm: arm.label),
        ("trainings", lambda arm: str(arm.n)),
        ("grokked", lambda arm: str(arm.grokked)),
        (f"of these, ≤ {SOON} epochs after memorising", lambda arm: str(arm.soon)),
        ("strictly: ≥ 2 × the memorised epoch", lambda arm: str(arm.strict)),
        ("median memorised epoch", lambda arm: arm.median("memorized_epoch").text()),
        ("median delay", lambda arm: arm.median("delay").text()),
        ("median grokking epoch", lambda arm: arm.median().text()),
    )
)
COLUMNS = (
    "optimizer", "on", "median epoch, AdamW", "its median epoch", "observations",
    "ratio to memorise", "ratio of delay + 1", "ratio of epochs", "detectable ratio",
    "Mann–Whitney p", "Mann–Whitney p, Holm", "signed-rank p, Holm", "log-rank p",
)  # fmt: skip

DELAY_TEXT = (
    "Grokking means generalising long after memorising. A training groks strictly if its grokking "
    "epoch is at least twice its memorised epoch, so that the delay is at least as long as "
    "memorising took. A training that generalises within 5 epochs of memorising shows no grokking. "
    "Counts include only trainings that grokked by the definition below; medians include all."
)
TESTS = (
    "A ratio is AdamW's epochs over the optimizer's, paired by training, as a geometric mean with "
    "its 95 % interval over seeds, or over tasks where there are several; ≥ and ≤ mark bounds, "
    "where a censored training counts at the budget. The detectable ratio is what 80 % of such "
    "studies would find at p < 0.05. Mann–Whitney's p cannot come below 0.1 with three seeds "
    "against three, and the log-rank test counts every training as an observation of its own."
)
OTHERWISE = "The same ratio over all trainings, for each definition of the epoch:"

Pair = tuple[dict[int, float | None], dict[int, float | None]]
Pairs = Mapping[Panel, Pair]


def pairs(run: Run, optimizer: str, criterion: str = SUSTAINED) -> dict[Panel, Pair]:
    """Returns the epochs by seed of AdamW and of an optimizer, for each panel that has both.

    If the swept setting does not concern AdamW, its cells without the setting are used. Only
    trainings that grokked have a delay.
    """
    what, found = CRITERIA[criterion], {}
    for panel in run.panels():
        base = run.of(panel, BASELINE) or run.of(panel._replace(point=""), BASELINE)
        slow, fast = (
            {row["seed"]: value(row, what) for row in rows}
            for rows in (base, run.of(panel, optimizer))
        )
        if criterion == DELAY:  # which may be 0
            slow, fast = (
                {seed: 1 + x for seed, x in of.items() if x is not None} for of in (slow, fast)
            )
        if slow and fast:
            found[panel] = slow, fast
    return found


def ratio(run: Run, found: Pairs, panels: Sequence[Panel] | None = None) -> statistics.Ratio | None:
    """Returns the ratio of AdamW's epochs to an optimizer's, over some panels of `found` or all."""
    there = [panel for panel in found if panels is None or panel in panels]
    tasks = [panel.task for panel in there]
    return statistics.ratio([found[panel] for panel in there], run.budget, tasks)


def _text(found: statistics.Ratio | None) -> str:
    return found.text if found else "–"


def _detectable(found: statistics.Ratio | None) -> str:
    if found is None:
        return "–"
    least = statistics.detectable(found.deviation, found.observations)
    return "> 10" if least > 10 else number(least)


def _others(run: Run) -> list[str]:
    """Returns the optimizers to compare with AdamW; none if the run has no cells of AdamW."""
    names = run.optimizers()
    return [name for name in names if name != BASELINE] if BASELINE in names else []


def strictly(run: Run) -> list[str]:
    """Returns sentences on how many trainings grokked strictly; nothing if none grokked."""
    arms = {arm.label: arm for arm in run.pooled() if arm.grokked}
    if len(arms) > FEW_OPTIMIZERS:
        arms = {"all optimizers": Arm.of(run, run.rows)}
    if not arms:
        return []
    strict = "; ".join(f"{name} {arm.strict} of {arm.grokked}" for name, arm in arms.items())
    soon = "; ".join(f"{name} {arm.soon} of {arm.grokked}" for name, arm in arms.items())
    return [
        f"Grokked strictly, at twice the memorised epoch or later: {strict} trainings that grokked "
        "at all.",
        f"Grokked within {SOON} epochs of memorising: {soon}.",
    ]


def sentences(run: Run) -> list[str]:
    """Returns a sentence for each optimizer with its ratios of memorising, delay and grokking."""
    return [text for name in _others(run) if (text := _compared(run, name))]


def _compared(run: Run, optimizer: str) -> str:
    """Returns a sentence with an optimizer's ratios, or "" if it shares no panel with AdamW."""
    names = f"{optimizer_label(BASELINE)} over {optimizer_label(optimizer)}"
    both = pairs(run, optimizer)
    found = ratio(run, both)
    if found is None:
        return f"No ratio {names}: neither grokked within the budget." if both else ""
    several = len({panel.task for panel in both}) > 1
    noun = "task" if several else "output function" if len(both) > 1 else "seed"
    text = (
        f"Ratio of grokking epochs, {names}, paired by training, with 95 % interval: {found.text} "
        f"(n = {plural(found.observations, noun)}"
    )
    if found.bounded:
        text += f"; {plural(found.bounded, 'pair')} with a censored training at the budget"
    text += ")"
    for words, key in (("of epochs to memorise", "memorised"), ("of delay + 1", DELAY)):
        own = ratio(run, pairs(run, optimizer, key))
        text += f"; {words} {own.text}" if own else ""
    return f"{text}."


def tests(run: Run) -> list[list[str]]:
    """Returns the rows of the table of tests, in the order of `COLUMNS`; none without AdamW.

    They cover first all panels together, then each task, each output function and each panel.
    """
    keys = "memorised", DELAY, SUSTAINED
    of = {name: {key: pairs(run, name, key) for key in keys} for name in _others(run)}
    tested = {
        f"{name}/{panel}": p
        for name, found in of.items()
        for panel, pair in found[SUSTAINED].items()
        if (p := statistics.mann_whitney(*pair)) is not None
    }
    corrected = holm(tested)
    ranked = _signed_ranks(run, {name: found[SUSTAINED] for name, found in of.items()})
    rows = []
    for on, panels in groups(run).items():
        whole = len(panels) > 1 and panels == run.panels() and not any(p.point for p in panels)
        for name, found in of.items():
            there = [panel for panel in panels if panel in found[SUSTAINED]]
            # Unswept cells of AdamW count only once, so panels that share them are not pooled.
            if not there or len({_anchor(run, panel) for panel in there}) < len(there):
                continue
            ratios = [ratio(run, found[key], there) for key in keys]
            epochs, key = ratios[-1], f"{name}/{panels[0]}" if len(panels) == 1 else ""
            rows.append(
                [
                    optimizer_label(name),
                    on,
                    *_medians(run, [found[SUSTAINED][panel] for panel in there]),
                    str(epochs.observations) if epochs else "0",
                    *map(_text, ratios),
                    _detectable(epochs),
                    p_text(tested.get(key)),
                    p_text(corrected.get(key)),
                    p_text(ranked.get(name)) if whole else "–",
                    p_text(_log_rank(run, name)) if whole else "–",
                ]
            )
    return rows


def _anchor(run: Run, panel: Panel) -> Panel:
    """Returns the panel of the AdamW cells with which a panel is compared."""
    return panel if run.of(panel, BASELINE) else panel._replace(point="")


def _signed_ranks(run: Run, of: Mapping[str, Pairs]) -> dict[str, float]:
    """Returns signed-rank p values over all tasks by optimizer, with Holm's correction."""
    found = {
        name: statistics.signed_rank([*own.values()], run.budget, [p.task for p in own])
        for name, own in of.items()
    }
    return holm({name: p for name, p in found.items() if p is not None})


def groups(run: Run) -> dict[str, list[Panel]]:
    """Returns groups of panels that are tested together, by their names in the table."""
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
    """Returns each optimizer's ratios over all panels by `CRITERIA`; none without AdamW."""
    return [
        [optimizer_label(name), *(_text(ratio(run, pairs(run, name, key))) for key in CRITERIA)]
        for name in _others(run)
    ]


def _medians(run: Run, found: Sequence[Pair]) -> list[str]:
    """Returns the median epoch of both optimizers, and the numbers of censored cells."""
    texts = []
    for which in (0, 1):
        values = [epoch for pair in found for epoch in pair[which].values()]
        median = censored_median(values, [run.budget] * len(values)).text()
        censored = sum(epoch is None for epoch in values)
        texts.append(median + (f" ({censored} of {len(values)} censored)" if censored else ""))
    return texts


def _log_rank(run: Run, fast: str) -> float | None:
    both = ([r["grok_epoch_sustained"] for r in run.of(None, name)] for name in (BASELINE, fast))
    return statistics.log_rank(*both, run.budget)


def items(run: Run) -> list[object]:
    """Returns the tests and, for a run without a sweep, the ratios by other criteria."""
    if not (rows := tests(run)):
        return []
    table = Table.of_texts(COLUMNS, rows, names=2).known()
    shown = [column for column in table.columns if column[0] != "Mann–Whitney p"]
    found: list[object] = [TESTS, table._replace(columns=shown)]
    if not run.is_sweep and (by := criteria(run)):
        found += [OTHERWISE, Table.of_texts(("AdamW over", *CRITERIA), by)]
    return found
