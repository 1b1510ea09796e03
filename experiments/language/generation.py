"""Generates tokens after prompts with any model, with a cache of keys and values."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.language import sharding
from experiments.settings import Count, at_least, check

DIVIDER = f"\n{'─' * 40}\n"  # between texts

Continued = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the texts that a command generates."""

    length: Count = 200
    """Maximum number of tokens to generate per text."""
    temperature: Annotated[float, at_least(0)] = 0.8
    """Sampling temperature. 0 always takes the most likely token."""
    top_k: Count | None = 40
    """Sample from this many of the most likely tokens. None means all tokens."""
    seed: int = 0
    """Random seed. It sets what is sampled."""
    count: Count = 3
    """Number of texts to generate."""

    def __post_init__(self) -> None:
        check(self)


def generate(
    program: Callable[..., jax.Array],
    mesh: jax.sharding.Mesh,
    prompts: Sequence[Sequence[int]],
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Continues each prompt.

    Args:
        program: The jitted `extend` of a model, `(tokens_BxT, lengths_B, temperature, top_k, seed)
            -> tokens_BxT` with a static top_k. It is compiled for each sum of `length` and the
            length of the longest prompt.
        mesh: The mesh of the model's params.
        prompts: B lists of at least one token.
        length: The number of tokens to add.
        temperature: The number that logits are divided by. 0 takes the most likely token.
        top_k: The number of most likely tokens to sample from; by default all.
        seed: The random seed. The tokens of a prompt depend on it and on the prompt's position in
            the list, not on the number of prompts.

    Returns:
        The new tokens, `(B, length)` int32.

    Raises:
        ValueError: A prompt is empty, or a number is out of range.
    """
    if not prompts or not all(map(len, prompts)):
        raise ValueError("At least one prompt is required, and each must have at least one token.")
    check_numbers(
        length=(length, 1), temperature=(temperature, 0), top_k=(1 if top_k is None else top_k, 1)
    )
    ways = math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
    filled = [*prompts, *[prompts[0]] * (-len(prompts) % ways)]
    lengths = np.array([len(prompt) for prompt in filled], np.int32)
    tokens = np.zeros((len(filled), lengths.max() + length), np.int32)
    for row, prompt in zip(tokens, filled, strict=True):
        row[: len(prompt)] = prompt
    with jax.set_mesh(mesh):
        tokens = program(tokens, lengths, np.float32(temperature), top_k, np.uint32(seed % 2**32))
    rows = zip(np.asarray(tokens), lengths[: len(prompts)], strict=False)
    return np.stack([row[start : start + length] for row, start in rows])


def extend(
    continued: Continued,
    logits: Callable[[jax.Array], jax.Array],
    tokens_BxT: jax.Array,
    lengths_B: jax.Array,
    temperature: jax.Array,
    top_k: int | None,
    seed: jax.Array,
    *,
    context: int,
) -> jax.Array:
    """Fills each row after its prompt; to be jitted under the mesh of the params.

    The first pass reads all prompts and fills the caches; then each new token takes a pass over
    itself. Beyond `context` the model reads the last `context` tokens as positions from 0 on, so
    that no cache is valid, and each new token takes a pass over all of them.

    Args:
        continued: A function `(tokens, caches, at) -> (hidden, caches)`. The tokens have the
            positions from `at` on, and `hidden`, `(B, T, D)`, is the input of the head. With caches
            None it creates caches for as many positions as there are tokens.
        logits: A function that returns the logits of `hidden`, float32.
        tokens_BxT: The prompts, padded to the final length.
        lengths_B: The lengths of the prompts.
        temperature, top_k, seed: As in `generate`.
        context: The maximum number of tokens that the model reads.
    """
    length = tokens_BxT.shape[1]
    window = min(context, length)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
        jnp.arange(len(tokens_BxT))
    )

    def put(tokens_BxT: jax.Array, at: jax.Array, hidden_BxD: jax.Array) -> jax.Array:
        found = logits(hidden_BxD)
        if top_k is not None:
            least = jax.lax.top_k(found, min(top_k, found.shape[1]))[0][:, -1:]
            found = jnp.where(found < least, -jnp.inf, found)
        noise = jax.vmap(
            lambda key: jax.random.gumbel(jax.random.fold_in(key, at), found.shape[1:])
        )
        drawn = jnp.argmax(found + temperature * noise(keys), axis=1)
        given = jax.lax.dynamic_index_in_dim(tokens_BxT, at, axis=1, keepdims=False)
        new = jnp.where(at < lengths_B, given, drawn)
        return jax.lax.dynamic_update_index_in_dim(tokens_BxT, new, at, axis=1)

    def by_cache(at: jax.Array, carried: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        tokens_BxT, caches = carried
        last = jax.lax.dynamic_slice_in_dim(tokens_BxT, at - 1, 1, axis=1)
        hidden, caches = continued(last, caches, at - 1)
        return put(tokens_BxT, at, hidden[:, 0]), caches

    def by_window(at: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
        seen = jax.lax.dynamic_slice_in_dim(tokens_BxT, at - window, window, axis=1)
        return put(tokens_BxT, at, continued(seen, None, 0)[0][:, -1])

    first = jnp.min(lengths_B)
    # The first pass also caches padding, which is overwritten before it is read.
    _, caches = continued(tokens_BxT[:, :window], None, 0)
    tokens_BxT, _ = jax.lax.fori_loop(first, window, by_cache, (tokens_BxT, caches))
    if window < length:
        first = jnp.maximum(first, window)
        tokens_BxT = jax.lax.fori_loop(first, length, by_window, tokens_BxT)
    return jax.lax.with_sharding_constraint(tokens_BxT, jax.P())


def check_numbers(**numbers: tuple[float, float]) -> None:
    """Checks options by name, each given as its value and its lower bound.

    Raises:
        ValueError: A value is below its bound, or not finite.
    """
    for name, (value, least) in numbers.items():
        if not least <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}; got {value}.")
