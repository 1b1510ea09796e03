"""The command line of `python -m experiments.finetune`."""

import argparse
import dataclasses
from typing import Literal, get_args

import tyro
from etils import epath

from experiments.finetune.config import ArmName, Base, Optimizer, Running, Training
from experiments.finetune.suites.config import Suite, SuiteName, defaults
from experiments.language.processes import Processes
from experiments.settings import Positive, check_different

# What fine-tuning a real model begins with: less to hold, longer windows, a rate for one.
_REAL = Training(
    optimizer=Optimizer(learning_rate=1e-5, weight_decay=0.01, ns_dtype="bfloat16"),
    context=2048,
    batch=8,
    dtype="bfloat16",
)
_SMALL = Training(batch=4, steps=200, remat=False)
# With no argument it is to take five minutes on two cores.
_SHORT = {"steps": 100, "evaluation_tokens": 16_384}


@dataclasses.dataclass(frozen=True)
class Command(Suite, Running, Training):
    """Fine-tunes a Qwen3 with AdamW and three forms of Muon, from equal starts on equal rows.

    With no argument: pretrains a small Qwen3 (once; it is kept), fine-tunes it with the four arms
    side by side to write the bodies of documented Python functions, and prints what came out, all
    within some minutes on two cores. `--model FOLDER --data FILE` fine-tunes a model of Hugging
    Face's on your own rows, every param of it; the memory that takes is told before it is
    allocated. Each arm's folder in --out has `metrics.jsonl`, `summary.json` and checkpoints, and
    the same command goes on with it, bit for bit, after Ctrl-C, SIGTERM (both save first and exit
    with 130), a crash or a kill.
    """

    model: str | None = None
    """A folder with config.json, safetensors and tokenizer of a Qwen3; by default the small one."""
    data: str | None = None
    """Rows with "messages", or "prompt" and "completion", as .jsonl, .jsonl.gz or .parquet; by
    default functions of the Python packages that are installed."""
    arms: tuple[ArmName, ...] = ("adamw", "muon_frozen1d", "muon_adamw", "muonclip")
    """Which to compare; each has a folder of its own in --out."""
    base: Base = dataclasses.field(default_factory=Base)
    """The small model, where there is no --model."""
    out: str = "runs/finetune/study"
    """Where the arms' folders are."""
    export: bool | None = None
    """Write the fine-tuned model, with its tokenizer, to `model` in the arm's folder; by default of
    a --model."""
    dry_run: bool = False
    """Print what a step takes of a device's memory, refuse what does not fit, and end."""
    preset: Literal["0.6b", "1.7b", "4b"] | None = None
    """Of --dry-run: a Qwen3 of that size, which need not be here."""
    topology: str | None = None
    """Of --dry-run: compile the step for devices that are not here, and print what it takes there:
    GPUs as h100:8, h200:8, b200:8 or h100:8x8 (hosts × devices), TPUs as v5e:4x4 or v5p:4x4x4.
    Needs the extra `gpu-compile` or `tpu`."""
    device_memory: Positive | None = None
    """Gigabytes that a device has; by default it is asked."""
    processes: Processes = dataclasses.field(default_factory=Processes)
    """A run on many hosts."""

    def __post_init__(self) -> None:
        Suite.__post_init__(self)
        Running.__post_init__(self)
        Training.__post_init__(self)
        check_different(self, "arms")
        if self.preset and not self.dry_run:
            raise ValueError(
                "--preset is of --dry-run; to train, give --model with the folder of such a model."
            )
        if self.topology and (self.suite or not self.dry_run):
            raise ValueError(
                "--topology is of --dry-run without --suite, as --dry-run --topology h100:8; to "
                "train on devices that are here, leave it out."
            )
        if self.preset and self.model:
            raise ValueError("Give --preset or --model, not both.")
        if self.preset and self.suite in ("mismatch", "qk"):
            raise ValueError(
                f"--suite {self.suite} pretrains the models that it compares; leave --preset "
                f"{self.preset} out."
            )
        if self.exports and not self.suite and "://" in self.out:
            raise ValueError(
                f"The fine-tuned model is written to a local folder; got --out {self.out}. Give "
                "--export False, which leaves checkpoints there and no model, or a local --out and "
                "copy the arm's folder `model` from it."
            )

    @property
    def exports(self) -> bool:
        """Whether the fine-tuned model is written."""
        return self.model is not None if self.export is None else self.export

    def folder(self, arm: ArmName) -> epath.Path:
        """Of the run with an arm."""
        return epath.Path(self.out) / arm


def parse(arguments: list[str]) -> Command:
    """The command line; what it does not say is that of a real model or of the small one."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--model", "--preset", "--suite", "--epochs"):
        early.add_argument(name, nargs="?")  # what is wrong or missing is for tyro to tell
    named, _ = early.parse_known_args([a for a in arguments if a not in ("-h", "--help")])
    real = bool(named.model or named.preset)
    preset = _REAL if real else _SMALL
    settings = {f.name: getattr(preset, f.name) for f in dataclasses.fields(Training)}
    if named.suite in get_args(SuiteName):
        settings |= defaults(named.suite)
    elif not real:
        settings |= _SHORT
    if named.epochs:
        settings["steps"] = 0  # as many as these are, unless --steps is given too
    return tyro.cli(
        Command, args=arguments, default=Command(**settings), prog="python -m experiments.finetune"
    )
