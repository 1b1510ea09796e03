"""Muon and AdamW in float64 NumPy, written from the papers: what the package is measured against.

Nothing here imports muon_jax. Sources: Jordan (2024) and KellerJordan/Muon for the update, Liu et
al. (2502.16982) for the shape scale and the decay, Kingma & Ba and Loshchilov & Hutter for AdamW,
optax.contrib.muon for its bias correction, and for the coefficients the papers named beside them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

JORDAN = [3.4445, -4.7750, 2.0315]
EXACT = [2.0, -1.5, 0.5]
YOU = [
    [4.0848, -6.8946, 2.9270],
    [3.9505, -6.3029, 2.6377],
    [3.7418, -5.5913, 2.3037],
    [2.8769, -3.1427, 1.2046],
    [2.8366, -3.0525, 1.2012],
]
POLAR_EXPRESS_RAW = [
    [8.287212, -23.595887, 17.300387],
    [4.107059, -2.947850, 0.544843],
    [3.948691, -2.908902, 0.551819],
    [3.318420, -2.488488, 0.510049],
    [2.300652, -1.668904, 0.418807],
]
POLAR_EXPRESS_SAFE = [
    [8.156555, -22.483293, 15.878770],
    [4.042930, -2.808917, 0.500018],
    [3.891668, -2.772484, 0.506065],
    [3.285754, -2.368129, 0.464490],
    [2.346541, -1.709783, 0.423236],
]
CANS = [
    [8.4703, -25.1081, 18.6293],
    [4.1828, -3.1087, 0.5806],
    [3.9619, -2.9541, 0.5630],
    [3.2866, -2.4647, 0.5074],
    [2.2737, -1.6447, 0.4162],
]
AOL = [
    [4.0098, -7.0585, 2.4635],
    [3.4585, -5.5479, 2.5959],
    [2.7573, -3.2939, 1.4254],
    [2.7215, -3.0494, 1.3169],
]


def with_safety(rows, safety):
    """The polynomial evaluated at sigma / safety."""
    return [[a / safety, b / safety**3, c / safety**5] for a, b, c in rows]


class Schedule(NamedTuple):
    rows: list
    normalization: str = "frobenius"
    safety: float = 1.0


SCHEDULES = {
    "jordan": Schedule([JORDAN] * 5),
    "you": Schedule(YOU),
    "polar_express": Schedule(with_safety(POLAR_EXPRESS_RAW, 1.05)),
    "polar_express_1.02": Schedule(POLAR_EXPRESS_SAFE, safety=1.02),
    "cans": Schedule(CANS),
    "aol": Schedule(AOL, normalization="aol"),
    "deepseek_v4": Schedule([JORDAN] * 8 + [EXACT] * 2),
    "exact": Schedule([EXACT] * 30),
    "cubic": Schedule([[1.5, -0.5, 0.0]] * 15),
}


def newton_schulz(x, rows, normalization="frobenius", safety=1.0, dtype=np.float64):
    """One matrix through the odd quintics `rows`, on its short side.

    Run in float32 as well, it shows how much rounding the formula itself suffers.
    """
    x = np.asarray(x, dtype)
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T, rows, normalization, safety, dtype).T
    if not x.any():
        return x
    if normalization == "aol":
        x = x / np.sqrt(np.abs(x @ x.T).sum(axis=1, keepdims=True))
    else:
        x = x / np.linalg.norm(x)
    x = x / safety
    for a, b, c in rows:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def polar_factor(x):
    u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u @ vt


SHAPE_SCALES = {
    "spectral": lambda fan_in, fan_out: math.sqrt(max(1, fan_out / fan_in)),
    "match_rms_adamw": lambda fan_in, fan_out: 0.2 * math.sqrt(max(fan_in, fan_out)),
    "mup": lambda fan_in, fan_out: math.sqrt(fan_out / fan_in),
    "none": lambda fan_in, fan_out: 1.0,
}


def momentum_step(kind, nesterov, beta, g, mu, t):
    """`(what is orthogonalised, the new mu)` at step t = 1, 2, ..."""
    if kind == "heavy_ball":
        mu = beta * mu + g
        return (beta * mu + g if nesterov else mu), mu
    mu = beta * mu + (1 - beta) * g
    if kind == "ema":
        return (beta * mu + (1 - beta) * g if nesterov else mu), mu
    if not nesterov:
        return mu / (1 - beta**t), mu
    return beta * mu / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t), mu


class Hyper(NamedTuple):
    """Rates and decays are numbers or functions of the step, from 0."""

    learning_rate: float | Callable = 0.02
    beta: float = 0.95
    nesterov: bool = True
    momentum: str = "ema"
    scale: str = "spectral"
    schedule: Schedule = SCHEDULES["jordan"]
    weight_decay: float | Callable = 0.0
    adam_learning_rate: float | Callable | None = None
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8
    adam_weight_decay: float | Callable | None = None
    adam_nesterov: bool = False


def hybrid(params, grads, labels, hyper):
    """The params after each step; all dicts by leaf name, Muon leaves `(fan_in, fan_out)`."""
    params = {name: np.asarray(w, np.float64) for name, w in params.items()}
    mu = {name: np.zeros_like(w) for name, w in params.items()}
    nu = {name: np.zeros_like(w) for name, w in params.items()}
    trajectory = []
    for step, grad in enumerate(grads):
        for name, w in params.items():
            g = np.asarray(grad[name], np.float64)
            if labels[name] == "muon":
                rate, decay = hyper.learning_rate, hyper.weight_decay
                u, mu[name] = momentum_step(
                    hyper.momentum, hyper.nesterov, hyper.beta, g, mu[name], step + 1
                )
                direction = SHAPE_SCALES[hyper.scale](*w.shape) * newton_schulz(u, *hyper.schedule)
            elif labels[name] == "other":
                rate = _either(hyper.adam_learning_rate, hyper.learning_rate)
                decay = _either(hyper.adam_weight_decay, hyper.weight_decay)
                direction, mu[name], nu[name] = _adam(g, mu[name], nu[name], step + 1, hyper)
            else:
                continue
            params[name] = w - _at(rate, step) * (direction + _at(decay, step) * w)
        trajectory.append(dict(params))
    return trajectory


def _adam(g, m, v, t, hyper):
    b1, b2 = hyper.adam_b1, hyper.adam_b2
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    m_hat = m / (1 - b1**t)
    if hyper.adam_nesterov:
        m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    return m_hat / (np.sqrt(v / (1 - b2**t)) + hyper.adam_eps), m, v


def _either(value, default):
    return default if value is None else value


def _at(rate, step):
    return rate(step) if callable(rate) else rate
