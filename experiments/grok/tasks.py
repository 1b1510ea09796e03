"""The seven tasks: tables of equations as tokens and answers, and their random splits."""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

MODULUS = 97
PARITY_BITS = 10

TaskName = Literal["add", "sub", "mul", "div", "exp", "gcd", "parity"]

# The fractions of arXiv 2504.16041. It has no subtraction, which gets the fraction of addition.
TRAIN_FRACTION: dict[TaskName, float] = {
    "add": 0.8,
    "sub": 0.8,
    "mul": 0.5,
    "div": 0.8,
    "exp": 0.7,
    "gcd": 0.5,
    "parity": 0.5,
}

_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: (a + b) % MODULUS,
    "sub": lambda a, b: (a - b) % MODULUS,
    "mul": lambda a, b: (a * b) % MODULUS,
    "div": lambda a, b: (a * pow(b, -1, MODULUS)) % MODULUS,
    "exp": lambda a, b: pow(a, b, MODULUS),
    "gcd": math.gcd,
}


class Table(NamedTuple):
    """The equations of a task.

    Attributes:
        tokens: The tokens before the answer, `(rows, positions)` int32. The model predicts the
            answer at the last position.
        answers: The token of each answer, `(rows,)` int32.
        vocabulary: The number of different tokens.
    """

    tokens: np.ndarray
    answers: np.ndarray
    vocabulary: int


class Split(NamedTuple):
    """A random split of a table: row indices, int32."""

    train: np.ndarray
    validation: np.ndarray


@functools.cache
def table(task: TaskName) -> Table:
    """Returns the table of a task: `a op b =` modulo 97, or ten bits and `=`.

    Division excludes b = 0. Exponentiation has 0 ** 0 = 1, and gcd(0, 0) is 0.
    """
    if task == "parity":
        numbers = np.arange(2**PARITY_BITS)
        bits = (numbers[:, None] >> np.arange(PARITY_BITS)[::-1]) & 1
        equals = np.full((len(numbers), 1), 2)
        tokens, answers, vocabulary = np.hstack([bits, equals]), bits.sum(axis=1) % 2, 3
    else:
        operator, equals = MODULUS, MODULUS + 1
        pairs = [(a, b) for a in range(MODULUS) for b in range(task == "div", MODULUS)]
        tokens = np.array([(a, operator, b, equals) for a, b in pairs])
        answers = np.array([_OPERATIONS[task](a, b) for a, b in pairs])
        vocabulary = MODULUS + 2
    return Table(tokens.astype(np.int32), answers.astype(np.int32), vocabulary)


def split(rows: int, train_fraction: float, seed: int) -> Split:
    """Splits the rows randomly into training and validation rows.

    Raises:
        ValueError: The fraction leaves no row for training or for validation.
    """
    cut = round(rows * train_fraction)
    if not 0 < cut < rows:
        raise ValueError(
            f"--train-fraction {train_fraction} of {rows} rows leaves {cut} for training and "
            f"{rows - cut} for validation; both must have at least one."
        )
    order = np.random.default_rng(seed).permutation(rows).astype(np.int32)
    return Split(np.sort(order[:cut]), np.sort(order[cut:]))
