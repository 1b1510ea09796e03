"""Leaves that are not hidden matrices, recognised by the words of their paths from a table."""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

BIAS, GAIN, VECTOR = VECTORS = ("a bias", "a norm or gain", "a vector or scalar")
EMBEDDING = "an embedding"
HEAD = "an output head"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# The digits of `conv2d`, `h_2` and of irreps such as `16x0e`, with the letter that belongs to them.
_NUMBER = re.compile(r"\d+x?\d*[a-z]?(?![A-Za-z])")
# Components of paths that may precede the model itself.
_WRAPPERS = ("params", "model", "module", "")


class Reading(NamedTuple):
    """The reason for the interpretation of a leaf, and a doubt if another is possible."""

    why: str
    doubt: str = ""


class LeafName(NamedTuple):
    """A leaf's path, split into words.

    Attributes:
        path: The path, such as `layers/0/attn/q_proj/kernel`.
        whole: The shape of the leaf.
        leaf: The words of the last component, such as `kernel`.
        module: The words of the module that the array belongs to, such as `q_proj`.
        above: The words of each component above the module, from the root.
        owner: The path of the module.
        series: The owner without the module's number: `mlp/Dense` for `mlp/Dense_1/kernel`.
        number: That number, if there is one. If the path has only numbers, all of them.
        scans: The axes along which scans stacked the layers.
    """

    path: str
    whole: tuple[int, ...]
    leaf: str
    module: str
    above: tuple[str, ...]
    owner: str
    series: str
    number: tuple[int, ...]
    scans: tuple[int, ...] = ()

    @classmethod
    def of(cls, path: str, shape: Sequence[int]) -> "LeafName":
        components = re.split(r"[/.]", path)
        named = [at for at, part in enumerate(components) if not part.isdigit()]
        words = [_words(components[at]) for at in named]
        if not named:
            numbers = tuple(int(part) for part in components if part)
            return cls(path, tuple(shape), "", "", (), "/".join(components), "", numbers)
        numbered = re.fullmatch(r"[A-Za-z]\d+", components[named[-1]])  # `w1` beside `w2`
        owned = len(named) > 1 and has(ARRAY, words[-1]) and not numbered
        at, end = (named[-2], named[-1]) if owned else (named[-1], len(components))
        stem = re.sub(r"_?\d+$", "", components[at])
        digits = re.findall(r"\d+$", components[at]) + components[at + 1 : end]
        return cls(
            path,
            tuple(shape),
            words[-1],
            words[-2] if owned else words[-1],
            tuple(part for part in words[: -2 if owned else -1] if part not in _WRAPPERS),
            "/".join(components[:end]),
            "/".join([*components[:at], stem]),
            tuple(int(number) for number in digits[-1:]),
        )

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of the leaf without those of scans."""
        return tuple(axis for axis in range(len(self.whole)) if axis not in self.scans)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a layer's leaf."""
        return tuple(self.whole[axis] for axis in self.axes)

    @property
    def is_bias(self) -> bool:
        return self._read(_BIASES) is not None

    @property
    def is_gain(self) -> bool:
        return self._read(_GAINS) is not None

    @property
    def is_array_name(self) -> bool:
        return has(ARRAY, self.leaf)

    @property
    def is_known(self) -> bool:
        """Whether its name is a known name of matrices."""
        return self.is_array_name or has(HIDDEN, self.module) or self.within(LORA)

    @property
    def is_nameless(self) -> bool:
        return not self.leaf

    @property
    def output_first(self) -> bool:
        """Whether the output axis comes first, as in the `weight` of torch, Equinox and Haliax."""
        return has(r"weight(_ih|_hh|_v)?$", self.leaf)

    def within(self, pattern: str) -> bool:
        """Whether the pattern matches the words of any component."""
        return any(has(pattern, part) for part in (*self.above, self.module, self.leaf))

    def read(self) -> Reading | None:
        """Returns the reason why it is not a hidden matrix by its words, or None."""
        return self._read(_BIASES + _GAINS + _OTHERS)

    def _read(self, rows: "Sequence[Row]") -> Reading | None:
        return next((Reading(row.why, row.doubt) for row in rows if row.fits(self)), None)


def _words(component: str) -> str:
    words = _WORD.findall(_NUMBER.sub("_", component))
    return "_".join(word.lower() for word in words)


@functools.lru_cache(maxsize=1 << 16)
def has(pattern: str, words: str) -> bool:
    """Whether the pattern matches one or more whole words."""
    return not pattern or re.search(rf"(?:^|_)(?:{pattern})(?:_|$)", words) is not None


class Row(NamedTuple):
    """A row of the table: patterns that the words of a leaf must match (see `has`), and the reason.

    Attributes:
        why, doubt: The reason, and another possible interpretation, as in `Reading`.
        name: A pattern for the module or the last component.
        leaf, module, parent: Patterns for the last component, the module and the one above it.
        unless: A pattern that no component may match.
        at_root: Whether the module must be at the root.
    """

    why: str
    name: str = ""
    leaf: str = ""
    module: str = ""
    parent: str = ""
    unless: str = ""
    at_root: bool = False
    doubt: str = ""

    def fits(self, name: LeafName) -> bool:
        return (
            (has(self.name, name.module) or has(self.name, name.leaf))
            and has(self.leaf, name.leaf)
            and has(self.module, name.module)
            and (not self.parent or (bool(name.above) and has(self.parent, name.above[-1])))
            and not (self.unless and name.within(self.unless))
            and not (self.at_root and name.above)
        )


# Names of arrays. If the last component is one of them, the component above names the matrix.
ARRAY = (
    r"^(kernel|weights?|w|embeddings?|table|scale|bias|b|g|offset|data_array)$|(gain|gamma|ls)$"
    r"|^(recurrent|depthwise|pointwise)_kernel|^weight_(ih|hh|v|g)$|kernel_lora|scale$"
)
LORA = "lora"
QKV = "q|k|v|query|key|value|qkv|kv|wq|wk|wv|wqkv|wkv"
OUT = "o|out|output|wo|vec"
EXPERT = "experts?|moe|gating"
ATTENTION = "attn|attention|mha"
CONV = "[a-z]*conv[a-z]*"
FEED_FORWARD = "mlp|ffn?|ffw|feed_forward|feedforward|channel_mix"
HEADS = r"heads?$|logits.*|(classifier|softmax|readout|policy|actor|critic|value|reward)$"
CRITIC = "^(values?|baseline|critic|q_values?|value_(fn|function)|reward)$"
HIDDEN = (
    rf"{QKV}|{OUT}|{EXPERT}|{ATTENTION}|{FEED_FORWARD}|{CONV}|{LORA}|kernel|weights?|w|wi|dense"
    "|proj|projection|linear|fc|up|down|gate|router|einsum|hidden|in|x|receptance|pooler"
)
# Names that imply a hidden matrix whatever its size, including those that read a recurrent state.
ROLE = (
    rf"{QKV}|{EXPERT}|{LORA}|wi|up|gate|router|einsum|c_attn|c_fc|c_proj|x_proj|dt_proj|wo|down"
    "|^(o|out|output)_proj$|altup[a-z_]*|h[figorzn]"
)
# Names so general that the position of the matrix in its parent is more informative.
GENERIC = "^(dense|linear|fc|lin|layers?|hidden|mlp|proj|projection|out|output|out_proj)$"

_TABLE = r"wte|wpe|vocab|codebook|lookup|[a-z]*emb|(?!un)[a-z]*embed[a-z]*|hash_table"
_BIASES = (
    Row(BIAS, name="bias|biases"),
    Row(BIAS, leaf="^(b|beta)$", unless=LORA),
    # Examples are TransformerLens's `b_Q`, and `fc_b`. MLA's `kv_b` is a matrix.
    Row(BIAS, leaf=r"^b_(?!proj|re|im|norm)[a-z]+$|^(?!w?[qkv]+_b$).*_b$", unless=LORA),
)
_GAINS = (
    Row(GAIN, name="[a-z]*norm|ln|bn|gn|rms", unless="kernel|modulation|lora"),
    Row(GAIN, leaf="scale|gain|gamma|^g|weight_g|ls"),
    Row(GAIN, module="^scale$"),
)
_OTHERS = (
    Row(
        f"{VECTOR}: elementwise",
        leaf=r"sigma|alpha|diag|lambda|log|temperature|time_(mix|maa|decay|first|faaaa)(?!.*_w$).*",
        unless=LORA,
    ),
    Row(
        EMBEDDING,
        module=r"embed[a-z]*_(proj|projection|hidden|map)[a-z_]*",
        unless=f"{LORA}|un.*|patch",
        doubt="could be a matrix that reads embeddings",
    ),
    Row(EMBEDDING, name=_TABLE, unless=LORA),
    Row(EMBEDDING, leaf="tokens?|cls|latents|probe|queries|pos|positions?|^w_(e|pos)$"),
    Row(EMBEDDING, name="rel_pos|relpos|relative_position|relative_attention"),
    Row(
        "a patch embedding",
        module=r"^(proj|projection|conv|layers?|linear|dense)$",
        parent=r"^(patch(es|ify)?|patch_?embed[a-z]*|pos_embed[a-z]*|embed[a-z]*_layer|stem)$",
    ),
    Row(EMBEDDING, module="^shared$", at_root=True),
    Row(
        HEAD,
        module=r"[a-z]*logits?[a-z]*|classifier|readout|relationship|[a-z]*unembed[a-z]*|head$",
        unless=f"router|gate|altup|pre|{LORA}",
    ),
    Row(HEAD, leaf="^w_u$"),
    Row(HEAD, module="^decoder$", parent="predictions"),
    Row(
        HEAD,
        module=r"^(output|score|output_proj(ection)?|out_proj|final_proj|final_layer)$",
        leaf=ARRAY,
        at_root=True,
    ),
    Row(
        HEAD,
        module=rf"{CRITIC}|^(action_out(_proj)?|policy|actor|pi)$",
        unless=f"{ATTENTION}|{FEED_FORWARD}|{LORA}",
        doubt="named like an output, such as a critic's or an actor's; could be a hidden matrix",
    ),
)
