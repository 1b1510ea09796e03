"""FLOPs of the matrix products in a compiled program: two for each multiply and add."""

import math
import re

from experiments.hlo import Computation, Instruction, dimensions, integers


def dot_flops(it: Instruction, scope: Computation) -> int:
    lhs = dimensions(scope[it.inputs()[0]].shape)
    contracted = integers(it.attribute("lhs_contracting_dims"))
    return 2 * math.prod(dimensions(it.shape)) * math.prod(lhs[axis] for axis in contracted)


def convolution_flops(it: Instruction, scope: Computation) -> int:
    """A TPU's matrix products are convolutions.

    The batch of a batched one is a spatial axis, spread by dilation (`window={size=64 stride=63
    lhs_dilate=64}`) until a window meets one matrix and otherwise holes, which cost nothing.
    """
    lhs_labels, rhs_labels, out_labels = re.split("_|->", it.attribute("dim_labels"))
    lhs, rhs = (dimensions(scope[name].shape) for name in it.inputs()[:2])
    out = dimensions(it.shape)
    flops = 2 * rhs[rhs_labels.index("i")] * out[out_labels.index("b")] * out[out_labels.index("f")]
    window = dict(re.findall(r"(\w+)=(\S+)", it.attribute("window")))
    for axis, size in enumerate(window["size"].split("x") if window else ()):

        def of(name: str, default: str, axis: int = axis) -> str:
            return window[name].split("x")[axis] if name in window else default

        flops *= _products(
            places=out[out_labels.index(str(axis))],
            size=int(size),
            elements=lhs[lhs_labels.index(str(axis))],
            stride=int(of("stride", "1")),
            low=int(of("pad", "0_0").split("_")[0]),
            element_step=int(of("lhs_dilate", "1")),
            window_step=int(of("rhs_dilate", "1")),
        )
    return flops


def _products(
    *, places: int, size: int, elements: int, stride: int, low: int, element_step: int, window_step
) -> int:
    """Pairs (place of the window, place in it) that meet an element: no padding, no hole.

    >>> batch = {"places": 64, "size": 64, "elements": 64, "stride": 63, "element_step": 64}
    >>> _products(**batch, low=0, window_step=1)
    64
    """
    met = range(0, elements * element_step, element_step)
    return sum(
        place * stride + inside * window_step - low in met
        for place in range(places)
        for inside in range(size)
    )


def library_flops(it: Instruction, scope: Computation) -> int | None:
    """Of a product that cuBLAS computes; None where its call does not tell what it contracts."""
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', it.attributes)
    if contracted is None:
        return None
    lhs = dimensions(scope[it.inputs()[0]].shape)
    axes = integers(contracted[1].replace('"', ""))
    return 2 * math.prod(dimensions(it.shape)) * math.prod(lhs[axis] for axis in axes)
