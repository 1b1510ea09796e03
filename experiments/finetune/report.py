"""Report of one command's fine-tunings: reads their files, draws figures, writes report.html.

It never trains, so it can be made again: `python -m experiments.finetune.report FOLDER`.
"""

import importlib.metadata
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from etils import epath
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.commands import flat, print_warning, reporting
from experiments.figures import figure_style, optimizer_label
from experiments.finetune import claims
from experiments.finetune.arms import ARMS, QUIRKS
from experiments.finetune.config import ArmName
from experiments.finetune.report_data import (
    Run,
    Trained,
    differing,
    found_arms,
    idle_clip,
    load_run,
)
from experiments.finetune.report_figures import draw
from experiments.pages import number, save_figure, text_table, together, write_page
from experiments.runs import RunError, read_json, write_json


def _share(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %"


def _last(name: str, form: Callable[[float], str]) -> Callable[[Run], str]:
    return lambda run: form(run.trained.last(name))


def _value(name: str) -> Callable[[Run], str]:
    return lambda run: _share(run.trained.values()[name])


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"


def _steps(run: Run) -> str:
    done, whole = run.trained.done, run.trained.steps
    return f"{whole:,}" if done == whole else f"{done:,} of {whole:,}"


# The table: heading in the report, heading in the terminal ("" to leave it out), the text of a run.
COLUMNS: tuple[tuple[str, str, Callable[[Run], str]], ...] = (
    ("arm", "arm", lambda run: optimizer_label(run.arm)),
    ("held-out loss (nats a token)", "held-out\nloss", _last("validation_loss", _loss)),
    ("held-out accuracy", "held-out\nacc.", _last("validation_accuracy", _share)),
    ("token accuracy, first quarter", "early\nacc.", _value("early_accuracy")),
    ("token accuracy, last quarter", "late\nacc.", _value("late_accuracy")),
    (
        "gradient norm, median",
        "grad.\nnorm",
        lambda run: number(run.summary.get("gradient_norm_median")),
    ),
    ("its quartiles' distance ÷ median", "its\nspread", _value("gradient_norm_spread")),
    ("largest attention logit", "", lambda run: number(run.summary.get("max_logit"))),
    ("skipped steps", "", lambda run: f"{run.skipped:,}"),
    ("steps", "steps", _steps),
    ("tokens/s", "tokens\n/s", lambda run: number(run.tokens_per_second)),
)


CAPTION = (
    "held-out loss: nats a token; early, late acc.: mean token accuracy of the\n"
    "rows trained on, first and last quarter of the steps\n"
    "its spread: distance of the gradient norm's quartiles, of its median"
)


def terminal_table(runs: Sequence[Run]) -> Table:
    """The table for the terminal, with the numbers of the HTML table."""
    return text_table("Fine-tuning, by arm", COLUMNS, runs, CAPTION)


def judged(runs: Sequence[Run]) -> list[claims.Judged]:
    """The post's claims beside what the runs came to."""
    return claims.judge({run.arm: {run.trained.seed: run.trained.values()} for run in runs})


def abstract(runs: Sequence[Run]) -> list[str]:
    """The result in plain sentences, every number computed from the records."""
    sentences = [
        f"The log of {optimizer_label(run.arm)} is damaged: {damage}."
        for run in runs
        for damage in run.damage
    ]
    sentences += [
        f"{optimizer_label(run.arm)} has done {_steps(run)} steps."
        for run in runs
        if not run.trained.finished
    ]
    if different := differing(run.settings for run in runs):
        sentences.append(f"Beside the arm the runs differ in {', '.join(different)}.")
    losses = {
        optimizer_label(run.arm): run.trained.last("validation_loss")
        for run in runs
        if run.trained.finished
    }
    ranked = sorted(
        (name for name in losses if math.isfinite(losses[name])), key=lambda name: losses[name]
    )
    if ranked:
        each = ", ".join(f"{name} at {losses[name]:.4f}" for name in ranked[1:])
        text = (
            f"{ranked[0]} ends with the lowest held-out loss, {losses[ranked[0]]:.4f} nats a token"
        )
        text = f"{ranked[0]} ends at {losses[ranked[0]]:.4f} nats a token" if not each else text
        sentences.append(f"{text}{', ' if each else ''}{each}, {_before(runs)} before training.")
    sentences += [f"{name} has no finite loss at the end." for name in losses if name not in ranked]
    if len(runs) > 1:
        sentences += claims.sentences(judged(runs))
        sentences.append("One training each, with one seed: no statistics.")
    optimizer = runs[0].settings["optimizer"]
    if idle := idle_clip([run.trained for run in runs], optimizer):
        sentences.append(idle)
    if quirks := optimizer["quirks"]:
        count = "one quirk" if len(quirks) == 1 else f"{len(quirks)} quirks"
        sentences.append(f"They train with {count} of the released code.")
    for run in runs:
        if run.skipped:
            steps = "step" if run.skipped == 1 else "steps"
            sentences.append(f"{optimizer_label(run.arm)} skipped {run.skipped:,} {steps}.")
    return sentences


def _before(runs: Sequence[Run]) -> str:
    """The held-out loss of the model that all begin with."""
    steps, losses = runs[0].trained.series["validation_loss"]
    return _loss(losses[0]) if len(steps) and steps[0] == 0 else "–"


def write_report(folder: epath.Path, arms: Sequence[ArmName]) -> epath.Path:
    """Writes the figures, report.html and summary.json into the folder above the arms' own.

    Args:
        folder: has a folder of each arm, which may be unfinished.
        arms: whose runs to tell of.

    Returns:
        The path of the page.

    Raises:
        RunError: there is no such run.
        ValueError: a file is damaged; the message names it.
    """
    runs = [load_run(folder / arm) for arm in arms]
    for run in runs:
        for damage in run.damage:
            print_warning(f"The log of {optimizer_label(run.arm)} is damaged: {damage}.")
    verdicts = judged(runs)
    write_json(
        folder / "summary.json",
        {
            "runs": {run.arm: run.summary or None for run in runs},
            "claims": [of._asdict() for of in verdicts],
        },
    )
    trainings: dict[str, list[Trained]] = {run.arm: [run.trained] for run in runs}
    with figure_style():
        figures = {
            name: save_figure(figure, folder / f"{name}.png")
            for name, figure in draw(trainings).items()
        }
    named = {optimizer_label(run.arm): run for run in runs}
    quirks = dict.fromkeys(q for r in runs for q in r.settings["optimizer"]["quirks"])
    return write_page(
        Path(__file__).parent / "report.html.jinja",
        folder / "report.html",
        study="Fine-tuning a Qwen3",
        command="experiments.finetune.report",
        config=together({name: _settings(run) for name, run in named.items()}),
        machine=together({name: run.summary.get("machine", {}) for name, run in named.items()}),
        version=importlib.metadata.version("muon-jax"),
        abstract=abstract(runs),
        columns=[heading for heading, *_ in COLUMNS],
        rows=[[form(run) for *_, form in COLUMNS] for run in runs],
        figures=figures,
        verdicts=verdicts,
        about={optimizer_label(arm): ARMS[arm] for arm in arms},
        quirks={quirk: QUIRKS[quirk] for quirk in quirks},
        runs=runs,
        data=next((run.summary["data"] for run in runs if "data" in run.summary), None),
    )


def _settings(run: Run) -> dict[str, Any]:
    return {key: value for key, value in flat(run.settings).items() if key != "arm"}


def _refuse_a_suite(folder: epath.Path) -> None:
    """Raises a RunError where a folder is a suite's, whose report is another one."""
    config = folder / "config.json"
    if config.exists() and "suite" in (settings := read_json(config)):
        raise RunError(
            f"{folder} is of --suite {settings['suite']}. Its report is made by `python -m "
            f"experiments.finetune.suites.report {folder}`."
        )


def main(folder: tyro.conf.Positional[str]) -> None:
    """Write the report of a comparison again from its files; nothing is trained.

    Args:
        folder: With a folder of each arm, e.g. runs/finetune/study.
    """
    path = epath.Path(folder)
    with reporting(folder):
        _refuse_a_suite(path)
        arms = found_arms(path)
        page = write_report(path, arms)
        runs = [load_run(path / arm) for arm in arms]
        console = Console()
        console.print(terminal_table(runs))
        console.print(Text(str(page)))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.finetune.report")
