"""The hooks of Muon's chain in float64 NumPy, written from the papers and their authors' code.

Nothing here imports muon_jax. A hook is made for one `(fan_in, fan_out)` leaf and keeps its own
state: `before(m, g)` and `after(o, m, g)` orthogonalisation, `on_update(u, w)` and
`on_weights(new, old)` of a constraint.
"""

import numpy as np
import reference_variants
from reference import SHAPE_SCALES, momentum_step, newton_schulz

norm = np.linalg.norm


def muon(
    w,
    grads,
    *,
    before=lambda w: lambda m, g: m,
    after=lambda w: lambda o, m, g: o,
    on_update=lambda w: lambda u, w: u,
    on_weights=lambda w: lambda new, old: new,
    polar=newton_schulz,
    **settings,
):
    """The weights after every step; each hook is made from the first weights."""
    muon = reference_variants.Muon(**settings)
    w = np.asarray(w, np.float64)
    hooks = [make(w) for make in (before, after, on_update, on_weights)]
    before, after, on_update, on_weights = hooks
    mu, trajectory = np.zeros(w.shape), []
    for step, g in enumerate(np.asarray(grads, np.float64)):
        m, mu = momentum_step(muon.momentum, muon.nesterov, muon.beta, g, mu, step + 1)
        factor = after(polar(before(m, g), *muon.schedule), m, g)
        update = on_update(SHAPE_SCALES[muon.scale](*w.shape) * factor, w)
        w = on_weights(w - muon.learning_rate * (update + muon.weight_decay * w), w)
        trajectory.append(w)
    return trajectory


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


# --- Norms of output neurons -----------------------------------------------------------------


def muown(w, grads, *, b1=0.9, b2=0.95, eps=1e-8, **settings):
    """Muown (2605.10797), as in Emerging-Optimizers; neurons are our columns."""
    muon = reference_variants.Muon(**settings)
    w = np.asarray(w, np.float64)
    g, length = norm(w, axis=0), norm(w, axis=0)
    mu, m, s, trajectory = np.zeros(w.shape), 0.0, 0.0, []
    for step, dw in enumerate(np.asarray(grads, np.float64)):
        u = w / g
        v, dg = u * length, np.sum(dw * u, axis=0)
        average, mu = momentum_step(
            muon.momentum, muon.nesterov, muon.beta, g / length * (dw - u * dg), mu, step + 1
        )
        o = SHAPE_SCALES[muon.scale](*w.shape) * newton_schulz(average, *muon.schedule)
        v = v - muon.learning_rate * o
        m, s = b1 * m + (1 - b1) * dg, b2 * s + (1 - b2) * dg**2
        adam = m / (1 - b1 ** (step + 1)) / (np.sqrt(s / (1 - b2 ** (step + 1))) + eps)
        g = g - muon.learning_rate * (adam + muon.weight_decay * g)
        length = norm(v, axis=0)
        w = g * v / length
        trajectory.append(w)
    return trajectory
