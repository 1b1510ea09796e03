"""What one QK-clip changes: the largest attention logit, and what the model predicts."""

import dataclasses
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
    """Of a model, before and after its queries and keys are scaled.

    Attributes:
        threshold: of the clip.
        before, after: largest attention logit.
        logits: largest absolute logit of the predictions, before.
        change: largest absolute difference of these.
    """

    threshold: float
    before: float
    after: float
    logits: float
    change: float


def measure(
    architecture: Architecture, params: Params, batch: Batch, share: float, projections: bool
) -> Clipped:
    """Clips at a share of the largest attention logit of a batch, and looks at the batch again.

    Args:
        architecture, params: the model, in float32.
        batch: `(windows, context)`.
        share: of the logit; the threshold is that to three digits, so that it can be written.
        projections: scale W_q and W_k even where they are normalised, and not the norms' gains.
    """
    spec = model.attention_spec(architecture)
    if projections:
        spec = dataclasses.replace(spec, qk_norm="ignore")
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
