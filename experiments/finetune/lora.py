"""LoRA (Hu et al., 2106.09685): trains two factors beside each target kernel and freezes the rest.

In a tree of params the factors of a kernel are its sibling `adapter`.
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
    """The output of an adapter, `(alpha / rank) x A B`."""

    def __init__(self, fan_in: int, fan_out: int, lora: Lora, rngs: nnx.Rngs):
        super().__init__(fan_in, lora.rank, fan_out, rngs=rngs)
        self.scale = lora.scale

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scale * super().__call__(x)


def adapt(layer: Layer, lora: Lora, rngs: nnx.Rngs) -> Layer:
    """Adds adapters to the targets of a layer, and returns it.

    Raises:
        ValueError: The rank is larger than a side of a target.
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
    """Adds new adapters, with a product of zero, to the params, where `shapes` have adapters."""
    found, key = flatten_dict(params), jax.random.key(seed)
    for number, (path, shape) in enumerate(sorted(flatten_dict(shapes).items())):
        if path[-1] == "lora_a":  # as in nnx.LoRA, for each layer
            make = nnx.initializers.he_uniform(batch_axis=tuple(range(len(shape.shape) - 2)))
            found[path] = make(jax.random.fold_in(key, number), shape.shape, shape.dtype)
        elif path[-1] == "lora_b":
            found[path] = jnp.zeros(shape.shape, shape.dtype)
    return unflatten_dict(found)


def split(tree: Params, lora: Lora, clipped: Collection[str] = ()) -> tuple[Params, Params]:
    """Splits a tree like the params into trained and frozen leaves.

    Args:
        tree: Nested dicts.
        lora: The settings of LoRA. Without a rank all leaves are trained.
        clipped: The names of norms whose gains QK-clip changes, which are trained leaves too.
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
    """Returns the tree that was split; the inverse of `split`."""
    return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen))


def merge(params: Params, lora: Lora) -> Params:
    """Merges the adapters into the kernels, for a model without adapters with the same outputs."""
    leaves = flatten_dict(params)
    for path in [path for path in leaves if path[-1] == "lora_a"]:
        a, b = leaves.pop(path), leaves.pop((*path[:-1], "lora_b"))
        kernel = (*path[:-2], "kernel")
        product = jnp.matmul(a, b, precision="highest")
        leaves[kernel] = (leaves[kernel] + lora.scale * product).astype(leaves[kernel].dtype)
    return unflatten_dict(leaves)
