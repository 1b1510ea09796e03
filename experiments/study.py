"""A study of many trainings. Its cells are trained until none is missing, and saved in a run."""

import dataclasses
import importlib.metadata
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from rich.console import Console

from experiments import timing
from experiments.commands import INTERRUPTED, explain, progress_bar
from experiments.parallel import run_in_parallel
from experiments.report.studies import show
from experiments.runs import Run, machine, read_json, write_json
from experiments.sweep import Row, missing_cells

Cell = TypeVar("Cell", bound=tuple)

Trained = tuple[Sequence[Row], Row]
"""The records of a cell, one for each evaluation, and its outcome."""

Show = Callable[[Any, float, str], None]
"""Shows a cell, the fraction done and a few words. Raises KeyboardInterrupt to stop the cell."""

Device = jax.Device | None


class Timed(NamedTuple):
    """Optimizers whose costs are measured in one process, since their ratios are reported.

    Attributes:
        names: The names of the optimizers.
        measure: A function `on_turn -> costs by name`, as `timing.step_costs` returns them.
        under: The key of these costs in `costs.json`. None if the file holds no others.
    """

    names: Sequence[str]
    measure: Callable[[Callable[[str], None]], Mapping[str, Any]]
    under: str | None = None


@dataclasses.dataclass
class Study(Generic[Cell]):
    """The cells of a study and the functions that train them.

    Attributes:
        run: The open run. Its log receives the records and the outcome of each finished cell.
        stop: An event that asks for an early end; finished cells are kept.
        console: Where progress is printed.
        missing: Returns the cells that remain to be trained, the next one first.
        train: A function `(cells of a group, show, device)` that trains these cells.
        plan: A description of the trainings, printed at the start.
        summary: Returns the contents of `summary.json` besides machine and number of cells.
        outcome: Describes the outcome of a cell in words.
        work: Returns a number that the training time of a cell is proportional to.
        groups: Groups missing cells that are trained together, by default each one alone.
        program: Returns a key that groups with the same compiled program share. If it is given,
            groups train on all devices at once, otherwise one after another.
        estimate: Describes how long the missing cells will take.
        costs: Optimizers whose costs are measured when no cell is missing.
    """

    run: Run
    stop: threading.Event
    console: Console
    missing: Callable[[], list[Cell]]
    train: Callable[[list[Cell], Show, Device], Sequence[Trained]]
    plan: str
    summary: Callable[[], dict[str, Any]]
    outcome: Callable[[Row], str]
    work: Callable[[Cell], float]
    groups: Callable[[list[Cell]], list[list[Cell]]] = lambda cells: [[cell] for cell in cells]
    program: Callable[[list[Cell]], Hashable] | None = None
    estimate: Callable[[list[Cell]], str] | None = None
    costs: Sequence[Timed] = ()

    def to_the_end(self) -> int:
        """Trains the missing cells until `stop` is set, and reports on the finished ones.

        Returns:
            The command's exit code.

        Raises:
            OSError: A file cannot be written; finished cells are kept.
        """
        run, console = self.run, self.console
        try:
            for note in run.notes:
                console.print(note, highlight=False, soft_wrap=True)
            console.print(f"[bold]{run.folder}[/bold]: {self.plan}", highlight=False)
            try:
                if self.missing():
                    self._train_missing()
                self._measure_costs()
            except KeyboardInterrupt:
                self.stop.set()
            if run.finished:
                self._summarize()
                show(run.folder, console)
            if left := len(self.missing()):
                again = "Run the same command to continue."
                console.print(f"Interrupted; trainings left: {left}. {again}")
        except OSError as error:
            saved = f"{len(run.finished)} finished trainings are saved in {run.folder}."
            raise OSError(f"{explain(error)} {saved}") from error
        return INTERRUPTED if self.stop.is_set() else 0

    def _train_missing(self) -> None:
        if self.estimate is not None:
            with self.console.status("estimating the time"):
                expected = self.estimate(self.missing())
            self.console.print(f"Expected time: {expected}", highlight=False)
        done: dict[Cell, float] = {}  # the finished fraction of each cell that has started
        lock = threading.Lock()

        def update(description: str, **changes: Any) -> None:
            completed = sum(share * self.work(cell) for cell, share in done.items())
            progress.update(bar, description=description, completed=completed, **changes)

        def show(cell: Cell, share: float, text: str) -> None:
            self._check_stop()
            with lock:
                done[cell] = share
                update(f"{cell} {text}")

        def train(cells: list[Cell], device: Device = None) -> None:
            with lock:
                done.update(dict.fromkeys(cells, 0.0))
                total = sum(map(self.work, {*done, *self.missing()}))
                update(f"{cells[0]} starting", total=total)
            trained = list(zip(cells, self.train(cells, show, device), strict=True))
            with lock:
                self.run.extend(
                    [
                        ([cell._asdict() | record for record in records], cell._asdict() | row)
                        for cell, (records, row) in trained
                    ]
                )
                for cell, (_, row) in trained:
                    done[cell] = 1.0
                    update(f"{cell} finished")
                    self.console.print(f"{cell}: {self.outcome(row)}", highlight=False)
                self._summarize()

        with progress_bar(self.console) as progress:
            bar = progress.add_task("starting")
            while cells := self.missing():
                if self.program is None:
                    train(self.groups(cells)[0])
                else:
                    run_in_parallel(self.groups(cells), self.program, train, self.stop)

    def _summarize(self) -> None:
        write_json(
            self.run.folder / "summary.json",
            {
                "version": importlib.metadata.version("muon-jax"),
                "machine": machine(),
                "cells_total": len(self.run.finished) + len(self.missing()),
                **self.summary(),
            },
        )

    def _measure_costs(self) -> None:
        path = self.run.folder / "costs.json"
        costs = read_json(path)["costs"] if path.exists() else {}
        for names, measure, under in self.costs:
            known = costs if under is None else costs.get(under, {})
            if {*names} <= known.keys():
                continue
            with progress_bar(self.console) as progress:
                turns = (timing.ROUNDS + 1) * len(names)
                bar = progress.add_task("timing the optimizers", total=turns)

                def on_turn(name: str, progress: Any = progress, bar: Any = bar) -> None:
                    self._check_stop()
                    progress.advance(bar)

                found = measure(on_turn)
            costs |= found if under is None else {under: found}
            write_json(path, {"machine": machine(), "costs": costs})

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise KeyboardInterrupt


def sweep_rates(
    run: Run,
    stop: threading.Event,
    console: Console,
    config: Any,
    *,
    cell: Callable[..., Cell],
    arms: Mapping[tuple[Hashable, ...], float],
    training: Callable[[Cell], Any],
    train: Callable[[Cell, Any, Callable[[Row], None], Device], Trained],
    corpus: dict[str, Any],
    swept: int | None = None,
    step_work: Callable[[Any], float] = lambda training: 1.0,
    **options: Any,
) -> int:
    """Trains arms at several learning rates, and all seeds at each arm's best rate.

    Args:
        run, stop, console: As in `Study`.
        config: Settings with the fields `seeds` and `sweep`.
        cell, arms, swept: As `make`, `arms` and `swept` in `sweep.missing_cells`.
        training: Returns the settings of a cell, which have the field `steps`.
        train: A function `(cell, its training, on_evaluation, device)`. Its evaluations have `step`
            and `validation_loss`, its outcome has `diverged` and `milliseconds_per_step`.
        corpus: The description of the text that the run records.
        step_work: Returns a number that the time of one step of a training is proportional to.
        options: Further settings of `Study`.

    Returns:
        The command's exit code.
    """

    def missing() -> list[Cell]:
        return missing_cells(run.finished, cell, arms, config.seeds, config.sweep, swept)

    def train_one(cells: list[Cell], show: Show, device: Device) -> list[Trained]:
        (one,) = cells
        its = training(one)

        def on_evaluation(evaluation: Row) -> None:
            loss = f"loss {evaluation['validation_loss']:.3f}"
            show(one, evaluation["step"] / its.steps, loss)

        return [train(one, its, on_evaluation, device)]

    def outcome(row: Row) -> str:
        loss = "diverged" if row["diverged"] else f"loss {row['validation_loss']:.4f}"
        return f"{loss}, {row['milliseconds_per_step']:.0f} ms per step"

    def work(cell: Cell) -> float:
        its = training(cell)
        return its.steps * step_work(its)

    plan = (
        f"trainings left: {len(missing())}; finished: {len(run.finished)}. More are added while a "
        "best learning rate is the highest or the lowest one tried."
    )
    functions = {"missing": missing, "train": train_one, "outcome": outcome, "work": work}
    summary = {"corpus": corpus}
    study = Study(run, stop, console, plan=plan, summary=lambda: summary, **functions, **options)
    return study.to_the_end()
