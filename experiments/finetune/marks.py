"""Splits marked texts into pieces to tokenise, and finds the ranges to train on."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.finetune import template

MARK = re.compile(f"([{template.CUT}{template.BEGIN}{template.END}])")


class Text(NamedTuple):
    """A text to tokenise."""

    pieces: tuple[str, ...]  # parts of the text, which are tokenised separately
    learnt: tuple[tuple[int, int], ...]  # ranges of characters to train on, ascending
    escaped: bool  # whether its content spells a special token or a marker
    dropped: int = 0  # how many reasoning texts and remarks beside tool calls the template omits


class Encoded(NamedTuple):
    """Tokens `(tokens,)`, int32, and whether to train on each, `(tokens,)`, bool."""

    tokens: np.ndarray
    learnt: np.ndarray


def unmark(marked: str) -> Text:
    """Returns the text without its marks, and what they mark."""
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
    """Joins the encodings of a text's pieces. A token is learnt if one of its characters is."""
    ids, places, at = [], [], 0
    for piece, encoding in zip(text.pieces, encodings, strict=True):
        ids += encoding.ids
        places.append(np.array(encoding.offsets, np.int64).reshape(-1, 2) + at)
        at += len(piece)
    begins, ends = np.concatenate(places).T
    learnt = np.zeros(len(ids), bool)
    for first, last in text.learnt:
        learnt |= (begins < last) & (ends > first)
    return Encoded(np.array(ids, np.int32), learnt)
