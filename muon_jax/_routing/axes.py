"""The fan_in and fan_out axes of a hidden kernel, inferred from its name and its neighbours."""

import math
import re

from muon_jax._matrix_axes import MatrixAxes
from muon_jax._routing.names import (
    ATTENTION,
    CONV,
    EXPERT,
    FEED_FORWARD,
    LORA,
    OUT,
    QKV,
    LeafName,
    Reading,
    has,
)
from muon_jax._routing.survey import Survey, is_expert, key

# Kernels that read the residual stream, and kernels that write to it. With the width, known from
# the norms, this distinguishes (fan_in, fan_out) from (fan_out, fan_in).
_READS = re.compile(
    r"(w_?)?(q|k|v|qkv|kv)([_\d]|$)|query|key|value|c_attn|c_fc|up|gat|router|wi|fc1|in_proj|w[13]$"
)
_WRITES = re.compile(r"(o|out|output)([_\d]|$)|attn_vec|c_proj|down|wo|fc2|w2$")
_LARGEST_WINDOW = 11
_LARGEST_PATCH = 32

STACK = "its leading axes are assumed to be a stack of matrices"
HEADS = "an attention kernel split into heads"
CONV_KERNEL = "a conv kernel"
EXPERT_STACK = "an expert stack"


def read_hidden(name: LeafName, tree: Survey) -> tuple[MatrixAxes, Reading]:
    """Returns the matrix axes of a hidden kernel, and the reason for them."""
    layer = name if len(name.axes) >= 2 else name._replace(scans=())
    axes, reading = _read_layer(layer, tree)
    fans = [
        layer.axes[fan] if isinstance(fan, int) else tuple(layer.axes[axis] for axis in fan)
        for fan in (axes.fan_in, axes.fan_out)
    ]
    scans = "".join(f", scanned along axis {axis}" for axis in name.scans)
    place = tree.ends.get(name.path)
    nameless = "its name is unknown" if name.is_nameless else ""
    doubt = reading.doubt or (place.doubt if place else "") or nameless
    return MatrixAxes(*fans), Reading(reading.why + scans, doubt)


def _read_layer(name: LeafName, tree: Survey) -> tuple[MatrixAxes, Reading]:
    """Returns the axes within `name.shape`, and the reason."""
    ndim = len(name.shape)
    if name.within(LORA):
        return _lora_axes(name, tree), Reading("a LoRA factor")
    if window_axes := read_window(name, tree):
        certain = name.within(CONV) or tree.bias(name)
        return window_axes, Reading(CONV_KERNEL, "" if certain else "could be a stack of matrices")
    attention = ndim >= 3 and _is_attention(name)
    by_bias = _axes_by_bias(name, tree)
    if by_bias and ndim >= 3:
        why = HEADS if attention else "a kernel of several axes, identified by its bias"
        return by_bias, Reading(why)
    if attention:
        doubt = ""
        if not name.scans and not tree.widths & {*name.shape}:
            doubt = "could be a stack of 2-D kernels, one per layer, since no norm is beside it"
        return _attention_axes(name, tree), Reading(HEADS, doubt)
    if ndim >= 3 and (split := _split_axes(name, tree)):
        doubt = "its leading axes could be a stack of matrices"
        return split, Reading("a kernel whose input or output has several axes", doubt)
    axes = by_bias or _plain_axes(name, tree)
    order = "(fan_out, fan_in)" if ndim - 2 in axes.split(name.shape)[2] else "(fan_in, fan_out)"
    if not name.is_known:
        doubt = "its name is unknown; could be an embedding or a head"
        return axes, Reading("a matrix according to its shape", doubt)
    if ndim == 2:
        return axes, Reading(f"a kernel {order}")
    if is_expert(name) or tree.counts_experts(name, name.shape[0]):
        return axes, Reading(f"{EXPERT_STACK} {order}")
    return axes, Reading(f"a stack of kernels {order}", "" if name.scans else STACK)


def _axes_by_bias(name: LeafName, tree: Survey) -> MatrixAxes | None:
    """Returns the axes of a kernel whose first or last axes have the shape of its bias, or None."""
    bias, axes = tree.bias(name), tuple(range(len(name.shape)))
    rest = len(axes) - len(bias)
    first, last = name.shape[: len(bias)] == bias, name.shape[rest:] == bias
    if not bias or not (first or last):
        return None
    if first and (name.output_first or not last):
        return MatrixAxes(axes[len(bias) :], axes[: len(bias)])
    return MatrixAxes(axes[:rest], axes[rest:])


def read_window(name: LeafName, tree: Survey) -> MatrixAxes | None:
    """Returns the axes of a conv kernel, or None. Window and input channels form the fan_in."""
    axes = tuple(range(len(name.shape)))
    if len(axes) < 3:
        return None
    window = axes[2:] if name.output_first else axes[:-2]
    sizes = [name.shape[axis] for axis in window]
    square = len(set(sizes[-2:])) == 1
    small = max(sizes) <= _LARGEST_WINDOW or (square and max(sizes) <= _LARGEST_PATCH)
    other = has(QKV, name.module) or name.within(f"{EXPERT}|{FEED_FORWARD}|{ATTENTION}")
    named = has(CONV, name.module) or has(CONV, name.leaf) or (name.within(CONV) and not other)
    if not named and (len(axes) < 4 or not small or other):
        return None
    bias = tree.bias(name)
    if name.output_first:
        if bias == (name.shape[1],) != (name.shape[0],):
            return MatrixAxes((0, *window), 1)
        return MatrixAxes(axes[1:], 0)
    *_, second, last = axes
    # The kernels of transposed convolutions are (window, out, in) in Haiku and Keras, not in Flax.
    raw = name.owner.rpartition("/")[2].lower()
    transposed = re.search(r"\dd?_?d?.*transpose", raw) is not None
    if len(bias) == 1 and name.shape[second] != name.shape[last]:
        transposed = bias == (name.shape[second],)
    return MatrixAxes((*window, last), second) if transposed else MatrixAxes(axes[:-1], last)


def _lora_axes(name: LeafName, tree: Survey) -> MatrixAxes:
    """Returns the axes of A (in, rank) or B (rank, out), which may also have heads or a stack."""
    axes = tuple(range(len(name.shape)))
    second = bool(re.search(r"(^|_)b(_|$)", name.leaf) or has("b|up", name.module))
    if name.output_first:
        return MatrixAxes(axes[1:], 0)
    if len(axes) == 2:
        return MatrixAxes(0, 1)
    pairs = (("lora_a", "lora_b"), ("/a", "/b"), ("_a", "_b"))
    others = (name.path.replace(*((b, a) if second else (a, b))) for a, b in pairs)
    other = next((path for path in others if path != name.path), name.path)
    pair = tree.names.get(key(other))
    if pair and len(pair.whole) == len(name.whole) and pair.whole[:-2] == name.whole[:-2]:
        return MatrixAxes(axes[-2], axes[-1])
    return MatrixAxes(0, axes[1:]) if second else MatrixAxes(axes[:-1], axes[-1])


def _is_attention(name: LeafName) -> bool:
    """Whether heads and head_dim may be two axes (Flax DenseGeneral, MaxText, Levanter, Gemma)."""
    inside = name.within(ATTENTION)
    named = has(f"{QKV}|{OUT}", name.module) or name.module == "c_attn"
    if not (named or (name.module == "c_proj" and inside)):
        return False
    return inside or not (is_expert(name) or name.within(FEED_FORWARD))


def _attention_axes(name: LeafName, tree: Survey) -> MatrixAxes:
    axes = tuple(range(len(name.shape)))
    wide = [axis for axis in axes if name.shape[axis] in tree.widths]
    if name.module == "c_attn" or (has(QKV, name.module) and not has("vec", name.module)):
        einsum = has("einsum", name.module) or (not name.is_array_name and has("^w_.*", name.leaf))
        usual = axes[-1 if name.output_first else -2 if einsum else 0]
        fan_in = wide[0] if len(wide) == 1 else usual
        parts = has("qkv|kv", name.module) and len(axes) >= 4 and name.shape[0] in (2, 3)
        rest = axes[1:] if parts and fan_in > 0 else axes
        return MatrixAxes(fan_in, tuple(axis for axis in rest if axis != fan_in))
    usual = axes[0 if name.output_first else -1]
    fan_out = wide[0] if len(wide) == 1 and wide[0] in (axes[0], axes[-1]) else usual
    return MatrixAxes(tuple(axis for axis in axes if axis != fan_out), fan_out)


def _split_axes(name: LeafName, tree: Survey) -> MatrixAxes | None:
    """Returns the axes of a kernel (in, heads, head_dim) or (heads, head_dim, out), or None."""
    if name.scans or name.within(f"{EXPERT}|{FEED_FORWARD}") or name.output_first:
        return None
    first, last = name.shape[0], name.shape[-1]
    if tree.counts_experts(name, first):
        return None
    axes, size = tuple(range(len(name.shape))), math.prod(name.shape)
    if first * first == size or first > max(name.shape[1:]):
        return MatrixAxes(0, axes[1:])
    return MatrixAxes(axes[:-1], axes[-1]) if last * last == size else None


def _plain_axes(name: LeafName, tree: Survey) -> MatrixAxes:
    """Returns the axes of a 2-D kernel by its name and the model's widths, else by convention."""
    first, last = pair = len(name.shape) - 2, len(name.shape) - 1
    wide = [axis for axis in pair if name.shape[axis] in tree.widths]
    raw = name.owner.rpartition("/")[2].lower()
    if len(wide) == 1:
        other = last if wide[0] == first else first
        if _WRITES.match(raw):
            return MatrixAxes(other, wide[0])
        if _READS.match(raw) and not (raw.startswith("value") and name.within(FEED_FORWARD)):
            return MatrixAxes(wide[0], other)
    return MatrixAxes(last, first) if name.output_first else MatrixAxes(first, last)
