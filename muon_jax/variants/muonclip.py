"""MuonClip: Muon followed by QK-clip."""

from typing import Any

import jax
import optax

from muon_jax._muon import muon
from muon_jax._options import takes_options_of
from muon_jax._scale import ShapeScale
from muon_jax.variants.qk_clip import Specs, qk_clip


@takes_options_of(muon)
def muonclip(
    learning_rate: optax.ScalarOrSchedule,
    specs: Specs,
    *,
    threshold: float | jax.Array = 100.0,
    alpha: float | jax.Array = 0.5,
    scale: str | ShapeScale | None = "match_rms_adamw",
    weight_decay: optax.ScalarOrSchedule = 0.1,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Returns Kimi K2's optimizer: Muon with Moonlight's scale and decay, followed by `qk_clip`.

    Attention logits above the threshold are scaled back to it after the step that computed them.
    The next forward pass may exceed it again, as `qk_clip` explains. Like `qk_clip`, `update` needs
    `max_logits`, and `max_logits=None` means a step without clipping.

    Args:
        specs, threshold, alpha: As in `qk_clip`.
        learning_rate, scale, weight_decay, options: As in `muon`, whose defaults for scale and
            decay are different.

    References:
        Kimi Team, 2025, "Kimi K2", arXiv 2507.20534; Liu et al., 2025, arXiv 2502.16982.

    Example:
        >>> import jax.numpy as jnp, muon_jax
        >>> tx = muon_jax.muonclip(4e-4, muon_jax.GroupedQuery(heads=2), adam_b2=0.98)
        >>> kernels = {"query": {"kernel": jnp.ones((8, 8))}, "key": {"kernel": jnp.ones((8, 8))}}
        >>> params = {"blocks": [{"attention": kernels}]}
        >>> max_logits = {"blocks/0/attention": jnp.array([80.0, 130.0])}
        >>> updates, state = tx.update(params, tx.init(params), params, max_logits=max_logits)
    """
    return optax.chain(
        muon(learning_rate, scale=scale, weight_decay=weight_decay, **options),
        qk_clip(specs, threshold=threshold, alpha=alpha),
    )
