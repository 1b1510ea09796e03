"""Counts the FLOPs of matrix products in a compiled program: two for each multiply-add."""

import math
import re

from experiments.hlo import Computation, Instruction, dimensions, integers


def dot_flops(it: Instruction, scope: Computation) -> int:
    lhs = dimensions(scope[it.inputs()[0]].shape)
    contracted = integers(it.attribute("lhs_contracting_dims"))
    return 2 * math.prod(dimensions(it.shape)) * math.prod(lhs[axis] for axis in contracted)


def convolution_flops(it: Instruction, scope: Computation) -> int:
    """Returns the FLOPs of a convolution. On TPUs matrix products are convolutions.

    The batch axis of a batched product is a spatial axis with dilation (`window={size=64 stride=63
    lhs_dilate=64}`): each window meets one matrix and otherwise holes, which cost nothing.
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
    """Returns the number of pairs (window, place in it) that meet an element, not padding or holes.

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
    """Returns the FLOPs of a call of cuBLAS or cuDNN; None if its text does not show them."""
    logits = re.search(
        r'"intermediate_tensor_shape": ?\{.*?"dimensions": ?\[([^\]]*)\]', it.attributes
    )
    if logits is not None:
        return _attention_flops(it, scope, integers(logits[1].replace('"', "")))
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', it.attributes)
    if contracted is None:
        return None
    lhs = dimensions(scope[it.inputs()[0]].shape)
    axes = integers(contracted[1].replace('"', ""))
    return 2 * math.prod(dimensions(it.shape)) * math.prod(lhs[axis] for axis in axes)


def _attention_flops(it: Instruction, scope: Computation, logits: list[int]) -> int:
    """Returns the FLOPs of cuDNN's attention. A causal mask halves the shape of its logits."""
    *batch, queries, keys = logits
    is_causal = re.search(r'"mask_type": ?"[A-Z_]*CAUSAL', it.attributes)
    pairs = sum(min(i + 1, keys) for i in range(queries)) if is_causal else queries * keys
    key, value = (dimensions(scope[name].shape)[-1] for name in it.inputs()[1:3])
    # The forward pass has two products, logits and output. The backward pass has five: the logits
    # again, and the gradients of the logits, values, queries and keys.
    is_backward = it.attribute("custom_call_target").endswith("Backward")
    columns = 3 * key + 2 * value if is_backward else key + value
    return 2 * math.prod(batch) * pairs * columns
