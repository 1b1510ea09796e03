"""Builders of the optimizers in `experiments.optimizers`, from a study's settings."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax

import muon_jax

Options = dict[str, Any]


class Given(NamedTuple):
    """What an optimizer is built from.

    Attributes:
        settings: The `optimizers.Settings` of the study.
        rate: The schedule of the optimizer's own learning rate.
        rest: AdamW's arguments for leaves that are not hidden matrices.
        placed: The arguments for routing and sharding.
    """

    settings: Any
    rate: optax.Schedule
    rest: Options
    placed: Options


Build = Callable[[Given], optax.GradientTransformation]


def muon(
    variant: Callable[..., optax.GradientTransformation] = muon_jax.muon,
    chosen: Callable[[Any], Options] = lambda settings: {},
    **own: Any,
) -> Build:
    """Returns the builder of Muon or a variant with Muon's settings.

    Args:
        variant: The function that makes the transformation. It gets those settings that it takes.
        chosen: Returns further arguments, or other values, from the study's settings.
        own: Further arguments, or other values, that do not depend on settings.
    """

    def build(given: Given) -> optax.GradientTransformation:
        further = chosen(given.settings) | own
        muon = dataclasses.asdict(given.settings.muon) | {"learning_rate": given.rate}
        muon |= given.rest | given.placed
        if "orthogonalizer" in further:
            del muon["ns_coeffs"], muon["ns_dtype"]
        if "other_optimizer" in further:
            muon = {name: value for name, value in muon.items() if not name.startswith("adam_")}
        takes = inspect.signature(variant).parameters
        return variant(**{name: value for name, value in muon.items() if name in takes} | further)

    return build


def of_variants(**names: str) -> Callable[[Any], Options]:
    """Returns a function of the settings that gives arguments by their names in `Variants`."""
    return lambda settings: {key: getattr(settings.variants, of) for key, of in names.items()}


def on_hyperball(variant: Callable[..., optax.GradientTransformation]) -> Build:
    """Returns the builder of a variant on the hyperball, without decay, which it would undo."""
    return muon(variant, constraint=muon_jax.hyperball(), weight_decay=0.0)


def low_rank(method: str, **own: Any) -> Build:
    """Returns the builder of Muon restricted to the top singular triplets."""

    def polar(settings: Any) -> Options:
        return {"orthogonalizer": muon_jax.TruncatedPolar(settings.variants.rank, method)}

    return muon(muon_jax.muon, polar, **own)


def split_heads(settings: Any) -> Options:
    """Returns a routing with a matrix for each head of queries, keys and values, as in GLM-5."""
    spec = settings.attention_spec
    parts: dict[str, Any] = {"query": spec.heads}
    if isinstance(spec, muon_jax.MultiHeadLatent):
        parts["key_value"] = muon_jax.Interleaved((spec.nope, spec.value), together=False)
    else:
        parts |= dict.fromkeys(("key", "value"), spec.kv_heads or spec.heads)
    axes = {name: muon_jax.MatrixAxes(split_fan_out=each) for name, each in parts.items()}
    return {"routing": [(f"attention/{name}/kernel", of) for name, of in axes.items()]}


def beside(name: Literal["sgd", "lion"]) -> Build:
    """Returns the builder of Muon beside SGD or Lion, with as much shrinkage as AdamW's."""

    def build(given: Given) -> optax.GradientTransformation:
        adamw, scheduled = given.settings.adamw, given.rest["adam_learning_rate"]
        factor = getattr(given.settings.variants, f"{name}_learning_rate") / adamw.learning_rate
        own = {
            "other_optimizer": name,
            "other_learning_rate": lambda step: factor * scheduled(step),
            "other_b1": adamw.b1,
            "other_weight_decay": adamw.weight_decay / factor,
        }
        return muon(**own)(given)

    return build


def muon_only(given: Given) -> optax.GradientTransformation:
    return muon()(given._replace(rest={"other_optimizer": "frozen"}))


def muon_rest(given: Given) -> optax.GradientTransformation:
    """Builds Muon with `rate` as the rate of the AdamW beside it; Muon keeps its own."""
    factor = given.settings.muon.learning_rate / given.settings.adamw.learning_rate
    theirs = given.rest["adam_learning_rate"]
    rest = given.rest | {"adam_learning_rate": given.rate}
    return muon()(given._replace(rate=lambda step: factor * theirs(step), rest=rest))


def equal_shrink(given: Given) -> optax.GradientTransformation:
    """Builds Muon with a decay such that a step shrinks weights as much as a step of AdamW."""
    theirs = given.rest["adam_learning_rate"]

    def decay(step: jax.Array) -> jax.Array:
        return given.settings.adamw.weight_decay * theirs(step) / given.rate(step)

    return muon(weight_decay=decay)(given)


def optax_muon(given: Given) -> optax.GradientTransformation:
    """Builds `optax.contrib.muon` for the same leaves and matrix axes as `muon_jax.muon`."""

    def matrices(params: Any) -> Any:
        def dimensions(label: str, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
            axes = optax.contrib.MuonDimensionNumbers((leaf.ndim - 2,), (leaf.ndim - 1,))
            return axes if label == "muon" else None

        return jax.tree.map(dimensions, muon_jax.label_params(params), params)

    muon = given.settings.muon
    return optax.contrib.muon(
        given.rate,
        beta=muon.beta,
        nesterov=muon.nesterov,
        weight_decay=muon.weight_decay,
        muon_weight_dimension_numbers=matrices,
        **{key: value for key, value in given.rest.items() if key != "adam_eps"},
    )


def adamw(given: Given, **own: Any) -> optax.GradientTransformation:
    """Builds AdamW for all parameters. `own` overrides its settings."""
    settings = dataclasses.asdict(given.settings.adamw)
    return optax.adamw(**settings | {"learning_rate": given.rate} | own)


def adamw_tuned(given: Given) -> optax.GradientTransformation:
    return adamw(given, weight_decay=given.settings.variants.tuned_weight_decay)


def after(first: Callable[[], optax.GradientTransformation], **own: Any) -> Build:
    """Returns the builder of `first` followed by AdamW. `own` overrides AdamW's settings."""
    return lambda given: optax.chain(first(), adamw(given, **own))


def adamw_of(swept: Literal["muon", "other"]) -> Build:
    """Returns the builder of AdamW with `rate` for hidden matrices (`"muon"`) or all others."""

    def build(given: Given) -> optax.GradientTransformation:
        rates = dict.fromkeys(("muon", "other"), given.rest["adam_learning_rate"])
        rates[swept] = given.rate
        parts = {label: adamw(given, learning_rate=rate) for label, rate in rates.items()}
        routing = given.placed.get("routing")
        return optax.partition(parts, lambda params: muon_jax.label_params(params, routing))

    return build


def fixed_table(build: Build) -> Build:
    """Returns the builder of the same optimizer with the embedding fixed at its initial value."""

    def is_table(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "embedding" in jax.tree_util.keystr(path), params
        )

    return lambda given: optax.chain(build(given), optax.masked(optax.set_to_zero(), is_table))


def dion(given: Given) -> optax.GradientTransformation:
    rank, decay = given.settings.variants.rank, given.settings.muon.weight_decay
    return muon_jax.dion(given.rate, rank=rank, weight_decay=decay, **given.rest, **given.placed)


def splus(given: Given, **rest: Any) -> optax.GradientTransformation:
    """Builds SPlus, by default for all parameters."""
    every = given.settings.variants.eigenbases_every
    return muon_jax.splus(given.rate, every=every, average=0.99, **rest, **given.placed)


def splus_adamw(given: Given) -> optax.GradientTransformation:
    return splus(given, other_optimizer="adamw", **given.rest)


def scion(given: Given) -> optax.GradientTransformation:
    muon = given.settings.muon
    own = {"ns_coeffs": muon.ns_coeffs, "ns_dtype": muon.ns_dtype}
    return muon_jax.scion(given.rate, **own, **given.placed)


def gluon(given: Given) -> optax.GradientTransformation:
    """Builds Gluon; by default its largest steps are Scion's, since L1 is 1 / Scion's radius."""
    variants, muon = given.settings.variants, given.settings.muon
    if (measured := variants.gluon_smoothness) is None:
        half = variants.gluon_norm
        hidden, tables, gains = ((half / radius, 1 / radius) for radius in (50.0, 3000.0, 1.0))
    else:
        hidden, tables, gains = measured[:2], measured[2:4], measured[4:]
    smoothness = [("norm", gains), ("embedding|head", tables), ("", hidden)]
    own = {"ns_coeffs": muon.ns_coeffs, "ns_dtype": muon.ns_dtype}
    return muon_jax.gluon(given.rate, smoothness=smoothness, **own, **given.placed)
