"""The named Newton-Schulz schedules, which give the odd quintic polynomial of each step."""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp

from muon_jax._checks import check_integer, check_number, check_static

Row = tuple[float, float, float]

NORMALIZATIONS = ("frobenius", "schatten", "spectral", "aol")


@dataclasses.dataclass(frozen=True)
class Schedule:
    r"""A Newton-Schulz schedule: row $k$ maps $\sigma \mapsto a\sigma + b\sigma^3 + c\sigma^5$.

    Attributes:
        rows: One `(a, b, c)` per step.
        tail: The row that is repeated after `rows` if more steps are requested. `None` means that
            the schedule has exactly `len(rows)` steps.
        steps: The default number of steps. `None` means `len(rows)`.
        normalization: How singular values are first scaled into (0, 1]. `"frobenius"` divides by
            the Frobenius norm. `"schatten"` divides by the Schatten-4 norm, which is between the
            largest singular value and the Frobenius norm (Grishina et al., 2506.10935).
            `"spectral"` divides by the largest singular value, which needs a decomposition of XXᵀ.
            `"aol"` rescales along the short side, of square matrices along the first (Boissin et
            al., 2512.04632).
        safety: A number by which the normalised matrix is divided as well, as a margin for
            rounding.
        low_precision_slack: A margin for rows that diverge just outside their interval. In bfloat16
            and float16 every fitted row is evaluated at `sigma / low_precision_slack`.

    Example:
        >>> from muon_jax import Schedule
        >>> Schedule(rows=((2.0, -1.5, 0.5),)).resolve()
        ((2.0, -1.5, 0.5),)
    """

    rows: tuple[Row, ...]
    tail: Row | None = None
    steps: int | None = None
    normalization: Literal["frobenius", "schatten", "spectral", "aol"] = "frobenius"
    safety: float = 1.0
    low_precision_slack: float = 1.0

    def __post_init__(self) -> None:
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"Schedule.normalization must be one of {', '.join(NORMALIZATIONS)}; got "
                f"{self.normalization!r}."
            )
        object.__setattr__(self, "rows", _checked_rows("Schedule.rows", self.rows))
        if self.tail is not None:
            object.__setattr__(self, "tail", _checked_row("Schedule.tail", self.tail))
        if not self.rows and self.tail is None:
            raise ValueError("Schedule needs at least one (a, b, c) row; got none.")
        if self.steps is not None:
            check_integer("Schedule.steps", self.steps, at_least=1)
        check_number("Schedule.safety", self.safety, above=0)
        check_number("Schedule.low_precision_slack", self.low_precision_slack, above=0)

    def resolve(
        self, steps: int | None = None, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> tuple[Row, ...]:
        """Returns the rows of `steps` steps in `dtype`."""
        if steps is None:
            steps = self.steps or len(self.rows)
        if isinstance(steps, bool) or not isinstance(steps, numbers.Integral):
            raise TypeError(
                f"Newton-Schulz steps must be a static Python int; got {type(steps).__name__}. "
                "With optax.inject_hyperparams, add it to static_args."
            )
        steps, rows = int(steps), self.rows
        if self.low_precision_slack != 1 and jnp.finfo(dtype).bits < 32:
            rows = _slack(rows, self.low_precision_slack)
        if steps < 1:
            raise ValueError(f"Newton-Schulz needs at least 1 step; got steps={steps}.")
        if self.tail is not None:
            return (rows + (self.tail,) * steps)[:steps]
        if steps != len(rows):
            raise ValueError(
                f"This schedule has {len(rows)} coefficient rows, one per step, but "
                f"steps={steps}. Omit steps, or pass {steps} rows."
            )
        return rows


_RULE = "{} must be {}a triple of numbers (a, b, c), or a sequence of such triples, all static"


def _refuse(name: str, value: Any) -> NoReturn:
    names = "the name of a schedule, " if name == "coeffs" else ""
    raise ValueError(f"{_RULE.format(name, names)}; got {value!r}.")


def _checked_rows(name: str, rows: Any) -> tuple[Row, ...]:
    if _length(rows) is None or any(_length(row) != 3 for row in rows):
        _refuse(name, rows)
    return tuple(_checked_row(name, row) for row in rows)


def _checked_row(name: str, row: Any) -> Row:
    if _length(row) != 3:
        _refuse(name, row)
    for value in row:
        if isinstance(value, jax.core.Tracer):
            check_static(f"A coefficient of {name}", value)
        check_number(f"A coefficient of {name}", value)
    a, b, c = row
    return float(a), float(b), float(c)


def _length(value: Any) -> int | None:
    """Returns the length of a sequence or an array with axes, and None for tracers and the rest."""
    if isinstance(value, (str, bytes, jax.core.Tracer)) or getattr(value, "ndim", 1) == 0:
        return None
    return len(value) if hasattr(value, "__len__") else None


_JORDAN = (3.4445, -4.7750, 2.0315)
_EXACT = (2.0, -1.5, 0.5)


def _slack(rows: tuple[Row, ...], safety: float) -> tuple[Row, ...]:
    """Maps p(sigma) to p(sigma / safety), so that values rounded above 1 stay in the interval."""
    return tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in rows)


SCHEDULES: dict[str, Schedule] = {
    # Jordan (2024), kellerjordan.github.io/posts/muon: steepest slope at 0, values in [0.68, 1.13].
    "jordan": Schedule((), tail=_JORDAN, steps=5),
    # YouJiacheng's six-digit search, known as "dion" in optax.
    "you": Schedule(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    # Amsel et al. (2505.16932): greedily minimax-optimal, so every prefix is optimal as well. The
    # tail is the fifth-order Newton-Schulz polynomial, and each fitted row has slack 1.05.
    "polar_express": Schedule(
        _slack(
            (
                (8.287212, -23.595887, 17.300387),
                (4.107059, -2.947850, 0.544843),
                (3.948691, -2.908902, 0.551819),
                (3.318420, -2.488488, 0.510049),
                (2.300652, -1.668904, 0.418807),
            ),
            1.05,
        ),
        tail=(1.875, -1.25, 0.375),
        steps=5,
    ),
    # The same method refitted with slack 1.02, which is part of the rows and of the normalisation.
    "polar_express_1.02": Schedule(
        (
            (8.156555, -22.483293, 15.878770),
            (4.042930, -2.808917, 0.500018),
            (3.891668, -2.772484, 0.506065),
            (3.285754, -2.368129, 0.464490),
            (2.346541, -1.709783, 0.423236),
        ),
        safety=1.02,
    ),
    # Grishina et al. (2506.10935): Chebyshev-optimal rows. The published rows have no slack, so in
    # bfloat16 a rounding error above the end of the interval would grow to infinity.
    "cans": Schedule(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        low_precision_slack=1.05,
    ),
    # Boissin et al. (2512.04632), Turbo-Muon: the tighter normalisation saves one step.
    "aol": Schedule(
        (
            (4.0098, -7.0585, 2.4635),
            (3.4585, -5.5479, 2.5959),
            (2.7573, -3.2939, 1.4254),
            (2.7215, -3.0494, 1.3169),
        ),
        normalization="aol",
    ),
    # DeepSeek-V4: eight steep steps, then two that converge to 1.
    "deepseek_v4": Schedule((_JORDAN,) * 8 + (_EXACT,) * 2),
    # Converges to the true polar factor: each step doubles a small singular value.
    "exact": Schedule((), tail=_EXACT, steps=30),
    # The classical Newton-Schulz iteration (Higham, 2008, eq. 8.20): a step needs one product less,
    # and multiplies a small singular value by 1.5.
    "cubic": Schedule((), tail=(1.5, -0.5, 0.0), steps=15),
}


def as_schedule(coeffs: "str | Schedule | Row | Sequence[Row]") -> Schedule:
    """Returns the schedule of a name, of one `(a, b, c)` for five steps, or of one row per step."""
    if isinstance(coeffs, Schedule):
        return coeffs
    if isinstance(coeffs, str):
        if coeffs not in SCHEDULES:
            same = _NAMES_ELSEWHERE.get(coeffs)
            raise ValueError(
                f"A Newton-Schulz schedule must be one of {', '.join(SCHEDULES)}, or (a, b, c), or "
                f"one (a, b, c) per step; got {coeffs!r}."
                + (f" Its name here is {same!r}." if same else "")
            )
        return SCHEDULES[coeffs]
    single = _length(coeffs) == 3 and all(_length(value) is None for value in coeffs)
    if single:
        return Schedule((), tail=_checked_row("coeffs", coeffs), steps=5)
    rows = _checked_rows("coeffs", coeffs)
    if not rows:
        _refuse("coeffs", coeffs)
    return Schedule(rows)


# Names in optax.contrib.muon, and names of its default in its documentation and among users.
_NAMES_ELSEWHERE = {"standard": "jordan", "muon": "jordan", "quintic": "jordan", "dion": "you"}
