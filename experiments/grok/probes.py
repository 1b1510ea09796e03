"""Looks inside a grokking model: Fourier power, two one-sided losses, spectra and norms.

`measure` looks at one seed, with static shapes: `jax.vmap` gives it more. The Fourier measures are
those of Nanda et al. (2301.05217), which has modular addition alone; what carries them to the other
tasks is ours and said where it is done.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.grok.losses import LOSSES, SoftmaxName
from experiments.grok.tasks import MODULUS, TaskName, table

PRIMITIVE_ROOT = 5
KEY_FREQUENCIES = 5
# Rows, evenly spaced, that a loss is the mean of: sparsemax, by a sort, costs more than the forward
# pass.
LOSS_ROWS = 1024
SINGULAR_VALUES = 32

GROUPS = ("embedding", "hidden", "head", "gains")

_TINY = float(np.finfo(np.float32).tiny)
_ACCURATE = 1e-3  # of the largest singular value, by a Gram matrix in float32


class Circle(NamedTuple):
    """The cyclic group whose characters, cos and sin of 2πkx / period, a task's solution may use.

    Attributes:
        residues: `(period,)`, the number at every place x of the circle.
        answers: place of every table row's answer `(rows,)`, -1 for a row outside of the group;
            None where the answers have no group.
    """

    residues: np.ndarray
    answers: np.ndarray | None


@functools.cache
def circle(task: TaskName) -> Circle | None:
    """A task's circle; None for parity, whose tokens are bits.

    add, sub: the residues in their natural order, period 97. mul, div, exp: the 96 non-zero ones
    by discrete logarithm to base 5; rows with a zero lie outside. In a ** b the group acts on the
    base and the answer, log c = b log a; as exponents the same embeddings have the natural order
    mod 96, for which `natural_gini` is. gcd: natural order, no group.
    """
    if task == "parity":
        return None
    if task not in ("mul", "div", "exp"):
        answers = table(task).answers if task in ("add", "sub") else None
        return Circle(np.arange(MODULUS, dtype=np.int32), answers)
    residues = np.array([pow(PRIMITIVE_ROOT, x, MODULUS) for x in range(MODULUS - 1)], np.int32)
    logarithms = np.full(MODULUS, -1, np.int32)
    logarithms[residues] = np.arange(MODULUS - 1)
    inside = table(task).tokens[:, 0] > 0
    return Circle(residues, np.where(inside, logarithms[table(task).answers], -1))


def measure(
    task: TaskName,
    softmax: SoftmaxName,
    params: Any,
    updates: Any,
    table_logits: jax.Array,
    train_rows: jax.Array,
) -> dict[str, jax.Array]:
    """All measures of one seed at one moment, each a float32 scalar or vector.

    `train_loss`, `validation_loss`: of up to 1024 rows each. `collapse_share`: see `collapsed`;
    not for sparsemax. `embedding_power`, `embedding_gini`, `embedding_ipr`, `natural_gini`: see
    `embedding_power`, `gini`; ipr is the inverse participation ratio Σp². `logit_power`,
    `logit_gini`, `restricted_loss`, `excluded_loss`, `key_frequencies`: see `wave_measures`.
    `norm_*`, `update_rms_*`: by group, and `norm_total`. `weight_*`, `update_*` with `stable_rank`,
    `effective_rank`, one value a hidden matrix, in the order of its path, and `singular_values` of
    the first of the largest: see `spectra`. A task lacks what it has no circle or no group for, and
    a model without norm layers the gains.

    Args:
        task: of the table.
        softmax: the output function.
        params: the model's, float32.
        updates: their change in the last step, a tree like `params`.
        table_logits: `(rows of the table, vocabulary)` float32.
        train_rows: `(train,)` int32, sorted.
    """
    answers, loss_of = jnp.asarray(table(task).answers), LOSSES[softmax]
    rows = len(answers)
    held_out = jnp.ones(rows, bool).at[train_rows].set(False)
    validation_rows = jnp.nonzero(held_out, size=rows - len(train_rows))[0]
    train_sample = _evenly(train_rows)

    def mean_loss(sample: jax.Array) -> jax.Array:
        return loss_of(table_logits[sample], answers[sample]).mean()

    found = {
        "train_loss": mean_loss(train_sample),
        "validation_loss": mean_loss(_evenly(validation_rows)),
    }
    if softmax != "sparsemax":
        found["collapse_share"] = collapsed(softmax, table_logits[train_rows]).mean()

    weights, changes = groups(params), groups(updates)
    if (own := circle(task)) is not None:
        embedding = weights["embedding"][0][:MODULUS]
        power = embedding_power(embedding[own.residues])
        found["embedding_power"] = power
        found["embedding_gini"], found["embedding_ipr"] = gini(jnp.sqrt(power)), (power**2).sum()
        if len(own.residues) < MODULUS:
            # Exponents count mod 96; elsewhere this shows that the natural order has no waves.
            period = MODULUS - 1 if task == "exp" else MODULUS
            found["natural_gini"] = gini(jnp.sqrt(embedding_power(embedding[:period])))
        if own.answers is not None:
            found |= wave_measures(own, loss_of, table_logits, answers, train_sample)

    for name in filter(weights.get, GROUPS):
        found[f"norm_{name}"] = _norm(weights[name])
        size = sum(leaf.size for leaf in changes[name])
        found[f"update_rms_{name}"] = _norm(changes[name]) / math.sqrt(size)
    found["norm_total"] = _norm([leaf for leaves in weights.values() for leaf in leaves])
    found |= {f"weight_{key}": value for key, value in spectra(weights["hidden"]).items()}
    found |= {f"update_{key}": value for key, value in spectra(changes["hidden"]).items()}
    return found


def record(measured: dict[str, Any]) -> dict[str, Any]:
    """One seed's measures as JSON takes them: five digits, None for what is not finite."""
    return {name: _plain(np.asarray(value)) for name, value in measured.items()}


def groups(tree: Any) -> dict[str, list[jax.Array]]:
    """The leaves of the params, or of a tree like them, in order of their paths, by `GROUPS`."""
    found: dict[str, list[jax.Array]] = {name: [] for name in GROUPS}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        top = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[0]
        inside = "hidden" if leaf.ndim == 2 else "gains"
        found[top if top in ("embedding", "head") else inside].append(leaf)
    return found


def embedding_power(on_circle: jax.Array) -> jax.Array:
    """The share of the variance over a circle that lies at each frequency.

    Args:
        on_circle: `(period, width)`, embeddings in the circle's order.

    Returns:
        `(period // 2,)`, for k = 1, 2, ..., summing to 1: |DFT|² summed over the width.
    """
    return _power(jnp.fft.rfft(on_circle, axis=0), len(on_circle))


def gini(values: jax.Array) -> jax.Array:
    """Gini coefficient of `(n,)` sizes: 0 where all are equal, 1 - 1/n where there is but one.

    The paper takes it of the norms of Fourier components, the root of their power (2301.05217 §5.1;
    there a cosine and its sine count as two).
    """
    n = len(values)
    ranks = 2 * jnp.arange(1, n + 1) - n - 1
    return (ranks * jnp.sort(values)).sum() / jnp.maximum(n * values.sum(), _TINY)


def wave_measures(
    own: Circle, loss_of: Any, table_logits: jax.Array, answers: jax.Array, train_sample: jax.Array
) -> dict[str, jax.Array]:
    """Power of the logits' waves; restricted and excluded loss (Nanda et al., 2301.05217 §5.1).

    Restricted: of the table's logits only their constant and their projections on cos and sin of
    w_k (a + b), at the five key frequencies w_k, stay; the loss is of all rows. Excluded: these
    projections are taken out, the rest stays; the loss is of training rows.

    Three things are ours. For a + b we take x, the place of the answer on the task's circle, which
    in addition is a + b: cos(w_k x) is then cos(w_k (a - b)) in sub, and by logarithms cos(w_k
    (log a + log b)) in mul. Waves of x are constant where the answer is, so that the projection is
    the DFT of the logits' means over the rows of each answer; in exp, where answers are not equally
    frequent, each answer counts alike. And the key frequencies, in the paper five of the final
    model's, are those with the most power in the logits now: known while the model trains.
    """
    assert own.answers is not None
    period, places = len(own.residues), jnp.asarray(own.answers)
    counts = np.bincount(own.answers[own.answers >= 0], minlength=period)
    # Rows outside go to one more segment.
    segments = jnp.where(places < 0, period, places)
    sums = jax.ops.segment_sum(table_logits, segments, period + 1)[:period]
    means = sums / jnp.asarray(counts, jnp.float32)[:, None]

    dft = jnp.fft.rfft(means, axis=0)
    power = _power(dft, period)
    key = 1 + jax.lax.top_k(power, KEY_FREQUENCIES)[1]
    is_key = jnp.zeros(len(dft), bool).at[key].set(True)
    waves = jnp.fft.irfft(jnp.where(is_key[:, None], dft, 0), n=period, axis=0)

    restricted = loss_of(waves + means.mean(axis=0, keepdims=True), jnp.asarray(own.residues))
    at = places[train_sample]
    excluded = loss_of(table_logits[train_sample] - waves[at], answers[train_sample])
    return {
        "logit_power": power,
        "logit_gini": gini(jnp.sqrt(power)),
        "restricted_loss": jnp.average(restricted, weights=jnp.asarray(counts, jnp.float32)),
        "excluded_loss": jnp.average(excluded, weights=(at >= 0).astype(jnp.float32)),
        "key_frequencies": jnp.sort(key),
    }


def collapsed(softmax: SoftmaxName, logits: jax.Array) -> jax.Array:
    """Where float32 absorbs all but the largest logit `(rows,)` (2501.04697).

    For softmax where Σ exp(z - max z) is exactly 1; for stablemax, likewise, where Σ s(z) is
    exactly s(max z).
    """
    largest = logits.max(axis=-1, keepdims=True)
    if softmax == "softmax":
        return jnp.exp(logits - largest).sum(axis=-1) == 1
    below = 1 / (1 - jnp.minimum(logits, 0))
    s = jnp.where(logits >= 0, logits + 1, below)
    return s.sum(axis=-1) == s.max(axis=-1)


def spectra(matrices: list[jax.Array]) -> dict[str, jax.Array]:
    """Stable rank, effective rank and singular values.

    From the eigenvalues of Gram matrices, at half the cost of an SVD: singular values below a
    thousandth of the largest are not accurate.

    Args:
        matrices: `(fan_in, fan_out)` each, float32.

    Returns:
        stable_rank: `(matrices,)`, ‖W‖_F² / ‖W‖₂², 0 for a zero matrix.
        effective_rank: `(matrices,)`, exp of the entropy of the singular values over their sum, of
            those that are accurate.
        singular_values: of the first of the largest matrices, 32 from the largest to the smallest,
            their ranks evenly spaced; all where there are fewer.
    """
    values = [_singular_values(matrix) for matrix in matrices]
    biggest = values[max(range(len(values)), key=lambda i: matrices[i].size)]
    chosen = np.linspace(0, len(biggest) - 1, min(SINGULAR_VALUES, len(biggest))).round()
    return {
        "stable_rank": jnp.stack([((s / jnp.maximum(s[0], _TINY)) ** 2).sum() for s in values]),
        "effective_rank": jnp.stack([_effective_rank(s) for s in values]),
        "singular_values": biggest[chosen.astype(int)],
    }


def _singular_values(matrix: jax.Array) -> jax.Array:
    """Largest first. The matrix is scaled first, so that the square of a small one is not lost."""
    largest = jnp.maximum(jnp.abs(matrix).max(), _TINY)
    scaled = matrix / largest
    gram = scaled @ scaled.T if matrix.shape[0] <= matrix.shape[1] else scaled.T @ scaled
    return largest * jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram)[::-1], 0))


def _effective_rank(values: jax.Array) -> jax.Array:
    # Many zeros that come out as a ten-thousandth would add to the entropy as real directions do.
    values = jnp.where(values < _ACCURATE * values[0], 0, values)
    shares = values / jnp.maximum(values.sum(), _TINY)
    return jnp.exp(jax.scipy.special.entr(shares).sum()) * (values[0] > 0)


def _power(dft: jax.Array, period: int) -> jax.Array:
    """Shares of power at k = 1, 2, ... in a real signal's `rfft` `(period // 2 + 1, signals)`."""
    frequency = np.arange(1, len(dft))
    times = np.where(2 * frequency == period, 1.0, 2.0)  # period / 2 is its own conjugate
    power = (jnp.abs(dft[1:]) ** 2).sum(axis=1) * jnp.asarray(times, jnp.float32)
    return power / jnp.maximum(power.sum(), _TINY)


def _norm(leaves: list[jax.Array]) -> jax.Array:
    return jnp.sqrt(sum(((leaf**2).sum() for leaf in leaves), jnp.float32(0)))


def _evenly(rows: jax.Array) -> jax.Array:
    return rows[:: math.ceil(len(rows) / LOSS_ROWS)]


def _plain(value: np.ndarray) -> Any:
    if value.ndim:
        return [_plain(x) for x in value]
    if np.issubdtype(value.dtype, np.integer):
        return int(value)
    return float(f"{value:.5g}") if np.isfinite(value) else None
