"""Windows of a corpus: random ones for training, fixed ones for validation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import corpus
from experiments.family.config import Training


class Data(NamedTuple):
    """The data of a training.

    Attributes:
        train: The training text, `(bytes,)` uint8.
        validation: The validation windows, `(windows, context + 1)` uint8, evenly spread over the
            validation text.
        origin: The description of the corpus that a run records.
    """

    train: jax.Array
    validation: jax.Array
    origin: dict[str, Any]


def load(config: Training) -> Data:
    """Returns the data of the configured corpus.

    Raises:
        ValueError: The text is shorter than a window.
        OSError: The text cannot be read.
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
    """Returns random windows of the training text, `(size, context + 1)` uint8."""
    starts = jax.random.randint(key, (size,), 0, len(train) - context)
    return train[jnp.add.outer(starts, jnp.arange(context + 1))]
