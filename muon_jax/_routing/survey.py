"""Facts that need the whole tree: scanned layers, the model's widths, and a leaf's neighbours."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from muon_jax._routing.names import ATTENTION, CONV, EXPERT, HIDDEN, QKV, LeafName, Reading, has

_STACK = "layers?|blocks?|stack(ed)?|scan(ned)?|h|encoderblock|encoder|decoder|repeat(s|ed)?|body"
_ROUTER = "router|gate|switch|gating"


class Survey(NamedTuple):
    """Facts about a whole tree.

    Attributes:
        names: The names of the leaves, by path.
        widths: The lengths of the gains of norms, which are the widths of the residual stream.
        parents: The leaves of the modules directly below a path, by that path.
        experts: For each router, the path of its parent and the sizes that may be the number of
            experts.
        ends: The readings of leaves that may be the model's first or last matrix, by path.
    """

    names: dict[str, LeafName]
    widths: frozenset[int]
    parents: dict[str, list[LeafName]]
    experts: tuple[tuple[str, frozenset[int]], ...]
    ends: dict[str, Reading]

    def bias(self, name: LeafName) -> tuple[int, ...]:
        """Returns the shape of a kernel's bias without axes of size 1, or () if it has none."""
        for path in _bias_paths(name):
            if (bias := self.names.get(path)) and (bias.is_bias or bias.is_nameless):
                shape = tuple(size for size in bias.shape if size != 1)
                if len(shape) < len(name.axes):
                    return shape
        return ()

    def is_beside(self, name: LeafName, pattern: str) -> bool:
        """Whether the name of another module of the same parent matches `pattern`."""
        return any(has(pattern, other.module) for other in self.beside(name))

    def follows_its_kernel(self, name: LeafName) -> bool:
        """Whether, in a tree without names, this leaf has the shape of the previous one's bias."""
        before, slash, last = key(name.path).rpartition("/")
        number = int(last) if last.isdigit() else 0
        kernel = self.names.get(f"{before}{slash}{number - 1}")
        return kernel is not None and self.bias(kernel) == name.whole

    def beside(self, name: LeafName) -> list[LeafName]:
        """Returns the leaves of the other modules of the same parent."""
        siblings = self.parents[name.owner.rpartition("/")[0]]
        return [other for other in siblings if other.owner != name.owner]

    def counts_experts(self, name: LeafName, size: int) -> bool:
        """Whether a router next to the leaf, or to a module that has it, has `size` choices."""
        return any(
            size in sizes and (not above or key(name.path).startswith(f"{above}/"))
            for above, sizes in self.experts
        )


def is_expert(name: LeafName) -> bool:
    """Whether the leaf belongs to experts; `moe/experts/attention` counts as attention."""
    return name.within(EXPERT) and not name.within(ATTENTION)


def key(path: str) -> str:
    """Returns a path with `/` as its only separator."""
    return path.replace(".", "/")


def _bias_paths(name: LeafName) -> Iterable[str]:
    before, slash, last = key(name.path).rpartition("/")
    if name.is_nameless:
        yield f"{before}{slash}{int(last) + 1 if last.isdigit() else 0}"
        return
    flat = re.sub("weight", "bias", last), re.sub("^[wW]_", "b_", last), re.sub("_w$", "_b", last)
    beside = ("bias", "b") if name.is_array_name else ()
    for bias in (*beside, f"{last}_bias", f"{last}_b", *flat):
        if bias != last:
            yield f"{before}{slash}{bias}"


def survey(names: Sequence[LeafName]) -> Survey:
    parents = defaultdict(list)
    for name in names:
        parents[name.owner.rpartition("/")[0]].append(name)
    widths = frozenset(
        name.shape[0]
        for name in names
        # The gains of queries, keys and heads are as long as a head, so they are not widths.
        if name.is_gain and not has(rf"{QKV}|heads?|per_dim_scale", name.module)
        if len(name.shape) == 1
    )
    experts = tuple(
        (name.owner.rpartition("/")[0], frozenset(name.shape))
        for name in names
        if has(_ROUTER, name.module) and not has("proj|up|attn", name.module)
        if len(name.shape) == 2
    )
    return Survey({key(name.path): name for name in names}, widths, parents, experts, {})


def find_scans(names: Sequence[LeafName]) -> list[LeafName]:
    """Returns the names with the axes along which scans stacked the layers.

    A subtree is scanned along its first axis (in MaxText the second) if all its leaves agree on
    its size, and if a norm or bias, a vector by its name, has one axis too many and fits the
    kernels beside it. Scans may be nested, and each round finds one axis.
    """
    scans: dict[str, tuple[int, ...]] = defaultdict(tuple)
    rest = list(names)
    while rest:
        axes = _scan_axes(rest)
        for path, axis in axes.items():
            scans[path] += (axis,)
        rest = [name._replace(scans=scans[name.path]) for name in rest if name.path in axes]
    return [name._replace(scans=scans[name.path]) for name in names]


def _scan_axes(names: Sequence[LeafName]) -> dict[str, int]:
    """Returns the next axis of scans, by the path of each leaf that has one."""
    subtrees = defaultdict(list)
    for name in names:
        components = name.path.split("/")
        for depth in range(len(components)):
            subtrees["/".join(components[:depth])].append(name)
    scanned: dict[str, int] = {}
    for subtree in sorted(subtrees, key=len):
        leaves = subtrees[subtree]
        if len(leaves) < 2 or leaves[0].path in scanned:
            continue
        if any(len(leaf.axes) < 2 for leaf in leaves):
            continue
        stacks = {leaf.path for leaf in leaves if is_expert(leaf) and len(leaf.axes) >= 4}
        # The axis of experts may precede the axis of layers.
        for at, of_stacks in ((0, 0), (1, 1), *([(0, 1)] if stacks else [])):
            axes = {
                leaf.path: leaf.axes[of_stacks if leaf.path in stacks else at] for leaf in leaves
            }
            layers = [leaf._replace(scans=(*leaf.scans, axes[leaf.path])) for leaf in leaves]
            sizes = {leaf.whole[axes[leaf.path]] for leaf in leaves}
            if len(sizes) == 1 and _is_scan(layers, at):
                scanned |= axes
                break
    return scanned


def _is_scan(layers: Sequence[LeafName], at: int) -> bool:
    """Whether the leaves, which leave out the axis `at`, form a single layer."""
    # The vectors of queries and keys may have the shape (heads, head_dim).
    plain = [leaf for leaf in layers if not has(QKV, leaf.module)]
    vectors = [leaf for leaf in plain if leaf.is_gain or leaf.is_bias]
    kernels = [leaf for leaf in layers if not (leaf.is_bias or leaf.is_gain)]
    kernels = [leaf for leaf in kernels if len(leaf.shape) >= 2]
    sizes = {size for leaf in kernels for size in leaf.shape} - {1}
    modules = {leaf.owner for leaf in layers}
    if (len(modules) > 1 or any(leaf.within(_STACK) for leaf in layers)) and any(
        len(leaf.shape) <= 2 and leaf.shape[-1] in sizes for leaf in vectors
    ):
        return True
    # Without such a vector the kernels must have known names and different shapes. Convolutions
    # are excluded, since their windows agree on the first axis too.
    stacks = [leaf for leaf in plain if len(leaf.whole) == 3 and not leaf.within(CONV)]
    known = all(has(HIDDEN, leaf.module) and not leaf.within(CONV) for leaf in layers)
    unlike = len({leaf.whole for leaf in layers}) > 1
    return at == 0 and known and len(kernels) == len(layers) and bool(stacks) and unlike
