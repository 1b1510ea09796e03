"""The predicted time of work on a device, from its assumed rates."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Kernel(NamedTuple):
    """The work of one kernel launch.

    Attributes:
        flops: The FLOPs of its matrix products.
        numbers: The number of entries that it reads and writes.
    """

    flops: int
    numbers: int


class Device(NamedTuple):
    """The assumed rates of a device.

    Attributes:
        name: The name of the device kind in JAX.
        launch: The overhead of each kernel launch, in seconds.
        bandwidth: The memory bandwidth, in bytes per second.
        flops: The achieved FLOP/s of products in bfloat16 or float16.
        wide_flops: The achieved FLOP/s of products in float32, at the highest precision.
        narrowest: The size of the narrowest number in elementwise arithmetic, in bytes.
        on_chip: Whether operands of products are in on-chip memory, and the arithmetic between
            products is fused with them.
        decomposing: The achieved FLOP/s of eigendecompositions, SVDs and QRs; infinite if unknown.
        fill: The time until the pipeline of a product is full, in addition to its launch, in
            seconds.
    """

    name: str
    launch: float
    bandwidth: float
    flops: float
    wide_flops: float
    narrowest: int = 1
    on_chip: bool = False
    decomposing: float = math.inf
    fill: float = 0

    def seconds(
        self, kernels: Iterable[Kernel], dtype: jax.typing.DTypeLike, *, launches: bool = True
    ) -> float:
        """Returns the time of kernels in sequence, each the longer of products and traffic.

        `dtype` is that of their entries. `launches` includes the overhead of launches.
        """
        size = jnp.dtype(dtype).itemsize
        rate = self.flops if size <= 2 else self.wide_flops
        total = 0.0
        for kernel in kernels:
            moves = not (kernel.flops and self.on_chip)
            traffic = moves * kernel.numbers * max(size, self.narrowest) / self.bandwidth
            start = self.launch + self.fill * (kernel.flops > 0)
            total += start * launches + max(kernel.flops / rate, traffic)
        return total

    def assumptions(self) -> str:
        """Returns the assumptions of a predicted time as a sentence."""
        rates = f"{self.flops / 1e12:.3g} TFLOP/s, {self.wide_flops / 1e12:.3g} in float32"
        if math.isinf(self.bandwidth):
            work = f"products alone, at {rates}"
        else:
            launch, bandwidth = 1e6 * self.launch, self.bandwidth / 1e12
            filling = f" and {1e6 * self.fill:g} more per product" if self.fill else ""
            work = (
                f"{launch:g} µs per kernel{filling}, {bandwidth:.3g} TB/s, {rates}; kernels in "
                "sequence"
            )
        left = "network" if self.decomposing < math.inf else "network and decompositions"
        return f"Time predicted for {self.name}: {work}, {left} not counted."


# Devices by platform. The times of the H100 and the v5e are not measured.
DEVICES = {
    # Measured rates of large products on two cores, and of decompositions on one thread. Launches
    # and traffic are not measured; without them, forms are chosen by their FLOPs.
    "cpu": Device("2 CPU cores", 0, math.inf, 750e9, 360e9, decomposing=20e9),
    # An H100 SXM according to NVIDIA's data sheet: products at 70 % of the peak of 989 TFLOP/s, and
    # of 67 TFLOP/s in float32, which is exact without tensor cores.
    "gpu": Device("NVIDIA H100 80GB HBM3", 2e-6, 3.35e12, 700e12, 47e12),
    # A v5e according to Google's data sheet: four matrix units of 128 × 128 at 1.5 GHz make its
    # peak of 197 TFLOP/s, of which products reach 98 %, with six products for an exact one in
    # float32. The compiler's estimated cycles imply 1500 of them for each kernel in addition to its
    # work, and 3000 more to fill the pipeline of a product. Its vector unit does not support
    # bfloat16.
    "tpu": Device(
        "TPU v5 lite",
        launch=1e-6,
        bandwidth=0.819e12,
        flops=193e12,
        wide_flops=32e12,
        narrowest=4,
        on_chip=True,
        fill=2e-6,
    ),
}


def device_of(platform: str) -> Device:
    """Returns the device of a platform, or a GPU if the platform is unknown."""
    return DEVICES.get(platform, DEVICES["gpu"])
