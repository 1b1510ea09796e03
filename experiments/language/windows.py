"""Windows of tokens: a step's batch of shuffled ones to train on, fixed ones to validate on."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from experiments.language.data import Tokens

_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # batches


def batches(
    tokens: Tokens, *, batch: int, context: int, seed: int, rows: Sequence[int] | None = None
) -> grain.MapDataset:
    """The windows that each step trains on, or those of them that this process loads.

    Documents follow each other, and every `context` tokens a window begins: each token but the
    first is a target once an epoch. Every epoch has its own order, and the windows of an epoch that
    fill no batch share one with the next. The sources of a mixture take turns by their weights, and
    each has its own epochs. A step's batch depends on the seed and the step alone, so
    that `batches(...)[step]` is all that it takes to go on from any step.

    Args:
        tokens: to cut.
        batch: windows a step, over all processes.
        context: targets of a window.
        seed: of the order; not negative.
        rows: places in the batch of the windows to load, as `processes.Share` tells them; by
            default all.

    Returns:
        An endless data set, indexed by step: `(rows, context + 1)` int32.

    Raises:
        ValueError: there is no whole window, or the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"--seed must be at least 0; got {seed}.")
    # Not left to Grain, which makes a seed of the place in the pipeline. Neighbouring seeds must
    # be far apart, since it adds the epoch to them.
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
    """The batches from a step on, read ahead in the background; `close()` ends that."""
    return iter(data[step:].to_iter_dataset(_READ))


class HeldOut(NamedTuple):
    """Windows to validate on.

    Attributes:
        windows: `(windows, context + 1)` int32; each token but a window's first is a target.
        bytes: of text that the targets stand for, in all; None if that is unknown.
    """

    windows: np.ndarray
    bytes: int | None

    def bits_per_byte(self, loss: float) -> float | None:
        """Of a mean loss in nats a target; a document's end costs bits and has no bytes."""
        if not self.bytes:
            return None
        return loss * self.windows[:, 1:].size / (math.log(2) * self.bytes)


def held_out(tokens: Tokens, context: int, limit: int) -> HeldOut:
    """Windows of the validation tokens, evenly spread, with `limit` targets at most.

    Raises:
        ValueError: there is no whole window, or the limit is below one.
    """
    if limit < context:
        raise ValueError(f"{limit} tokens to validate on are fewer than one --context {context}.")
    windows = _Windows(tokens.validation, context, "held out")
    count = min(limit // context, len(windows))
    chosen = np.stack([windows[i * len(windows) // count] for i in range(count)])
    table = tokens.bytes_per_token
    return HeldOut(chosen, None if table is None else int(table[chosen[:, 1:]].sum()))


class _Steps:
    """`(places, context + 1)` of each step: the windows at these places of its batch."""

    def __init__(self, windows: grain.MapDataset, batch: int, places: Sequence[int]):
        self._windows, self._batch, self._places = windows, batch, places

    def __len__(self) -> int:
        return len(self._windows) // self._batch

    def __getitem__(self, step: int) -> np.ndarray:
        return np.stack([self._windows[step * self._batch + place] for place in self._places])


class _Windows:
    """`(context + 1,)` int32 from every `context` tokens of shards that follow each other."""

    def __init__(self, shards: Sequence[np.ndarray], context: int, purpose: str):
        self._shards = shards
        self._context = context
        self._ends = np.cumsum([len(shard) for shard in shards])
        if len(self) < 1:
            raise ValueError(
                f"The text has {self._ends[-1]} tokens {purpose}, fewer than the {context + 1} "
                "of one sequence; give more text or a shorter --context."
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
