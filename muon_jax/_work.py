"""The work of a program according to its jaxpr: products, decompositions and collectives."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from muon_jax._orthogonalize.devices import Kernel

STEPS = 1000  # the number of steps over which branches are averaged

# FLOPs of decompositions of m × n matrices with m ≥ n, including vectors, from Golub and Van Loan,
# Matrix Computations: 8.3 (eigenvectors), 8.6 (SVD by way of QR), 5.2 (QR and Q), 4.2.
_DECOMPOSITIONS = {
    "eigh": lambda m, n: 9 * n**3,
    "svd": lambda m, n: 6 * m * n**2 + 20 * n**3,
    "qr": lambda m, n: 4 * m * n**2 - 4 * n**3 // 3,
    "cholesky": lambda m, n: n**3 // 3,
}

_COLLECTIVES = {"all_to_all", "reduce_scatter", "all_gather", "all_gather_invariant", "ppermute"}
_COLLECTIVES |= {"psum", "psum_invariant", "pmax", "pmin"}

# Primitives of scalars that are known at every step, which may decide a branch.
_SCALAR = {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor", "min", "max", "clamp"}
_SCALAR |= {"add", "sub", "mul", "div", "rem", "neg", "abs", "sign", "pow", "integer_pow"}
_SCALAR |= {"select_n", "convert_element_type", "stop_gradient", "copy"}


class Done(NamedTuple):
    """The work of one primitive.

    Attributes:
        times: The average number of runs per step.
        kernel: The work of one run on one device; empty for a collective.
        dtype: The dtype of its entries.
        decomposes: Whether its FLOPs are those of a decomposition.
        bytes: The bytes that one device receives from a collective.
        everywhere: Whether each device runs it, inside a `shard_map`. XLA distributes the others.
    """

    times: float
    kernel: Kernel
    dtype: Any
    decomposes: bool = False
    bytes: float = 0.0
    everywhere: bool = False


def work_of(jaxpr: Any, counters: Sequence[bool], platform: str) -> list[Done]:
    """Returns the work of a step of an optimizer, averaged over the first thousand steps.

    If counters decide a branch, it counts as often as it is taken; of other branches the most
    expensive one counts. A `while` loop counts once, since the number of its iterations is unknown;
    the numbers of `fori_loop` and `scan` are known. `counters` says of each input of the closed
    `jaxpr` whether it is the number of steps so far.
    """
    reader = _Reader(platform)
    count = np.arange(STEPS, dtype=np.int32)
    reader.run(jaxpr, [count if counts else None for counts in counters], 1.0, {})
    return reader.done


class _Reader:
    def __init__(self, platform: str):
        self.platform = platform
        self.done: list[Done] = []

    def run(self, jaxpr: Any, known: Sequence[Any], times: float, sizes: dict[Any, int]) -> list:
        """Reads an open or closed jaxpr, whose scalar inputs and outputs may be known."""
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        env = dict(zip(inner.invars, known, strict=True))

        def read(var: Any) -> Any:
            if hasattr(var, "val"):
                scalar = np.ndim(var.val) == 0
                return np.full(STEPS, var.val, var.aval.dtype) if scalar else None
            return env.get(var)

        for eqn in inner.eqns:
            outputs = self._read(eqn, [read(var) for var in eqn.invars], times, sizes)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(var) for var in inner.outvars]

    def _read(self, eqn: Any, known: list, times: float, sizes: dict[Any, int]) -> list:
        name, params = eqn.primitive.name, eqn.params
        unknown = [None] * len(eqn.outvars)
        if name in _SCALAR and all(x is not None for x in known):
            with jax.ensure_compile_time_eval():
                return [np.asarray(eqn.primitive.bind(*map(jnp.asarray, known), **params))]
        if name == "platform_index":
            platforms = [of is None or self.platform in of for of in params["platforms"]]
            return [np.full(STEPS, platforms.index(True), np.int32)]
        if name == "cond":
            return self._branch(params["branches"], known, times, sizes) or unknown
        if name == "scan":
            body = params["jaxpr"]
            self.run(body, [None] * len(body.jaxpr.invars), times * params["length"], sizes)
            return unknown
        if name == "shard_map":
            own = {axis: params["mesh"].shape[axis] for axis in params["newly_manual_axes"]}
            self.run(params["jaxpr"], known, times, sizes | own)
            return unknown
        inner = [x for x in params.values() if hasattr(getattr(x, "jaxpr", x), "eqns")]
        if name == "while":
            inner = [params["body_jaxpr"]]
        for jaxpr in inner:
            variables = getattr(jaxpr, "jaxpr", jaxpr).invars
            same = name != "while" and len(variables) == len(known)
            outputs = self.run(jaxpr, known if same else [None] * len(variables), times, sizes)
            if same and len(outputs) == len(unknown):
                unknown = outputs
        if not inner:
            self._work(eqn, times, sizes)
        return unknown

    def _branch(self, branches: Any, known: list, times: float, sizes: dict[Any, int]) -> list:
        index, *operands = known
        before, found = self.done, []
        for branch in branches:
            self.done = []
            found.append((self.run(branch, operands, times, sizes), self.done))
        if index is None:  # the most expensive one
            self.done = before + max((done for _, done in found), key=_dearness)
            return []
        index = np.clip(np.asarray(index, np.int32), 0, len(branches) - 1)
        shares = [float(np.mean(index == number)) for number in range(len(branches))]
        self.done = before
        for share, (_, done) in zip(shares, found, strict=True):
            self.done += [x._replace(times=share * x.times) for x in done if share]
        return found[shares.index(1.0)][0] if 1.0 in shares else []

    def _work(self, eqn: Any, times: float, sizes: dict[Any, int]) -> None:
        if not eqn.invars:
            return
        name, x, everywhere = eqn.primitive.name, eqn.invars[0].aval, bool(sizes)
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            out = eqn.outvars[0].aval
            flops = 2 * math.prod(x.shape[axis] for axis in contracted) * out.size
            complex_ = jnp.issubdtype(out.dtype, jnp.complexfloating)
            numbers = sum(var.aval.size for var in (*eqn.invars, *eqn.outvars))
            kernel = Kernel((1 + 3 * complex_) * flops, numbers)
            self.done.append(Done(times, kernel, x.dtype, everywhere=everywhere))
        elif name in _DECOMPOSITIONS:
            *batch, m, n = x.shape
            flops = math.prod(batch) * _DECOMPOSITIONS[name](max(m, n), min(m, n))
            kernel = Kernel(flops, 3 * x.size)
            self.done.append(Done(times, kernel, x.dtype, True, everywhere=everywhere))
        elif name.startswith("reduce_"):  # it only reads, since the rest is fused with it
            self.done.append(Done(times, Kernel(0, x.size), x.dtype, everywhere=everywhere))
        elif name in _COLLECTIVES:
            axes = eqn.params.get("axes", eqn.params.get("axis_name"))
            axes = axes if isinstance(axes, (tuple, frozenset)) else (axes,)
            if math.prod(sizes.get(axis, 1) for axis in axes) > 1:
                arriving = sum(out.aval.size * out.aval.dtype.itemsize for out in eqn.outvars)
                self.done.append(Done(times, Kernel(0, 0), x.dtype, bytes=arriving))


def _dearness(done: list[Done]) -> float:
    return sum(x.times * x.kernel.flops + x.bytes for x in done)
