"""Where a tree begins and ends: matrices that no name tells, by the sizes that others read."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from muon_jax._routing.axes import CONV_KERNEL, read_hidden, read_window, sides
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

# A matrix whose name says nothing and whose long side is this many times the short one is taken
# for a table of vectors; feed-forward kernels reach 8.
_TABLE_ASPECT = 16
_IMAGE_CHANNELS = 3
_FEWEST = 3
"""Matrices that a tree needs for a first and a last one among them."""
_HIDDEN = "could be a hidden matrix"
_FIRST = Reading("the model's first matrix: no other's output is as wide as its input", _HIDDEN)
_LAST = Reading("the model's last matrix: no other's input is as wide as its output", _HIDDEN)


def read_tree(names: Sequence[LeafName]) -> Survey:
    """The survey of a tree, with what a matrix's place in it tells."""
    tree = survey(names)
    return tree._replace(ends=_ends(names, tree))


def reason_for_other(name: LeafName, tree: Survey) -> Reading | None:
    """Why a leaf is no hidden matrix; None if it is one."""
    if reading := _by_words(name, tree) or _by_shape(name, tree):
        return reading
    place = tree.ends.get(name.path)
    return place if place and place.why else None


def _by_words(name: LeafName, tree: Survey) -> Reading | None:
    reading = name.read()
    core = tree.core_shape(name)
    if reading is None:
        return Reading(HEAD) if len(core) == 2 and _ends_a_head(name, tree) else None
    # A head may be the values of an attention, or a connector.
    values = has(CRITIC, name.module) and tree.is_beside(name, QKV)
    inside = reading.why == HEAD and (values or _is_connector(name, tree))
    return None if inside else reading


def _ends_a_head(name: LeafName, tree: Survey) -> bool:
    """Whether it is `class_head/Dense_0`, or the last of several."""
    if not (name.above and has(HEADS, name.above[-1]) and has(GENERIC, name.module)):
        return False
    beside = tree.beside(name)
    later = any(other.series == name.series and other.number > name.number for other in beside)
    inside = set(tree.core_shape(name)) <= tree.widths
    return not (later or inside or name.within(ATTENTION) or tree.is_beside(name, QKV))


def _is_connector(name: LeafName, tree: Survey) -> bool:
    """Whether it leads from one tower's width to another's, though it is called `head`."""
    core = tree.core_shape(name)
    between = len(core) == 2 and core[0] != core[1] and set(core) <= tree.widths
    return between and name.module == "head" and bool(name.above)


def _by_shape(name: LeafName, tree: Survey) -> Reading | None:
    core, shape = tree.core(name), tree.core_shape(name)
    if sum(size != 1 for size in shape) < 2:
        return Reading(VECTOR + (" a layer" if len(core) < len(name.shape) else ""))
    if len(shape) >= 3 and not name.within(LORA) and (axes := read_window(name, core, tree)):
        fan_in, fan_out = sides(axes)
        ordered = fan_in[1:] + fan_in[:1] if name.output_first else fan_in
        *window, channels = (name.shape[axis] for axis in ordered)
        outputs = name.shape[fan_out[0]]
        if channels == 1 or outputs == 1:
            return Reading("a depthwise conv kernel, or one of a single channel")
        if channels == _IMAGE_CHANNELS and max(window) > 1:
            return Reading("a conv kernel that reads an image")
        if outputs == _IMAGE_CHANNELS and max(window) > 1:
            return Reading("a conv kernel that writes an image", _HIDDEN)
    elif name.is_nameless and tree.follows_its_kernel(name):
        return Reading(BIAS + " by its place", "its name is unknown")
    elif not name.is_known and not name.is_nameless:
        short, long = sorted(shape[-2:])
        if long >= _TABLE_ASPECT * max(short, 1):
            return Reading(
                "shaped like a table, by no known name",
                f"{_HIDDEN}; send it to 'muon' by a rule if it is",
            )
    return None


class _Kernel(NamedTuple):
    name: LeafName
    fan_in: int
    fan_out: int


def _ends(names: Sequence[LeafName], tree: Survey) -> dict[str, Reading]:
    """Matrices of names such as `Dense_3` that read the model's input or write its output.

    A hidden matrix reads what another one writes: its fan_in is another's fan_out, or a width of
    norms or embeddings. If nothing in the tree has its fan_in it is the first, and if nothing has
    its fan_out the last. In between stand sizes that only one other leaf has, or a part of it.
    """
    words = {name: _by_words(name, tree) for name in names}
    # Heads, stems and critics are no hidden matrices, but they read and write.
    kernels = [
        _kernel(name, tree)
        for name, reading in words.items()
        if len(tree.core(name)) > 1 and (reading is None or reading.why == HEAD)
    ]
    inner = [
        kernel for kernel in kernels if not (words[kernel.name] or _by_shape(kernel.name, tree))
    ]
    connector = Reading("", "called a head, but as wide as what could read it")
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
        name.shape[-1]
        for name, reading in words.items()
        if len(name.shape) > 1 and reading and reading.why == EMBEDDING
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
    core = tree.core_shape(name)
    if max(core[:-2], default=1) > 1 and {2, 4} & {kernel.fan_in, kernel.fan_out}:
        return Reading("", "could read or write an image of so few channels")
    pointwise = len(core) == 2 or (len(core) > 3 and core[:-2] == (1,) * len(core[:-2]))
    told = has(ROLE, name.module) or name.within(f"{ATTENTION}|{LORA}")
    if not pointwise or told or _is_recurrent(name):
        return None
    readers = [other for other in reads.get(kernel.fan_out, ()) if other.owner != name.owner]
    writers = [other for other in writes.get(kernel.fan_in, ()) if other.owner != name.owner]
    series = [other for other in readers + writers if other.series == name.series]
    doubt = ""
    # What is repeated, layer by layer, is neither the first nor the last of a model.
    alike = [x for x in tree.beside(name) if (x.series, x.shape) == (name.series, name.shape)]
    gates = has("in_proj|w_in", name.module) or _is_recurrent_input(name)
    if not (readers or writers or {kernel.fan_in, kernel.fan_out} & known or gates):
        return Reading("", "no other leaf is as wide as its input or its output")
    if not gates and kernel.fan_out not in known:
        later = any(other.number > name.number for other in series)
        later |= any((head := other.read()) and head.why == HEAD for other in readers)
        if not readers and not alike:
            alone = not any(other.series == name.series for other in tree.beside(name))
            told = not name.above and has("^(fc|linear)$", name.module) and alone
            return Reading(HEAD) if told else _LAST
        many = len(writes.get(kernel.fan_out, ())) > 1 or kernel.fan_in in known
        if not later and not (readers and many):
            doubt = "could be the model's last matrix"
    if len(core) == 2 and kernel.fan_in not in known:
        several = any(size >= 8 and kernel.fan_in % size == 0 for size in writes)
        if (
            not writers and not several and not alike
        ):  # several outputs side by side, or a flattened image
            return _FIRST
        earlier = any(other.number < name.number for other in series)
        many = len(writers) > 1 or kernel.fan_out in known
        if not earlier and not (writers and many):
            doubt = doubt or "could be the model's first matrix"
    return Reading("", doubt) if doubt else None


def _kernel(name: LeafName, tree: Survey) -> _Kernel:
    axes, reading = read_hidden(name, tree)
    fan_in, fan_out = sides(axes)
    if reading.why.startswith(CONV_KERNEL):
        fan_in = fan_in[:1] if name.output_first else fan_in[-1:]
    sizes = [math.prod(name.shape[axis] for axis in side) for side in (fan_in, fan_out)]
    return _Kernel(name, *sizes)


def _is_recurrent(name: LeafName) -> bool:
    """Whether it reads the state that its cell writes."""
    return has("^(recurrent_kernel|weight_hh)$", name.leaf)


def _is_recurrent_input(name: LeafName) -> bool:
    """Whether it reads the input of a recurrent cell, into gates that no other matrix reads."""
    cell = has(r"[a-z]*(lstm|gru|rnn|cell)[a-z]*", "_".join((*name.above, name.module)))
    named = has("i[figorzn]|linear|[a-z]*cell", name.module) and not _is_recurrent(name)
    return has("^weight_ih$", name.leaf) or (cell and named)
