"""What the names and shapes of a parameter tree tell: its embeddings, norms, scans and matrices."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from muon_jax._matrix_axes import MatrixAxes

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# The last component of a path may only say that this is an array; then the one above names it.
_ARRAY = _set("kernel weight weights w embedding embeddings table scale bias b g offset")

_BIAS = _set("bias biases")
_GAIN = _set("scale gain gamma g ls")
_NORM = _set("ln bn gn rms")
_EMBEDDING = _set("emb wte wpe vocab codebook lookup")
_TOKEN = _set("token tokens cls latents probe")
_HEAD = _set("logits classifier readout relationship")
_ROOT_HEAD = _set("output score")

_QKV = _set("q k v query key value qkv kv wq wk wv wqkv wkv")
_OUT = _set("o out output wo vec")
_EXPERT = _set("expert experts moe gating")
_ATTENTION = _set("attn attention mha")
_HIDDEN = (
    _QKV
    | _OUT
    | _EXPERT
    | _set(
        "kernel weight weights w wi proj projection dense linear fc mlp ffn ff up down gate router "
        "einsum lora hidden conv attn attention in"
    )
)

# Kernels that read the residual stream, and kernels that write to it: with the width known from
# the norms, this tells (fan_in, fan_out) from (fan_out, fan_in).
_READS = re.compile(
    r"(w_?)?(q|k|v|qkv|kv)([_\d]|$)|query|key|value|c_attn|c_fc|up|gat|router|wi|fc1|in_proj|w[13]$"
)
_WRITES = re.compile(r"(o|out|output)([_\d]|$)|attn_vec|c_proj|down|wo|fc2|w2$")

# A matrix whose name says nothing and whose long side is this many times the short one is taken
# for a table of vectors; feed-forward kernels reach 8.
_TABLE_ASPECT = 16
_LARGEST_WINDOW = 11


BIAS, GAIN, VECTOR = VECTORS = ("a bias", "a norm or gain", "a vector or scalar")
EMBEDDING = "an embedding"


class Reading(NamedTuple):
    """Why a leaf is read so, and what speaks for another reading."""

    why: str
    doubt: str = ""


class LeafName(NamedTuple):
    """A leaf's path in words.

    Attributes:
        path: as in `layers/0/attn/q_proj/kernel`.
        shape: of the leaf.
        parts: the path's components, without indices.
        leaf: words of the last component.
        module: name of what the array belongs to.
        words: of that module.
    """

    path: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    leaf: tuple[str, ...]
    module: str
    words: tuple[str, ...]

    @classmethod
    def of(cls, path: str, shape: Sequence[int]) -> "LeafName":
        parts = tuple(part for part in re.split(r"[/.]", path) if not part.isdigit())
        leaf = _words(parts[-1]) if parts else ()
        owned = len(parts) > 1 and bool(leaf) and (parts[-1].lower() in _ARRAY or leaf[-1] in _GAIN)
        module = parts[-2] if owned else parts[-1] if parts else ""
        return cls(path, tuple(shape), parts, leaf, module.lower(), _words(module))

    @property
    def is_bias(self) -> bool:
        single = self.leaf in (("b",), ("beta",))
        return single or bool(_BIAS & set(self.leaf + self.words))

    @property
    def is_gain(self) -> bool:
        normed = any(word.endswith("norm") or word in _NORM for word in self.leaf + self.words)
        return normed or bool(_GAIN & set(self.leaf))

    @property
    def is_array_name(self) -> bool:
        return bool(self.parts) and self.parts[-1].lower() in _ARRAY

    def within(self, words: frozenset[str]) -> bool:
        return any(word in words for part in self.parts for word in _words(part))


def _words(component: str) -> tuple[str, ...]:
    return tuple(word.lower() for word in _WORD.findall(component))


class Survey(NamedTuple):
    """What only the whole tree shows.

    Attributes:
        scan_axis: path -> the axis along which a scan stacked the layers.
        widths: the lengths of the norms' gains.
    """

    scan_axis: dict[str, int]
    widths: frozenset[int]


def survey(names: Sequence[LeafName]) -> Survey:
    """Finds the scanned subtrees, and the widths that norms act on."""
    scanned = _scan_axes(names)
    widths = set()
    for name in names:
        core = _core(name, scanned.get(name.path))
        if name.is_gain and len(core) == 1:
            widths.add(name.shape[core[0]])
    return Survey(scanned, frozenset(widths))


def _scan_axes(names: Sequence[LeafName]) -> dict[str, int]:
    """A subtree is scanned along axis 0 (or 1, in MaxText) if all its leaves agree on its size.

    The witness is a norm or bias, a vector by name, that has one axis more. Biases and norms of
    queries and keys are none: theirs can be (heads, head_dim).
    """
    subtrees = defaultdict(list)
    for name in names:
        components = name.path.split("/")
        for depth in range(len(components)):
            subtrees["/".join(components[:depth])].append(name)
    found: dict[str, int] = {}
    for subtree in sorted(subtrees, key=len):
        leaves = subtrees[subtree]
        if len(leaves) < 2 or leaves[0].path in found:
            continue
        for axis in (0, 1):
            if any(len(leaf.shape) < 2 for leaf in leaves):
                break
            if len({leaf.shape[axis] for leaf in leaves}) == 1 and _is_scan(leaves, axis):
                found |= {leaf.path: axis for leaf in leaves}
                break
    return found


def _is_scan(leaves: Sequence[LeafName], axis: int) -> bool:
    plain = [leaf for leaf in leaves if not _QKV & set(leaf.words)]
    if any(len(leaf.shape) == 2 and (leaf.is_gain or leaf.is_bias) for leaf in plain):
        return True
    kernels = all(len(leaf.shape) >= 3 and not leaf.is_bias for leaf in leaves)
    # Windows of a bias-free convolutional net agree on their first axis too.
    stacks = [leaf for leaf in plain if len(leaf.shape) == 3 and not leaf.within(_set("conv"))]
    return axis == 0 and kernels and bool(stacks) and len({leaf.shape for leaf in leaves}) > 1


def _core(name: LeafName, scan_axis: int | None) -> tuple[int, ...]:
    """The leaf's axes without the scan's."""
    return tuple(axis for axis in range(len(name.shape)) if axis != scan_axis)


def reason_for_adamw(name: LeafName, tree: Survey) -> Reading | None:
    """Why a leaf is no hidden matrix; None if it is one."""
    core = _core(name, tree.scan_axis.get(name.path))
    if name.is_bias:
        return Reading(BIAS)
    if name.is_gain:
        return Reading(GAIN)
    if _is_embedding(name):
        return Reading(EMBEDDING)
    if _is_head(name):
        return Reading("an output head")
    if len(core) < 2:
        return Reading(VECTOR + (" a layer" if len(core) < len(name.shape) else ""))
    known = name.is_array_name or _HIDDEN & set(name.words)
    short, long = sorted(name.shape[axis] for axis in core[-2:])
    if not known and long >= _TABLE_ASPECT * max(short, 1):
        return Reading(
            "shaped like a table, by no known name",
            "could be a hidden matrix; send it to 'muon' by a rule if it is",
        )
    return None


def _is_embedding(name: LeafName) -> bool:
    for word in name.leaf + name.words:
        if ("embed" in word and "unembed" not in word) or word.endswith("emb"):
            return True
    tied = name.words == ("shared",) and len(name.parts) <= 2
    return tied or bool(_EMBEDDING & set(name.words)) or bool(_TOKEN & set(name.leaf))


def _is_head(name: LeafName) -> bool:
    words = set(name.words)
    if (words & _HEAD and "pre" not in words) or name.words[-1:] == ("head",):
        return True
    if any("unembed" in word for word in words):
        return True
    above = [part.lower() for part in name.parts[:-1]]
    if name.module == "decoder" and "predictions" in above:
        return True
    outer = [part for part in above[:-1] if part not in ("params", "model")]
    return name.module in _ROOT_HEAD and name.is_array_name and not outer


def read_hidden(name: LeafName, tree: Survey) -> tuple[MatrixAxes, Reading]:
    """The matrix axes of a hidden kernel, and why they are read so."""
    scan_axis = tree.scan_axis.get(name.path)
    core = _core(name, scan_axis)
    stacked = "" if scan_axis is None else f", scanned along axis {scan_axis}"
    if len(core) < 2:
        core = tuple(range(len(name.shape)))
    if len(core) >= 3 and (axes := _window_axes(name, core)):
        doubt = "" if name.within(_set("conv")) else "could be a stack of matrices"
        return axes, Reading(f"a conv kernel{stacked}", doubt)
    if len(core) >= 3 and (axes := _attention_axes(name, core, tree)):
        doubt = ""
        if scan_axis is None and not tree.widths & {name.shape[axis] for axis in core}:
            doubt = "could be a stack of 2-D kernels, one a layer: no norm beside it tells"
        return axes, Reading(f"an attention kernel split into heads{stacked}", doubt)
    axes = _plain_axes(name, core[-2:], tree)
    order = "(fan_out, fan_in)" if axes.fan_out == core[-2] else "(fan_in, fan_out)"
    if not (name.is_array_name or _HIDDEN & set(name.words)):
        return axes, Reading(
            f"a matrix by shape{stacked}", "its name is unknown; could be an embedding or a head"
        )
    if len(core) == 2:
        return axes, Reading(f"a kernel {order}{stacked}")
    told = scan_axis is not None or name.within(_EXPERT)
    doubt = "" if told else "its leading axes are read as a stack of matrices"
    what = "an expert stack" if name.within(_EXPERT) else "a stack of kernels"
    return axes, Reading(f"{what} {order}{stacked}", doubt)


def _output_first(name: LeafName) -> bool:
    """torch, Equinox and Haliax call it `weight` and put the output first; Flax's `kernel` not."""
    return bool(name.leaf) and name.leaf[-1] == "weight"


def _window_axes(name: LeafName, core: tuple[int, ...]) -> MatrixAxes | None:
    """A conv kernel: window and input channels are fan_in, so the window never is batch."""
    window = core[2:] if _output_first(name) else core[:-2]
    named = name.within(_set("conv"))
    small = len(core) >= 4 and all(name.shape[axis] <= _LARGEST_WINDOW for axis in window)
    if not named and (not small or _QKV & set(name.words) or name.within(_EXPERT)):
        return None
    if _output_first(name):
        return MatrixAxes(fan_in=core[1:], fan_out=core[0])
    if "transpose" in name.words and name.leaf == ("w",):  # Haiku: (window, out, in)
        return MatrixAxes(fan_in=(*window, core[-1]), fan_out=core[-2])
    return MatrixAxes(fan_in=core[:-1], fan_out=core[-1])


def _attention_axes(name: LeafName, core: tuple[int, ...], tree: Survey) -> MatrixAxes | None:
    """Heads and head_dim are two axes (Flax DenseGeneral, MaxText, Levanter, Gemma)."""
    words = set(name.words)
    fused = name.module == "c_attn"
    inside = name.within(_ATTENTION)
    if not (words & (_QKV | _OUT) or fused or (name.module == "c_proj" and inside)):
        return None
    if name.within(_EXPERT) and not inside:
        return None
    wide = [axis for axis in core if name.shape[axis] in tree.widths]
    if fused or (words & _QKV and not words & _set("vec")):
        usual = core[-1] if _output_first(name) else core[-2 if "einsum" in words else 0]
        fan_in = wide[0] if len(wide) == 1 else usual
        parts = words & _set("qkv kv") and len(core) >= 4 and name.shape[core[0]] in (2, 3)
        skip = core[:1] if parts and core[0] < fan_in else ()
        return MatrixAxes(
            fan_in, tuple(axis for axis in core if axis != fan_in and axis not in skip)
        )
    usual = core[0] if _output_first(name) else core[-1]
    fan_out = wide[0] if len(wide) == 1 and wide[0] in (core[0], core[-1]) else usual
    return MatrixAxes(tuple(axis for axis in core if axis != fan_out), fan_out)


def _plain_axes(name: LeafName, pair: tuple[int, ...], tree: Survey) -> MatrixAxes:
    """A 2-D kernel: which of its axes is the input, by name and width, else by convention."""
    first, last = pair
    wide = [axis for axis in pair if name.shape[axis] in tree.widths]
    if len(wide) == 1:
        other = last if wide[0] == first else first
        if _WRITES.match(name.module):
            return MatrixAxes(other, wide[0])
        if _READS.match(name.module):
            return MatrixAxes(wide[0], other)
    return MatrixAxes(last, first) if _output_first(name) else MatrixAxes(first, last)
