"""Packs rows into windows, and returns the batch of each step as a function of seed and step."""

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Concatenated rows of tokens."""

    tokens: np.ndarray  # `(tokens,)` int32
    learnt: np.ndarray  # `(tokens,)` bool, whether to train on each; False for the first of a row
    starts: np.ndarray  # `(rows + 1,)` int64, where each row begins, and the end of the last

    @classmethod
    def of(cls, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> "Rows":
        """Concatenates one or more rows, each of tokens and of whether to train on each token."""
        tokens, learnt = map(np.concatenate, zip(*rows, strict=True))
        return cls(tokens, learnt, np.cumsum([0, *(len(row) for row, _ in rows)]))

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each row, `(rows,)`."""
        return np.diff(self.starts)


class Batch(NamedTuple):
    """Windows of rows, as arrays `(windows, context)` int32."""

    tokens: Any  # padding is 0
    targets: Any  # next token in the row where it is trained on; elsewhere -1
    segments: Any  # 1 for the first row of a window, 2 for the second, and so on; 0 for padding


class Batches:
    """The batches of windows that each step trains on, or the part that this process makes.

    The rows of an epoch are packed by best-fit decreasing, so that every epoch has the same number
    of windows. Rows of equal length are permuted, and windows are shuffled, anew in each epoch. A
    batch may contain the last windows of one epoch and the first of the next. `batches[step]`
    depends on the seed and the step only.

    Args:
        rows: The rows, none longer than `context`.
        batch: The number of windows in a step, over all processes.
        context: The number of tokens in a window.
        seed: The seed of the order, not negative.
        places: Which windows of a batch to make, as in `processes.Share`. By default all.

    Attributes:
        windows: The number of windows in an epoch.

    Raises:
        ValueError: If a row is too long.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        batch: int,
        context: int,
        seed: int,
        places: Sequence[int] | None = None,
    ):
        self._rows, self._context, self._seed = rows, context, seed
        self._batch, self._places = batch, range(batch) if places is None else places
        self._packed = pack(np.sort(rows.lengths)[::-1], context)
        self.windows = len(self._packed)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, step: int) -> Batch:
        windows = [self._window(step * self._batch + place) for place in self._places]
        return assemble(self._rows, windows, self._context)

    def _window(self, number: int) -> list[int]:
        epoch, index = divmod(number, self.windows)
        if epoch not in self._epochs:
            rng = np.random.default_rng((self._seed, epoch))
            rows = rng.permutation(len(self._rows.lengths))
            rows = rows[np.argsort(-self._rows.lengths[rows], kind="stable")]
            kept = {epoch - 1: self._epochs[epoch - 1]} if epoch - 1 in self._epochs else {}
            self._epochs = kept | {epoch: (rows, rng.permutation(self.windows))}
        rows, order = self._epochs[epoch]
        return rows[self._packed[order[index]]].tolist()


def in_order(rows: Rows, *, batch: int, context: int) -> list[Batch]:
    """Returns batches with every row once, for evaluation. Empty windows pad the last batch.

    Arguments and errors are those of `Batches`.
    """
    windows = pack(rows.lengths, context)
    windows += [[] for _ in range(-len(windows) % batch)]
    return [
        assemble(rows, windows[start : start + batch], context)
        for start in range(0, len(windows), batch)
    ]


def pack(lengths: np.ndarray, context: int) -> list[list[int]]:
    """Packs rows into windows by best-fit decreasing: the longest first, each where it fits best.

    Args:
        lengths: The lengths of the rows, `(rows,)`.
        context: The number of tokens in a window.

    Returns:
        The indices of the rows in each window.

    Raises:
        ValueError: If there are no rows, or a row is empty or longer than a window.
    """
    if not len(lengths) or lengths.min() < 1 or lengths.max() > context:
        raise ValueError(f"There must be rows, and each must have 1 to {context} tokens.")
    windows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}  # windows by the number of tokens that still fit
    spaces: list[int] = []  # the keys of `with_space`, ascending
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        best = bisect.bisect_left(spaces, length)
        if best == len(spaces):
            space, window = context, len(windows)
            windows.append([])
        else:
            space = spaces[best]
            window = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[best]
        windows[window].append(row)
        space -= length
        if space:
            if space not in with_space:
                bisect.insort(spaces, space)
            with_space.setdefault(space, []).append(window)
    return windows


def assemble(rows: Rows, windows: Sequence[Sequence[int]], context: int) -> Batch:
    """Returns the batch of these windows, each a list of rows from `pack`."""
    empty = np.zeros((len(windows), context), np.int32)
    batch = Batch(empty, np.full_like(empty, -1), np.zeros_like(empty))
    for i, window in enumerate(windows):
        begin = 0
        for segment, row in enumerate(window, 1):
            whole = slice(rows.starts[row], rows.starts[row + 1])
            tokens, learnt = rows.tokens[whole], rows.learnt[whole]
            end = begin + len(tokens)
            batch.tokens[i, begin:end] = tokens
            batch.targets[i, begin : end - 1] = np.where(learnt[1:], tokens[1:], -1)
            batch.segments[i, begin:end] = segment
            begin = end
    return batch
