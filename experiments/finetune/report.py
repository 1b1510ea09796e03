"""Report of one command's fine-tunings: all of its arms, and the post's claims about them."""

import math
from collections.abc import Callable, Sequence

from etils import epath

from experiments.finetune import claims
from experiments.finetune.arms import ARMS, QUIRKS
from experiments.finetune.config import ArmName
from experiments.finetune.report_data import Run, found_arms, idle_clip, load_run
from experiments.finetune.report_figures import pictures
from experiments.report import records
from experiments.report.figures import optimizer_label
from experiments.report.page import Column, Report, Section, Table
from experiments.report.text import all_told, form, number, plural


def _last(name: str, spec: str) -> Callable[[Run], str]:
    return lambda run: form(run.trained.last(name), spec)


def _value(name: str) -> Callable[[Run], str]:
    return lambda run: form(run.trained.values()[name], ".1%")


def _steps(run: Run) -> str:
    done, whole = run.trained.done, run.trained.steps
    return f"{whole:,}" if done == whole else f"{done:,} of {whole:,}"


COLUMNS: tuple[Column, ...] = (
    ("arm", "arm", lambda run: run.label),
    ("held-out loss (nats per token)", "held-out\nloss", _last("validation_loss", ".4f")),
    ("held-out accuracy", "held-out\nacc.", _last("validation_accuracy", ".1%")),
    (
        "loss on the pretraining text, rise (nats per token)",
        "forgot",
        lambda run: form(run.trained.forgot, "+.4f"),
    ),
    ("token accuracy, first quarter", "early\nacc.", _value("early_accuracy")),
    ("token accuracy, last quarter", "late\nacc.", _value("late_accuracy")),
    (
        "gradient norm, median",
        "grad.\nnorm",
        lambda run: number(run.summary.get("gradient_norm_median")),
    ),
    ("its interquartile range ÷ median", "its\nspread", _value("gradient_norm_spread")),
    ("largest attention logit", "", lambda run: number(run.summary.get("max_logit"))),
    ("skipped steps", "", lambda run: f"{run.skipped:,}"),
    ("steps", "steps", _steps),
    ("tokens/s", "tokens\n/s", lambda run: number(run.tokens_per_second)),
)
NOTE = (
    "held-out loss: nats per token; forgot: rise of loss on pretraining text\n"
    "early, late acc.: mean token accuracy of training examples, first and\n"
    "last quarter of the steps\n"
    "its spread: interquartile range of the gradient norm ÷ its median"
)
CAPTION = (
    "One training with one seed per row. Held out: the last evaluation, on the same examples "
    "for all. Token accuracy: mean over the first and the last quarter of the steps. Gradient "
    "norm: before clipping, of the steps after warm-up. “–”: unknown, NaN or Inf."
)
POST = (
    "KingNish, “Muon vs MuonClip vs Muon+AdamW for Fine-Tuning”, Hugging Face blog, December "
    "2025. “Muon alone” is its optimizer with frozen gains, “the hybrid” Muon + AdamW. With "
    "several seeds, a verdict requires a 95 % interval, paired by seed, that excludes zero, and "
    "a refutation also p < 0.05 after Holm's correction; with one seed it is of one run only."
)
MEASURED = {
    "Examples": "{data[name]}: {data[rows]:,}, of which {data[held_out_rows]:,} are held out by "
    "group; {data[learnt]:,} of {data[tokens]:,} tokens are trained on; {data[truncated]:,} "
    "examples were truncated, {data[too_long]:,} omitted. SHA-256 {data[sha256]}.",
    "Mean token accuracy": "As in trl: the share of trained-on tokens that have the largest "
    "logit, in the examples of the step, averaged over microbatches.",
    "Held out": "Mean cross-entropy in nats, and accuracy, over all trained-on tokens of the "
    "held-out examples.",
    "Pretraining text": "Text like that which the model was pretrained on, held out there. Its "
    "loss per token, every token a target, rises as the model forgets.",
    "Gradient norm": "Global norm before clipping; its spread is the interquartile range over "
    "the median, of the steps after warm-up.",
    "Seed": "Sets the order of the examples, in the same way for all optimizers. All of them begin "
    "with the same model.",
}


def about(arms: Sequence[ArmName], quirks: Sequence[str]) -> dict[str, str]:
    """Returns descriptions of the arms and of the quirks that they have."""
    of_arms = {optimizer_label(arm): f"{ARMS[arm]}." for arm in dict.fromkeys(arms)}
    return of_arms | {f"Quirk {name}": f"{QUIRKS[name].about}." for name in dict.fromkeys(quirks)}


def judged(runs: Sequence[Run]) -> list[claims.Judged]:
    """Judges the post's claims by the runs."""
    return claims.judge({run.arm: {run.trained.seed: run.trained.values()} for run in runs})


def abstract(runs: Sequence[Run]) -> list[str]:
    """Returns sentences with the results, computed from the records."""
    sentences = records.damaged(runs) + [
        f"{run.label} has done {_steps(run)} steps." for run in runs if not run.trained.finished
    ]
    if different := records.differing(runs, "arm"):
        sentences.append(f"Besides the optimizer the runs differ in {', '.join(different)}.")
    losses = {
        run.label: run.trained.last("validation_loss") for run in runs if run.trained.finished
    }
    ranked = sorted((name for name in losses if math.isfinite(losses[name])), key=losses.get)
    if ranked:
        first, *rest = ranked
        each = "".join(f", {name} at {losses[name]:.4f}" for name in rest)
        how = "ends with the lowest held-out loss," if rest else "ends at"
        sentences.append(
            f"{first} {how} {losses[first]:.4f} nats per token{each}, {_before(runs)} before "
            "training."
        )
    sentences += [
        f"{name} ends with a loss of NaN or Inf." for name in losses if name not in ranked
    ]
    if len(runs) > 1:
        sentences += claims.sentences(judged(runs))
        sentences.append("Each is one training with one seed, so there are no statistics.")
    settings = runs[0].records.settings
    if (lora := settings["lora"])["rank"]:
        sentences.append(
            f"LoRA trains factors of rank {lora['rank']}, alpha {lora['alpha']:g}, of "
            f"{', '.join(lora['targets'])}; all else is frozen."
        )
    optimizer = settings["optimizer"]
    sentences += idle_clip([run.trained for run in runs], optimizer)
    if count := len(optimizer["quirks"]):
        quirks = "one quirk" if count == 1 else f"{count} quirks"
        sentences.append(f"They reproduce {quirks} of the released code.")
    return sentences + [
        f"{run.label} skipped {plural(run.skipped, 'step')}." for run in runs if run.skipped
    ]


def _before(runs: Sequence[Run]) -> str:
    """Returns the held-out loss of the initial model."""
    steps, losses = runs[0].trained.series["validation_loss"]
    return form(losses[0], ".4f") if len(steps) and steps[0] == 0 else "–"


def report(folder: epath.Path, arms: Sequence[ArmName] = ()) -> Report:
    """Returns the report of a command's runs, which may be unfinished.

    Args:
        folder: The command's folder, with a folder for each arm.
        arms: The arms to report on. By default, all in the folder.

    Raises:
        RunError: If there is no such run.
        ValueError: If a file is damaged. The message names it.
    """
    runs = [load_run(folder / arm) for arm in arms or found_arms(folder)]
    table = Table(COLUMNS, runs, CAPTION, "Fine-tuning, by arm", NOTE).known()
    verdicts = judged(runs)
    quirks = [q for run in runs for q in run.records.settings["optimizer"]["quirks"]]
    facts = next(({"data": run.summary["data"]} for run in runs if "data" in run.summary), {})
    measured = about([run.arm for run in runs], quirks) | all_told(MEASURED, facts)
    return records.report(
        "Fine-tuning a model",
        folder,
        runs,
        abstract(runs),
        table,
        [
            Section("arms", "The optimizers", [table]),
            Section("claims", "The post's claims and this run", [POST, verdicts]),
            Section("figures", "Figures", pictures({run.arm: [run.trained] for run in runs})),
            Section("criteria", "How it was measured", [measured]),
        ],
        {
            "runs": {run.arm: run.summary or None for run in runs},
            "claims": [of._asdict() for of in verdicts],
        },
    )
