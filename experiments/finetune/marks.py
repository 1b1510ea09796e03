"""Texts on their way to tokens: cut at marks, and told by them what is learnt."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.finetune import template

MARK = re.compile(f"([{template.CUT}{template.BEGIN}{template.END}])")


class Text(NamedTuple):
    """A text on its way to tokens.

    Attributes:
        pieces: that make it, each to be tokenised by itself.
        learnt: begins and ends of the characters to learn, in ascending order.
        escaped: whether content spells a special token or a marker.
        dropped: thoughts, and words beside a call, that the template leaves out.
    """

    pieces: tuple[str, ...]
    learnt: tuple[tuple[int, int], ...]
    escaped: bool
    dropped: int = 0


class Encoded(NamedTuple):
    """`(tokens,)` int32, and `(tokens,)` bool: whether each is to be learnt."""

    tokens: np.ndarray
    learnt: np.ndarray


def unmark(marked: str) -> Text:
    """What marks in a text say, and the text without them."""
    pieces, learnt, at, begin = [""], [], 0, 0
    for part in MARK.split(marked):
        match part:
            case template.CUT:
                pieces.append("")
            case template.BEGIN:
                begin = at
            case template.END:
                learnt.append((begin, at))
            case _:
                pieces[-1] += part
                at += len(part)
    return Text(tuple(pieces), tuple(learnt), len(pieces) > 1)


def join(text: Text, encodings: Sequence[Any]) -> Encoded:
    ids: list[int] = []
    places = []
    at = 0
    for piece, encoding in zip(text.pieces, encodings, strict=True):
        ids += encoding.ids
        places.append(np.array(encoding.offsets, np.int64).reshape(-1, 2) + at)
        at += len(piece)
    begins, ends = np.concatenate(places).T
    learnt = np.zeros(len(ids), bool)
    for first, last in text.learnt:
        learnt |= (begins < last) & (ends > first)
    return Encoded(np.array(ids, np.int32), learnt)
