"""Measures the effect of one QK-clip on the largest attention logit and on the predictions."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.finetune import model
from experiments.finetune.architecture import Architecture
from experiments.finetune.model import LanguageModel, Params
from experiments.finetune.packing import Batch
from experiments.language.mesh import one_device
from muon_jax import clip_qk


class Clipped(NamedTuple):
    """The effect of one QK-clip on a model."""

    threshold: float
    before: float  # largest attention logit before the clip
    after: float  # and after it
    logits: float  # largest absolute output logit before the clip
    change: float  # largest absolute change of an output logit


def measure(
    architecture: Architecture, params: Params, batch: Batch, share: float, projections: bool
) -> Clipped:
    """Clips at a share of a batch's largest attention logit, and compares the model's outputs.

    Args:
        architecture, params: The model, in float32.
        batch: The batch, `(windows, context)`.
        share: The threshold as a fraction of the largest logit. It is rounded to three digits.
        projections: Whether to scale W_q and W_k in models with QK-norm, not the norms' gains.
    """
    spec = model.attention_spec(architecture, projections)
    look = jax.jit(functools.partial(_look, LanguageModel(architecture, "float32", remat=False)))
    tokens, segments = jnp.asarray(batch.tokens), jnp.asarray(batch.segments)
    mesh = one_device()
    with jax.set_mesh(mesh):
        params = jax.device_put(params, model.shardings(architecture, mesh))
        first, per_head = look(params, tokens, segments)
        before = _largest(per_head)
        threshold = float(f"{share * before:.3g}")
        clipped = clip_qk(params, per_head, spec, threshold=threshold)
        second, after = look(clipped, tokens, segments)
    real = (segments > 0)[..., None]
    return Clipped(
        threshold=threshold,
        before=before,
        after=_largest(after),
        logits=float(jnp.max(jnp.where(real, jnp.abs(first), 0))),
        change=float(jnp.max(jnp.where(real, jnp.abs(second - first), 0))),
    )


def _look(
    lm: LanguageModel, params: Params, tokens: jax.Array, segments: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    hidden, max_logits = lm.hidden(params, tokens, segments, max_logits=True)
    return lm.logits(params, hidden), max_logits


def _largest(per_head: Any) -> float:
    return max(float(jnp.max(x)) for x in jax.tree.leaves(per_head))
