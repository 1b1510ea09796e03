"""Report of one pretraining run, or of runs with several optimizers."""

import functools
import math
from collections.abc import Sequence

from etils import epath

from experiments.optimizers import OptimizerName
from experiments.pretrain import report_figures as figures
from experiments.pretrain.report_data import (
    MEASURES,
    Run,
    differences,
    load_runs,
    loss_text,
    measure_of,
)
from experiments.report import records
from experiments.report.figures import optimizer_label
from experiments.report.page import Code, Column, Picture, Report, Section, Table
from experiments.report.text import all_told, flop, form, number, plural

_BASELINE = optimizer_label("adamw")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.3g} %"


def _newton_schulz(run: Run) -> str:
    return _percent(run.summary.get("costs", {}).get("newton_schulz_share"))


def _model_speed(run: Run) -> str:
    speed = run.median("flops_per_second")
    return "–" if speed is None else f"{flop(speed)}/s"


def _steps_text(run: Run) -> str:
    done, whole = f"{run.steps:,}", f"{run.whole:,}"
    return whole if done == whole else f"{done} of {whole}"


COLUMNS: tuple[Column, ...] = (
    ("optimizer", "optimizer", lambda run: run.label),
    ("learning rate", "rate", lambda run: form(run.rate, "g")),
    ("held out (bits per byte)", "bits\na byte", lambda run: loss_text(run.last("bits_per_byte"))),
    (
        "held out (nats per token)",
        "nats\na token",
        lambda run: loss_text(run.last("validation_loss")),
    ),
    ("training loss (nats per token)", "train\nloss", lambda run: loss_text(run.last("loss"))),
    ("tokens", "", lambda run: f"{run.steps * run.tokens_per_step:,}"),
    ("steps", "steps", _steps_text),
    ("tokens/s", "tokens\n/s", lambda run: number(run.median("tokens_per_second"))),
    ("model FLOPs/s", "", _model_speed),
    ("MFU", "MFU", lambda run: _percent(run.median("mfu"))),
    ("training time (s)", "time\n(s)", lambda run: number(run.last("seconds"))),
    ("skipped steps", "skip", lambda run: number(run.last("skipped"))),
    ("Newton–Schulz of the FLOPs", "NS", _newton_schulz),
    ("params", "", lambda run: run.summary.get("params_sha256", "–")[:8]),
)
NOTE = (
    "bits, nats: held-out text; train loss: last step, in nats\n"
    "tokens/s: median; skip: steps skipped\n"
    "MFU: share of peak FLOP/s; NS: Newton-Schulz, share of FLOPs"
)
CAPTION = (
    "One training with one seed per row. Held out: the last evaluation, on the same text for "
    "all. Training loss: the last logged step. “–”: unknown, NaN or Inf."
)
MEASURED = {
    "Text": "{data[name]}: {data[train_tokens]:,} tokens to train on, {data[validation_tokens]:,} "
    "held out, a vocabulary of {data[vocabulary]:,}. SHA-256 {data[sha256]}.",
    "Held out": "Mean cross-entropy of the same sequences at every evaluation, in nats per "
    "token, and in bits over the bytes of the text, if their number is known.",
    "Seed": "Sets the initial parameters and the data order, in the same way for all optimizers.",
    "Learning rates": "The optimizer's own learning rate after warm-up. Optimizers that leave "
    "embedding, head and gains to AdamW train them at AdamW's learning rate.",
    "Training time, tokens/s, FLOPs/s, MFU": "The time includes compilation, but not evaluations "
    "and checkpoints. Tokens/s and FLOPs/s are medians over logged intervals, so compilation does "
    "not affect them. FLOPs are those of the model's forward and backward pass, counted from "
    "shapes; MFU is their share of the devices' peak.",
    "Skipped steps": "Steps that were not applied, since their loss or gradient had NaN or Inf or "
    "their gradient norm exceeded --spike.",
    "Newton–Schulz of the FLOPs": "FLOPs of the orthogonalisation as a share of its and the "
    "model's, counted from shapes. It falls with the tokens per step, here {tokens_per_step:,}.",
    "Params": "Beginning of the SHA-256 of the final float32 parameters, which summary.json has "
    "in full.",
}


def table(runs: Sequence[Run]) -> Table:
    """Returns the table of the runs, without columns that are empty for all of them."""
    return Table(COLUMNS, runs, CAPTION, "Pretraining", NOTE).known()


def abstract(runs: Sequence[Run]) -> list[str]:
    """Returns sentences with the results, computed from the records."""
    sentences = records.damaged(runs) + [
        f"{run.label} has done {run.steps:,} of {run.whole:,} steps."
        for run in runs
        if run.steps < run.whole
    ]
    if different := differences(runs):
        sentences.append(f"Besides the optimizer the runs differ in {', '.join(different)}.")
    key = measure_of(runs)
    curves = {run.label: dict(run.held_out(key)) for run in runs}
    common = set.intersection(*map(set, curves.values()))
    if not common:
        return [*sentences, "No evaluation has been reached by all runs."]
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
            sentences.append(_comparison(first, other, curves, tokens, unit))
    sentences += [
        f"{when}, the held-out loss of {name} is NaN or Inf."
        for name in losses
        if name not in ranked
    ]
    sentences += [
        f"{run.label} skipped {plural(skipped, 'step')}."
        for run in runs
        if (skipped := run.last("skipped"))
    ]
    several = ["Each is one training with one seed, so there are no statistics."] * (len(runs) > 1)
    return sentences + several


def _comparison(
    first: str, other: str, curves: dict[str, dict[int, float]], end: int, unit: str
) -> str:
    """Returns a sentence: how much lower the first optimizer is, and when it passes the other.

    Between two evaluations, the loss is interpolated linearly in the logarithm of the tokens.
    """
    goal = curves[other][end]
    less = goal - curves[first][end]
    if less < 5e-5:
        return f"{first} and {other} are equal."
    sentence = f"{first} is lower than {other} by {less:.4f} {unit}, {100 * less / goal:.2g} %"
    points = [(n, x) for n, x in sorted(curves[first].items()) if n and math.isfinite(x)]
    below = next(i for i, (_, x) in enumerate(points) if x <= goal)
    if below:
        (n0, x0), (n1, x1) = points[below - 1 : below + 1]
        tokens = n0 * (n1 / n0) ** ((x0 - goal) / (x0 - x1))
        sentence += f", and passes its last value after {100 * tokens / end:.0f} % of the tokens"
    return sentence + "."


PICTURES = (
    (
        figures.held_out_figure,
        "Held-out loss in {measure}, against training tokens and against training time at the "
        "run's median speed. The legend shows the last values. The evaluation before training "
        "is not on the log axis.",
        "Held-out loss against tokens and against training time, a line for each optimizer.",
    ),
    (
        figures.loss_figure,
        "Training loss of the logged steps. Thick: the mean over 6 % of them, fewer at the "
        "beginning.",
        "Training loss against tokens, a line for each optimizer.",
    ),
    (
        figures.optimization_figure,
        "The optimizer's own learning rate; the global gradient norm before clipping; the RMS "
        "of the update, including weight decay and learning rate, of hidden matrices and of all "
        "other parameters; the largest attention logit of all layers.",
        "Learning rate, gradient norm, update RMS and largest attention logit against step.",
    ),
    (
        figures.router_figure,
        "Load of the most and of the least used expert of all layers in one step, relative to "
        "an even load (values below 1/32 are drawn at 1/32); entropy of the router's normalised "
        "scores, mean over tokens and layers; dotted: entropy of equal scores.",
        "Largest and smallest load of an expert, and router entropy, against step.",
    ),
    (
        figures.experts_figure,
        "Load of every expert, mean over the last tenth of the logged steps.",
        "Load of every expert at the end, a panel for each optimizer.",
    ),
)


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """Returns the figures of the runs: none of routers in dense models, none without records."""
    evaluated = runs if any(r["step"] for run in runs for r in run.records.evaluated) else []
    trained = runs if any(run.records.trained for run in runs) else []
    routed = [run for run in runs if any("load" in record for record in run.records.trained)]
    measure = MEASURES[measure_of(runs)]
    return [
        Picture(
            draw.__name__.removesuffix("_figure"),
            functools.partial(draw, own),
            caption.format(measure=measure),
            alt,
        )
        for (draw, caption, alt), own in zip(
            PICTURES, (evaluated, trained, trained, routed, routed), strict=True
        )
        if own and all(run.config for run in own)
    ]


def report(folder: epath.Path, optimizers: Sequence[OptimizerName] = ()) -> Report:
    """Returns the report of the runs in a folder, which may be unfinished.

    Args:
        folder: The folder of one run, or that of several optimizers' folders.
        optimizers: The optimizers to report on. By default, all in the folder.

    Raises:
        RunError: If there is no such run.
        ValueError: If a file is damaged. The message names it.
    """
    runs = load_runs(folder, optimizers)
    facts = {"tokens_per_step": runs[0].tokens_per_step}
    facts |= next(({"data": run.summary["data"]} for run in runs if "data" in run.summary), {})
    samples = [Code(run.label, run.samples) for run in runs if run.samples]
    new = len(runs) > 1 and all(run.config for run in runs)
    return records.report(
        "Pretraining a language model",
        folder,
        runs,
        abstract(runs),
        table(runs),
        [
            Section("runs", "The run" if len(runs) == 1 else "The runs", [table(runs)]),
            Section("figures", "Figures", pictures(runs)),
            Section("samples", "What the models write", samples),
            Section("criteria", "How it was measured", [all_told(MEASURED, facts)]),
        ],
        {"runs": {run.optimizer: run.summary or None for run in runs}} if new else None,
    )
