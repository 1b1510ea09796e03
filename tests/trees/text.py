"""The notation of the trees: the path, shape and axis roles of every leaf.

A line has a path, the sizes of its axes, and one letter for each axis: `i` for fan_in, `o` for
fan_out and `b` for a batch of independent matrices (stacked layers, experts). A single `-` marks a
leaf that is not a hidden matrix. `{a,b}` in a path stands for one leaf each, and so does `{0-3}`.

Two conventions hold throughout:

* stacked parts (query/key/value, key/value, gate/up) whose axis comes before the input axis count
  as a batch; where the part axis comes after the input axis it belongs to the output;
* patch embeddings, heads (also pre-training heads) and learned probes are other, while poolers
  and head transforms, which map width to width, are muon.
"""

import itertools
import math
import re

SIZES = {
    "D": 96,  # model width
    "H": 6,  # query heads
    "KV": 2,  # key/value heads
    "G": 3,  # query heads per key/value head
    "K": 24,  # head width where it is free
    "DH": 16,  # head width where it is width / heads
    "F": 160,  # feed-forward width
    "FM": 76,  # expert width
    "FS": 228,  # width of the shared experts together
    "E": 7,  # experts
    "V": 512,  # vocabulary
    "P": 56,  # positions
    "C": 10,  # classes
    "R": 32,  # relative position buckets
    # Latent attention: queries, keys, keys with rotated ones, a head's queries, keys and values.
    **{"QL": 40, "KL": 28, "KR": 36, "QH": 26, "KH": 39, "VH": 21},
}


def rows(text, prefix=""):
    """The leaves of a tree, or of the module at a prefix: `(path, shape, roles)`."""
    leaves = []
    for line in filter(None, text.splitlines()):
        path, *sizes, roles = line.split()
        shape = tuple(math.prod(SIZES.get(n) or int(n) for n in size.split("*")) for size in sizes)
        leaves += [(name, shape, roles) for name in spellings(prefix + path)]
    return leaves


def spelled(leaf):
    """The roles of a route's axes, how many parts fan_out has, and `?` if the route is a guess."""
    guess = "?" * bool(leaf.doubt)
    if leaf.label != "muon":
        return "-" + guess
    batch, fan_in, _ = leaf.axes.split(leaf.shape)
    roles = ["b" if i in batch else "i" if i in fan_in else "o" for i in range(len(leaf.shape))]
    parts = leaf.axes.split_fan_out
    return "".join(roles) + (f"/{parts}" if parts != 1 else "") + guess


def spellings(path):
    """`{a,b}` is a or b, and `{0-3}` any of the numbers."""
    choices = []
    for at, piece in enumerate(re.split(r"\{(.*?)\}", path)):
        choice = piece.split(",") if at % 2 else [piece]
        if at % 2 and (numbers := re.fullmatch(r"(\d+)-(\d+)", piece)):
            choice = [str(n) for n in range(int(numbers[1]), int(numbers[2]) + 1)]
        choices.append(choice)
    return map("".join, itertools.product(*choices))


def scan(prefix, block, axis=0, size=5):
    """The module at a prefix, whose leaves are stacked along a new axis."""
    return [
        (
            path,
            (*shape[:axis], size, *shape[axis:]),
            roles if roles == "-" else roles[:axis] + "b" + roles[axis:],
        )
        for path, shape, roles in rows(block, prefix)
    ]


def suffixed(leaves, end):
    return [(path + end, *rest) for path, *rest in leaves]
