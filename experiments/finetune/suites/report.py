"""Report of a suite: reads its folder, draws its figures, writes report.html.

It never trains: `python -m experiments.finetune.suites.report FOLDER`.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.commands import flat, reporting
from experiments.figures import figure_style, optimizer_label
from experiments.finetune import claims
from experiments.finetune.arms import ARMS, QUIRKS
from experiments.finetune.claims import MEASURES, Judged, difference_text
from experiments.finetune.report_data import idle_clip
from experiments.finetune.suites import answers
from experiments.finetune.suites.config import CONTROLLED, PRETRAINED, PUBLISHED, SuiteName
from experiments.finetune.suites.figures import draw
from experiments.finetune.suites.results import (
    BY_BASE,
    TO_ADAMW_BY_BASE,
    TO_PUBLISHED,
    Contrast,
    Group,
    contrasts,
    groups,
    values,
)
from experiments.pages import number, save_figure, text_table, write_page
from experiments.runs import write_json
from experiments.sweep import Files, load_run

TITLES: dict[SuiteName, str] = {
    "as_published": "Fine-tuning as the released code does it",
    "controlled": "Fine-tuning with all arms on equal terms",
    "mismatch": "Fine-tuning models that AdamW and Muon pretrained",
    "qk": "QK-clip in fine-tuning, with QK-norm and without",
}
# How many effects of quirks the abstract tells, the largest ones.
TOLD = 6


class Results(NamedTuple):
    """A suite's folder, read."""

    which: SuiteName
    files: Files
    groups: list[Group]
    contrasts: list[Contrast]
    clips: dict[str, dict[str, float]]

    @property
    def variant(self) -> str | None:
        """Whose arms the post's claims are about; None where the suite asks something else."""
        return {"controlled": CONTROLLED, "as_published": PUBLISHED}.get(self.which)

    @property
    def verdicts(self) -> list[Judged]:
        """The claims that the suite answers."""
        if self.variant:
            return claims.judge(values(self.groups, self.variant))
        if self.which == "mismatch":
            return answers.mismatch(self.contrasts)
        return answers.clip(self.clips)


def load(folder: Path) -> Results:
    """Reads a suite's folder.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is not what it should be; the message names it.
    """
    files = load_run(folder)
    which = files.config.get("suite")
    if which not in TITLES:
        raise ValueError(f"{folder / 'config.json'} is of no suite of this study: {which!r}.")
    found = groups(files)
    return Results(which, files, found, contrasts(which, found), files.config["clips"])


def _share(name: str) -> Callable[[Group], str]:
    def text(of: Group) -> str:
        share = of.mean(name)
        return f"{100 * share:.2f} %" if math.isfinite(share) else "–"

    return text


# The table: heading in the report, heading in the terminal ("" to leave it out), the text.
COLUMNS: tuple[tuple[str, str, Callable[[Group], str]], ...] = (
    ("variant", "variant", lambda of: of.variant),
    ("arm", "arm", lambda of: of.label),
    ("best rate", "rate", lambda of: f"{of.best.rate:g}" + " (edge)" * of.at_edge),
    ("final loss (nats a token)", "loss", lambda of: of.loss_text()),
    ("held-out accuracy", "accuracy", _share("validation_accuracy")),
    ("token accuracy, first quarter", "", _share("early_accuracy")),
    ("token accuracy, last quarter", "", _share("late_accuracy")),
    ("gradient norm, quartiles' distance ÷ median", "", _share("gradient_norm_spread")),
    ("largest attention logit", "logit", lambda of: number(of.largest_logit())),
    ("seeds", "", lambda of: str(len(of.best.losses))),
    ("cells", "", lambda of: str(of.cells)),
    ("diverged", "", lambda of: str(of.diverged)),
    ("skipped steps", "", lambda of: str(of.skipped)),
)


def terminal_table(folder: Path) -> Table:
    """The table for the terminal, with the numbers of the HTML table."""
    results = load(folder)
    caption = "\n".join(abstract(results))
    return text_table(TITLES[results.which], COLUMNS, results.groups, caption, names=2)


def contrast_text(of: Contrast) -> str:
    """A difference with its interval and p, e.g. "−0.0123 nats [−0.0200, −0.0046], p 0.012"."""
    text = difference_text(MEASURES["validation_loss"], of.mean, of.interval)
    return text if of.p is None else f"{text}, p {_p(of)}"


def _p(of: Contrast) -> str:
    return "–" if of.p is None else "< 0.001" if of.p < 1e-3 else f"{of.p:.3f}"


def abstract(results: Results) -> list[str]:
    """The result in plain sentences, every number computed from the run."""
    found, files = results.groups, results.files
    if not found:
        return ["No cell has finished yet."]
    sentences = []
    total = files.summary["cells_total"]
    if len(files.rows) < total:
        sentences.append(f"{len(files.rows)} of {total} cells finished so far.")
    if results.variant:
        sentences += _arms(results)
        sentences += claims.sentences(results.verdicts)
        own = [of for group in found if group.variant == results.variant for of in group.trained]
        if idle := idle_clip(own, files.config["optimizer"]):
            sentences.append(idle)
    if results.which == "as_published":
        sentences += _removals(results.contrasts)
    if results.which == "mismatch":
        sentences += answers.mismatch_sentences(results.contrasts, contrast_text)
    if results.which == "qk":
        sentences += answers.clip_sentences(results.clips, found, results.contrasts, contrast_text)
    if edge := [f"{of.label} ({of.variant})" for of in found if of.at_edge]:
        sentences.append(f"Still best at the edge of the rates tried: {', '.join(edge)}.")
    if diverged := sum(of.diverged for of in found):
        sentences.append(f"{diverged} {'cell' if diverged == 1 else 'cells'} diverged.")
    return sentences


def _arms(results: Results) -> list[str]:
    """Which arm is the lowest, and which differ from AdamW."""
    own = [of for of in results.groups if of.variant == results.variant]
    ranked = sorted((of for of in own if math.isfinite(of.loss)), key=lambda of: of.loss)
    if not ranked:
        return ["Every arm diverged."]
    first = ranked[0]
    names = " and ".join(of.label for of in ranked if of.loss == first.loss)
    seeds = len(first.best.losses)
    sentences = [
        f"{names} {'has' if names == first.label else 'have'} the lowest mean held-out loss, "
        f"{first.loss_text()} nats a token over {seeds} {'seed' if seeds == 1 else 'seeds'}, at "
        f"the rate {first.best.rate:g}; {first.before:.4f} before training."
    ]
    beside = [of for of in results.contrasts if of.family == "minus AdamW" and of.gaps]
    sentences += [f"{of.name} minus AdamW: {contrast_text(of)}." for of in beside]
    if tested := [of for of in beside if of.p is not None]:
        lower, higher = (sum(of.sign == sign for of in tested) for sign in (-1, 1))
        arms = "arm" if len(tested) == 1 else "arms"
        sentences.append(
            f"Of {len(tested)} {arms} beside AdamW, {lower} end lower and {higher} higher at p < "
            "0.05 after Holm's correction."
        )
    return sentences


def _removals(found: Sequence[Contrast]) -> list[str]:
    tested = [of for of in found if of.family == TO_PUBLISHED and of.p is not None]
    if not tested:
        return []
    told = sorted((of for of in tested if of.sign), key=lambda of: -abs(of.mean))
    first, rest = told[:TOLD], told[TOLD:]
    names = [f"{of.name} ({contrast_text(of)})" for of in first]
    if rest:
        at_most = MEASURES["validation_loss"].text(abs(rest[0].mean))
        names.append(f"the other {len(rest)} by at most {at_most}")
    return [
        f"Of {len(tested)} removals of one quirk, {len(told)} change the final loss at p < 0.05 "
        f"after Holm's correction{': ' if told else ''}{'; '.join(names)}."
    ]


def matrix(results: Results) -> tuple[list[str], list[list[str]]]:
    """Base × arm: columns and rows of the table of the mismatch suite."""
    by_name = {(of.family, of.name): of for of in results.contrasts}
    losses = {(of.variant, of.arm): of.loss_text() for of in results.groups}
    columns, rows = ["fine-tuned with"], []
    for base in PRETRAINED.values():
        columns += [f"{base}: final loss", f"{base}: minus AdamW"]
    columns.append("difference of the two differences")
    for arm in dict.fromkeys(of.arm for of in results.groups):
        label = optimizer_label(arm)
        row = [label]
        for base in PRETRAINED.values():
            beside = by_name.get((TO_ADAMW_BY_BASE, f"{label}, {base}"))
            row += [losses.get((base, arm), "–"), contrast_text(beside) if beside else "–"]
        crossed = by_name.get((BY_BASE, label))
        rows.append([*row, contrast_text(crossed) if crossed else "–"])
    return columns, rows


def write_report(folder: Path) -> Path:
    """Writes the figures, report.html and the results in summary.json into the suite's folder.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is not what it should be; the message names it.
    """
    results = load(folder)
    files, found = results.files, results.groups
    verdicts = results.verdicts
    summary = files.summary | {
        "groups": [_group_json(of) for of in found],
        "contrasts": [_contrast_json(of) for of in results.contrasts],
        "claims": [of._asdict() for of in verdicts],
    }
    write_json(folder / "summary.json", summary)
    with figure_style():
        figures = {
            name: save_figure(figure, folder / f"{name}.png") | {"caption": caption}
            for name, (caption, figure) in draw(results.which, found, results.contrasts).items()
        }
    arms = dict.fromkeys(of.arm for of in found)
    return write_page(
        Path(__file__).parents[1] / "suite.html.jinja",
        folder / "report.html",
        study=TITLES[results.which],
        command="experiments.finetune.suites.report",
        config=flat({k: v for k, v in files.config.items() if k not in ("suite", "clips")}),
        machine=files.summary["machine"],
        version=files.summary["version"],
        abstract=abstract(results),
        which=results.which,
        columns=[heading for heading, *_ in COLUMNS],
        rows=[[form(of) for *_, form in COLUMNS] for of in found],
        differences=[
            [of.family, of.name, contrast_text(of._replace(p=None)), _p(of), str(len(of.gaps))]
            for of in results.contrasts
        ],
        matrix=matrix(results) if results.which == "mismatch" else None,
        clips=answers.clip_rows(results.clips),
        verdicts=verdicts,
        figures=figures,
        about={optimizer_label(arm): ARMS[arm] for arm in arms},
        quirks={name: QUIRKS[name] for name in files.config["optimizer"]["quirks"]},
        files=files,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _group_json(of: Group) -> dict[str, Any]:
    return {
        "variant": of.variant,
        "arm": of.arm,
        "best_rate": of.best.rate,
        "at_edge": of.at_edge,
        "validation_loss": _finite(of.loss),
        "losses_by_seed": {str(seed): _finite(x) for seed, x in sorted(of.best.losses.items())},
        "losses_by_rate": {f"{rate:g}": _finite(x) for rate, x in of.losses.items()},
        "max_logit": _finite(of.largest_logit()),
        "cells": of.cells,
        "diverged": of.diverged,
    }


def _contrast_json(of: Contrast) -> dict[str, Any]:
    return {
        "family": of.family,
        "name": of.name,
        "by_seed": {str(seed): gap for seed, gap in of.gaps.items()},
        "mean": _finite(of.mean),
        "interval": of.interval and [of.interval.low, of.interval.high],
        "p_holm": of.p,
    }


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Write the report of a suite again from its files; nothing is trained.

    Args:
        folder: The suite's folder, e.g. runs/finetune/controlled.
    """
    with reporting(folder):
        path = write_report(folder)
        Console().print(terminal_table(folder), Text(str(path)))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.finetune.suites.report")
