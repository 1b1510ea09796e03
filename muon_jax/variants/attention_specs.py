"""Where an attention module holds its query and key heads, and which of them QK-clip scales."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from muon_jax._checks import check_integer

Names = str | tuple[str, ...]

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


class AttentionSpec(Protocol):
    """How the attention modules of a model hold their heads.

    Attributes:
        heads: query heads.
        head_axis: the axis of the heads in a leaf of one layer.
        most_axes: of a leaf of one layer; one with more is a stack.
        scaled: names of what is scaled for the queries, and for the keys.
    """

    @property
    def heads(self) -> int: ...
    @property
    def head_axis(self) -> int: ...
    @property
    def most_axes(self) -> int: ...
    @property
    def scaled(self) -> tuple[Names, Names]: ...

    def factors(self, gamma: jax.Array, alpha: Any) -> tuple[jax.Array, jax.Array]:
        """Of gamma `(..., heads)` what multiplies `scaled`: `(..., heads there, columns or 1)`."""

    def check(self, module: str, names: Sequence[str]) -> None:
        """Refuses a module, with the `names` below it, where these factors would change nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedQuery:
    """Multi-head, grouped-query or multi-query attention, for `qk_clip`.

    A key head takes the smallest gamma of the query heads that read it: query head `n` reads key
    head `n // (heads // kv_heads)`.

    Attributes:
        heads: query heads.
        kv_heads: key heads; `None` is `heads`.
        query: a leaf or module below the attention module, or several; all leaves there are scaled,
            biases too, so that the logits scale exactly.
        key: the same for the keys.
        head_axis: the axis of the heads in a leaf of one layer: either the heads alone, as in
            `(fan_in, heads, head_dim)`, -2, or heads × head_dim merged, as in
            `(fan_in, heads * head_dim)`, -1, and torch's `(heads * head_dim, fan_in)`, 0.
        qk_norm: what to do where queries and keys are normalised after their projections, so that
            no scale of a projection reaches the logits: `"refuse"`; the names of the two norms, as
            in `("q_norm", "k_norm")`, whose gains are then scaled in place of the projections, by
            the smallest gamma of the heads, which share them; or `"ignore"`, for norms that only
            look like these.

    Raises:
        TypeError: a number that is no static integer, or a name that is no string.
        ValueError: numbers of heads that do not divide, or another `qk_norm`.

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
                    "kv_heads must divide heads, since each key head serves equally many query "
                    f"heads; got heads={self.heads}, kv_heads={self.kv_heads}."
                )
        named = (
            isinstance(self.qk_norm, tuple)
            and len(self.qk_norm) == 2
            and all(isinstance(name, str) for name in self.qk_norm)
        )
        if not named and self.qk_norm not in ("refuse", "ignore"):
            raise ValueError(
                'qk_norm must be "refuse", "ignore" or the names (queries\' norm, keys\' norm); '
                f"got {self.qk_norm!r}."
            )

    @property
    def most_axes(self) -> int:
        return 3 if isinstance(self.qk_norm, str) else 1

    @property
    def scaled(self) -> tuple[Names, Names]:
        return (self.query, self.key) if isinstance(self.qk_norm, str) else self.qk_norm

    def factors(self, gamma: jax.Array, alpha: Any) -> tuple[jax.Array, jax.Array]:
        groups = (self.kv_heads or self.heads, -1)
        if not isinstance(self.qk_norm, str):
            gamma, groups = jnp.min(gamma, axis=-1, keepdims=True), (1, 1)
        of_keys = jnp.min(gamma.reshape(*gamma.shape[:-1], *groups), axis=-1)
        return gamma[..., None] ** alpha, of_keys[..., None] ** (1 - alpha)

    def check(self, module: str, names: Sequence[str]) -> None:
        norms = sorted(set(filter(None, map(_find_norm, names))), key=lambda norm: "q" not in norm)
        if norms and self.qk_norm == "refuse":
            pair = tuple(norms) if len(norms) == 2 else ("<queries' norm>", "<keys' norm>")
            raise ValueError(
                f"{module!r} normalises its queries and keys ({', '.join(norms)}), which cancels "
                "any scale of W_q and W_k: clipping them would change no logit. Scale the gains of "
                f"the norms in their place, qk_norm={pair!r}, or give "
                'qk_norm="ignore" if these norms come before the projections.'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiHeadLatent:
    """Multi-head latent attention (DeepSeek), for `qk_clip`.

    The heads share one rotary key, so the rotary queries take all of gamma: with `nope` columns of
    queries and keys scaled by `gamma ** alpha` and `gamma ** (1 - alpha)` and `rope` columns of the
    queries by gamma, both parts of a logit scale by gamma. Shared key and values stay as they are.

    Attributes:
        heads: of queries, keys and values.
        query: the leaf or module below the attention module that makes the queries, each head
            `[nope | rope]`.
        key: the one that makes keys and values from the latent, each head `[nope | value]`.
        nope: columns of a head without position.
        rope: columns of a head that are rotated.
        value: columns of a head's value.
        head_axis: as in `GroupedQuery`.

    Raises:
        TypeError: a number that is no static integer, or a name that is no string.
        ValueError: a number out of range.

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

    def __post_init__(self):
        _check_heads(self)
        for name in ("nope", "rope", "value"):
            check_integer(name, getattr(self, name), at_least=0)

    @property
    def most_axes(self) -> int:
        return 3

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
        """The norms of latent attention are of the latents, before the projections scaled here."""


def _check_heads(spec: GroupedQuery | MultiHeadLatent) -> None:
    check_integer("heads", spec.heads, at_least=1)
    check_integer("head_axis", spec.head_axis, at_least=-3)
    for name, given in (("query", spec.query), ("key", spec.key)):
        listed = given if isinstance(given, tuple) else (given,)
        if not listed or not all(isinstance(each, str) and each for each in listed):
            raise TypeError(
                f"{name} must be the name of a leaf or module, or a tuple of names; got {given!r}."
            )


def _find_norm(name: str) -> str | None:
    """The norm of queries or keys in a leaf's name, as in `q_norm` of `q_norm/scale`."""
    parts = name.split("/")
    for stop in range(1, len(parts) + 1):
        norm = "/".join(parts[:stop])
        words = {word.lower() for word in _WORD.findall(norm)}
        normed = any(word.endswith("norm") or word in ("ln", "rms") for word in words)
        if normed and words & {"q", "k", "qk", "query", "key", "qnorm", "knorm"}:
            return norm
    return None
