"""What only the whole tree shows: scanned layers, the model's widths, a leaf's neighbours."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from muon_jax._routing.names import ATTENTION, CONV, EXPERT, HIDDEN, QKV, LeafName, Reading, has

_STACK = "layers?|blocks?|stack(ed)?|scan(ned)?|h|encoderblock|encoder|decoder|repeat(s|ed)?|body"
_ROUTER = "router|gate|switch|gating"


class Survey(NamedTuple):
    """What is known of a tree.

    Attributes:
        names: by path.
        scans: path -> the axes along which scans stacked the layers.
        widths: the lengths of the gains of norms: what the residual stream is as wide as.
        parents: path -> the leaves of the modules right below it.
        experts: of each router, the path of what has it and the sizes that may count experts.
        ends: path -> what its place in the tree tells; see `_name_ends`.
    """

    names: dict[str, LeafName]
    scans: dict[str, tuple[int, ...]]
    widths: frozenset[int]
    parents: dict[str, list[LeafName]]
    experts: tuple[tuple[str, frozenset[int]], ...]
    ends: dict[str, Reading]

    def core(self, name: LeafName) -> tuple[int, ...]:
        """The leaf's axes without those of scans."""
        scanned = self.scans.get(name.path, ())
        return tuple(axis for axis in range(len(name.shape)) if axis not in scanned)

    def core_shape(self, name: LeafName) -> tuple[int, ...]:
        return tuple(name.shape[axis] for axis in self.core(name))

    def bias(self, name: LeafName) -> tuple[int, ...]:
        """The shape of the bias beside a kernel, without axes of length 1; empty without one."""
        for path in _bias_paths(name):
            if (bias := self.names.get(path)) and (bias.is_bias or bias.is_nameless):
                shape = tuple(size for size in self.core_shape(bias) if size != 1)
                if len(shape) < len(self.core(name)):
                    return shape
        return ()

    def is_beside(self, name: LeafName, pattern: str) -> bool:
        """Whether another module of the same parent has these words."""
        return any(has(pattern, other.module) for other in self.beside(name))

    def follows_its_kernel(self, name: LeafName) -> bool:
        """Whether, in a tree without names, the leaf before ends in this one's shape."""
        before, slash, last = key(name.path).rpartition("/")
        number = int(last) if last.isdigit() else 0
        kernel = self.names.get(f"{before}{slash}{number - 1}")
        return kernel is not None and self.bias(kernel) == name.shape

    def beside(self, name: LeafName) -> list[LeafName]:
        """The leaves of the other modules of the same parent."""
        found = self.parents[name.owner.rpartition("/")[0]]
        return [other for other in found if other.owner != name.owner]

    def counts_experts(self, name: LeafName, size: int) -> bool:
        """Whether a router beside it, or beside a module that has it, chooses among so many."""
        return any(
            size in sizes and (not above or key(name.path).startswith(f"{above}/"))
            for above, sizes in self.experts
        )


def is_expert(name: LeafName) -> bool:
    """`moe_layers/attention` is an attention, and `moe/experts/attention` too."""
    return name.within(EXPERT) and not name.within(ATTENTION)


def key(path: str) -> str:
    """A path with one kind of separator."""
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
    tree = Survey(
        {key(name.path): name for name in names}, _scans(names), frozenset(), parents, (), {}
    )
    widths = {
        size
        for name in names
        # The gain of queries, of keys or of each head is as long as a head is wide.
        if name.is_gain and not has(rf"{QKV}|heads?|per_dim_scale", name.module)
        for size in tree.core_shape(name)
        if len(tree.core_shape(name)) == 1
    }
    experts = tuple(
        (name.owner.rpartition("/")[0], frozenset(tree.core_shape(name)))
        for name in names
        if has(_ROUTER, name.module) and not has("proj|up|attn", name.module)
        if len(tree.core(name)) == 2
    )
    return tree._replace(widths=frozenset(widths), experts=experts)


def _scans(names: Sequence[LeafName]) -> dict[str, tuple[int, ...]]:
    """A subtree is scanned along an axis if all its leaves agree on its size.

    It is the first axis, or the second in MaxText. The witness is a norm or bias, a vector by name,
    that has an axis more than it should and fits the kernels beside it. Scans may be nested: each
    round finds one axis.
    """
    found: dict[str, tuple[int, ...]] = {}
    rest = list(names)
    while rest:
        axes = _scan_axes(rest, found)
        for path, axis in axes.items():
            found[path] = (*found.get(path, ()), axis)
        rest = [name for name in rest if name.path in axes]
    return found


def _scan_axes(names: Sequence[LeafName], found: dict[str, tuple[int, ...]]) -> dict[str, int]:
    cores = {
        name.path: tuple(a for a in range(len(name.shape)) if a not in found.get(name.path, ()))
        for name in names
    }
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
        if any(len(cores[leaf.path]) < 2 for leaf in leaves):
            continue
        stacks = {leaf.path for leaf in leaves if is_expert(leaf) and len(cores[leaf.path]) >= 4}
        # The axis of experts may lie in front of that of layers.
        for at, of_stacks in ((0, 0), (1, 1), *([(0, 1)] if stacks else [])):
            axes = {
                path: cores[path][of_stacks if path in stacks else at]
                for path in (leaf.path for leaf in leaves)
            }
            sizes = {leaf.shape[axes[leaf.path]] for leaf in leaves}
            rests = {
                leaf.path: tuple(leaf.shape[a] for a in cores[leaf.path] if a != axes[leaf.path])
                for leaf in leaves
            }
            if len(sizes) == 1 and _is_scan(leaves, rests, at):
                scanned |= axes
                break
    return scanned


def _is_scan(leaves: Sequence[LeafName], rests: dict[str, tuple[int, ...]], at: int) -> bool:
    """Whether the leaves, without the axis `at`, are those of one layer."""
    # Queries' and keys' vectors can be (heads, head_dim).
    plain = [leaf for leaf in leaves if not has(QKV, leaf.module)]
    kernels = [leaf for leaf in leaves if not (leaf.is_bias or leaf.is_gain)]
    kernels = [leaf for leaf in kernels if len(rests[leaf.path]) >= 2]
    sizes = {size for leaf in kernels for size in rests[leaf.path]} - {1}
    modules = {leaf.owner for leaf in leaves}
    if len(modules) > 1 or any(leaf.within(_STACK) for leaf in leaves):
        for leaf in plain:
            vector = leaf.is_gain or leaf.is_bias
            rest = rests[leaf.path]
            if vector and len(rest) <= 2 and rest[-1] in sizes:
                return True
    # Without a witness: kernels of known names and unlike shapes. The windows of a bias-free
    # convolutional net agree on their first axis too.
    stacks = [leaf for leaf in plain if len(leaf.shape) == 3 and not leaf.within(CONV)]
    known = all(has(HIDDEN, leaf.module) and not leaf.within(CONV) for leaf in leaves)
    unlike = len({leaf.shape for leaf in leaves}) > 1
    return at == 0 and known and len(kernels) == len(leaves) and bool(stacks) and unlike
