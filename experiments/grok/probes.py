"""Diagnostics of a grokking model: Fourier power, restricted and excluded loss, spectra and norms.

`measure` computes them for one seed, with static shapes; use `jax.vmap` for several. The Fourier
measures are those of Nanda et al. (2301.05217) for modular addition. Their extension to other tasks
is our own; the docstrings describe it.
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
# The number of evenly spaced rows over which a loss is averaged. On all rows sparsemax, which
# sorts, would cost more than the forward pass.
LOSS_ROWS = 1024
SINGULAR_VALUES = 32

GROUPS = ("embedding", "hidden", "head", "gains")

_TINY = float(np.finfo(np.float32).tiny)
_ACCURATE = 1e-3  # accuracy of singular values from a float32 Gram matrix, relative to the largest


class Circle(NamedTuple):
    """The cyclic group whose characters, cos and sin of 2πkx / period, a task's solution may use.

    Attributes:
        residues: The number at each position x of the circle, `(period,)`.
        answers: The position of each table row's answer, `(rows,)`, or -1 for rows outside of the
            group. None if the answers form no group.
    """

    residues: np.ndarray
    answers: np.ndarray | None


@functools.cache
def circle(task: TaskName) -> Circle | None:
    """Returns the circle of a task, or None for parity, whose tokens are bits.

    For add and sub it holds the residues in natural order, with period 97. For mul, div and exp it
    holds the 96 non-zero residues ordered by discrete logarithm to base 5; rows with a zero are
    outside. In a ** b the group acts on the base and the answer, log c = b log a. The embeddings of
    exponents have the natural order mod 96 instead, which `natural_gini` measures. For gcd the
    order is natural and there is no group.
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
    """Returns all measures of one seed at one moment, each a float32 scalar or vector.

    `train_loss` and `validation_loss` are means over up to 1024 rows. `collapse_share` is the mean
    of `collapsed`, omitted for sparsemax. `embedding_power`, `embedding_gini` and `natural_gini`
    come from `embedding_power` and `gini`; `embedding_ipr` is the inverse participation ratio Σp².
    `logit_power`, `logit_gini`, `restricted_loss`, `excluded_loss` and `key_frequencies` come from
    `wave_measures`. `norm_*` and `update_rms_*` are given by group, and `norm_total` for all.
    `weight_*` and `update_*` come from `spectra`, with one rank for each hidden matrix in order of
    paths. Measures that need a circle or a group are omitted for tasks without one,
    and those of the gains for a model without norm layers.

    Args:
        task: The task.
        softmax: The output function.
        params: The parameters of the model, float32.
        updates: The change of the parameters in the last step, a tree like `params`.
        table_logits: The logits of all rows, `(rows of the table, vocabulary)` float32.
        train_rows: The sorted indices of the training rows, `(train,)` int32.
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
            # Exponents have period 96. For other tasks this shows that natural order has no waves.
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
    """Returns the measures of one seed as JSON values with five digits; None if not finite."""
    return {name: _plain(np.asarray(value)) for name, value in measured.items()}


def groups(tree: Any) -> dict[str, list[jax.Array]]:
    """Groups the leaves of a tree like the params by `GROUPS`, in the order of their paths."""
    found: dict[str, list[jax.Array]] = {name: [] for name in GROUPS}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        top = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[0]
        inside = "hidden" if leaf.ndim == 2 else "gains"
        found[top if top in ("embedding", "head") else inside].append(leaf)
    return found


def embedding_power(on_circle: jax.Array) -> jax.Array:
    """Returns the fraction of the variance over a circle at each frequency.

    Args:
        on_circle: The embeddings in the order of the circle, `(period, width)`.

    Returns:
        The power |DFT|² for k = 1, 2, ..., summed over the width and normalised to sum 1,
        `(period // 2,)`.
    """
    return _power(jnp.fft.rfft(on_circle, axis=0), len(on_circle))


def gini(values: jax.Array) -> jax.Array:
    """Returns the Gini coefficient of sizes `(n,)`: 0 if all are equal, 1 - 1/n if one is not 0.

    The paper applies it to the norms of Fourier components, the root of their power (2301.05217
    §5.1; it counts a cosine and its sine as two components).
    """
    n = len(values)
    ranks = 2 * jnp.arange(1, n + 1) - n - 1
    return (ranks * jnp.sort(values)).sum() / jnp.maximum(n * values.sum(), _TINY)


def wave_measures(
    own: Circle, loss_of: Any, table_logits: jax.Array, answers: jax.Array, train_sample: jax.Array
) -> dict[str, jax.Array]:
    """Returns the Fourier power of the logits, and restricted and excluded loss (2301.05217 §5.1).

    The restricted loss keeps only the constant of the logits and their projections on cos and sin
    of w_k (a + b), at five key frequencies w_k, and is the mean over all rows. The excluded loss
    removes these projections from the logits and is the mean over training rows.

    Three aspects differ from the paper. First, x replaces a + b, where x is the position of the
    answer on the task's circle. For addition both are equal; cos(w_k x) is cos(w_k (a - b)) for
    sub, and cos(w_k (log a + log b)) for mul. Second, waves of x are constant for equal answers, so
    the projection is the DFT of the mean logits of each answer. In exp, where answers are not
    equally frequent, each answer has equal weight. Third, the key frequencies are those with the
    most power in the present logits, which are known during training. The paper takes five
    frequencies of the final model.
    """
    assert own.answers is not None
    period, places = len(own.residues), jnp.asarray(own.answers)
    counts = np.bincount(own.answers[own.answers >= 0], minlength=period)
    # Rows outside of the group go to an extra segment.
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
    """Returns whether float32 absorbs all but the largest logit, `(rows,)` (2501.04697).

    That is the case if Σ exp(z - max z) is exactly 1 for softmax, or if Σ s(z) is exactly s(max z)
    for stablemax.
    """
    largest = logits.max(axis=-1, keepdims=True)
    if softmax == "softmax":
        return jnp.exp(logits - largest).sum(axis=-1) == 1
    below = 1 / (1 - jnp.minimum(logits, 0))
    s = jnp.where(logits >= 0, logits + 1, below)
    return s.sum(axis=-1) == s.max(axis=-1)


def spectra(matrices: list[jax.Array]) -> dict[str, jax.Array]:
    """Returns stable ranks, effective ranks and singular values of matrices.

    The singular values come from eigenvalues of Gram matrices, at half the cost of an SVD. Those
    below a thousandth of the largest are not accurate.

    Args:
        matrices: The matrices, each `(fan_in, fan_out)` float32.

    Returns:
        stable_rank: ‖W‖_F² / ‖W‖₂² of each matrix, `(matrices,)`; 0 for a zero matrix.
        effective_rank: The exponential of the entropy of the accurate singular values, divided by
            their sum, `(matrices,)`.
        singular_values: 32 singular values of the first of the largest matrices, in descending
            order with evenly spaced ranks, or all if there are fewer.
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
    """Returns singular values in descending order. Scaling first avoids underflow of squares."""
    largest = jnp.maximum(jnp.abs(matrix).max(), _TINY)
    scaled = matrix / largest
    gram = scaled @ scaled.T if matrix.shape[0] <= matrix.shape[1] else scaled.T @ scaled
    return largest * jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram)[::-1], 0))


def _effective_rank(values: jax.Array) -> jax.Array:
    # Rounding errors of many zero singular values would otherwise add to the entropy.
    values = jnp.where(values < _ACCURATE * values[0], 0, values)
    shares = values / jnp.maximum(values.sum(), _TINY)
    return jnp.exp(jax.scipy.special.entr(shares).sum()) * (values[0] > 0)


def _power(dft: jax.Array, period: int) -> jax.Array:
    """Returns the fractions of power at k = 1, 2, ... of an `rfft` `(period // 2 + 1, signals)`."""
    frequency = np.arange(1, len(dft))
    times = np.where(2 * frequency == period, 1.0, 2.0)  # frequency period / 2 has no conjugate
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
