"""Builders of the optimizers in `experiments.optimizers`, from a study's settings.

A builder is a function `(settings, rate, rest, placed) -> transformation`, see `optimizers.Arm`.
Some functions here return builders, for optimizers that differ in one argument.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
import optax

import muon_jax

if TYPE_CHECKING:
    from experiments.optimizers import Settings

Options = dict[str, Any]


def adamw(
    settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options, **own: Any
) -> optax.GradientTransformation:
    return optax.adamw(**dataclasses.asdict(settings.adamw) | {"learning_rate": rate} | own)


def after(first: Callable[[], optax.GradientTransformation], **own: Any) -> Callable:
    """Returns the builder of `first` followed by AdamW. `own` overrides AdamW's settings."""

    def build(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
        return optax.chain(first(), adamw(settings, rate, rest, placed, **own))

    return build


def adamw_tuned(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
    decay = settings.variants.tuned_weight_decay
    return adamw(settings, rate, rest, placed, weight_decay=decay)


def like_muon(variant: Callable[..., optax.GradientTransformation], **own: Any) -> Callable:
    """Returns the builder of a variant with Muon's settings. `own` overrides them."""

    def build(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
        muon = dataclasses.asdict(settings.muon) | {"learning_rate": rate} | rest | placed
        if "orthogonalizer" in own:
            del muon["ns_coeffs"], muon["ns_dtype"]
        if "other_optimizer" in own:
            muon = {name: value for name, value in muon.items() if not name.startswith("adam_")}
        reads = inspect.signature(variant).parameters
        return variant(**{name: value for name, value in muon.items() if name in reads} | own)

    return build


def on_hyperball(variant: Callable[..., optax.GradientTransformation]) -> Callable:
    """Returns the builder of a variant on the hyperball, without decay, which it would undo."""
    return like_muon(variant, constraint=muon_jax.hyperball(), weight_decay=0.0)


def equal_decay(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
    decay = settings.adamw.weight_decay
    return like_muon(muon_jax.muon, weight_decay=decay)(settings, rate, rest, placed)


def equal_shrink(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
    """Builds Muon with a decay such that a step shrinks weights as much as a step of AdamW."""
    theirs = rest["adam_learning_rate"]

    def decay(step: jax.Array) -> jax.Array:
        return settings.adamw.weight_decay * theirs(step) / rate(step)

    return like_muon(muon_jax.muon, weight_decay=decay)(settings, rate, rest, placed)


def optax_muon(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
    """Builds `optax.contrib.muon` for the same leaves and matrix axes as `muon_jax.muon`."""

    def matrices(params: Any) -> Any:
        def dimensions(label: str, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
            axes = optax.contrib.MuonDimensionNumbers((leaf.ndim - 2,), (leaf.ndim - 1,))
            return axes if label == "muon" else None

        return jax.tree.map(dimensions, muon_jax.label_params(params), params)

    muon = settings.muon
    return optax.contrib.muon(
        rate,
        beta=muon.beta,
        nesterov=muon.nesterov,
        weight_decay=muon.weight_decay,
        muon_weight_dimension_numbers=matrices,
        **{key: value for key, value in rest.items() if key != "adam_eps"},
    )


def low_rank(method: str, **own: Any) -> Callable:
    def build(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
        polar = muon_jax.TruncatedPolar(settings.variants.rank, method)
        return like_muon(muon_jax.muon, orthogonalizer=polar, **own)(settings, rate, rest, placed)

    return build


def muon_only(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
    return like_muon(muon_jax.muon)(settings, rate, {"other_optimizer": "frozen"}, placed)


def muon_split(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
    """Builds Muon with a matrix for each head of queries, keys and values, as in GLM-5."""
    spec = settings.attention_spec
    parts: dict[str, Any] = {"query": spec.heads}
    if isinstance(spec, muon_jax.MultiHeadLatent):
        parts["key_value"] = muon_jax.Interleaved((spec.nope, spec.value), together=False)
    else:
        parts |= dict.fromkeys(("key", "value"), spec.kv_heads or spec.heads)
    routing = [
        (f"attention/{name}/kernel", muon_jax.MatrixAxes(split_fan_out=each))
        for name, each in parts.items()
    ]
    return like_muon(muon_jax.muon, routing=routing)(settings, rate, rest, placed)


def rest(name: Literal["sgd", "lion"]) -> Callable:
    """Returns the builder of Muon beside SGD or Lion, with as much shrinkage as AdamW's."""

    def build(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
        other = getattr(settings.variants, f"{name}_learning_rate")
        scheduled = rest["adam_learning_rate"]
        factor = other / settings.adamw.learning_rate
        own = {
            "other_optimizer": name,
            "other_learning_rate": lambda step: factor * scheduled(step),
            "other_b1": settings.adamw.b1,
            "other_weight_decay": settings.adamw.weight_decay / factor,
        }
        return like_muon(muon_jax.muon, **own)(settings, rate, rest, placed)

    return build


def muon_rest(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
    """Builds Muon with `rate` as the rate of the AdamW beside it; Muon keeps its own."""
    factor = settings.muon.learning_rate / settings.adamw.learning_rate
    theirs = rest["adam_learning_rate"]
    swapped = rest | {"adam_learning_rate": rate}
    return like_muon(muon_jax.muon)(settings, lambda step: factor * theirs(step), swapped, placed)


def adamw_of(swept: Literal["muon", "other"]) -> Callable:
    """Returns the builder of AdamW with `rate` for hidden matrices (`"muon"`) or all others."""

    def build(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
        rates = dict.fromkeys(("muon", "other"), rest["adam_learning_rate"]) | {swept: rate}
        parts = {label: adamw(settings, of, rest, placed) for label, of in rates.items()}
        routing = placed.get("routing")
        return optax.partition(parts, lambda params: muon_jax.label_params(params, routing))

    return build


def dion2(variant: Callable[..., optax.GradientTransformation]) -> Callable:
    def build(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
        own = {"fraction": settings.variants.fraction}
        return like_muon(variant, **own)(settings, rate, rest, placed)

    return build


def soap(variant: Callable[..., optax.GradientTransformation]) -> Callable:
    def build(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
        own = {"every": settings.variants.soap_every}
        return like_muon(variant, **own)(settings, rate, rest, placed)

    return build


def fixed_table(build: Callable) -> Callable:
    """Returns the builder of the same optimizer with the embedding fixed at its initial value."""

    def is_table(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "embedding" in jax.tree_util.keystr(path), params
        )

    def fixed(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
        trained = build(settings, rate, rest, placed)
        return optax.chain(trained, optax.masked(optax.set_to_zero(), is_table))

    return fixed


def muonbp(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
    variants = settings.variants
    own = {"blocks": variants.blocks, "period": variants.period}
    return like_muon(muon_jax.muonbp, **own)(settings, rate, rest, placed)


def muonclip(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
    own = {"specs": settings.attention_spec, "threshold": settings.variants.clip_threshold}
    return like_muon(muon_jax.muonclip, **own)(settings, rate, rest, placed)


def dion(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
    decay = settings.muon.weight_decay
    return muon_jax.dion(rate, rank=settings.variants.rank, weight_decay=decay, **rest, **placed)


def splus(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
    every = settings.variants.eigenbases_every
    return muon_jax.splus(rate, every=every, average=0.99, **placed)


def splus_adamw(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
    return splus(settings, rate, {}, {"other_optimizer": "adamw"} | rest | placed)


def scion(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
    muon = settings.muon
    return muon_jax.scion(rate, ns_coeffs=muon.ns_coeffs, ns_dtype=muon.ns_dtype, **placed)


def gluon(settings: "Settings", rate: optax.Schedule, rest: Options, placed: Options):
    """Builds Gluon; by default its largest steps are Scion's, since L1 is 1 / Scion's radius."""
    given, half = settings.variants.gluon_smoothness, settings.variants.gluon_norm
    if given is None:
        hidden, tables, gains = ((half / radius, 1 / radius) for radius in (50.0, 3000.0, 1.0))
    else:
        hidden, tables, gains = given[:2], given[2:4], given[4:]
    smoothness = [("norm", gains), ("embedding|head", tables), ("", hidden)]
    own = {"ns_coeffs": settings.muon.ns_coeffs, "ns_dtype": settings.muon.ns_dtype}
    return muon_jax.gluon(rate, smoothness=smoothness, **own, **placed)
