"""Shape scales by name: how large the orthogonal update of a fan_in × fan_out matrix is."""

import math
from collections.abc import Callable

ShapeScale = Callable[[int, int], float]

SHAPE_SCALES: dict[str, ShapeScale] = {
    # Jordan (2024): unit spectral norm, more where the output is the longer side.
    "spectral": lambda fan_in, fan_out: math.sqrt(max(1.0, fan_out / fan_in)),
    # Liu et al. (2502.16982), eq. 4: update RMS 0.2, AdamW's, so AdamW's rate can be reused.
    "match_rms_adamw": lambda fan_in, fan_out: 0.2 * math.sqrt(max(fan_in, fan_out)),
    # Bernstein (2024), Pethick et al. (2502.07529): spectral norm of the muP limit.
    "mup": lambda fan_in, fan_out: math.sqrt(fan_out / fan_in),
    "none": lambda fan_in, fan_out: 1.0,
}


def as_shape_scale(scale: str | ShapeScale | None) -> ShapeScale:
    """A name, a callable `(fan_in, fan_out) -> factor`, or None (no scale).

    Raises:
        ValueError: an unknown name.
    """
    if scale is None:
        return SHAPE_SCALES["none"]
    if callable(scale):
        return scale
    if not isinstance(scale, str) or scale not in SHAPE_SCALES:
        raise ValueError(
            f"Unknown shape scale {scale!r}. Known: {', '.join(SHAPE_SCALES)}; or pass a callable "
            "(fan_in, fan_out) -> factor."
        )
    return SHAPE_SCALES[scale]
