"""Rows packed into windows, and a step's batch of them: a function of the seed and the step."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Rows of tokens that follow each other.

    Attributes:
        tokens: `(tokens,)` int32.
        learnt: `(tokens,)` bool, whether to learn to predict each; a row's first one never is.
        starts: `(rows + 1,)` int64, where each row begins, and where the last ends.
    """

    tokens: np.ndarray
    learnt: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> "Rows":
        """From the tokens, and whether each is learnt, of every row; there is one at least."""
        tokens, learnt = map(np.concatenate, zip(*rows, strict=True))
        return cls(tokens, learnt, np.cumsum([0, *(len(row) for row, _ in rows)]))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, `(rows,)`."""
        return np.diff(self.starts)


class Batch(NamedTuple):
    """Windows of rows, `(windows, context)` int32 each; 0 where a window has no row.

    Attributes:
        tokens: to read.
        targets: the next token of the row, 0 at its end.
        mask: 1 where the target is to be learnt, else 0.
        segments: 1 for the first row of a window, 2 for the second, ...
        positions: of a token in its row, from 0.
    """

    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


class Batches:
    """The windows that each step trains on, or those of them that this process makes.

    Best-fit decreasing packs all rows of an epoch, so that every epoch has as many windows. Which
    rows of a length share one, and the windows' order, are the epoch's own; the windows of an
    epoch that fill no batch share one with the next. `batches[step]` depends on the seed and the
    step alone.

    Args:
        rows: none longer than the context.
        batch: windows of a step, over all processes.
        context: tokens of a window.
        seed: of the order; not negative.
        places: in the batch, of the windows to make, as `processes.Share` tells them; by default
            all.

    Attributes:
        windows: of an epoch.

    Raises:
        ValueError: a row is too long, or the batch or the seed is out of range.
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
        _check_batch(batch)
        if seed < 0:
            raise ValueError(f"--seed must be at least 0; got {seed}.")
        self._rows, self._context, self._seed = rows, context, seed
        self._batch = batch
        self._places = range(batch) if places is None else [int(place) for place in places]
        self._packed = pack(np.sort(rows.lengths)[::-1], context)
        self.windows = len(self._packed)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise IndexError(f"steps are counted from 0, got {step}")
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
    """Every row once, to evaluate; the last batch ends with empty windows.

    Args and errors are those of `Batches`.
    """
    _check_batch(batch)
    windows = pack(rows.lengths, context)
    windows += [[] for _ in range(-len(windows) % batch)]
    return [
        assemble(rows, windows[start : start + batch], context)
        for start in range(0, len(windows), batch)
    ]


def pack(lengths: np.ndarray, context: int) -> list[list[int]]:
    """Rows that share a window, by best fit: the longest first, each where least is left.

    Args:
        lengths: `(rows,)`, of rows.
        context: tokens of a window.

    Raises:
        ValueError: a row has none, or more than a window.
    """
    if not len(lengths) or lengths.min() < 1 or lengths.max() > context:
        raise ValueError(f"Each row must have from 1 to {context} tokens, and there must be one.")
    windows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}  # windows by the tokens that they still have room for
    spaces: list[int] = []  # its keys, ascending
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
    """A batch of these rows; `pack` tells which fit."""
    batch = Batch(*np.zeros((len(Batch._fields), len(windows), context), np.int32))
    for i, window in enumerate(windows):
        at = 0
        for segment, row in enumerate(window, 1):
            first, last = rows.starts[row], rows.starts[row + 1]
            here = slice(at, at := at + int(last - first))
            before = slice(here.start, here.stop - 1)
            batch.tokens[i, here] = rows.tokens[first:last]
            batch.targets[i, before] = rows.tokens[first + 1 : last]
            batch.mask[i, before] = rows.learnt[first + 1 : last]
            batch.segments[i, here] = segment
            batch.positions[i, here] = np.arange(last - first)
    return batch


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise ValueError(f"--batch must be at least 1; got {batch}.")
