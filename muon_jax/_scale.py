"""Shape scales: the factors by which the orthogonal factor of each matrix is multiplied."""

import math
from collections.abc import Callable

ShapeScale = Callable[[int, int], float]

SHAPE_SCALES: dict[str, ShapeScale] = {
    # Jordan (2024): spectral norm 1, or more if the output is the longer side.
    "spectral": lambda fan_in, fan_out: math.sqrt(max(1.0, fan_out / fan_in)),
    # Liu et al. (2502.16982), eq. 4: update RMS 0.2, like AdamW's, so that its rate can be reused.
    "match_rms_adamw": lambda fan_in, fan_out: 0.2 * math.sqrt(max(fan_in, fan_out)),
    # Bernstein (2024), Pethick et al. (2502.07529): spectral norm of the muP limit.
    "mup": lambda fan_in, fan_out: math.sqrt(fan_out / fan_in),
    "none": lambda fan_in, fan_out: 1.0,
}


def as_shape_scale(scale: str | ShapeScale | None) -> ShapeScale:
    """Returns the shape scale with this name, the callable itself, or a factor of 1 for None."""
    if scale is None:
        return SHAPE_SCALES["none"]
    if callable(scale):
        return scale
    if not isinstance(scale, str) or scale not in SHAPE_SCALES:
        raise ValueError(
            f"scale must be one of {', '.join(SHAPE_SCALES)}, or a callable "
            f"(fan_in, fan_out) -> factor; got {scale!r}."
        )
    return SHAPE_SCALES[scale]
