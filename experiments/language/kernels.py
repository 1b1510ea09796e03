"""FLOPs of attention's kernels on TPUs, whose programs do not tell them."""

import dataclasses
import math
import re
from typing import NamedTuple

from experiments.compiled import Kernel, Program
from experiments.language import attention

# Products that each kernel computes for a pair of blocks: over the columns of a key head, and over
# those of a value head.
_PRODUCTS = {"splash_mha_fwd": (1, 1), "splash_mha_dq": (2, 1), "splash_mha_dkv": (2, 2)}


class Shape(NamedTuple):
    """What one run of a kernel attends to, on one device.

    Attributes:
        sequences: how many.
        heads: of queries.
        length: of a sequence.
        key: columns of a head's queries and keys.
        value: columns of its values.
    """

    sequences: int
    heads: int
    length: int
    key: int
    value: int


def kernel_flops(name: str, shape: Shape) -> int | None:
    """Of one run: the blocks on and below the diagonal. None if the kernel is another one.

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
    """The program with the FLOPs of its kernels of attention, which then are not `unread`."""
    found = {name: kernel_flops(name, shape) for name in program.unread}

    def told(kernel: Kernel) -> Kernel:
        flops = found.get(re.sub(r"[.\d]+$", "", kernel.name))
        return kernel if flops is None else dataclasses.replace(kernel, flops=flops)

    kernels = tuple(map(told, program.kernels))
    more = sum(program.unread[name] * flops for name, flops in found.items() if flops is not None)
    others = {name: runs for name, runs in program.unread.items() if found[name] is None}
    return dataclasses.replace(program, flops=program.flops + more, unread=others, kernels=kernels)
