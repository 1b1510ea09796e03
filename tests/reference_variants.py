"""Muon's relatives in float64 NumPy, written from the papers and their authors' code.

Nothing here imports muon_jax. Every optimizer takes one `(fan_in, fan_out)` leaf and a list of
gradients and returns the leaf after each step. Where a paper and its code disagree, it is the code.
"""

import functools
import math

import numpy as np
from reference import SCHEDULES, SHAPE_SCALES, momentum_step, newton_schulz, polar_factor
from reference_hooks import Muon, at, descend, muon, norm

# --- Muon with hooks ---------------------------------------------------------------------------


def neuron_norm(w, beta2, eps):
    v = 0.0

    def after(o, m, g):
        nonlocal v
        v = beta2 * v + (1 - beta2) * np.mean(o * o, axis=0, keepdims=True)
        even = o / (np.sqrt(v) + eps)
        return norm(o) * even / (norm(even) + eps)

    return after


def normuon(w, grads, *, beta2=0.95, eps=1e-10, **settings):
    """Li et al. (2510.05491), Algorithm 1, and zichongli5/NorMuon."""
    return muon(w, grads, after=functools.partial(neuron_norm, beta2=beta2, eps=eps), **settings)


def entry_norm(w, beta2, rms, eps):
    v = 0.0

    def after(o, m, g):
        nonlocal v
        v = beta2 * v + (1 - beta2) * o * o
        normalised = o / (np.sqrt(v) + eps)
        return rms * np.sqrt(o.size) * normalised / (norm(normalised) + eps)

    return after


def adamuon(w, grads, *, beta2=0.95, rms=0.2, eps=1e-8, **settings):
    """Si et al. (2507.11005), Algorithm 1, and Chongjie-Si/AdaMuon, whose beta2 is the beta.

    The rescaling takes the place of `scale`, and would cancel a bias correction of v.
    """
    hooks = {"before": lambda w: lambda m, g: np.sign(m)}
    hooks["after"] = functools.partial(entry_norm, beta2=beta2, rms=rms, eps=eps)
    return muon(w, grads, **hooks, **settings | {"scale": "none"})


def truncated_polar(x, rank):
    """U_k V_kᵀ of the top k singular triplets; a null direction has none."""
    u, sigma, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    k = min(rank, np.count_nonzero(sigma > 1e-12 * sigma[0]))
    return u[:, :k] @ vt[:k]


def low_rank(w, grads, *, rank, **settings):
    """Muon with the polar factor of the momentum's best rank-k approximation."""
    return muon(w, grads, polar=lambda x, *schedule: truncated_polar(x, rank), **settings)


def muonbp(w, grads, *, blocks, period, block_learning_rate=None, **settings):
    """Khaled et al. (2510.16981): the whole matrix on steps 0, P, 2P, ..., its tiles on others.

    `blocks` counts the tiles along fan_in and fan_out. On a block step the shape scale is that of
    the tile (the paper's rule for the second rate), and the rate, the decay's included, is
    `block_learning_rate` if there is one.
    """
    settings = Muon(**settings)
    step = -1

    def polar(u, *schedule):
        nonlocal step
        step += 1
        r, c = blocks if step % period else (1, 1)
        tiles = [np.hsplit(row, c) for row in np.vsplit(u, r)]
        scale = SHAPE_SCALES[settings.scale](*tiles[0][0].shape)
        return scale * np.block([[newton_schulz(x, *schedule) for x in row] for row in tiles])

    def rate(step):
        second = step % period and block_learning_rate is not None
        return at(block_learning_rate if second else settings.learning_rate, step)

    own = {"learning_rate": rate, "scale": "none"}
    return muon(w, grads, polar=polar, **settings._asdict() | own)


def dion(w, grads, *, q, learning_rate, weight_decay=0.0, mu=0.95, scale="mup"):
    """Ahn et al. (2504.05295), Algorithm 1, and microsoft/dion's dion_simple.

    P is orthonormal, Q only has unit columns, so the sides are not alike: P is on the side of
    fan_out (torch's rows). `q` is the first right factor, of fan_in by the rank.
    """
    q = np.asarray(q, np.float64)
    m = 0.0

    def direction(g, w, step):
        nonlocal m, q
        m = m + g.T
        if not m.any():  # QR would make up a P, and Q would be lost
            return np.zeros_like(g)
        p, _ = np.linalg.qr(m @ q)
        r = m.T @ p
        m = m - (1 - mu) * p @ r.T
        q = r / (norm(r, axis=0) + 1e-8)
        return SHAPE_SCALES[scale](*g.shape) * (p @ q.T).T

    return descend(w, grads, direction, learning_rate, weight_decay)


def dion2(w, grads, *, fraction, beta=0.95, side="short", beta2=None, eps=1e-10, **settings):
    """Ahn et al. (2512.16928) and microsoft/dion's Dion2; with `beta2` NorDion2, which is Dion3."""
    muon = Muon(**settings)
    of_fan_in = w.shape[0] < w.shape[1] if side == "short" else side == "fan_in"
    m, v = 0.0, np.zeros(w.shape[0 if of_fan_in else 1])

    def direction(g, w, step):
        nonlocal m
        m = m + (g if of_fan_in else g.T)
        count = math.ceil(round(fraction * len(m), 9))
        chosen = np.argsort(-np.abs(m).sum(axis=1))[:count]
        update = np.zeros(m.shape)
        update[chosen] = newton_schulz(m[chosen], *muon.schedule)
        m[chosen] *= beta
        if beta2 is not None:
            o = update[chosen]
            v[chosen] = beta2 * v[chosen] + (1 - beta2) * np.mean(o * o, axis=1)
            even = o / (np.sqrt(v[chosen])[:, None] + eps)
            update[chosen] = even * norm(o) / (norm(even) + eps)
        return SHAPE_SCALES[muon.scale](*w.shape) * (update if of_fan_in else update.T)

    return descend(w, grads, direction, muon.learning_rate, muon.weight_decay)


# --- SPlus -----------------------------------------------------------------------------------


def splus(
    w,
    grads,
    *,
    learning_rate,
    weight_decay=0.0,
    b1=0.9,
    b2=0.999,
    every=100,
    standard=True,
    max_dim=10_000,
    ema_rate=0.999,
):
    """Frans et al. (2506.07254), Algorithm 2, and kvfrans/splus: `(trajectory, evaluation)`.

    As in the code, a step uses the eigenbases of earlier ones, and of a matrix with one side of
    `max_dim` or more the other side is turned. The code's decay carries the shape scale; ours does
    not. `standard=False` is for embeddings and vectors.

    A repeated eigenvalue, such as the zeros that one gradient leaves on the longer side, leaves
    the eigenbasis and the step undetermined.
    """
    w = np.asarray(w, np.float64)
    axes = [a for a in range(w.ndim) if standard and w.ndim == 2 and w.shape[a] < max_dim]
    shape_scale = 2 / sum(w.shape) if len(axes) == 2 else 0.001
    bases, sides = {a: np.eye(w.shape[a]) for a in axes}, dict.fromkeys(axes, 0.0)
    m = mean = 0.0
    evaluation = []

    def turned(x, back=False):
        for a, basis in bases.items():
            basis = basis if back else basis.T
            x = x @ basis.T if a else basis @ x
        return x

    def direction(g, w, step):
        nonlocal m
        m = b1 * m + (1 - b1) * g
        u = turned(np.sign(turned(m)), back=True)
        for a in axes:
            sides[a] = b2 * sides[a] + (1 - b2) * (g.T @ g if a else g @ g.T)
            if step == 0 or (step + 1) % every == 0:
                bases[a] = np.linalg.eigh(sides[a])[1]
        return shape_scale * u

    trajectory = descend(w, grads, direction, learning_rate, weight_decay)
    for step, new in enumerate(trajectory):
        mean = ema_rate * mean + (1 - ema_rate) * new
        evaluation.append(mean / (1 - ema_rate ** (step + 1)))
    return trajectory, evaluation


# --- Linear minimisation oracles -------------------------------------------------------------


def _unit(d, axis):
    return d / (norm(d, axis=axis, keepdims=True) + 1e-8)


# LIONS-EPFL/scion: rows are its output neurons, columns its inputs. `orth` is a polar factor,
# `area` the size of a convolution's kernel, which comes as `(area * channels in, fan_out)`.
ORACLES = {
    "spectral": lambda d, orth, area: np.sqrt(d.shape[1] / d.shape[0]) * orth(d),
    "spectral_conv": lambda d, orth, area: np.sqrt(d.shape[1] / d.shape[0] / area) * orth(d),
    "sign": lambda d, orth, area: np.sign(d) / d.shape[0],
    "bias_rms": lambda d, orth, area: np.sqrt(d.shape[0]) * _unit(d, 0),
    "row_norm": lambda d, orth, area: _unit(d, 0) / np.sqrt(d.shape[0]),
    "col_norm": lambda d, orth, area: np.sqrt(d.shape[1]) * _unit(d, 1),
}


def _oracle(oracle="spectral", schedule=SCHEDULES["jordan"], area=1):
    return lambda d: ORACLES[oracle](d, lambda x: newton_schulz(x, *schedule), area)


def scion(w, grads, *, learning_rate, radius=1.0, alpha=0.1, constrained=True, **oracle):
    """Pethick et al. (2502.07529). `alpha`, the new gradient's weight, is their `momentum`."""
    lmo = _oracle(**oracle)
    d = 0.0

    def direction(g, w, step):
        nonlocal d
        d = (1 - alpha) * d + alpha * g
        return radius * lmo(d)

    return descend(w, grads, direction, learning_rate, 1.0 if constrained else 0.0)


def dual_norm(d, oracle="spectral", area=1):
    """The largest <d, x> with x in the unit ball: <d, oracle(d)>, where the oracle is exact."""
    return np.sum(d * ORACLES[oracle](d, polar_factor, area))


def gluon(
    w,
    grads,
    *,
    l0,
    l1,
    learning_rate=1.0,
    weight_decay=0.0,
    alpha=0.1,
    oracle="spectral",
    schedule=SCHEDULES["jordan"],
    area=1,
):
    """Riabinin et al. (2505.13416), Theorem 1: t = ‖·‖_* / (L0 + L1 ‖·‖_*) along the oracle.

    The theorem has full gradients and no momentum (alpha = 1); here the norm is the momentum's.
    """
    lmo = _oracle(oracle, schedule, area)
    d = 0.0

    def direction(g, w, step):
        nonlocal d
        d = (1 - alpha) * d + alpha * g
        size = dual_norm(d, oracle, area)
        return size / (l0 + l1 * size) * lmo(d) if size else np.zeros_like(g)

    return descend(w, grads, direction, learning_rate, weight_decay)


# --- Norms of output neurons -----------------------------------------------------------------


def muown(w, grads, *, b1=0.9, b2=0.95, eps=1e-8, **settings):
    """Muown (2605.10797), as in Emerging-Optimizers; neurons are our columns."""
    muon = Muon(**settings)
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


# --- Decay and memory ------------------------------------------------------------------------


def cautious_decay(w, directions, *, learning_rate, weight_decay):
    """Chen et al. (2510.12402), Algorithm 1: decay only where direction and weight agree.

    The mask is u w >= 0, by which an entry without an update decays.
    """

    def direction(u, w, step):
        return u + at(weight_decay, step) * (u * w >= 0) * w

    return descend(w, directions, direction, learning_rate)


def round_trip(x, count, dtype=np.float64, levels=127):
    """`(int8, scale, what comes back)`: linear, symmetric, one scale per slice of the last axis.

    Gupta et al. (2509.23106), who have blocks of 2048 values; rounded stochastically, up where the
    number of the entry at step `count` is below the fraction.
    """
    x = np.asarray(x, dtype)
    scale = np.abs(x).max(axis=-1, keepdims=True) / dtype(levels)
    q = x / np.where(scale > 0, scale, dtype(1))
    up = uniform(count, x.shape) < q - np.floor(q)
    q = np.clip(np.floor(q) + up, -levels, levels).astype(np.int8)
    return q, scale, q * scale


def uniform(count, shape):
    """Ettinger's "lowbias32" of the place in the array, with the step's own hash mixed in."""

    def mixed(bits):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            bits = ((bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)) % np.uint64(2**32)
        return bits

    place = np.arange(np.prod(shape), dtype=np.uint64).reshape(shape)
    return (mixed(place ^ mixed(np.uint64(count))) >> np.uint64(8)) / 2.0**24


def int8_muon(w, grads, levels=127, **settings):
    """Muon with its momentum kept in integers: rounded after it was used, not before."""
    return muon(w, grads, keep=lambda mu, t: round_trip(mu, t, levels=levels)[2], **settings)
