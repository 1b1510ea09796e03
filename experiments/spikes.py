"""Spikes of the gradient norm: steps at which it is far above its recent median."""

from collections.abc import Sequence

import numpy as np

_RUNNING = 50  # steps of a running median
_SPIKE = 3


def spikes(norms: Sequence[float]) -> dict[str, float]:
    """Counts the spikes of the gradient norm over a training.

    Each step's norm is compared with the median of the 50 steps before it, so the first 50 steps,
    which include warm-up, are not compared.

    Args:
        norms: The norm at every step.

    Returns:
        `spikes`, the number of steps above three times the median, and `largest_spike`, the largest
        norm over its median. It is 0 if there are at most 50 steps.

    Example:
        >>> spikes([1.0] * 60 + [2.0, 7.0] + [1.0] * 60)
        {'spikes': 1, 'largest_spike': 7.0}
    """
    if len(norms) <= _RUNNING:
        return {"spikes": 0, "largest_spike": 0.0}
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(norms, np.float64), _RUNNING)
    compared = np.asarray(norms[_RUNNING:]) / np.median(windows[:-1], axis=1)
    return {"spikes": int((compared > _SPIKE).sum()), "largest_spike": float(compared.max())}
