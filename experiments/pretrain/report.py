"""Report of pretraining runs: reads their files, draws figures, writes report.html.

It never trains, so it can be made again: `python -m experiments.pretrain.report FOLDER`.
"""

import importlib.metadata
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from etils import epath
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.figures import (
    CENSORED_MARK,
    DASHES,
    OTHER_COLORS,
    POINT_MARK,
    figure_style,
    legend_line,
    new_figure,
    optimizer_color,
    optimizer_label,
    plain_log_axis,
)
from experiments.optimizers import ARMS, OptimizerName
from experiments.pages import number, save_figure, write_page
from experiments.pretrain import log
from experiments.pretrain.config import Training, from_json
from experiments.runs import RunError, write_json

BASELINE = "adamw"
_REFERENCE = {"color": "#444444", "linestyle": ":", "linewidth": 1, "zorder": 1.5}
# Loads below are drawn here: an expert without a token has none on a log axis.
_LEAST_LOAD = 1 / 32


class Run(NamedTuple):
    """The files of a run, which may be unfinished.

    Attributes:
        color: of its lines, in all figures.
        trained: records of training steps, oldest first.
        evaluated: records of evaluations.
        summary: empty until it is finished.
        samples: texts that the finished model wrote.
    """

    optimizer: OptimizerName
    color: str
    config: Training
    settings: dict[str, Any]
    trained: list[dict[str, Any]]
    evaluated: list[dict[str, Any]]
    summary: dict[str, Any]
    samples: str

    @property
    def steps(self) -> int:
        """That it has done, as far as its records tell."""
        return max((record["step"] for record in self.trained + self.evaluated), default=0)

    @property
    def speed(self) -> float | None:
        """Tokens a second: the median over records, of which one that compiled is an outlier."""
        speeds = [r["tokens_per_second"] for r in self.trained if r.get("tokens_per_second")]
        return statistics.median(speeds) if speeds else None

    def tokens(self, steps: Any) -> Any:
        """Trained on after so many steps."""
        return steps * self.config.tokens_per_step

    def last(self, key: str) -> float | None:
        """The value of a key in the newest record that has it, None where it was not finite."""
        records = self.evaluated if key in _MEASURES else self.trained
        return records[-1].get(key) if records else None


_MEASURES = {"bits_per_byte": "bits a byte", "validation_loss": "nats a token"}


def load_run(folder: epath.Path) -> Run:
    """Reads a run's folder.

    Raises:
        RunError: it holds no run.
        ValueError: a file is damaged; the message names it.
    """
    if not (folder / "config.json").exists():
        raise RunError(f"{folder} holds no run: it has no config.json.")
    settings = _object(folder / "config.json")
    try:
        own = {key: value for key, value in settings.items() if key != "optimizer"}
        optimizer, config = settings["optimizer"], from_json(Training, own)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is of no run of this study: {error}.") from None
    records = log.read(folder)
    summary, samples = folder / "summary.json", folder / "samples.txt"
    return Run(
        optimizer,
        optimizer_color(optimizer),
        config,
        settings,
        [record for record in records if "loss" in record],
        [record for record in records if "validation_loss" in record],
        _object(summary) if summary.exists() else {},
        samples.read_bytes().decode(errors="replace") if samples.exists() else "",
    )


def _object(path: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is wanted, found {type(value).__name__}.")
    return value


def load_runs(folder: epath.Path, optimizers: Sequence[OptimizerName]) -> list[Run]:
    """The runs of a folder: itself for one optimizer, else a sub-folder for each.

    Raises:
        RunError: there is no such run, or several are asked for and the folder is one itself.
        ValueError: a file is damaged; the message names it.
    """
    if len(optimizers) == 1:
        return [load_run(folder)]
    if (folder / "config.json").exists():
        raise RunError(f"{folder} is a run itself. Compare optimizers in another folder.")
    runs: list[Run] = []
    for optimizer in optimizers:
        run = load_run(folder / optimizer)
        taken = {other.color for other in runs}
        free = (color for color in (run.color, *OTHER_COLORS) if color not in taken)
        runs.append(run._replace(color=next(free, run.color)))
    return runs


def found_optimizers(folder: epath.Path) -> tuple[OptimizerName, ...]:
    """Whose runs a folder has.

    Raises:
        RunError: none.
    """
    if (folder / "config.json").exists():
        return (load_run(folder).optimizer,)
    found = tuple(name for name in ARMS if (folder / name / "config.json").exists())
    if not found:
        raise RunError(
            f"{folder} holds no run: neither it nor a folder of an optimizer in it has a "
            "config.json."
        )
    return found


def measure_of(runs: Iterable[Run]) -> str:
    """The key of the held-out measure: nats a token where one run does not know its bytes."""
    known = [record for run in runs for record in run.evaluated]
    return "bits_per_byte" if all("bits_per_byte" in r for r in known) else "validation_loss"


def share_text(run: Run) -> str:
    """Newton-Schulz's part of a step's FLOPs, "–" where it is not known."""
    share = run.summary.get("costs", {}).get("newton_schulz_share")
    return "–" if share is None else f"{100 * share:.2g} %"


def _steps_text(run: Run) -> str:
    whole = run.config.steps
    return f"{whole:,}" if run.steps == whole else f"{run.steps:,} of {whole:,}"


def _fixed(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


# The table: heading in the report, heading in the terminal ("" to leave it out), the text of a run.
COLUMNS: tuple[tuple[str, str, Callable[[Run], str]], ...] = (
    ("optimizer", "optimizer", lambda run: optimizer_label(run.optimizer)),
    ("learning rate", "rate", lambda run: f"{run.config.rate(run.optimizer):g}"),
    ("held out (bits a byte)", "bits\na byte", lambda run: _fixed(run.last("bits_per_byte"))),
    ("held out (nats a token)", "nats\na token", lambda run: _fixed(run.last("validation_loss"))),
    ("training loss (nats a token)", "train\nloss", lambda run: _fixed(run.last("loss"))),
    ("tokens", "", lambda run: f"{run.tokens(run.steps):,}"),
    ("steps", "steps", _steps_text),
    ("tokens/s", "tokens\n/s", lambda run: number(run.speed)),
    ("training time (s)", "time\n(s)", lambda run: number(run.last("seconds"))),
    ("skipped steps", "skip", lambda run: number(run.last("skipped"))),
    ("Newton–Schulz of the FLOPs", "NS", share_text),
    ("params_sha256", "", lambda run: run.summary.get("params_sha256", "–")[:12]),
)
CAPTION = (
    "bits, nats: of the held-out text; train loss: of the last step, nats a token\n"
    "tokens/s: median; skip: steps that changed nothing; NS: of the FLOPs"
)


def columns_of(runs: Sequence[Run]) -> list[tuple[str, str, Callable[[Run], str]]]:
    """The columns in which any run has something to say."""
    return [column for column in COLUMNS if any(column[2](run) != "–" for run in runs)]


def terminal_table(runs: Sequence[Run]) -> Table:
    """The table for the terminal, with the numbers of the HTML table."""
    table = Table(
        title="Pretraining",
        caption=CAPTION,
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    columns = [(heading, form) for _, heading, form in columns_of(runs) if heading]
    for place, (heading, _) in enumerate(columns):
        table.add_column(heading, justify="right" if place else "left", vertical="bottom")
    for run in runs:
        # Text, and not str, so that a name with brackets is not read as rich's markup.
        table.add_row(*(Text(form(run)) for _, form in columns))
    return table


def abstract(runs: Sequence[Run]) -> list[str]:
    """The result in plain sentences, every number computed from the records."""
    sentences = [
        f"{optimizer_label(run.optimizer)} has done {run.steps:,} of {run.config.steps:,} steps."
        for run in runs
        if run.steps < run.config.steps
    ]
    key = measure_of(runs)
    unit = _MEASURES[key]
    curves = {run.optimizer: dict(held_out_curve(run, key)) for run in runs}
    common = set.intersection(*map(set, curves.values()))
    tokens = max(common, default=None)
    if tokens is None:
        return [*sentences, "There is no evaluation that all have come to."]
    losses = {name: curve[tokens] for name, curve in curves.items()}
    finite = {name: x for name, x in losses.items() if math.isfinite(x)}
    ranked = sorted(finite, key=finite.__getitem__)
    when = f"After {tokens:,} tokens"
    if ranked:
        first, *rest = ranked
        text = f"{when}, {optimizer_label(first)} predicts the held-out text at "
        text += f"{finite[first]:.4f} {unit}"
        before = curves[first].get(0, math.nan)
        if not rest and tokens and math.isfinite(before):
            text += f", {before:.4f} before training"
        if rest:
            text += ", " + ", ".join(f"{optimizer_label(n)} at {finite[n]:.4f}" for n in rest)
        sentences.append(text + ".")
        other = BASELINE if BASELINE in rest else next(iter(rest), None)
        if other:
            sentences += _comparison(first, other, finite, unit)
            sentences += _sooner(curves[first], curves[other], first, other, tokens)
    for name in losses.keys() - finite.keys():
        sentences.append(f"{when}, the held-out loss of {optimizer_label(name)} is not finite.")
    for run in runs:
        if skipped := run.last("skipped"):
            sentences.append(f"{optimizer_label(run.optimizer)} skipped {skipped} steps.")
    if len(runs) > 1:
        sentences.append("One training each, with one seed: no statistics.")
    return sentences


def _comparison(first: str, other: str, losses: dict[str, float], unit: str) -> list[str]:
    less = losses[other] - losses[first]
    if f"{losses[other]:.4f}" == f"{losses[first]:.4f}":
        return [f"{optimizer_label(first)} and {optimizer_label(other)} are level."]
    share = 100 * less / losses[other]
    return [
        f"{optimizer_label(first)} is lower than {optimizer_label(other)} by {less:.4f} {unit}, "
        f"{share:.2g} %."
    ]


def _sooner(
    ours: dict[int, float], theirs: dict[int, float], first: str, other: str, end: int
) -> list[str]:
    """How many tokens the better one takes to where the other ends, if it is well before the end.

    Between two evaluations the loss is taken to fall with the logarithm of the tokens.
    """
    goal = theirs[end]
    points = [(n, x) for n, x in sorted(ours.items()) if 0 < n <= end and math.isfinite(x)]
    below = next((i for i, (_, x) in enumerate(points) if x <= goal), 0)
    if not below:
        return []
    (n0, x0), (n1, x1) = points[below - 1 : below + 1]
    tokens = n0 * (n1 / n0) ** ((x0 - goal) / (x0 - x1))
    share = 100 * tokens / end
    return [f"It comes to {optimizer_label(other)}'s last value after {share:.0f} % of the tokens."]


def held_out_curve(run: Run, key: str) -> list[tuple[int, float]]:
    """Tokens trained on, and the held-out measure there, NaN where it is not finite."""
    return [
        (run.tokens(record["step"]), math.nan if record[key] is None else record[key])
        for record in run.evaluated
    ]


def series(run: Run, *path: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a key, or of one in another, NaN where one is not finite or missing."""

    def value(record: Any) -> float:
        for key in path:
            record = record.get(key) if record else None
        return math.nan if record is None else record

    steps = np.array([record["step"] for record in run.trained])
    return steps, np.array([value(record) for record in run.trained], float)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Means over the 6 % of the records about each, over fewer where the curve is steep."""
    reach = round(0.03 * len(values))
    means = np.array(values)
    for i in np.flatnonzero(np.isfinite(values)):
        near = min(i // 4, reach)
        means[i] = np.nanmean(values[i - near : i + near + 1])
    return means


def _draw_noisy(axes: Axes, x: np.ndarray, values: np.ndarray, color: str) -> None:
    axes.plot(x, values, color=color, lw=0.8, alpha=0.35)
    axes.plot(x, smoothed(values), color=color, lw=1.7)


def held_out_figure(runs: Sequence[Run]) -> Figure:
    """The held-out measure against tokens, and against time."""
    key = measure_of(runs)
    figure = new_figure(10.4, 3.7)
    left, right = figure.subplots(1, 2, sharey=True)
    for run in runs:
        curve = np.array([point for point in held_out_curve(run, key) if point[0]]).reshape(-1, 2)
        tokens, losses = curve.T
        style = {"lw": 1.6, "color": run.color}
        if len(curve) < 50:
            style = POINT_MARK | {"ls": "-"} | style
        left.plot(tokens, losses, **style)
        if run.speed:
            right.plot(tokens / run.speed, losses, **style)
    for axes, name in ((left, "tokens (log scale)"), (right, "training time (s, log scale)")):
        axes.set_xlabel(name)
        _log_if_positive(axes, "x")
        axes.tick_params(labelleft=True)
    left.xaxis.set_major_formatter(EngFormatter())
    left.set_ylabel(f"held out ({_MEASURES[key]})")
    _name_optimizers(figure, runs, lambda run: f": {_fixed(run.last(key))}")
    return figure


def loss_figure(runs: Sequence[Run]) -> Figure:
    """Training loss against tokens."""
    figure = new_figure(10.4, 3.9)
    axes = figure.subplots()
    lost = False
    for run in runs:
        steps, losses = series(run, "loss")
        tokens = run.tokens(steps)
        _draw_noisy(axes, tokens, losses, run.color)
        gaps = tokens[~np.isfinite(losses)]
        if gaps.size:
            lost = True
            mark = CENSORED_MARK | {"color": run.color, "clip_on": False, "in_layout": False}
            axes.plot(gaps, gaps * 0 + 1, transform=axes.get_xaxis_transform(), **mark)
    _log_if_positive(axes, "x")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("tokens (log scale)")
    axes.set_ylabel("training loss (nats a token)")
    others = [legend_line("smoothed", lw=1.7), legend_line("one step", lw=0.8, alpha=0.5)]
    others += [legend_line("not finite", **CENSORED_MARK)] if lost else []
    _name_optimizers(figure, runs, others=others)
    return figure


def optimization_figure(runs: Sequence[Run]) -> Figure:
    """Learning rate, gradient norm, update RMS and largest attention logit against step."""
    figure = new_figure(10.4, 5.6)
    (rate, gradient), (update, logit) = figure.subplots(2, 2)
    for place, run in enumerate(runs):
        color = run.color
        # Equal lines lie on each other: the later ones are thinner.
        rate.plot(*series(run, "learning_rate"), color=color, lw=max(3.0 - 1.2 * place, 1.2))
        for group, dashes in (("matrices", "-"), ("others", DASHES)):
            update.plot(*series(run, "update_rms", group), color=color, lw=1.3, ls=dashes)
        for axes, key in ((gradient, "gradient_norm"), (logit, "max_logit")):
            _draw_noisy(axes, *series(run, key), color)
        gradient.axhline(run.config.clip, **_REFERENCE)
    titles = ("Learning rate", "Gradient norm", "RMS of the update", "Largest attention logit")
    for axes, title in zip((rate, gradient, update, logit), titles, strict=True):
        axes.set_title(title, loc="left")
        axes.xaxis.set_major_formatter("{x:,.10g}")
    for axes in (update, logit):
        axes.set_xlabel("step")
    for axes in (gradient, update):
        _log_if_positive(axes, "y")
    peaks = [run.config.rate(run.optimizer) for run in runs]
    if max(peaks) > 5 * min(peaks):
        _log_if_positive(rate, "y")
    else:
        rate.set_ylim(bottom=0)
    update.yaxis.set_major_formatter("{x:.0e}")
    others = [
        legend_line("hidden matrices", lw=1.3),
        legend_line("other params", lw=1.3, ls=DASHES),
        legend_line("smoothed", lw=1.7),
        legend_line("one step", lw=0.8, alpha=0.5),
        legend_line("clipped above", lw=1, ls=":"),
    ]
    _name_optimizers(figure, runs, others=others)
    return figure


def router_figure(runs: Sequence[Run]) -> Figure:
    """The busiest and the idlest expert, and the entropy of the scores, against step."""
    figure = new_figure(10.4, 3.7)
    load, entropy = figure.subplots(1, 2)
    for run in runs:
        color = run.color
        steps, largest = series(run, "largest_load")
        _, smallest = series(run, "smallest_load")
        smallest = np.maximum(smallest, _LEAST_LOAD)
        load.fill_between(steps, smallest, largest, color=color, alpha=0.12, lw=0)
        load.plot(steps, largest, color=color, lw=1.3)
        load.plot(steps, smallest, color=color, lw=1.3, ls=DASHES)
        entropy.plot(*series(run, "router_entropy"), color=color, lw=1.5)
        entropy.axhline(math.log(run.config.model.experts), **_REFERENCE)
    load.axhline(1, **_REFERENCE)
    load.set_title("Load of an expert ÷ even share", loc="left")
    entropy.set_title("Entropy of the router's scores (nats)", loc="left")
    plain_log_axis(load, "y")
    low, high = load.get_ylim()
    _load_ticks(load.yaxis, low, high)
    for axes in (load, entropy):
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter("{x:,.10g}")
    others = [
        legend_line("busiest expert of all layers", lw=1.3),
        legend_line("idlest", lw=1.3, ls=DASHES),
        legend_line("even", lw=1, ls=":"),
    ]
    _name_optimizers(figure, runs, others=others)
    return figure


def experts_figure(runs: Sequence[Run]) -> Figure:
    """The load of every expert at the end, layer × expert, a panel for each optimizer."""
    columns = min(len(runs), 2 if len(runs) < 5 else 3)
    lines = math.ceil(len(runs) / columns)
    layers = max(len(final_load(run)) for run in runs)
    figure = new_figure(10.4 if columns > 1 else 6.4, (0.8 + 0.15 * max(layers, 6)) * lines + 0.7)
    grid = figure.subplots(lines, columns, squeeze=False)
    for spare in grid.flat[len(runs) :]:
        spare.remove()
    shade = LogNorm(1 / 2, 2)
    for run, axes in zip(runs, grid.flat, strict=False):
        load = final_load(run)
        first = run.config.model.dense_layers + 1
        edges = (-0.5, load.shape[1] - 0.5, first + len(load) - 0.5, first - 0.5)
        image = axes.imshow(
            np.maximum(load, _LEAST_LOAD),
            cmap="PuOr_r",
            norm=shade,
            extent=edges,
            aspect="auto",
            interpolation="nearest",
        )
        axes.grid(visible=False)
        axes.set_title(optimizer_label(run.optimizer), loc="left")
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    below = {"location": "bottom", "shrink": 0.4, "aspect": 40, "pad": 0.02}
    bar = figure.colorbar(image, ax=list(grid.flat[: len(runs)]), extend="both", **below)
    bar.set_label("load ÷ even share")
    _load_ticks(bar.ax.xaxis, 1 / 2, 2)
    return figure


def final_load(run: Run) -> np.ndarray:
    """`(layers with experts, experts)`: mean over the last tenth of the records; 1 is even."""
    loads = [record["load"] for record in run.trained if "load" in record]
    return np.mean(np.array(loads[-math.ceil(len(loads) / 10) :], float), axis=0)


def _load_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks at powers of two, as 1/4 or 4, and nowhere else."""
    powers = [2.0**k for k in range(-5, 8) if low <= 2.0**k <= high]
    names = [f"{x:g}" if x >= 1 else f"1/{1 / x:g}" for x in powers]
    axis.set_ticks(powers, names)
    axis.set_ticks([], minor=True)


def _log_if_positive(axes: Axes, which: str) -> None:
    """A log axis, if anything is drawn that has a place on it."""
    drawn = (line.get_xdata() if which == "x" else line.get_ydata() for line in axes.lines)
    if any(np.any(np.asarray(values, float) > 0) for values in drawn):
        plain_log_axis(axes, which)


def _name_optimizers(
    figure: Figure,
    runs: Sequence[Run],
    tail: Callable[[Run], str] = lambda run: "",
    others: Sequence[Any] = (),
) -> None:
    handles = [
        legend_line(optimizer_label(run.optimizer) + tail(run), run.color, lw=4) for run in runs
    ]
    handles += others
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8))


def draw(runs: Sequence[Run]) -> dict[str, Figure]:
    """What there is to draw: dense models have no router, and a run may have no record yet."""
    figures = {}
    if any(record["step"] for run in runs for record in run.evaluated):
        figures["held_out"] = held_out_figure(runs)
    if any(run.trained for run in runs):
        figures |= {"loss": loss_figure(runs), "optimization": optimization_figure(runs)}
    if routed := [run for run in runs if any("load" in record for record in run.trained)]:
        figures |= {"router": router_figure(routed), "experts": experts_figure(routed)}
    return figures


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
        config=_together(runs, lambda run: _flat(run.settings)),
        machine=_together(runs, lambda run: run.summary.get("machine", {})),
        version=importlib.metadata.version("muon-jax"),
        abstract=abstract(runs),
        columns=[heading for heading, *_ in columns_of(runs)],
        rows=[[form(run) for *_, form in columns_of(runs)] for run in runs],
        figures=figures,
        measure=_MEASURES[measure_of(runs)],
        runs=runs,
        text=next((run.summary["data"] for run in runs if "data" in run.summary), None),
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the names that they have on the command line."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _together(runs: Sequence[Run], of: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
    """What all runs have in common once, and the rest for each."""
    values: dict[str, dict[str, Any]] = {}
    for run in runs:
        for key, value in of(run).items():
            values.setdefault(key, {})[optimizer_label(run.optimizer)] = value
    found = {}
    for key, each in values.items():
        first, *others = each.values()
        named = "; ".join(f"{name}: {value}" for name, value in each.items())
        found[key] = named if any(other != first for other in others) else first
    return found


def main(folder: tyro.conf.Positional[str]) -> None:
    """Write the report of a pretraining run again from its files; nothing is trained.

    Args:
        folder: Of a run, or of several optimizers' runs, e.g. runs/pretrain/tiny.
    """
    path = epath.Path(folder)
    try:
        optimizers = found_optimizers(path)
        page = write_report(path, optimizers)
        runs = load_runs(path, optimizers)
    except (RunError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    console = Console()
    console.print(terminal_table(runs))
    console.print(Text(str(page)))


if __name__ == "__main__":
    tyro.cli(main)
