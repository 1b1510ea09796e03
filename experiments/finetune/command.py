"""The command line of `python -m experiments.finetune`."""

import dataclasses
from typing import Literal, get_args

from etils import epath

from experiments import command_line
from experiments.finetune.config import ArmName, Base, Optimizer, Running, Training
from experiments.finetune.suites.config import Suite, SuiteName, defaults
from experiments.language.planning import Planning
from experiments.language.processes import Processes
from experiments.settings import check_different, given_text

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
class Command(Suite, Planning, Running, Training):
    """Fine-tunes a model with AdamW and with three forms of Muon, and compares the results.

    Without options, this pretrains a small Qwen3 (once; it is cached), fine-tunes it with each of
    the four optimizers to write the bodies of documented Python functions, and prints the results.
    It takes a few minutes on two CPU cores. `--model FOLDER --data FILE` fine-tunes all parameters
    of a Hugging Face model on your own examples; the memory required is printed before it is
    allocated. Each optimizer gets a folder in --out with `metrics.jsonl`, `summary.json` and
    checkpoints. Run the same command again to resume, bit for bit, after Ctrl-C or SIGTERM (which
    save a checkpoint and exit with code 130), a crash or a kill.
    """

    model: str | None = None
    """Folder of a Qwen3, Qwen2.5 or Llama 3 model to fine-tune: config.json, safetensors and
    tokenizer. By default, the small model."""
    data: str | None = None
    """File of examples: .jsonl, .jsonl.gz or .parquet, each with "messages", or with "prompt" and
    "completion". By default, listed functions of Python's standard library and of this project's
    dependencies, the same on every machine; "installed" takes all functions that are here."""
    optimizers: tuple[ArmName, ...] = ("adamw", "muon_frozen1d", "muon_adamw", "muonclip")
    """Optimizers to compare. Each gets its own folder in --out."""
    base: Base = dataclasses.field(default_factory=Base)
    """The small model that is pretrained and fine-tuned if --model is not given."""
    out: str = "runs/finetune/study"
    """Folder of the run. It has a folder for each optimizer, and may be in gs:// or s3://."""
    export: bool | None = None
    """Write the fine-tuned model and its tokenizer to the folder `model` in each optimizer's
    folder. By default, only with --model."""
    preset: Literal["0.6b", "1.7b", "4b"] | None = None
    """Named settings. They are those of a size of Qwen3 to plan for with --dry-run or
    --compile-only, which need not be present; explicit options override them."""
    processes: Processes = dataclasses.field(default_factory=Processes)
    """Training on several hosts."""

    def __post_init__(self) -> None:
        Suite.__post_init__(self)
        Planning.__post_init__(self)
        Running.__post_init__(self)
        Training.__post_init__(self)
        check_different(self, "optimizers")
        if self.preset and not (self.dry_run or self.compile_only):
            raise ValueError(
                "--preset requires --dry-run or --compile-only. To train such a model, give its "
                "folder as --model."
            )
        alone = {"--compile-only": self.compile_only, "--rollback.above": self.rollback.above}
        for name, value in alone.items():
            if value and self.suite:
                raise ValueError(f"{name} excludes --suite {self.suite}; remove one of them.")
        if self.preset and self.model:
            raise ValueError("Give --preset or --model, not both.")
        for name, value in {"--preset": self.preset, "--model": self.model}.items():
            if value and self.suite in ("mismatch", "qk"):
                raise ValueError(
                    f"--suite {self.suite} pretrains the models that it compares; remove {name} "
                    f"{value}."
                )
        if self.exports and not self.suite and "://" in self.out:
            raise ValueError(
                "The fine-tuned model can only be written to a local folder; got --out "
                f"{self.out}. Give --export False to write checkpoints only, or a local --out."
            )

    @property
    def exports(self) -> bool:
        """Whether the fine-tuned model is written."""
        return self.model is not None if self.export is None else self.export

    def folder(self, arm: ArmName) -> epath.Path:
        """Returns the folder of the run with an optimizer."""
        return epath.Path(self.out) / arm


def parse(arguments: list[str]) -> Command:
    """Returns the command, with the defaults of --model or --preset, or of the small model."""
    real = any(given_text(arguments, name) for name in ("--model", "--preset"))
    suite = given_text(arguments, "--suite", get_args(SuiteName))
    preset = _REAL if real else _SMALL
    settings = {f.name: getattr(preset, f.name) for f in dataclasses.fields(Training)}
    if suite:
        settings |= defaults(suite)
    elif not real:
        settings |= _SHORT
    if given_text(arguments, "--epochs"):
        settings["steps"] = 0  # as many as these are, unless --steps is given too
    default = Command(**settings)
    return command_line.parse(Command, "python -m experiments.finetune", arguments, default=default)
