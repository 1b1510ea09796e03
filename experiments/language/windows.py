"""Windows of tokens: shuffled batches to train on, and fixed windows to evaluate on."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from experiments.language.data import Tokens

_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # in batches


def batches(
    tokens: Tokens, *, batch: int, context: int, seed: int, rows: Sequence[int] | None = None
) -> grain.MapDataset:
    """Returns the batches of windows to train on, or the part that this process loads.

    Documents follow each other, and a window begins every `context` tokens, so that each token but
    the first is a target once an epoch. Every epoch has its own order, and windows that fill no
    batch share one with the next epoch. The sources of a mixture alternate by their weights, each
    in its own epochs. A step's batch depends on the seed and the step alone, so that
    `batches(...)[step]` suffices to resume at any step.

    Args:
        tokens: The tokens.
        batch: The number of windows in a step, over all processes.
        context: The number of targets in a window.
        seed: The seed of the order, not negative.
        rows: The windows of the batch to load, as in `processes.Share`. By default all.

    Returns:
        An endless data set, indexed by step: `(rows, context + 1)` int32.

    Raises:
        ValueError: If there is no whole window, or the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"--seed must be at least 0; got {seed}.")
    # Grain's own default would depend on the place in the pipeline. Since Grain adds the epoch to
    # the seed, neighbouring seeds are mapped far apart.
    sources = tokens.parts or (("", 1.0, tokens),)
    starts = np.random.SeedSequence(seed).generate_state(len(sources))
    shuffled = [
        grain.MapDataset.source(_Windows(source.train, context, f"{name} to train on".strip()))
        .shuffle(seed=int(start))
        .repeat()
        for start, (name, _, source) in zip(starts, sources, strict=True)
    ]
    weights = [weight for _, weight, _ in sources]
    mixed = grain.MapDataset.mix(shuffled, weights) if tokens.parts else shuffled[0]
    places = range(batch) if rows is None else [int(row) for row in rows]
    return grain.MapDataset.source(_Steps(mixed, batch, places))


def from_step(data: grain.MapDataset, step: int) -> Iterator[np.ndarray]:
    """Returns the batches from a step on, prefetched in the background until `close()`."""
    return iter(data[step:].to_iter_dataset(_READ))


class HeldOut(NamedTuple):
    """Windows to evaluate on.

    Attributes:
        windows: `(windows, context + 1)` int32. Each token but the first of a window is a target.
        bytes: The bytes of text that all targets stand for; None if unknown.
    """

    windows: np.ndarray
    bytes: int | None

    def bits_per_byte(self, loss: float) -> float | None:
        """Converts a loss in nats per target. Ends of documents count bits but have no bytes."""
        if not self.bytes:
            return None
        return loss * self.windows[:, 1:].size / (math.log(2) * self.bytes)


def held_out(tokens: Tokens, context: int, limit: int) -> HeldOut:
    """Returns evenly spaced windows of the held-out tokens, with at most `limit` targets.

    Raises:
        ValueError: If there is no whole window, or `limit` is less than one window.
    """
    if limit < context:
        raise ValueError(f"--evaluation-tokens must be at least --context {context}; got {limit}.")
    windows = _Windows(tokens.validation, context, "held out")
    count = min(limit // context, len(windows))
    chosen = np.stack([windows[i * len(windows) // count] for i in range(count)])
    table = tokens.bytes_per_token
    return HeldOut(chosen, None if table is None else int(table[chosen[:, 1:]].sum()))


class _Steps:
    """The windows `(places, context + 1)` at these places of each step's batch."""

    def __init__(self, windows: grain.MapDataset, batch: int, places: Sequence[int]):
        self._windows, self._batch, self._places = windows, batch, places

    def __len__(self) -> int:
        return len(self._windows) // self._batch

    def __getitem__(self, step: int) -> np.ndarray:
        return np.stack([self._windows[step * self._batch + place] for place in self._places])


class _Windows:
    """Windows `(context + 1,)` int32, one every `context` tokens of concatenated shards."""

    def __init__(self, shards: Sequence[np.ndarray], context: int, purpose: str):
        self._shards = shards
        self._context = context
        self._ends = np.cumsum([len(shard) for shard in shards])
        if len(self) < 1:
            raise ValueError(
                f"The text must have at least {context + 1} tokens {purpose} (one sequence); got "
                f"{self._ends[-1]}. Give more text or a shorter --context."
            )

    def __len__(self) -> int:
        return max(int(self._ends[-1]) - 1, 0) // self._context

    def __getitem__(self, index: int) -> np.ndarray:
        start, missing = index * self._context, self._context + 1
        shard = int(np.searchsorted(self._ends, start, side="right"))
        start -= int(self._ends[shard] - len(self._shards[shard]))
        parts = []
        while missing:
            parts.append(self._shards[shard][start : start + missing])
            missing -= len(parts[-1])
            shard, start = shard + 1, 0
        return np.concatenate(parts, dtype=np.int32)
