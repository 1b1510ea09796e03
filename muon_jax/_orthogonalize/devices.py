"""How long work takes a processor: what a device is taken to do in a second."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Kernel(NamedTuple):
    """What a device runs as one piece.

    Attributes:
        flops: of its matrix products.
        numbers: that it reads and writes.
    """

    flops: int
    numbers: int


class Device(NamedTuple):
    """What is assumed of a device.

    Attributes:
        name: of the kind, as JAX calls it.
        launch: seconds that each kernel takes beside its work.
        bandwidth: of its memory, in bytes a second.
        flops: a second, of products of bfloat16 or float16, as they reach it.
        wide_flops: the same of float32, at the highest precision.
        narrowest: bytes of the narrowest number that it computes with beside products.
        on_chip: whether products find their operands in the chip's own memory, and take along the
            arithmetic between them, so that it is no kernel of its own.
        decomposing: FLOPs a second of eigendecompositions, SVDs and QRs; infinite where it is not
            known.
    """

    name: str
    launch: float
    bandwidth: float
    flops: float
    wide_flops: float
    narrowest: int = 1
    on_chip: bool = False
    decomposing: float = math.inf

    def seconds(
        self, kernels: Iterable[Kernel], dtype: jax.typing.DTypeLike, *, launches: bool = True
    ) -> float:
        """Of kernels one after another: of each its launch, and the longer of products and traffic.

        Args:
            kernels: what runs.
            dtype: of their numbers.
            launches: whether those count.
        """
        size = jnp.dtype(dtype).itemsize
        rate = self.flops if size <= 2 else self.wide_flops
        total = 0.0
        for kernel in kernels:
            moves = not (kernel.flops and self.on_chip)
            traffic = moves * kernel.numbers * max(size, self.narrowest) / self.bandwidth
            total += self.launch * launches + max(kernel.flops / rate, traffic)
        return total

    def assumptions(self) -> str:
        """In a sentence."""
        rates = f"{self.flops / 1e12:.3g} TFLOP/s, {self.wide_flops / 1e12:.3g} in float32"
        if math.isinf(self.bandwidth):
            work = f"products alone, at {rates}"
        else:
            launch, bandwidth = 1e6 * self.launch, self.bandwidth / 1e12
            work = f"{launch:g} µs per kernel, {bandwidth:.3g} TB/s, {rates}; kernels in sequence"
        left = "network" if self.decomposing < math.inf else "network and decompositions"
        return f"Time predicted for {self.name}: {work}, {left} not counted."


# By platform; neither the H100's nor the v5e's times are measured.
DEVICES = {
    # Large products on two cores, as measured, and decompositions on one thread. Nothing is
    # measured of launches and traffic: without them forms are chosen by their FLOPs.
    "cpu": Device("2 CPU cores", 0, math.inf, 750e9, 360e9, decomposing=20e9),
    # An H100 SXM by NVIDIA's data sheet: products at 70 % of the peak of 989 TFLOP/s, and of 67 in
    # float32, which is exact without tensor cores.
    "gpu": Device("NVIDIA H100 80GB HBM3", 2e-6, 3.35e12, 700e12, 47e12),
    # A v5e by Google's data sheet: products at 55 % of the peak of 197 TFLOP/s, as the compiler's
    # estimated cycles at 0.94 GHz have them, six for an exact one of float32. Its vector unit knows
    # no bfloat16.
    "tpu": Device("TPU v5 lite", 1e-6, 0.819e12, 108e12, 18e12, narrowest=4, on_chip=True),
}


def device_of(platform: str) -> Device:
    """That of a platform; of one that is not known, a GPU."""
    return DEVICES.get(platform, DEVICES["gpu"])
