"""LoRA (Hu et al., 2106.09685): each target gets two factors of an update, and the rest is frozen.

A tree of params has the factors of a kernel beside it, in `adapter`.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.finetune.config import Lora
from experiments.language.decoder import Layer

Params = dict[str, Any]
_ADAPTER = "adapter"


class Adapter(nnx.LoRA):
    """`(alpha / rank) x A B`."""

    def __init__(self, fan_in: int, fan_out: int, lora: Lora, rngs: nnx.Rngs):
        super().__init__(fan_in, lora.rank, fan_out, rngs=rngs)
        self.scale = lora.scale

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scale * super().__call__(x)


def adapt(layer: Layer, lora: Lora, rngs: nnx.Rngs) -> Layer:
    """The layer, whose targets have adapters.

    Raises:
        ValueError: the rank is larger than a side of a target.
    """
    for name in lora.targets if lora.rank else ():
        linear = getattr(layer.attention, name, None) or getattr(layer.feed_forward, name)
        side = min(linear.in_features, linear.out_features)
        if lora.rank > side:
            raise ValueError(
                f"--lora.rank must be at most the smaller side of each target, and {name} is "
                f"{linear.in_features} × {linear.out_features}; got {lora.rank}. Use at most "
                f"{side}, or remove {name} from --lora.targets."
            )
        linear.adapter = Adapter(linear.in_features, linear.out_features, lora, rngs)
    return layer


def begin(params: Params, shapes: Params, seed: int) -> Params:
    """The params with new adapters, whose product is zero, where `shapes` have some."""
    found, key = flatten_dict(params), jax.random.key(seed)
    for number, (path, shape) in enumerate(sorted(flatten_dict(shapes).items())):
        if path[-1] == "lora_a":  # as nnx.LoRA begins, layer by layer
            make = nnx.initializers.he_uniform(batch_axis=tuple(range(len(shape.shape) - 2)))
            found[path] = make(jax.random.fold_in(key, number), shape.shape, shape.dtype)
        elif path[-1] == "lora_b":
            found[path] = jnp.zeros(shape.shape, shape.dtype)
    return unflatten_dict(found)


def split(tree: Params, lora: Lora, clipped: Collection[str] = ()) -> tuple[Params, Params]:
    """Of a tree like the params, what is trained and what is frozen.

    Args:
        tree: nested dicts.
        lora: without a rank all is trained.
        clipped: names of norms whose gains change, too.
    """
    if not lora.rank:
        return tree, {}
    leaves = flatten_dict(tree)
    trained = {path for path in leaves if _ADAPTER in path or path[-2] in clipped}
    return (
        unflatten_dict({path: leaf for path, leaf in leaves.items() if path in trained}),
        unflatten_dict({path: leaf for path, leaf in leaves.items() if path not in trained}),
    )


def join(trained: Params, frozen: Params) -> Params:
    """The tree that `split` divided."""
    return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen))


def merge(params: Params, lora: Lora) -> Params:
    """The params of a model without adapters that computes the same."""
    leaves = flatten_dict(params)
    for path in [path for path in leaves if path[-1] == "lora_a"]:
        a, b = leaves.pop(path), leaves.pop((*path[:-1], "lora_b"))
        kernel = (*path[:-2], "kernel")
        product = jnp.matmul(a, b, precision="highest")
        leaves[kernel] = (leaves[kernel] + lora.scale * product).astype(leaves[kernel].dtype)
    return unflatten_dict(leaves)
