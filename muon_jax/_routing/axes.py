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
from muon_jax._routing.survey import Survey, is_expert

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
    core = tree.core(name)
    if len(core) < 2:
        core = tuple(range(len(name.shape)))
    axes, reading = _read_core(name, core, tree)
    scans = "".join(f", scanned along axis {axis}" for axis in tree.scans.get(name.path, ()))
    place = tree.ends.get(name.path)
    nameless = "its name is unknown" if name.is_nameless else ""
    doubt = reading.doubt or (place.doubt if place else "") or nameless
    return axes, Reading(reading.why + scans, doubt)


def sides(axes: MatrixAxes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns fan_in and fan_out as tuples."""
    fan_in, fan_out = axes.fan_in, axes.fan_out
    return (
        (fan_in,) if isinstance(fan_in, int) else tuple(fan_in),
        (fan_out,) if isinstance(fan_out, int) else tuple(fan_out),
    )


def _read_core(name: LeafName, core: tuple[int, ...], tree: Survey) -> tuple[MatrixAxes, Reading]:
    if name.within(LORA):
        return _lora_axes(name, core, tree), Reading("a LoRA factor")
    if window_axes := read_window(name, core, tree):
        certain = name.within(CONV) or tree.bias(name)
        return window_axes, Reading(CONV_KERNEL, "" if certain else "could be a stack of matrices")
    attention = len(core) >= 3 and _is_attention(name)
    by_bias = axes_by_bias(name, core, tree)
    if by_bias and len(core) >= 3:
        why = HEADS if attention else "a kernel of several axes, identified by its bias"
        return by_bias, Reading(why)
    if attention:
        doubt = ""
        if not tree.scans.get(name.path) and not tree.widths & {name.shape[axis] for axis in core}:
            doubt = "could be a stack of 2-D kernels, one per layer, since no norm is beside it"
        return _attention_axes(name, core, tree), Reading(HEADS, doubt)
    if len(core) >= 3 and (split := _split_axes(name, core, tree)):
        doubt = "its leading axes could be a stack of matrices"
        return split, Reading("a kernel whose input or output has several axes", doubt)
    axes = by_bias or _plain_axes(name, core[-2:], tree)
    order = "(fan_out, fan_in)" if core[-2] in sides(axes)[1] else "(fan_in, fan_out)"
    if not name.is_known:
        doubt = "its name is unknown; could be an embedding or a head"
        return axes, Reading("a matrix according to its shape", doubt)
    if len(core) == 2:
        return axes, Reading(f"a kernel {order}")
    if is_expert(name) or tree.counts_experts(name, name.shape[core[0]]):
        return axes, Reading(f"{EXPERT_STACK} {order}")
    doubt = "" if tree.scans.get(name.path) else STACK
    return axes, Reading(f"a stack of kernels {order}", doubt)


def axes_by_bias(name: LeafName, core: tuple[int, ...], tree: Survey) -> MatrixAxes | None:
    """Returns the axes of a kernel whose first or last axes have the shape of its bias, or None."""
    bias = tree.bias(name)
    shape = tuple(name.shape[axis] for axis in core)
    first = shape[: len(bias)] == bias
    last = shape[len(shape) - len(bias) :] == bias
    if not bias or first == last:
        first, last = bool(bias) and first and name.output_first, bool(bias) and last
        last = last and not first
    if first:
        return MatrixAxes(core[len(bias) :], core[: len(bias)])
    if last:
        return MatrixAxes(core[: len(core) - len(bias)], core[len(core) - len(bias) :])
    return None


def read_window(name: LeafName, core: tuple[int, ...], tree: Survey) -> MatrixAxes | None:
    """Returns the axes of a conv kernel, or None. Window and input channels form the fan_in."""
    if len(core) < 3:
        return None
    window = core[2:] if name.output_first else core[:-2]
    sizes = [name.shape[axis] for axis in window]
    small = max(sizes) <= _LARGEST_WINDOW or (
        len(set(sizes[-2:])) == 1 and max(sizes) <= _LARGEST_PATCH
    )
    other = has(QKV, name.module) or name.within(f"{EXPERT}|{FEED_FORWARD}|{ATTENTION}")
    named = has(CONV, name.module) or has(CONV, name.leaf) or (name.within(CONV) and not other)
    if not named and (len(core) < 4 or not small or other):
        return None
    bias = tree.bias(name)
    if name.output_first:
        first, second = core[:2]
        if bias == (name.shape[second],) != (name.shape[first],):
            return MatrixAxes((first, *window), second)
        return MatrixAxes(core[1:], first)
    *_, second, last = core
    # The kernels of transposed convolutions are (window, out, in) in Haiku and Keras, not in Flax.
    raw = name.owner.rpartition("/")[2].lower()
    transposed = re.search(r"\dd?_?d?.*transpose", raw) is not None
    if len(bias) == 1 and name.shape[second] != name.shape[last]:
        transposed = bias == (name.shape[second],)
    if transposed:
        return MatrixAxes((*window, last), second)
    return MatrixAxes((*window, second), last)


def _lora_axes(name: LeafName, core: tuple[int, ...], tree: Survey) -> MatrixAxes:
    """Returns the axes of A (in, rank) or B (rank, out), which may also have heads or a stack."""
    second = bool(re.search(r"(^|_)b(_|$)", name.leaf) or has("b|up", name.module))
    if name.output_first:
        return MatrixAxes(core[1:], core[0])
    if len(core) == 2:
        return MatrixAxes(core[0], core[1])
    other = name.path
    for a, b in (("lora_a", "lora_b"), ("/a", "/b"), ("_a", "_b")):
        other = name.path.replace(*((b, a) if second else (a, b)))
        if other != name.path:
            break
    pair = tree.names.get(other.replace(".", "/"))
    if pair and len(pair.shape) == len(name.shape) and pair.shape[:-2] == name.shape[:-2]:
        return MatrixAxes(core[-2], core[-1])
    return MatrixAxes(core[0], core[1:]) if second else MatrixAxes(core[:-1], core[-1])


def _is_attention(name: LeafName) -> bool:
    """Whether heads and head_dim may be two axes (Flax DenseGeneral, MaxText, Levanter, Gemma)."""
    inside = name.within(ATTENTION)
    named = has(f"{QKV}|{OUT}", name.module) or name.module == "c_attn"
    if not (named or (name.module == "c_proj" and inside)):
        return False
    return inside or not (is_expert(name) or name.within(FEED_FORWARD))


def _attention_axes(name: LeafName, core: tuple[int, ...], tree: Survey) -> MatrixAxes:
    fused = name.module == "c_attn"
    wide = [axis for axis in core if name.shape[axis] in tree.widths]
    if fused or (has(QKV, name.module) and not has("vec", name.module)):
        einsum = has("einsum", name.module) or (not name.is_array_name and has("^w_.*", name.leaf))
        usual = core[-1] if name.output_first else core[-2 if einsum else 0]
        fan_in = wide[0] if len(wide) == 1 else usual
        parts = has("qkv|kv", name.module) and len(core) >= 4 and name.shape[core[0]] in (2, 3)
        skip = core[:1] if parts and core[0] < fan_in else ()
        return MatrixAxes(
            fan_in, tuple(axis for axis in core if axis != fan_in and axis not in skip)
        )
    usual = core[0] if name.output_first else core[-1]
    fan_out = wide[0] if len(wide) == 1 and wide[0] in (core[0], core[-1]) else usual
    return MatrixAxes(tuple(axis for axis in core if axis != fan_out), fan_out)


def _split_axes(name: LeafName, core: tuple[int, ...], tree: Survey) -> MatrixAxes | None:
    """Returns the axes of a kernel (in, heads, head_dim) or (heads, head_dim, out), or None."""
    if tree.scans.get(name.path) or name.within(f"{EXPERT}|{FEED_FORWARD}") or name.output_first:
        return None
    if tree.counts_experts(name, name.shape[core[0]]):
        return None
    first, *_, last = (name.shape[axis] for axis in core)
    size = math.prod(name.shape[axis] for axis in core)
    if first * first == size or first > max(name.shape[axis] for axis in core[1:]):
        return MatrixAxes(core[0], core[1:])
    if last * last == size:
        return MatrixAxes(core[:-1], core[-1])
    return None


def _plain_axes(name: LeafName, pair: tuple[int, ...], tree: Survey) -> MatrixAxes:
    """Returns the axes of a 2-D kernel by its name and the model's widths, else by convention."""
    first, last = pair
    wide = [axis for axis in pair if name.shape[axis] in tree.widths]
    raw = name.owner.rpartition("/")[2].lower()
    if len(wide) == 1:
        other = last if wide[0] == first else first
        if _WRITES.match(raw):
            return MatrixAxes(other, wide[0])
        if _READS.match(raw) and not (raw.startswith("value") and name.within(FEED_FORWARD)):
            return MatrixAxes(wide[0], other)
    return MatrixAxes(last, first) if name.output_first else MatrixAxes(first, last)
