"""Muon and the hooks of its chain in float64 NumPy, written from papers and their authors' code.

Nothing here imports muon_jax. A hook is made for one `(fan_in, fan_out)` leaf and keeps its own
state. Rates and decays are numbers or functions of the step, from 0; the decay is decoupled and of
the old weight: `w - lr * (direction + wd * w)`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from reference import SCHEDULES, SHAPE_SCALES, Schedule, momentum_step, newton_schulz

norm = np.linalg.norm


class Muon(NamedTuple):
    """The settings that the variants share with Muon: their `**settings`."""

    learning_rate: float | Callable
    weight_decay: float | Callable = 0.0
    beta: float = 0.95
    nesterov: bool = True
    momentum: str = "ema"
    scale: str = "spectral"
    schedule: Schedule = SCHEDULES["jordan"]


def at(rate, step):
    return rate(step) if callable(rate) else rate


def descend(w, grads, direction, learning_rate, weight_decay=0.0, on_weights=lambda new, old: new):
    """`direction(g, w, step)` keeps its own state."""
    w = np.asarray(w, np.float64)
    trajectory = []
    for step, g in enumerate(grads):
        update = direction(np.asarray(g, np.float64), w, step)
        w = on_weights(w - at(learning_rate, step) * (update + at(weight_decay, step) * w), w)
        trajectory.append(w)
    return trajectory


def muon(
    w,
    grads,
    *,
    before=lambda w: lambda m, g: m,
    after=lambda w: lambda o, m, g: o,
    on_update=lambda w: lambda u, w: u,
    on_weights=lambda w: lambda new, old: new,
    polar=newton_schulz,
    keep=lambda mu, t: mu,
    **settings,
):
    """Muon with hooks, which are made from the first weights and keep their own state.

    They are `before(m, g)` and `after(o, m, g)` orthogonalisation by `polar`, and `on_update(u, w)`
    and `on_weights(new, old)` of a constraint. `keep(mu, t)` is what storing does to the momentum.
    """
    muon = Muon(**settings)
    w = np.asarray(w, np.float64)
    before, after, on_update, on_weights = (
        make(w) for make in (before, after, on_update, on_weights)
    )
    mu = np.zeros(w.shape)

    def direction(g, w, step):
        nonlocal mu
        m, mu = momentum_step(muon.momentum, muon.nesterov, muon.beta, g, mu, step + 1)
        mu = keep(mu, step + 1)
        factor = after(polar(before(m, g), *muon.schedule), m, g)
        return on_update(SHAPE_SCALES[muon.scale](*w.shape) * factor, w)

    return descend(w, grads, direction, muon.learning_rate, muon.weight_decay, on_weights)


# --- Before orthogonalisation ----------------------------------------------------------------


def equilibrate(w):
    """MuonEq: output neurons, our columns, to their root-mean-square norm."""

    def before(m, g):
        norms = norm(m, axis=0)
        return m * np.sqrt(np.mean(norms**2)) / norms

    return before


def second_moment(w, beta2=0.95, eps=1e-10):
    """Muon², as in modded-nanogpt: the gradient's squares under the Nesterov average."""
    v = np.zeros(w.shape)

    def before(m, g):
        nonlocal v
        v = beta2 * v + (1 - beta2) * g * g
        return m / (np.sqrt(v) + eps)

    return before


def eigenbasis(w, b2=0.95, every=10, eps=1e-8, max_dim=10_000):
    """SOAP (2409.11321) on the bases of earlier steps, eigenvectors, identities at first."""
    sides = [np.zeros((n, n)) for n in w.shape]
    bases = [np.eye(n) for n in w.shape]
    v, count = np.zeros(w.shape), 0

    def before(m, g):
        nonlocal v, count
        count += 1
        left, right = bases
        v = b2 * v + (1 - b2) * (left.T @ g @ right) ** 2
        root = np.sqrt(v / (1 - b2**count)) + eps
        m = left @ (left.T @ m @ right / root) @ right.T
        for a, square in enumerate((g @ g.T, g.T @ g)):
            sides[a] = b2 * sides[a] + (1 - b2) * square
            if w.shape[a] < max_dim and (count == 1 or count % every == 0):
                bases[a] = np.linalg.eigh(sides[a])[1]
        return m

    return before


# --- After orthogonalisation -----------------------------------------------------------------


def snap_norm(w):
    """Muon+."""
    return lambda o, m, g: o * np.sqrt(min(w.shape)) / norm(o)


def noise_scale(w, beta2=0.95, eps=1e-8):
    """NAMO, as in Emerging-Optimizers."""
    v = 0.0

    def after(o, m, g):
        nonlocal v
        v = beta2 * v + (1 - beta2) * norm(g) ** 2
        return o * norm(m) / (np.sqrt(v) + eps)

    return after


def nuclear_scale(w):
    """PolarGrad."""
    return lambda o, m, g: o * np.sum(o * m)


def uniform_polar(iterations=2, power=0.5):
    """Aurora, on the longer side of rectangles."""

    def polar(x, *schedule):
        n, m = x.shape
        if n < m:
            return polar(x.T, *schedule).T
        d = 1 / norm(x, axis=1, keepdims=True) if n > m else np.ones((n, 1))
        for k in range(iterations):
            u = newton_schulz(d * x, *schedule)
            if n > m and k < iterations - 1:
                d = d * (m / n / norm(u, axis=1, keepdims=True) ** 2) ** power
        return u

    return polar


# --- Constraints -----------------------------------------------------------------------------


def hyperball(w):
    """Wen et al. (2606.16899): R n(W - rate R n(U))."""
    radius = norm(w)
    return {
        "on_update": lambda w: lambda u, w: radius * u / norm(u),
        "on_weights": lambda w: lambda new, old: radius * new / norm(new),
    }


def update_floor(share, axis=None):
    """u/w floor, of a matrix or (axis 0) of each output neuron."""

    def on_update(u, w):
        own, least = (norm(x, axis=axis, keepdims=axis is not None) for x in (u, share * w))
        return u * np.maximum(1, least / own)

    return {"on_update": lambda w: on_update}


def radial_brake(outward, inward):
    """RadialBrakeHook of Emerging-Optimizers."""

    def on_weights(new, old):
        change = norm(new) - norm(old)
        kept = norm(old) + (outward if change > 0 else inward) * change
        return new * kept / norm(new)

    return {"on_weights": lambda w: on_weights}


def spectral_sphere(radius):
    """MuonSphere (2601.08393)."""

    def on_weights(new, old):
        return new * radius * SHAPE_SCALES["mup"](*new.shape) / norm(new, 2)

    return {"on_weights": lambda w: on_weights}


def spectral_cap(bound):
    def on_weights(new, old):
        return new * min(1, bound * SHAPE_SCALES["mup"](*new.shape) / norm(new, 2))

    return {"on_weights": lambda w: on_weights}


def stiefel(radius):
    """SPEL (2601.21487)."""

    def on_weights(new, old):
        u, _, vt = np.linalg.svd(new, full_matrices=False)
        return radius * u @ vt

    return {"on_weights": lambda w: on_weights}
