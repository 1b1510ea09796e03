"""MuonBP: orthogonalises each device's block of a matrix, and periodically whole matrices."""

import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from muon_jax._checks import check_integer, check_number
from muon_jax._matrices.stages import Stages
from muon_jax._muon import MuonState, StageOptions, hybrid_muon, muon, scale_by_muon
from muon_jax._options import takes_options_of
from muon_jax._precision import widen


@takes_options_of(scale_by_muon, without=("before", "after"))
def scale_by_muonbp(
    *,
    period: int = 5,
    block_ratio: float | jax.Array = 1.0,
    blocks: tuple[int, int] | None = None,
    **options: Any,
) -> optax.GradientTransformation:
    """Orthogonalises blocks of matrices, but whole matrices once in `period` steps.

    Whole matrices are orthogonalised in the first step. In steps with blocks no matrix is moved,
    since on a mesh the blocks are the devices' shards. The shape scale is that of the block.

    Args:
        period: The number of steps between orthogonalisations of whole matrices. 1 means Muon.
        block_ratio: A factor of the updates in all other steps, for the second rate of the paper.
        blocks: The numbers of blocks `(along fan_in, along fan_out)` of every matrix, on any mesh.
            `None` means one block for each shard; under Auto axes inside `jit` that needs
            `shardings=`. Leaves that `MatrixAxes` splits into parts keep these parts.
        options: The options of `scale_by_muon`.

    References:
        Khaled et al., 2025, MuonBP, arXiv 2510.16981, algorithm 1.
    """
    check_integer("period", period, at_least=1)
    check_number("block_ratio", block_ratio, at_least=0)
    if blocks is not None:
        if not isinstance(blocks, (tuple, list)) or len(blocks) != 2:
            raise TypeError(
                f"blocks must be (along fan_in, along fan_out) or None; got {blocks!r}."
            )
        for name, count in zip(("fan_in", "fan_out"), blocks, strict=True):
            check_integer(f"blocks along {name}", count, at_least=1)
    stages = Stages(**options)

    def init(params):
        return MuonState(jnp.zeros([], jnp.int32), stages.init_momentum(params))

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        averaged, mu = stages.average(updates, state.mu, count)

        def orthogonalized(matrices, averaged, ratio=1.0):
            factors = matrices.orthogonalize(matrices.split(averaged), like=state.mu)
            return matrices.merge([ratio * widen(x) for x in matrices.scale(factors)], updates)

        matrices = stages.matrices(updates)
        if period == 1:
            return orthogonalized(matrices, averaged), MuonState(count, mu)
        in_blocks = matrices.in_blocks(blocks)
        out = jax.lax.cond(
            (count - 1) % period == 0,
            functools.partial(orthogonalized, matrices),
            functools.partial(orthogonalized, in_blocks, ratio=block_ratio),
            averaged,
        )
        return out, MuonState(count, mu)

    return optax.GradientTransformation(init, update)


@takes_options_of(muon, without=("before", "after"))
def muonbp(
    learning_rate: optax.ScalarOrSchedule,
    *,
    period: int = 5,
    block_ratio: float | jax.Array = 1.0,
    blocks: tuple[int, int] | None = None,
    **options: Unpack[StageOptions],
) -> optax.GradientTransformationExtraArgs:
    """Updates the hidden matrices with MuonBP and all other leaves with AdamW.

    MuonBP orthogonalises blocks in most steps and whole matrices in some; see `scale_by_muonbp`. On
    a mesh the blocks are the devices' shards, so that most steps move no matrix. All other options
    are those of `muon`.

    Example:
        >>> import muon_jax
        >>> tx = muon_jax.muonbp(0.02, period=4, blocks=(1, 2), adam_learning_rate=3e-4)
    """
    scale_by = functools.partial(
        scale_by_muonbp, period=period, block_ratio=block_ratio, blocks=blocks
    )
    return hybrid_muon(scale_by, learning_rate, **options)
