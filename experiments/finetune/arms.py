"""The four optimizers that are compared, and the quirks of the code released with the study.

By default, all arms have the same learning rate, warm-up and weight decay, and Muon's updates are
scaled to the root mean square of AdamW's. The quirks, one by one or all of them with
`AS_PUBLISHED`, reproduce the published comparison.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

import muon_jax
from experiments.finetune import lora, model
from experiments.finetune.architecture import Architecture
from experiments.finetune.config import ArmName, Lora, Optimizer, QuirkName, Training
from experiments.language.mesh import make_mesh
from experiments.schedules import warmup_then_decay

ARMS: dict[ArmName, str] = {
    "adamw": "AdamW for all parameters",
    "muon_frozen1d": (
        "Muon for the hidden matrices, AdamW for embedding and head; gains and biases are frozen"
    ),
    "muon_adamw": "Muon for the hidden matrices, AdamW for embedding, head, gains and biases",
    "muonclip": "Muon and AdamW as before, with QK-clip of the gains of QK-norm, if there is one",
}


class Quirk(NamedTuple):
    """A peculiarity of the published code: its name, the arms it changes, and what it does."""

    name: str
    arms: tuple[ArmName, ...]
    about: str


# KingNish, "Muon vs MuonClip vs Muon+AdamW for Fine-Tuning", Hugging Face blog, December 2025.
QUIRKS: dict[QuirkName, Quirk] = {
    "warmup_of_muonclip_alone": Quirk(
        "warm-up for MuonClip alone",
        ("adamw", "muon_frozen1d", "muon_adamw"),
        "only muonclip has a warm-up; the others begin at the full learning rate",
    ),
    "decay_apart": Quirk(
        "unequal decay",
        ("adamw", "muon_frozen1d", "muon_adamw"),  # SGD's params never decay
        "weight decay is 0.1 for Muon's parameters, 0.01 for AdamW's, and 0 for SGD's",
    ),
    "spectral_scale": Quirk(
        "the spectral scale",
        ("muon_frozen1d", "muon_adamw"),
        "updates of muon_frozen1d and muon_adamw have the spectral norm √max(1, fan_out/fan_in) "
        "instead of AdamW's RMS; for Qwen3 4B they are 1/10 to 1/20 as large",
    ),
    "scale_in_root": Quirk(
        "the scale under the root",
        ("muonclip",),
        "updates of muonclip are scaled by √(0.2·max(fan_in, fan_out)), 2.24 times AdamW's RMS, "
        "instead of 0.2·√max(fan_in, fan_out)",
    ),
    "sgd_of_gains": Quirk(
        "SGD of the gains",
        ("muonclip",),
        "with muonclip, SGD with momentum trains all that is not a matrix",
    ),
    "no_clip": Quirk(
        "a clip that never runs",
        ("muonclip",),
        "muonclip finds no layer to clip, so it never clips",
    ),
    "frozen_in_norm": Quirk(
        "frozen gradients in the norm",
        ("muon_frozen1d",),
        "the gradient norm, as logged and as used for clipping, includes frozen parameters",
    ),
    "muon_of_tables": Quirk(
        "Muon of embedding and head",
        ("muon_frozen1d", "muon_adamw", "muonclip"),
        "Muon trains embedding and head like hidden matrices",
    ),
}

# The settings of that comparison.
AS_PUBLISHED = Optimizer(learning_rate=5e-5, quirks=tuple(QUIRKS))

_MUON_DECAY, _ADAMW_DECAY = 0.1, 0.01

GROUPS = ("embedding", "matrices", "head", "gains", "biases")


class Arm(NamedTuple):
    """The optimizer of one training."""

    labels: Any  # which optimizer updates each param: "muon", "adamw", "sgd" or "frozen"
    counted: Any  # whether each param is part of the gradient norm
    schedule: optax.Schedule  # a factor of the learning rate
    # `rate -> transformation`; the rate after warm-up may be traced.
    build: Callable[[float | jax.Array], optax.GradientTransformationExtraArgs]
    clips_at: float | None  # threshold of its QK-clip; None without one


def make(name: ArmName, config: Training, architecture: Architecture, **placed: Any) -> Arm:
    """Returns the arm of a name.

    Args:
        name: A key of `ARMS`.
        config: The settings of optimizer and schedule.
        architecture: The architecture of the model.
        **placed: `mesh` and `shardings` of the params, as for `muon_jax.muon`.
    """
    settings = config.optimizer
    params, _ = split(name, config, architecture, model.shapes(architecture, config.lora))
    quirks = settings.quirks
    late = "warmup_of_muonclip_alone" in quirks and name != "muonclip"
    schedule = warmup_then_decay(
        0 if late else config.warmup,
        config.steps,
        config.decay,
        config.final_lr_fraction,
        wsd_share=config.schedules.wsd_share,
    )
    if name == "adamw":
        labels = jax.tree.map(lambda x: "adamw", params)
    else:
        labels = muon_jax.label_params(params, routing(name, settings, config.lora, architecture))
        other = _rest(name, settings)
        labels = jax.tree.map(lambda x: other if x == "other" else x, labels)
    counts_frozen = "frozen_in_norm" in quirks
    return Arm(
        labels,
        jax.tree.map(lambda label: counts_frozen or label != "frozen", labels),
        schedule,
        lambda rate: config.schedules.averaged(
            _transformation(name, config, architecture, schedule, placed, rate)
        ),
        settings.clip_threshold if _clips(name, settings) else None,
    )


def _transformation(
    name: ArmName,
    config: Training,
    architecture: Architecture,
    schedule: optax.Schedule,
    placed: dict[str, Any],
    rate: float | jax.Array,
) -> optax.GradientTransformationExtraArgs:
    settings, course = config.optimizer, config.schedules

    def scheduled(step: jax.Array) -> jax.Array:
        return rate * schedule(step)

    decay = rest_decay = settings.weight_decay
    if "decay_apart" in settings.quirks:
        decay, rest_decay = _MUON_DECAY, _ADAMW_DECAY
    decay, rest_decay = (course.decay(x, config.steps) for x in (decay, rest_decay))
    adam = {"b1": settings.b1, "b2": settings.b2, "eps": settings.eps, "weight_decay": rest_decay}
    if name == "adamw":
        return optax.with_extra_args_support(optax.adamw(scheduled, **adam))
    rest = _rest(name, settings)
    own = {f"adam_{key}": value for key, value in adam.items()}
    if rest == "sgd":
        own = {"other_b1": settings.b1, "other_weight_decay": 0.0}
    muon = muon_jax.muon(
        scheduled,
        beta=course.momentum(settings.beta),
        ns_coeffs=settings.ns_coeffs,
        ns_dtype=settings.ns_dtype,
        scale=_scale(name, settings.quirks),
        weight_decay=decay,
        other_optimizer=rest,
        routing=routing(name, settings, config.lora, architecture),
        **own,
        **placed,
    )
    if not _clips(name, settings):
        return muon
    spec = model.attention_spec(architecture, settings.clip_projections)
    return optax.chain(muon, muon_jax.qk_clip(spec, threshold=settings.clip_threshold))


def _clips(name: ArmName, settings: Optimizer) -> bool:
    return name == "muonclip" and "no_clip" not in settings.quirks


def _rest(name: ArmName, settings: Optimizer) -> str:
    return "sgd" if name == "muonclip" and "sgd_of_gains" in settings.quirks else "adamw"


def check(name: ArmName, config: Training, architecture: Architecture) -> None:
    """Raises a ValueError where LoRA freezes what the arm has to clip."""
    settings = config.optimizer
    of_projections = settings.clip_projections or not architecture.qk_norm
    if config.lora.rank and _clips(name, settings) and of_projections:
        raise ValueError(
            f"--lora.rank {config.lora.rank} freezes the projections, and muonclip scales W_q and "
            f"W_k of this {architecture.family}. Use --optimizers adamw muon_adamw, or --lora.rank "
            "0."
        )


def split(
    name: ArmName, config: Training, architecture: Architecture, tree: model.Params
) -> tuple[model.Params, model.Params]:
    """Of a tree like the params, what the arm changes, and what LoRA freezes.

    QK-clip scales gains; these are not trained beside adapters.
    """
    clipped: Any = ()
    if architecture.qk_norm and _clips(name, config.optimizer):
        clipped = model.attention_spec(architecture).qk_norm
    return lora.split(tree, config.lora, clipped)


@functools.cache  # since it cannot be traced inside a compiled step
def routing(name: ArmName, settings: Optimizer, of: Lora, architecture: Architecture) -> Any:
    """Returns which params Muon updates, by the arm, the quirks and the params' use in the loss."""
    config = Training(optimizer=settings, lora=of)
    params, frozen = split(name, config, architecture, model.shapes(architecture, of))
    rules: list[tuple[str, Any]] = []
    vectors = any(path[-1] in ("scale", "bias") for path in flatten_dict(params))
    if vectors and (name == "muon_frozen1d" or of.rank):
        rules.append((r"/(scale|bias)$", "frozen"))
    if "muon_of_tables" in settings.quirks and not of.rank:
        # PyTorch stores an embedding as (vocabulary, hidden), read as (fan_out, fan_in).
        rules.append((r"^embedding/", muon_jax.MatrixAxes(fan_in=1, fan_out=0)))
        if not architecture.tied:
            rules.append((r"^head/", muon_jax.MatrixAxes()))
    losses = model.LanguageModel(architecture, lora=of).losses
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)

    def loss_of(params: Any, frozen: Any, *given: jax.Array) -> Any:
        return losses(lora.join(params, frozen), *given)

    with jax.set_mesh(make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        return muon_jax.trace_routing(loss_of, params, frozen, tokens, tokens, tokens, rules=rules)


def _scale(name: ArmName, quirks: tuple[QuirkName, ...]) -> Any:
    if name == "muonclip" and "scale_in_root" in quirks:
        return lambda fan_in, fan_out: math.sqrt(0.2 * max(fan_in, fan_out))
    if name != "muonclip" and "spectral_scale" in quirks:
        return "spectral"
    return "match_rms_adamw"


def by_group(tree: Any, what: Callable[[list[jax.Array]], Any]) -> dict[str, Any]:
    """Applies `what` to the leaves of each of the `GROUPS` in a tree like the params."""
    leaves: dict[str, list[jax.Array]] = {group: [] for group in GROUPS}
    for path, leaf in flatten_dict(tree).items():
        table = path[0] if path[0] in GROUPS else "matrices"
        leaves[{"scale": "gains", "bias": "biases"}.get(path[-1], table)].append(leaf)
    return {group: what(of) for group, of in leaves.items() if of}


norm = optax.tree.norm


def rms(leaves: list[jax.Array]) -> jax.Array:
    """Returns the root mean square of all entries together, float32."""
    return norm(leaves) / jnp.sqrt(jnp.float32(sum(x.size for x in leaves)))
