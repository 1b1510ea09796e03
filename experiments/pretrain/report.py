"""Report of pretraining runs: reads their files, draws figures, writes report.html.

It never trains, so it can be made again: `python -m experiments.pretrain.report FOLDER`.
"""

import importlib.metadata
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro
from etils import epath
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.commands import flat, print_warning, reporting
from experiments.figures import figure_style, optimizer_label
from experiments.optimizers import OptimizerName
from experiments.pages import flop, number, save_figure, text_table, together, write_page
from experiments.pretrain.report_data import (
    MEASURES,
    Run,
    differences,
    found_optimizers,
    held_out_curve,
    load_runs,
    loss_text,
    measure_of,
)
from experiments.pretrain.report_figures import draw
from experiments.runs import write_json

_BASELINE = optimizer_label("adamw")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.3g} %"


def _newton_schulz(run: Run) -> str:
    return _percent(run.summary.get("costs", {}).get("newton_schulz_share"))


def _model_speed(run: Run) -> str:
    speed = run.median("flops_per_second")
    return "–" if speed is None else f"{flop(speed)}/s"


def _steps_text(run: Run) -> str:
    whole = run.config.steps
    return f"{whole:,}" if run.steps == whole else f"{run.steps:,} of {whole:,}"


# The table: heading in the report, heading in the terminal ("" to leave it out), the text of a run.
COLUMNS: tuple[tuple[str, str, Callable[[Run], str]], ...] = (
    ("optimizer", "optimizer", lambda run: optimizer_label(run.optimizer)),
    ("learning rate", "rate", lambda run: f"{run.config.rate(run.optimizer):g}"),
    ("held out (bits a byte)", "bits\na byte", lambda run: loss_text(run.last("bits_per_byte"))),
    (
        "held out (nats a token)",
        "nats\na token",
        lambda run: loss_text(run.last("validation_loss")),
    ),
    ("training loss (nats a token)", "train\nloss", lambda run: loss_text(run.last("loss"))),
    ("tokens", "", lambda run: f"{run.steps * run.config.tokens_per_step:,}"),
    ("steps", "steps", _steps_text),
    ("tokens/s", "tokens\n/s", lambda run: number(run.median("tokens_per_second"))),
    ("model FLOPs/s", "", _model_speed),
    ("MFU", "MFU", lambda run: _percent(run.median("mfu"))),
    ("training time (s)", "time\n(s)", lambda run: number(run.last("seconds"))),
    ("skipped steps", "skip", lambda run: number(run.last("skipped"))),
    ("Newton–Schulz of the FLOPs", "NS", _newton_schulz),
    ("params", "", lambda run: run.summary.get("params_sha256", "–")[:8]),
)


CAPTION = (
    "bits, nats: held-out text; train loss: last step, in nats\n"
    "tokens/s: median; skip: steps that changed nothing\n"
    "MFU: of the peak; NS: Newton-Schulz, of the FLOPs"
)


def columns_of(runs: Sequence[Run]) -> list[tuple[str, str, Callable[[Run], str]]]:
    """The columns in which any run has something to say."""
    return [column for column in COLUMNS if any(column[2](run) != "–" for run in runs)]


def terminal_table(runs: Sequence[Run]) -> Table:
    """The table for the terminal, with the numbers of the HTML table."""
    return text_table("Pretraining", columns_of(runs), runs, CAPTION)


def abstract(runs: Sequence[Run]) -> list[str]:
    """The result in plain sentences, every number computed from the records."""
    sentences = [
        f"The log of {optimizer_label(run.optimizer)} is damaged: {damage}."
        for run in runs
        for damage in run.damage
    ]
    sentences += [
        f"{optimizer_label(run.optimizer)} has done {run.steps:,} of {run.config.steps:,} steps."
        for run in runs
        if run.steps < run.config.steps
    ]
    if different := differences(runs):
        sentences.append(f"Beside the optimizer the runs differ in {', '.join(different)}.")
    key = measure_of(runs)
    curves = {optimizer_label(run.optimizer): dict(held_out_curve(run, key)) for run in runs}
    common = set.intersection(*map(set, curves.values()))
    if not common:
        return [*sentences, "There is no evaluation that all have come to."]
    tokens, unit = max(common), MEASURES[key]
    losses = {name: curve[tokens] for name, curve in curves.items()}
    ranked = sorted((name for name in losses if math.isfinite(losses[name])), key=losses.get)
    when = f"After {tokens:,} tokens"
    if ranked:
        first, *rest = ranked
        text = f"{when}, {first} predicts the held-out text at {losses[first]:.4f} {unit}"
        text += "".join(f", {name} at {losses[name]:.4f}" for name in rest)
        before = curves[first].get(0, math.nan)
        if len(runs) == 1 and tokens and math.isfinite(before):
            text += f", {before:.4f} before training"
        sentences.append(text + ".")
        if rest:
            other = _BASELINE if _BASELINE in rest else rest[0]
            sentences += _comparison(first, other, curves, tokens, unit)
    sentences += [
        f"{when}, the held-out loss of {name} is not finite."
        for name in losses
        if name not in ranked
    ]
    for run in runs:
        if skipped := run.last("skipped"):
            steps = "step" if skipped == 1 else "steps"
            sentences.append(f"{optimizer_label(run.optimizer)} skipped {skipped:,} {steps}.")
    if len(runs) > 1:
        sentences.append("One training each, with one seed: no statistics.")
    return sentences


def _comparison(
    first: str, other: str, curves: dict[str, dict[int, float]], end: int, unit: str
) -> list[str]:
    """By how much the first is lower at the end, and where it passes the other one's last value.

    Between two evaluations the loss is taken to fall with the logarithm of the tokens.
    """
    goal = curves[other][end]
    less = goal - curves[first][end]
    if less < 5e-5:
        return [f"{first} and {other} are level."]
    sentence = f"{first} is lower than {other} by {less:.4f} {unit}, {100 * less / goal:.2g} %"
    points = [(n, x) for n, x in sorted(curves[first].items()) if n and math.isfinite(x)]
    below = next(i for i, (_, x) in enumerate(points) if x <= goal)
    if below:
        (n0, x0), (n1, x1) = points[below - 1 : below + 1]
        tokens = n0 * (n1 / n0) ** ((x0 - goal) / (x0 - x1))
        sentence += f", and passes its last value after {100 * tokens / end:.0f} % of the tokens"
    return [sentence + "."]


def write_report(folder: epath.Path, optimizers: Sequence[OptimizerName]) -> epath.Path:
    """Writes the figures and report.html into a folder, and for several runs summary.json.

    Args:
        folder: of the run of one optimizer, or above those of several; they may be unfinished.
        optimizers: whose runs it has.

    Returns:
        The path of the page.

    Raises:
        RunError: there is no such run.
        ValueError: a file is damaged; the message names it.
    """
    runs = load_runs(folder, optimizers)
    for run in runs:
        for damage in run.damage:
            print_warning(f"The log of {optimizer_label(run.optimizer)} is damaged: {damage}.")
    if len(runs) > 1:
        of = {run.optimizer: run.summary or None for run in runs}
        write_json(folder / "summary.json", {"runs": of})
    with figure_style():
        figures = {
            name: save_figure(figure, folder / f"{name}.png") for name, figure in draw(runs).items()
        }
    return write_page(
        Path(__file__).parent / "report.html.jinja",
        folder / "report.html",
        study="Pretraining a language model",
        command="experiments.pretrain.report",
        config=together({optimizer_label(run.optimizer): flat(run.settings) for run in runs}),
        machine=together(
            {optimizer_label(r.optimizer): r.summary.get("machine", {}) for r in runs}
        ),
        version=importlib.metadata.version("muon-jax"),
        abstract=abstract(runs),
        columns=[heading for heading, *_ in columns_of(runs)],
        rows=[[form(run) for *_, form in columns_of(runs)] for run in runs],
        figures=figures,
        measure=MEASURES[measure_of(runs)],
        runs=runs,
        text=next((run.summary["data"] for run in runs if "data" in run.summary), None),
    )


def main(folder: tyro.conf.Positional[str]) -> None:
    """Write the report of a pretraining run again from its files; nothing is trained.

    Args:
        folder: Of a run, or of several optimizers' runs, e.g. runs/pretrain/tiny.
    """
    path = epath.Path(folder)
    with reporting(folder):
        optimizers = found_optimizers(path)
        page = write_report(path, optimizers)
        runs = load_runs(path, optimizers)
        console = Console()
        console.print(terminal_table(runs))
        console.print(Text(str(page)))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.pretrain.report")
