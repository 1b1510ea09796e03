"""What a sweep's cells took to grok, by what was swept.

Tokens, steps, FLOPs and seconds are a cell's sustained grokking epoch times what its epoch takes; a
censored cell counts at its budget.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

from experiments.figures import optimizer_label
from experiments.grok import grid
from experiments.grok.report_data import Median, Row, Run, censored_median

# What an epoch of a cell takes, in the units of each axis.
UNITS: dict[str, Callable[[Row], float]] = {
    "epochs": lambda row: 1.0,
    "tokens": lambda row: row["tokens_per_epoch"],
    "steps": lambda row: row["steps_per_epoch"],
    "FLOP": lambda row: row["steps_per_epoch"] * row["step_flops"],
    "seconds": lambda row: row["steps_per_epoch"] / row["steps_per_second"],
}

# XLA counts nothing of a decomposition and one pass of a loop, so that their FLOPs are not known.
UNCOUNTED = frozenset(
    ("polar", "low_rank", "low_rank_subspace", "dion", "splus", "splus_adamw", "optax_muon")
)


def known(optimizer: str, unit: str) -> bool:
    """Whether an optimizer's cost is known in a unit."""
    return unit != "FLOP" or optimizer not in UNCOUNTED


def apart(values: Collection[float]) -> bool:
    """Whether values differ by more than what XLA's folding of constants does: 0.04 % of FLOPs."""
    return max(values, default=0) > 1.01 * min(values, default=0)


def swept(run: Run) -> dict[str, list[str]]:
    """The settings that differ between the cells of each optimizer."""
    points = [(cell.optimizer, grid.values(cell.point)) for cell in run.cells]
    return {
        name: list(dict.fromkeys(s for owner, point in points if owner == name for s in point))
        for name in run.optimizers()
    }


def plain(setting: str) -> str:
    """A setting's name for readers: "learning rate" for "muon.learning-rate"."""
    return setting.split(".")[-1].replace("-", " ").replace("_", " ")


def numeric(values: Iterable[float | str]) -> bool:
    """Whether all values of a setting are numbers, and none is a word."""
    return not any(isinstance(value, str) for value in values)


def ordered(values: Iterable[float | str]) -> list[float | str]:
    """A setting's values, each once: numbers by size, words as they come.

    Example:
        >>> ordered([64, 32, 64]), ordered(["spectral", "mup", "spectral"])
        ([32, 64], ['spectral', 'mup'])
    """
    found = list(dict.fromkeys(values))
    return sorted(found) if numeric(found) else found


def cost(run: Run, row: Row, unit: str) -> float:
    """What a cell took to its sustained grokking epoch, or to its budget."""
    return (row["grok_epoch_sustained"] or run.budget) * UNITS[unit](row)


def median_cost(run: Run, rows: Sequence[Row], unit: str) -> Median:
    """The median of what each of some cells took; a bound where censored cells leave no more."""
    costs = [cost(run, row, unit) for row in rows]
    found = (None if row["censored"] else x for row, x in zip(rows, costs, strict=True))
    return censored_median(found, costs)


def counts(run: Run) -> str:
    """How many cells there are, and how many are censored and whose; a sentence."""
    seeds = len({row["seed"] for row in run.rows})
    cells = f"{len(run.rows)} cells, {seeds} {'seed' if seeds == 1 else 'seeds'} a setting"
    whose = []
    for name in run.optimizers():
        own = [row["censored"] for row in run.rows if row["optimizer"] == name]
        whose += [f"{optimizer_label(name)} {sum(own)} of {len(own)}"] if any(own) else []
    if not whose:
        return f"All of {cells}, grokked within {run.budget} epochs."
    censored = sum(row["censored"] for row in run.rows)
    return f"{cells}; {censored} censored at {run.budget} epochs: {'; '.join(whose)}."


def uncounted(run: Run) -> str:
    """Whose FLOPs are not known, and why, in a sentence; "" where all are."""
    names = "; ".join(optimizer_label(n) for n in run.optimizers() if not known(n, "FLOP"))
    why = "XLA's count leaves out decompositions and what loops repeat"
    return f"No FLOP (–) of {names}: {why}." if names else ""
