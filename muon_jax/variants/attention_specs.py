"""Descriptions of attention modules: where their query and key heads are, for QK-clip."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from muon_jax._checks import check_integer

Names = str | tuple[str, ...]

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedQuery:
    """Multi-head, grouped-query or multi-query attention, for `qk_clip`.

    The factor of a key head is the smallest gamma of the query heads that read it. Query head `n`
    reads key head `n // (heads // kv_heads)`.

    Attributes:
        heads: The number of query heads.
        kv_heads: The number of key heads; `None` means `heads`.
        query: The name of a leaf or module below the attention module, or several names. All leaves
            there are scaled, including biases, so that the logits scale exactly.
        key: The same for the keys.
        head_axis: The axis of the heads in a leaf of one layer. It is either an axis of the heads
            alone, such as -2 for `(fan_in, heads, head_dim)`, or an axis of heads × head_dim, such
            as -1 for `(fan_in, heads * head_dim)` and 0 for torch's `(heads * head_dim, fan_in)`.
        qk_norm: What to do if queries and keys are normalised after their projections, so that
            scaling a projection does not change the logits. `"refuse"` raises an error. The names
            of the two norms, such as `("q_norm", "k_norm")`, scale their gains instead of the
            projections, by the smallest gamma of the heads, which share them. `"ignore"` is for
            norms that only have such a name.

    Example:
        >>> GroupedQuery(heads=16, kv_heads=8, query="q_proj", key="k_proj", head_axis=0).factors(
        ...     jnp.full(16, 0.25), alpha=0.5
        ... )[1].shape
        (8, 1)
    """

    heads: int
    kv_heads: int | None = None
    query: Names = "query"
    key: Names = "key"
    head_axis: int = -1
    qk_norm: tuple[str, str] | Literal["refuse", "ignore"] = "refuse"

    def __post_init__(self):
        _check_heads(self)
        if self.kv_heads is not None:
            check_integer("kv_heads", self.kv_heads, at_least=1)
            if self.heads % self.kv_heads:
                raise ValueError(
                    "kv_heads must divide heads, since each key head is read by the same number of "
                    f"query heads; got heads={self.heads}, kv_heads={self.kv_heads}."
                )
        named = isinstance(self.qk_norm, tuple) and [*map(type, self.qk_norm)] == [str, str]
        if not named and self.qk_norm not in ("refuse", "ignore"):
            raise ValueError(
                'qk_norm must be "refuse", "ignore" or the names (queries\' norm, keys\' norm); '
                f"got {self.qk_norm!r}."
            )

    @property
    def most_axes(self) -> int:
        """The largest number of axes of a leaf of one layer; a leaf with more is a stack."""
        return 3 if isinstance(self.qk_norm, str) else 1

    @property
    def scaled(self) -> tuple[Names, Names]:
        """The names of the leaves or modules to scale, for the queries and for the keys."""
        return (self.query, self.key) if isinstance(self.qk_norm, str) else self.qk_norm

    def factors(self, gamma: jax.Array, alpha: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the factors of `scaled`, `(..., their heads, columns or 1)`, from gamma."""
        groups = (self.kv_heads or self.heads, -1)
        if not isinstance(self.qk_norm, str):
            gamma, groups = jnp.min(gamma, axis=-1, keepdims=True), (1, 1)
        of_keys = jnp.min(gamma.reshape(*gamma.shape[:-1], *groups), axis=-1)
        return gamma[..., None] ** alpha, of_keys[..., None] ** (1 - alpha)

    def check(self, module: str, names: Sequence[str]) -> None:
        """Checks that the factors have an effect in a module, which has these `names` below it."""
        norms = sorted(set(filter(None, map(_find_norm, names))), key=lambda norm: "q" not in norm)
        if norms and self.qk_norm == "refuse":
            pair = tuple(norms) if len(norms) == 2 else ("<queries' norm>", "<keys' norm>")
            raise ValueError(
                f"{module!r} normalises its queries and keys ({', '.join(norms)}), which cancels "
                "any scale of W_q and W_k, so clipping them would not change the logits. Pass "
                f"qk_norm={pair!r} to scale the gains of the norms instead, or pass "
                'qk_norm="ignore" if these norms come before the projections.'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiHeadLatent:
    """Multi-head latent attention (DeepSeek), for `qk_clip`.

    All heads share one rotary key, so only the rotary queries are scaled, by gamma. The `nope`
    columns of queries and keys are scaled by `gamma ** alpha` and `gamma ** (1 - alpha)`. Both
    terms of a logit are then scaled by gamma. The shared key and the values are not changed.

    Attributes:
        heads: The number of heads of queries, keys and values.
        query: The leaf or module below the attention module that computes the queries, each head
            `[nope | rope]`.
        key: The leaf or module that computes keys and values from the latent, each head
            `[nope | value]`.
        nope: The number of columns of a head without position encoding.
        rope: The number of rotated columns of a head.
        value: The number of columns of a head's value.
        head_axis: As in `GroupedQuery`.

    Example:
        >>> spec = MultiHeadLatent(heads=4, query="q", key="kv_b", nope=8, rope=4, value=8)
        >>> [factors.shape for factors in spec.factors(jnp.ones(4), alpha=0.5)]
        [(4, 12), (4, 16)]
    """

    heads: int
    query: Names
    key: Names
    nope: int
    rope: int
    value: int
    head_axis: int = -1
    most_axes: ClassVar[int] = 3

    def __post_init__(self):
        _check_heads(self)
        for name in ("nope", "rope", "value"):
            check_integer(name, getattr(self, name), at_least=0)

    @property
    def scaled(self) -> tuple[Names, Names]:
        return self.query, self.key

    def factors(self, gamma: jax.Array, alpha: Any) -> tuple[jax.Array, jax.Array]:
        def columns(*parts):
            blocks = [jnp.broadcast_to(x[..., None], (*gamma.shape, size)) for x, size in parts]
            return jnp.concatenate(blocks, axis=-1)

        of_queries = columns((gamma**alpha, self.nope), (gamma, self.rope))
        return of_queries, columns((gamma ** (1 - alpha), self.nope), (gamma**0, self.value))

    def check(self, module: str, names: Sequence[str]) -> None:
        """Accepts all norms: they normalise the latents, before the projections that are scaled."""


AttentionSpec = GroupedQuery | MultiHeadLatent


def _check_heads(spec: "AttentionSpec") -> None:
    check_integer("heads", spec.heads, at_least=1)
    check_integer("head_axis", spec.head_axis, at_least=-3)
    for name, given in (("query", spec.query), ("key", spec.key)):
        listed = given if isinstance(given, tuple) else (given,)
        if not listed or not all(isinstance(each, str) and each for each in listed):
            raise TypeError(
                f"{name} must be the name of a leaf or module, or a tuple of names; got {given!r}."
            )


def _find_norm(name: str) -> str | None:
    """Returns the norm of queries or keys in a leaf's name, such as `q_norm` in `q_norm/scale`."""
    parts = name.split("/")
    for stop in range(1, len(parts) + 1):
        norm = "/".join(parts[:stop])
        words = {word.lower() for word in _WORD.findall(norm)}
        normed = any(word.endswith("norm") or word in ("ln", "rms") for word in words)
        if normed and words & {"q", "k", "qk", "query", "key", "qnorm", "knorm"}:
            return norm
    return None
