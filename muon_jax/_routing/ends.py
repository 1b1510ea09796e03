"""The first and last matrices of a model, recognised by their sizes if not by their names."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from muon_jax._routing.axes import CONV_KERNEL, read_hidden, read_window
from muon_jax._routing.names import (
    ATTENTION,
    BIAS,
    CRITIC,
    EMBEDDING,
    GENERIC,
    HEAD,
    HEADS,
    LORA,
    QKV,
    ROLE,
    VECTOR,
    LeafName,
    Reading,
    has,
)
from muon_jax._routing.survey import Survey, survey

# A matrix of unknown name whose long side is at least this many times the short one is taken for
# a table of vectors. The ratio of feed-forward kernels reaches 8.
_TABLE_ASPECT = 16
_IMAGE_CHANNELS = 3
_FEWEST = 3
"""The number of matrices that a tree must have before a first and a last one are looked for."""
_HIDDEN = "could be a hidden matrix"
_FIRST = Reading("the first matrix: no other matrix has an output of its input's width", _HIDDEN)
_LAST = Reading("the last matrix: no other matrix has an input of its output's width", _HIDDEN)


def read_tree(names: Sequence[LeafName]) -> Survey:
    """Returns the survey of a tree, including its first and last matrices."""
    tree = survey(names)
    return tree._replace(ends=_ends(names, tree))


def reason_for_other(name: LeafName, tree: Survey) -> Reading | None:
    """Returns the reason why a leaf is not a hidden matrix, or None if it is one."""
    if reading := _by_words(name, tree) or _by_shape(name, tree):
        return reading
    place = tree.ends.get(name.path)
    return place if place and place.why else None


def _by_words(name: LeafName, tree: Survey) -> Reading | None:
    reading = name.read()
    if reading is None:
        return Reading(HEAD) if len(name.shape) == 2 and _ends_a_head(name, tree) else None
    # A name like a head's may belong to the values of an attention, or to a connector.
    values = has(CRITIC, name.module) and tree.is_beside(name, QKV)
    inside = reading.why == HEAD and (values or _is_connector(name, tree))
    return None if inside else reading


def _ends_a_head(name: LeafName, tree: Survey) -> bool:
    """Whether the leaf is the only or the last matrix of a head, such as `class_head/Dense_0`."""
    if not (name.above and has(HEADS, name.above[-1]) and has(GENERIC, name.module)):
        return False
    beside = tree.beside(name)
    later = any(other.series == name.series and other.number > name.number for other in beside)
    inside = set(name.shape) <= tree.widths
    return not (later or inside or name.within(ATTENTION) or tree.is_beside(name, QKV))


def _is_connector(name: LeafName, tree: Survey) -> bool:
    """Whether a matrix called `head` maps from the width of one tower to that of another."""
    shape = name.shape
    between = len(shape) == 2 and shape[0] != shape[1] and set(shape) <= tree.widths
    return between and name.module == "head" and bool(name.above)


def _by_shape(name: LeafName, tree: Survey) -> Reading | None:
    shape = name.shape
    if sum(size != 1 for size in shape) < 2:
        return Reading(VECTOR + (" per layer" if name.scans else ""))
    if len(shape) >= 3 and not name.within(LORA) and (axes := read_window(name, tree)):
        _, fan_in, fan_out = axes.split(shape)
        ordered = fan_in[1:] + fan_in[:1] if name.output_first else fan_in
        *window, channels = (shape[axis] for axis in ordered)
        outputs = shape[fan_out[0]]
        if channels == 1 or outputs == 1:
            return Reading("a depthwise conv kernel, or one of a single channel")
        if channels == _IMAGE_CHANNELS and max(window) > 1:
            return Reading("a conv kernel that reads an image")
        if outputs == _IMAGE_CHANNELS and max(window) > 1:
            return Reading("a conv kernel that writes an image", _HIDDEN)
    elif name.is_nameless and tree.follows_its_kernel(name):
        return Reading(BIAS + " according to its position", "its name is unknown")
    elif not name.is_known and not name.is_nameless:
        short, long = sorted(shape[-2:])
        if long >= _TABLE_ASPECT * max(short, 1):
            return Reading(
                "shaped like a table, and its name is unknown",
                f"{_HIDDEN}; in that case send it to 'muon' by a rule",
            )
    return None


class _Kernel(NamedTuple):
    name: LeafName
    fan_in: int
    fan_out: int


def _ends(names: Sequence[LeafName], tree: Survey) -> dict[str, Reading]:
    """Finds the matrices with names such as `Dense_3` that read the input or write the output.

    The input of a hidden matrix is the output of another: its fan_in equals another's fan_out, or a
    width of norms or embeddings. If no leaf of the tree has its fan_in, it is the first matrix; if
    none has its fan_out, the last. If only one other leaf has that size, or a part of a leaf, the
    result is a doubt.
    """
    words = {name: _by_words(name, tree) for name in names}
    # Heads, stems and critics are not hidden matrices, but their inputs and outputs count.
    kernels = [
        _kernel(name, tree)
        for name, reading in words.items()
        if len(name.shape) > 1 and (reading is None or reading.why == HEAD)
    ]
    inner = [
        kernel for kernel in kernels if not (words[kernel.name] or _by_shape(kernel.name, tree))
    ]
    connector = Reading("", "called a head, but its output is as wide as another module's input")
    ends = {kernel.name.path: connector for kernel in inner if _is_connector(kernel.name, tree)}
    if len(kernels) < _FEWEST:
        return ends
    reads, writes = defaultdict(set), defaultdict(set)
    for kernel in kernels:
        reads[kernel.fan_in].add(kernel.name)
        if words[kernel.name] is None:
            writes[kernel.fan_out].add(kernel.name)
        if _is_recurrent(kernel.name):
            writes[kernel.fan_in].add(kernel.name)
        if _is_recurrent_input(kernel.name):
            writes[kernel.fan_out // 4].add(kernel.name)
    known = tree.widths | {
        name.whole[-1]
        for name, reading in words.items()
        if len(name.whole) > 1 and reading and reading.why == EMBEDDING
    }
    for kernel in inner:
        if kernel.name.path not in ends and (reading := _end(kernel, reads, writes, known, tree)):
            ends[kernel.name.path] = reading
    return ends


def _end(
    kernel: _Kernel,
    reads: dict[int, set[LeafName]],
    writes: dict[int, set[LeafName]],
    known: frozenset[int],
    tree: Survey,
) -> Reading | None:
    name = kernel.name
    shape = name.shape
    if max(shape[:-2], default=1) > 1 and {2, 4} & {kernel.fan_in, kernel.fan_out}:
        return Reading("", "could read or write an image of so few channels")
    pointwise = len(shape) == 2 or (len(shape) > 3 and set(shape[:-2]) == {1})
    inside = has(ROLE, name.module) or name.within(f"{ATTENTION}|{LORA}")
    if not pointwise or inside or _is_recurrent(name):
        return None
    readers = [other for other in reads.get(kernel.fan_out, ()) if other.owner != name.owner]
    writers = [other for other in writes.get(kernel.fan_in, ()) if other.owner != name.owner]
    series = [other for other in readers + writers if other.series == name.series]
    doubt = ""
    # A matrix that is repeated in every layer is neither the first nor the last of a model.
    alike = [x for x in tree.beside(name) if (x.series, x.whole) == (name.series, name.whole)]
    gates = has("in_proj|w_in", name.module) or _is_recurrent_input(name)
    if not (readers or writers or {kernel.fan_in, kernel.fan_out} & known or gates):
        return Reading("", "no other leaf is as wide as its input or its output")
    if not gates and kernel.fan_out not in known:
        later = any(other.number > name.number for other in series)
        later |= any((head := other.read()) and head.why == HEAD for other in readers)
        if not readers and not alike:
            alone = not any(other.series == name.series for other in tree.beside(name))
            named = not name.above and has("^(fc|linear)$", name.module) and alone
            return Reading(HEAD) if named else _LAST
        many = len(writes.get(kernel.fan_out, ())) > 1 or kernel.fan_in in known
        if not later and not (readers and many):
            doubt = "could be the model's last matrix"
    if len(shape) == 2 and kernel.fan_in not in known:
        # A multiple of an output's width may be several outputs concatenated, or a flattened image.
        several = any(size >= 8 and kernel.fan_in % size == 0 for size in writes)
        if not writers and not several and not alike:
            return _FIRST
        earlier = any(other.number < name.number for other in series)
        many = len(writers) > 1 or kernel.fan_out in known
        if not earlier and not (writers and many):
            doubt = doubt or "could be the model's first matrix"
    return Reading("", doubt) if doubt else None


def _kernel(name: LeafName, tree: Survey) -> _Kernel:
    axes, reading = read_hidden(name, tree)
    _, fan_in, fan_out = axes.split(name.whole)
    if reading.why.startswith(CONV_KERNEL):
        fan_in = fan_in[:1] if name.output_first else fan_in[-1:]
    sizes = [math.prod(name.whole[axis] for axis in side) for side in (fan_in, fan_out)]
    return _Kernel(name, *sizes)


def _is_recurrent(name: LeafName) -> bool:
    """Whether the matrix reads the recurrent state of its cell."""
    return has("^(recurrent_kernel|weight_hh)$", name.leaf)


def _is_recurrent_input(name: LeafName) -> bool:
    """Whether the matrix maps the input of a recurrent cell to its gates."""
    cell = has(r"[a-z]*(lstm|gru|rnn|cell)[a-z]*", "_".join((*name.above, name.module)))
    named = has("i[figorzn]|linear|[a-z]*cell", name.module) and not _is_recurrent(name)
    return has("^weight_ih$", name.leaf) or (cell and named)
