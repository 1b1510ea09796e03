"""FLOPs of attention kernels on TPUs, which compiled programs do not report."""

import dataclasses
import math
import re
from typing import NamedTuple

from experiments.compiled import Kernel, Program
from experiments.language import attention

# Matrix products that each kernel computes for a pair of blocks: over the dimensions of a key
# head, and over those of a value head.
_PRODUCTS = {"splash_mha_fwd": (1, 1), "splash_mha_dq": (2, 1), "splash_mha_dkv": (2, 2)}


class Shape(NamedTuple):
    """The shape of the attention that one kernel launch computes on one device.

    Attributes:
        sequences: The number of sequences.
        heads: The number of query heads.
        length: The length of a sequence.
        key: The dimensions of a head's queries and keys.
        value: The dimensions of a head's values.
    """

    sequences: int
    heads: int
    length: int
    key: int
    value: int


def kernel_flops(name: str, shape: Shape) -> int | None:
    """Returns the FLOPs of one launch, which skips blocks above the diagonal; None if unknown.

    >>> kernel_flops("splash_mha_fwd_residuals", Shape(1, 1, 1024, 64, 64)) == 3 * 2 * 512**2 * 128
    True
    """
    products = _PRODUCTS.get(re.sub("_(no_)?residuals$", "", name))
    if products is None:
        return None
    block = math.gcd(shape.length, attention.BLOCK)
    pairs = (shape.length // block) * (shape.length // block + 1) // 2
    columns = products[0] * shape.key + products[1] * shape.value
    return shape.sequences * shape.heads * pairs * 2 * block**2 * columns


def with_attention(program: Program, shape: Shape) -> Program:
    """Adds the FLOPs of the attention kernels to a program, and removes them from `unread`."""
    known = {name: kernel_flops(name, shape) for name in program.unread}

    def with_flops(kernel: Kernel) -> Kernel:
        flops = known.get(re.sub(r"[.\d]+$", "", kernel.name))
        return kernel if flops is None else dataclasses.replace(kernel, flops=flops)

    kernels = tuple(map(with_flops, program.kernels))
    more = sum(program.unread[name] * flops for name, flops in known.items() if flops is not None)
    others = {name: runs for name, runs in program.unread.items() if known[name] is None}
    return dataclasses.replace(program, flops=program.flops + more, unread=others, kernels=kernels)
