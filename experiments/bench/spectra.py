"""The effect of Newton-Schulz on singular values, for its standard form and its Gram form."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.report.figures import DASHES, figure_style, legend_line, new_figure, plain_log_axis
from experiments.report.page import Table
from muon_jax._orthogonalize.newton_schulz import Form, NewtonSchulz

Row = dict[str, Any]

SHAPES = ((256, 1024), (512, 512))
SPECTRA = ("Gaussian", "1/k", "exponential")
SCHEDULES = ("jordan", "polar_express")
DTYPES = ("bfloat16", "float32")
POINTS = 64  # approximate number of points on a curve
FORMS = ("standard", "Gram", "Gram, no restart")
LINES: dict[str, dict[str, Any]] = {
    "standard": {"color": "#999999", "lw": 3, "zorder": 3},
    "Gram": {"color": "#D55E00", "lw": 1.4, "ls": DASHES, "zorder": 4},
    "Gram, no restart": {"color": "#0072B2", "lw": 1, "zorder": 2},
}


class Decomposed(NamedTuple):
    """The singular value decomposition of a matrix `u * sigma @ v.T`, in float64."""

    u: np.ndarray
    sigma: np.ndarray
    v: np.ndarray


@functools.cache
def matrix(spectrum: str, m: int, n: int, seed: int = 0) -> Decomposed:
    """Returns an m × n matrix with descending singular values and a Frobenius norm of 1.

    A `Gaussian` matrix has independent entries. `1/k` and `exponential` have random singular
    vectors; the singular values of `exponential` fall from 1 to 1e-6.
    """
    random = np.random.default_rng(seed)
    u, sigma, vt = np.linalg.svd(random.standard_normal((m, n)), full_matrices=False)
    if spectrum == "1/k":
        sigma = 1 / np.arange(1, len(sigma) + 1)
    elif spectrum == "exponential":
        sigma = np.geomspace(1, 1e-6, len(sigma))
    return Decomposed(u, sigma / np.linalg.norm(sigma), vt.T)


def orthogonalized(x: np.ndarray, form: str, schedule: str, dtype: str) -> np.ndarray:
    """Returns the result of Newton-Schulz, in float64."""
    method = "standard" if form == "standard" else "gram"
    solver = NewtonSchulz(schedule, dtype=dtype, method=method)
    without = Form("gram") if form == "Gram, no restart" else None
    return np.asarray(solver(jnp.asarray(x, jnp.float32), form=without), np.float64)


def singular_values(spectrum: str, shape: tuple[int, int], schedule: str, dtype: str) -> list[Row]:
    """Returns a row for each form, with singular values of the result and the map from the input's.

    `mapped` is uᵢᵀ y vᵢ for some singular vectors of the input, and `sigma` their singular values.
    """
    whole = matrix(spectrum, *shape)
    x = whole.u * whole.sigma @ whole.v.T
    solver = NewtonSchulz(schedule, dtype=dtype, method="gram")
    restarts = solver.form(*shape, jnp.float32, "cpu").restarts
    rows = []
    for form in FORMS:
        y = orthogonalized(x, form, schedule, dtype)
        row: Row = {"spectrum": spectrum, "shape": list(shape), "schedule": schedule}
        row |= {"dtype": dtype, "form": form}
        row["restarts"] = list(restarts) if form == "Gram" else []
        finite = bool(np.isfinite(y).all())
        values = np.linalg.svd(y, compute_uv=False) if finite else np.full(min(shape), np.nan)
        # The first 16 points are included, since a spectrum that falls fast changes most there.
        points = np.r_[:16, 16 : min(shape) : max(1, min(shape) // POINTS)]
        mapped = np.einsum("ik,ij,jk->k", whole.u[:, points], y, whole.v[:, points], optimize=True)
        rows.append(
            row
            | {
                "finite": finite,
                "smallest": _number(values.min()),
                "median": _number(np.median(values)),
                "largest": _number(values.max()),
                "sigma": [_number(value) for value in whole.sigma[points]],
                "mapped": [_number(value) for value in mapped],
            }
        )
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Returns a table of the smallest, median and largest singular value of each form."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: (row["dtype"], row["schedule"], row["shape"])):
        key = row["dtype"], row["schedule"], *row["shape"], row["spectrum"]
        groups.setdefault(key, {})[row["form"]] = row
    lines = [
        [
            dtype,
            schedule,
            f"{m} × {n}",
            spectrum,
            *(_cell(forms[form]) for form in FORMS),
            ", ".join(map(str, forms["Gram"]["restarts"])) or "none",
        ]
        for (dtype, schedule, m, n, spectrum), forms in groups.items()
    ]
    headings = ("dtype", "schedule", "matrix", "spectrum", *FORMS, "restarts")
    title = "Singular values after Newton–Schulz: smallest / median / largest"
    note = "Restarts: the steps after which the Gram form computes XXᵀ again."
    return Table.of_texts(headings, lines, note, title=title, note=note, names=4)


def figure(rows: Sequence[Row]) -> Figure:
    """Draws output against input singular values of the first shape, by spectrum and setting."""
    settings = list(itertools.product(DTYPES, SCHEDULES))
    with figure_style():
        drawing = new_figure(10, 2.3 * len(settings))
        panels = drawing.subplots(len(settings), len(SPECTRA), squeeze=False)
        for i, (dtype, schedule) in enumerate(settings):
            for j, spectrum in enumerate(SPECTRA):
                axes = panels[i, j]
                axes.set_title(f"{spectrum} · {schedule} · {dtype}")
                shown = (dtype, schedule, spectrum, list(SHAPES[0]))
                for row in rows:
                    if shown == tuple(row[k] for k in ("dtype", "schedule", "spectrum", "shape")):
                        y = [np.nan if value is None else value for value in row["mapped"]]
                        axes.plot(row["sigma"], y, **LINES[row["form"]])
                axes.axhline(1, color="#444444", lw=0.8, ls=":")
                plain_log_axis(axes, "x")
                axes.set_xlim(max(1e-6, axes.get_xlim()[0]), None)
                axes.set_ylim(-0.5, 2.5)
        drawing.supxlabel("singular value ÷ Frobenius norm")
        drawing.supylabel("after five steps")
        handles = [legend_line(form, **line) for form, line in LINES.items()]
        drawing.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return drawing


def _cell(row: Row) -> str:
    if not row["finite"]:
        return "not finite"
    values = [row[key] for key in ("smallest", "median", "largest")]
    return " / ".join(f"{value:.3f}" if value < 100 else f"{value:,.0f}" for value in values)


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None
