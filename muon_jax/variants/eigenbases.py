"""Shampoo's eigenbases of both sides of every matrix, which SPlus and SOAP use."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from muon_jax._checks import check_integer, check_number
from muon_jax._matrices.stages import Matrices
from muon_jax._orthogonalize.decompositions import each_matrix
from muon_jax._precision import widen
from muon_jax.variants.low_rank import product, relative

# The largest entry of gradients in the second moments: the sum of 2^23 squares of it is finite.
_LARGEST = 2.0**52


class Sides(NamedTuple):
    """Square matrices `(*batch, fan, fan)` of the two sides of a part; `None` for long sides."""

    fan_in: Any
    fan_out: Any


@dataclasses.dataclass(frozen=True)
class Eigenbases:
    """Averages of G Gᵀ and Gᵀ G, and their eigenvectors, which are renewed every few steps.

    Attributes:
        b2: The decay of the averages.
        every: The number of steps between eigendecompositions; the first step has one.
        max_dim: A side of at least this size keeps the identity as its basis.
    """

    b2: Any
    every: int
    max_dim: int

    def __post_init__(self) -> None:
        check_number("b2", self.b2, at_least=0, below=1)
        check_integer("every", self.every, at_least=1)
        check_integer("max_dim", self.max_dim, at_least=1)

    def init(self, matrices: Matrices) -> tuple[list[Sides], list[Sides]]:
        """Returns zeros as averages and identities as bases."""

        def zeros(batch: Any, n: int) -> jax.Array:
            return jnp.zeros((*batch, n, n), jnp.float32)

        def identity(batch: Any, n: int) -> jax.Array:
            return jnp.broadcast_to(jnp.eye(n, dtype=jnp.float32), (*batch, n, n))

        return self._sides(matrices, zeros), self._sides(matrices, identity)

    def _sides(self, matrices: Matrices, square: Callable) -> list[Sides]:
        """Returns `square(batch, size)` for the sides of every part that are short enough."""
        pairs = []
        for part in matrices.parts:
            batch, *fans = part.axes.matrix_shape(part.shape)
            both = (
                matrices.own_batch(part, square(batch, n)) if n < self.max_dim else None
                for n in fans
            )
            pairs.append(Sides(*both))
        return pairs

    def average(self, second: list[Sides], gradients: list[jax.Array]) -> list[Sides]:
        """Updates the averages with `bounded` whole gradients `(*batch, fan_in, fan_out)`."""
        return [
            Sides(
                self._averaged(old.fan_in, lambda g=g: product(g, g.mT)),
                self._averaged(old.fan_out, lambda g=g: product(g.mT, g)),
            )
            for old, g in zip(second, gradients, strict=True)
        ]

    def _averaged(self, old: Any, new: Callable) -> Any:
        if old is None:
            return None
        return (self.b2 * old + (1 - self.b2) * new()).astype(old.dtype)

    def renew(
        self, matrices: Matrices, second: list[Sides], bases: list[Sides], count: jax.Array
    ) -> list[Sides]:
        """Returns the bases after step `count`, from 1, decomposing each matrix on one device."""

        def fresh(second: list[Sides]) -> list[Sides]:
            halves = [
                matrices.map_distributed(half, _eigenvectors) for half in zip(*second, strict=True)
            ]
            return [Sides(*pair) for pair in zip(*halves, strict=True)]

        due = (count == 1) | (count % self.every == 0)
        return jax.lax.cond(due, fresh, lambda _: bases, second) if second else bases


def bounded(g: jax.Array) -> jax.Array:
    """Scales a matrix down until the squares of its entries are finite, in float32."""
    g = widen(g)
    largest = jnp.max(jnp.abs(g), axis=(-2, -1), keepdims=True)
    root = jnp.sqrt(_LARGEST) * jax.lax.rsqrt(jnp.maximum(largest, _LARGEST))
    return (g * root * root).astype(jnp.float32)


def into(m: jax.Array, bases: Sides) -> jax.Array:
    """Transforms matrices to the coordinates of the bases."""
    left, right = bases
    m = m if left is None else product(left.mT, m)
    return m if right is None else product(m, right)


def out_of(m: jax.Array, bases: Sides) -> jax.Array:
    """Inverts `into`."""
    left, right = bases
    m = m if left is None else product(left, m)
    return m if right is None else product(m, right.mT)


def _eigenvectors(x: jax.Array) -> jax.Array:
    return each_matrix(jnp.linalg.eigh, relative(x)[0])[1]
