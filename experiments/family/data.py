"""Windows of a corpus: random ones to train on, fixed ones to validate on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import corpus
from experiments.family.config import Training


class Data(NamedTuple):
    """A corpus as a training needs it.

    Attributes:
        train: `(bytes,)` uint8.
        validation: `(windows, context + 1)` uint8, evenly spread over the validation text.
        origin: what a run records of the corpus.
    """

    train: jax.Array
    validation: jax.Array
    origin: dict[str, Any]


def load(config: Training) -> Data:
    """The configured corpus.

    Raises:
        ValueError: the text is too short for a window.
        OSError: the text cannot be read.
    """
    text = corpus.load(config.text, config.corpus_bytes)
    window = config.context + 1
    for side in ("train", "validation"):
        length = len(getattr(text, side))
        if length < window:
            raise ValueError(
                f"{text.name} has {length} bytes for {side}, fewer than the {window} of one "
                "sequence; use more bytes or a shorter --context."
            )
    starts = np.linspace(0, len(text.validation) - window, config.validation).astype(int)
    windows = text.validation[starts[:, None] + np.arange(window)]
    return Data(jnp.asarray(text.train), jnp.asarray(windows), text.as_json())


def batch(train: jax.Array, key: jax.Array, size: int, context: int) -> jax.Array:
    """Random windows of the training text, `(size, context + 1)` uint8."""
    starts = jax.random.randint(key, (size,), 0, len(train) - context)
    return train[jnp.add.outer(starts, jnp.arange(context + 1))]
