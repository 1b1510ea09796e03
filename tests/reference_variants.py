"""Muon's relatives in float64 NumPy, written from the papers and their authors' code.

Nothing here imports muon_jax. Every function takes one `(fan_in, fan_out)` leaf and a list of
gradients and returns the leaf after each step. Rates and decays are numbers or functions of the
step, from 0; the decay is decoupled and of the old weight: `w - lr * (direction + wd * w)`.
Where a paper and its code disagree both are here, and the code is the default.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from reference import SCHEDULES, SHAPE_SCALES, Schedule, momentum_step, newton_schulz, polar_factor


class Muon(NamedTuple):
    """What the variants share with Muon: their `**muon`."""

    learning_rate: float | Callable
    weight_decay: float | Callable = 0.0
    beta: float = 0.95
    nesterov: bool = True
    momentum: str = "ema"
    scale: str = "spectral"
    schedule: Schedule = SCHEDULES["jordan"]


def _at(rate, step):
    return rate(step) if callable(rate) else rate


def _descend(w, grads, direction, learning_rate, weight_decay):
    """`direction(g, step)` keeps its own state."""
    w = np.asarray(w, np.float64)
    trajectory = []
    for step, g in enumerate(grads):
        update = direction(np.asarray(g, np.float64), step)
        w = w - _at(learning_rate, step) * (update + _at(weight_decay, step) * w)
        trajectory.append(w)
    return trajectory


def _muon(w, grads, muon, direction, keep=lambda mu, t: mu):
    """`direction(u, step)` of the momentum; `keep(mu, step + 1)` is what storing does to it."""
    mu = np.zeros(np.shape(w))

    def of_momentum(g, step):
        nonlocal mu
        u, mu = momentum_step(muon.momentum, muon.nesterov, muon.beta, g, mu, step + 1)
        mu = keep(mu, step + 1)
        return direction(u, step)

    return _descend(w, grads, of_momentum, muon.learning_rate, muon.weight_decay)


# --- A second moment after the orthogonalisation ---------------------------------------------


def normuon(w, grads, *, beta2=0.95, rescale="preserve", mean_over="fan_in", eps=1e-10, **muon):
    """Li et al. (2510.05491), Algorithm 1, and zichongli5/NorMuon.

    `rescale`: "preserve" restores the norm that Newton-Schulz left, then the shape scale (code);
    "rms" makes the root mean square 0.2 and has no shape scale (paper). `mean_over`: "fan_in",
    one second moment per output neuron (both); "short", one per index of the longer axis (the
    authors' modded-nanogpt record).
    """
    muon = Muon(**muon)
    axis = 1 if mean_over == "short" and w.shape[0] > w.shape[1] else 0
    v = 0.0

    def direction(u, step):
        nonlocal v
        o = newton_schulz(u, *muon.schedule)
        v = beta2 * v + (1 - beta2) * np.mean(o * o, axis=axis, keepdims=True)
        normalised = o / (np.sqrt(v) + eps)
        normalised = normalised / (np.linalg.norm(normalised) + eps)
        if rescale == "rms":
            return 0.2 * np.sqrt(o.size) * normalised
        return SHAPE_SCALES[muon.scale](*o.shape) * np.linalg.norm(o) * normalised

    return _muon(w, grads, muon, direction)


def adamuon(w, grads, *, beta2=0.95, sign=True, rms=0.2, eps=1e-8, **muon):
    """Si et al. (2507.11005), Algorithm 1, and Chongjie-Si/AdaMuon, whose beta2 is the beta.

    The rescaling takes the place of `scale`, and would cancel a bias correction of v.
    """
    muon = Muon(**muon)
    v = 0.0

    def direction(u, step):
        nonlocal v
        o = newton_schulz(np.sign(u) if sign else u, *muon.schedule)
        v = beta2 * v + (1 - beta2) * o * o
        normalised = o / (np.sqrt(v) + eps)
        return rms * np.sqrt(o.size) * normalised / (np.linalg.norm(normalised) + eps)

    return _muon(w, grads, muon, direction)


# --- Low rank --------------------------------------------------------------------------------


def truncated_polar(x, rank):
    """U_k V_kᵀ of the top k singular triplets; a null direction has none."""
    u, sigma, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    k = min(rank, np.count_nonzero(sigma > 1e-12 * sigma[0]))
    return u[:, :k] @ vt[:k]


def low_rank(w, grads, *, rank, **muon):
    """Muon with the polar factor of the momentum's best rank-k approximation."""
    muon = Muon(**muon)
    factor = SHAPE_SCALES[muon.scale](*w.shape)
    return _muon(w, grads, muon, lambda u, step: factor * truncated_polar(u, rank))


def dion(w, grads, *, q, learning_rate, weight_decay=0.0, mu=0.95, p_side="fan_out", scale="mup"):
    """Ahn et al. (2504.05295), Algorithm 1, and microsoft/dion's dion_simple.

    P is orthonormal, Q only has unit columns, so the sides are not alike: P is on the side of
    fan_out in dion_simple (torch's rows), of the longer axis in dion_reference. `q`: the first
    right factor, of the other side by the rank.
    """
    turned = p_side == "fan_out"
    q = np.asarray(q, np.float64)
    m = 0.0

    def direction(g, step):
        nonlocal m, q
        m = m + (g.T if turned else g)
        if not m.any():  # QR would make up a P, and Q would be lost
            return np.zeros_like(g)
        p, _ = np.linalg.qr(m @ q)
        r = m.T @ p
        m = m - (1 - mu) * p @ r.T
        q = r / (np.linalg.norm(r, axis=0) + 1e-8)
        update = p @ q.T
        return SHAPE_SCALES[scale](*g.shape) * (update.T if turned else update)

    return _descend(w, grads, direction, learning_rate, weight_decay)


def dion2(w, grads, *, fraction, beta=0.95, side="short", beta2=None, eps=1e-10, **muon):
    """Ahn et al. (2512.16928) and microsoft/dion's Dion2; with `beta2` NorDion2, which is Dion3."""
    muon = Muon(**muon)
    of_fan_in = w.shape[0] < w.shape[1] if side == "short" else side == "fan_in"
    m, v = 0.0, np.zeros(w.shape[0 if of_fan_in else 1])

    def direction(g, step):
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
            update[chosen] = even * np.linalg.norm(o) / (np.linalg.norm(even) + eps)
        return SHAPE_SCALES[muon.scale](*w.shape) * (update if of_fan_in else update.T)

    return _descend(w, grads, direction, muon.learning_rate, muon.weight_decay)


# --- Blocks ----------------------------------------------------------------------------------


def muonbp(w, grads, *, blocks, period, block_learning_rate=None, block_scale="block", **muon):
    """Khaled et al. (2510.16981): the whole matrix on steps 0, P, 2P, ..., its tiles on others.

    `blocks` counts the tiles along fan_in and fan_out. On a block step the shape scale is that of
    the tile (the paper's rule for the second rate) or, with "full", of the matrix, and the rate,
    the decay's included, is `block_learning_rate` if there is one.
    """
    muon = Muon(**{"scale": "match_rms_adamw", "nesterov": False} | muon)

    def direction(u, step):
        r, c = blocks if step % period else (1, 1)
        tiles = [np.hsplit(row, c) for row in np.vsplit(u, r)]
        shape = tiles[0][0].shape if block_scale == "block" else u.shape
        tiles = [[newton_schulz(tile, *muon.schedule) for tile in row] for row in tiles]
        return SHAPE_SCALES[muon.scale](*shape) * np.block(tiles)

    def rate(step):
        second = step % period and block_learning_rate is not None
        return _at(block_learning_rate if second else muon.learning_rate, step)

    return _muon(w, grads, muon._replace(learning_rate=rate), direction)


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
    basis="previous",
    standard=True,
    constant=0.001,
    max_dim=10_000,
    ema_rate=0.999,
    average="new",
    scaled_decay=True,
):
    """Frans et al. (2506.07254), Algorithm 2, and kvfrans/splus: `(trajectory, evaluation)`.

    `basis`: the step uses the "previous" eigenbases (code) or, "current", those it has just
    refreshed (paper). `average`: over the "new" weights (paper, torch) or the "old" (the authors'
    optax). The code's decay carries the shape scale; `scaled_decay=False` leaves it out.
    `standard=False` is for embeddings and vectors. Of a matrix with one side of `max_dim` or more
    the code still turns the other side.

    A repeated eigenvalue, such as the zeros that one gradient leaves on the longer side, leaves
    the eigenbasis and the step undetermined.
    """
    w = np.asarray(w, np.float64)
    axes = [a for a in range(w.ndim) if standard and w.ndim == 2 and w.shape[a] < max_dim]
    shape_scale = 2 / sum(w.shape) if len(axes) == 2 else constant
    bases, sides = {a: np.eye(w.shape[a]) for a in axes}, dict.fromkeys(axes, 0.0)
    m = mean = 0.0
    trajectory, evaluation = [], []

    def whitened_sign(x):
        left, right = bases.get(0), bases.get(1)
        x = x if left is None else left.T @ x
        x = np.sign(x if right is None else x @ right)
        x = x if left is None else left @ x
        return x if right is None else x @ right.T

    for step, g in enumerate(grads):
        g = np.asarray(g, np.float64)
        m = b1 * m + (1 - b1) * g
        u = whitened_sign(m)
        for a in axes:
            sides[a] = b2 * sides[a] + (1 - b2) * (g.T @ g if a else g @ g.T)
            if step == 0 or (step + 1) % every == 0:
                bases[a] = np.linalg.eigh(sides[a])[1]
        u = whitened_sign(m) if basis == "current" else u
        decay = _at(weight_decay, step) * w * (shape_scale if scaled_decay else 1.0)
        old, w = w, w - _at(learning_rate, step) * (shape_scale * u + decay)
        mean = ema_rate * mean + (1 - ema_rate) * (w if average == "new" else old)
        trajectory.append(w)
        evaluation.append(mean / (1 - ema_rate ** (step + 1)))
    return trajectory, evaluation


# --- Linear minimisation oracles -------------------------------------------------------------


def _unit(d, axis):
    return d / (np.linalg.norm(d, axis=axis, keepdims=True) + 1e-8)


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

    def direction(g, step):
        nonlocal d
        d = (1 - alpha) * d + alpha * g
        return radius * lmo(d)

    return _descend(w, grads, direction, learning_rate, 1.0 if constrained else 0.0)


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
    norm_of="momentum",
    oracle="spectral",
    schedule=SCHEDULES["jordan"],
    area=1,
):
    """Riabinin et al. (2505.13416), Theorem 1: t = ‖·‖_* / (L0 + L1 ‖·‖_*) along the oracle.

    The theorem has full gradients and no momentum (alpha = 1), where the choices of `norm_of`,
    "momentum" and "gradient", agree.
    """
    lmo = _oracle(oracle, schedule, area)
    d = 0.0

    def direction(g, step):
        nonlocal d
        d = (1 - alpha) * d + alpha * g
        norm = dual_norm(d if norm_of == "momentum" else g, oracle, area)
        return norm / (l0 + l1 * norm) * lmo(d) if norm else np.zeros_like(g)

    return _descend(w, grads, direction, learning_rate, weight_decay)


# --- QK-clip ---------------------------------------------------------------------------------


def _gamma(max_logits, tau):
    s = np.asarray(max_logits, np.float64)
    return tau / np.where(s > tau, s, tau)


def qk_clip(w_q, w_k, max_logits, *, tau=100.0, alpha=0.5, query="own"):
    """Kimi K2 (2507.20534), Algorithm 1, for MHA and GQA: the new `(w_q, w_k)`.

    Kernels are `(..., heads, head_dim)`; there is one logit per query head, and query head h reads
    key head h // (heads / key heads). A key head follows the hottest query head of its group, a
    query head its "own" logit or, as in Megatron-LM, its "group"'s.
    """
    gamma = _gamma(max_logits, tau).reshape(w_k.shape[-2], -1)
    lowest = gamma.min(axis=1, keepdims=True)
    gamma = gamma if query == "own" else np.broadcast_to(lowest, gamma.shape)
    return w_q * gamma.reshape(-1, 1) ** alpha, w_k * lowest ** (1 - alpha)


def qk_clip_mla(q_nope, q_rope, k_nope, max_logits, *, tau=100.0, alpha=0.5):
    """The same for MLA: its rotary key is shared by the heads, so q_rope takes the whole factor."""
    gamma = _gamma(max_logits, tau)[:, None]
    return q_nope * gamma**alpha, q_rope * gamma, k_nope * gamma ** (1 - alpha)


# --- Decay and memory ------------------------------------------------------------------------


def cautious_decay(w, directions, *, learning_rate, weight_decay, at_zero=True):
    """Chen et al. (2510.12402), Algorithm 1: decay only where direction and weight agree.

    The paper's mask is u w >= 0, by which an entry without an update decays. Without `at_zero` it
    is sign(u) = sign(w), by which it does not.
    """
    w = np.asarray(w, np.float64)
    trajectory = []
    for step, u in enumerate(directions):
        mask = u * w >= 0 if at_zero else u * w > 0
        w = w - _at(learning_rate, step) * (u + _at(weight_decay, step) * mask * w)
        trajectory.append(w)
    return trajectory


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


def int8_muon(w, grads, levels=127, **muon):
    """Muon with its momentum kept in integers: rounded after it was used, not before."""
    muon = Muon(**muon)
    factor = SHAPE_SCALES[muon.scale](*w.shape)

    def direction(u, step):
        return factor * newton_schulz(u, *muon.schedule)

    return _muon(w, grads, muon, direction, keep=lambda mu, t: round_trip(mu, t, levels=levels)[2])
