"""`python -m experiments.pretrain.speed`: training throughput, compared with PyTorch if installed.

All loops train the model from the same params on the same tokens and take turns, so that noise of
the machine affects all of them and their ratio is meaningful. PyTorch runs in its own process, so
that the two do not compete for threads and memory.
"""

from experiments.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before the imports, which take seconds

import functools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.command_line import parse
from experiments.commands import guard
from experiments.language.mesh import make_mesh, one_device
from experiments.optimizers import OptimizerName
from experiments.pretrain import export
from experiments.pretrain.config import PresetName, Training
from experiments.pretrain.costs import step_costs, unknown_peak
from experiments.pretrain.presets import PRESETS, fitted, preset_of
from experiments.pretrain.step import Trainer
from experiments.report.figures import optimizer_label
from experiments.settings import Count
from experiments.timing import take_turns

Loop = Callable[[int], None]
"""Trains some steps and waits until they are done."""

# Seconds to wait for PyTorch's threads to sleep; they spin for a while after their turn.
_PAUSE = 0.5


@dataclass(frozen=True)
class Command(Training):
    """Times training steps of a preset with each optimizer, and the same training in PyTorch.

    PyTorch trains Hugging Face's implementation of the same model on the CPU, eagerly (no
    torch.compile), with fused AdamW and with each of its implementations of experts. This requires
    pip install -e ".[experiments,parity]". On a GPU or TPU, only the JAX loops run. All loops have
    float32 params and compute in --model.dtype.
    """

    preset: PresetName = "tiny"
    """Named settings. They are those of the model; explicit options override them."""
    optimizers: tuple[OptimizerName, ...] = ("adamw", "muon")
    """Optimizers to compare. PyTorch always uses AdamW."""
    turn: Count = 5
    """Number of timed steps of each loop in a round."""
    rounds: Count = 5
    """Timed rounds, whose median is reported. One more round runs first, untimed."""


def our_loop(config: Training, optimizer: OptimizerName) -> tuple[Loop, Trainer]:
    """Returns the JAX training loop on all devices, and its trainer."""
    mesh = make_mesh(config.mesh.sizes)
    trainer = Trainer(config, optimizer, mesh, config.data.vocabulary)
    state = trainer.start(config.seed)
    batch = jax.device_put(
        tokens(config).reshape(config.accumulate, -1, config.context + 1), trainer.windows
    )

    def loop(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = trainer.advance(state, batch, look=False)
            if jax.default_backend() == "cpu":  # where concurrent steps would share cores
                jax.block_until_ready(state)
        jax.block_until_ready(state)

    return loop, trainer


def torch_loops(config: Training) -> dict[str, Loop]:
    """Returns the training loops in PyTorch with AdamW, by implementation of the experts.

    Raises:
        ImportError: If torch or transformers is not installed.
        ValueError: If Hugging Face has no such model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    mesh = one_device()
    start = Trainer(config, "adamw", mesh, config.data.vocabulary).start(config.seed)
    batch = torch.tensor(tokens(config)).long().split(config.batch // config.accumulate)
    mixture = config.model.layers > config.model.dense_layers
    ways = ("eager", "grouped_mm") if mixture else ("",)

    def loop_of(folder: Path, way: str) -> Loop:
        model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", dtype=torch.float32
        ).train()
        if way:
            model.set_experts_implementation(way)
        adamw = config.adamw
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=adamw.learning_rate,
            betas=(adamw.b1, adamw.b2),
            eps=adamw.eps,
            weight_decay=adamw.weight_decay,
            fused=True,
        )
        low = config.model.dtype == "bfloat16"

        def loop(steps: int) -> None:
            for _ in range(steps):
                optimizer.zero_grad(set_to_none=True)
                for windows in batch:
                    with torch.autocast("cpu", torch.bfloat16, enabled=low):
                        logits = model(windows[:, :-1], use_cache=False).logits
                    loss = torch.nn.functional.cross_entropy(
                        logits.float().flatten(0, 1), windows[:, 1:].flatten()
                    )
                    (loss / len(batch)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
                optimizer.step()

        return loop

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        export.write(path, config.model, start.params, start.bias, context=config.context)
        return {f"PyTorch, AdamW{way and f', {way}'}": loop_of(path, way) for way in ways}


_theirs: dict[str, Loop] = {}  # in the process of PyTorch


def _prepare(config: Training) -> list[str]:
    _theirs.update(torch_loops(config))
    return list(_theirs)


def _turn(name: str, steps: int) -> None:
    _theirs[name](steps)


def tokens(config: Training) -> np.ndarray:
    """Returns a batch `(batch, context + 1)` int32, the same in every call."""
    rng = np.random.default_rng(config.seed)
    shape = config.batch, config.context + 1
    return rng.integers(0, config.data.vocabulary, shape, dtype=np.int32)


def median_seconds(loops: dict[str, Loop], steps: int, rounds: int) -> dict[str, float]:
    """Returns each loop's median seconds per step, in turns whose first step is not timed."""

    def begin(name: str) -> None:
        time.sleep(_PAUSE)
        loops[name](1)

    turns = {name: functools.partial(loop, steps) for name, loop in loops.items()}
    seconds = take_turns(turns, rounds, before=begin)
    return {name: statistics.median(of) / steps for name, of in seconds.items()}


def main() -> int:
    """Prints a table of throughput; returns the command's exit code."""
    preset = preset_of(sys.argv[1:])
    default = Command(preset=preset, **vars(fitted(PRESETS[preset], sys.argv[1:])))
    prog = "python -m experiments.pretrain.speed"
    return guard(lambda: _compare(parse(Command, prog, default=default)))


def _compare(command: Command) -> int:
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        loops: dict[str, Loop] = {}
        if jax.default_backend() == "cpu" and not missing:
            for name in process.submit(_prepare, command.training()).result():
                loops[name] = functools.partial(_wait_for, process, name)
        trainers = {}
        for optimizer in command.optimizers:
            name = f"ours, {optimizer_label(optimizer)}"
            loops[name], trainers[name] = our_loop(command, optimizer)
        median = median_seconds(loops, command.turn, command.rounds)
    mfu = {}
    for name, trainer in trainers.items():
        costs = step_costs(command, trainer.optimizer, trainer.abstract.params)
        mfu[name] = costs.rates(median[name]).get("mfu", float("nan"))
    _print(command, median, mfu, missing)
    return 0


def _wait_for(process: ProcessPoolExecutor, name: str, steps: int) -> None:
    process.submit(_turn, name, steps).result()


def _print(
    command: Command, median: dict[str, float], mfu: dict[str, float], missing: list[str]
) -> None:
    rivals = [seconds for name, seconds in median.items() if name.startswith("PyTorch")]
    base = median.get("ours, AdamW")
    table = Table(
        title=f"{command.preset}: {command.tokens_per_step:,} tokens per step, "
        f"{command.model.dtype} arithmetic, {jax.device_count()} × "
        f"{jax.devices()[0].device_kind}, median of {command.rounds} rounds"
    )
    for heading in ("loop", "s per step", "tokens/s", "× fastest PyTorch", "÷ AdamW step", "MFU"):
        table.add_column(heading, justify="left" if heading == "loop" else "right")
    for name, seconds in median.items():
        ours = name in mfu
        table.add_row(
            name,
            f"{seconds:.3f}",
            f"{command.tokens_per_step / seconds:,.0f}",
            f"{min(rivals) / seconds:.2f}" if rivals else "–",
            f"{seconds / base:.2f}" if base and ours else "–",
            f"{mfu[name]:.1%}" if ours and mfu[name] == mfu[name] else "–",
        )
    console = Console()
    console.print(table)
    if unknown := unknown_peak():
        console.print(unknown)
    if missing:
        console.print(f"PyTorch was not timed: {' and '.join(missing)} must be installed.")


if __name__ == "__main__":
    sys.exit(main())
