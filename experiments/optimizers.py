"""The optimizers that the studies compare, by their names on the command line."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro

import muon_jax
from experiments import baselines
from experiments import builders as make
from experiments.schedules import Schedules
from experiments.settings import Average, Count, Decay, Part, Positive, Rate, Rule

ScheduleName = Literal[
    "jordan",
    "you",
    "polar_express",
    "polar_express_1.02",
    "cans",
    "aol",
    "deepseek_v4",
    "exact",
    "cubic",
]
ScaleName = Literal["spectral", "match_rms_adamw", "mup", "none"]
_RANK = Rule(
    "a whole number of at least 1, or a fraction greater than 0 and at most 1",
    lambda value: value >= 1 if isinstance(value, int) else 0 < value <= 1,
)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW for all parameters, or beside Muon for those that are not hidden matrices."""

    learning_rate: Rate = 1e-3
    """Learning rate after warm-up."""
    weight_decay: Decay = 1.0
    """Decoupled weight decay. Each step shrinks parameters by this × the learning rate."""
    b1: Average = 0.9
    """Decay rate of the first moment."""
    b2: Average = 0.98
    """Decay rate of the second moment."""
    eps: Positive = 1e-8
    """Constant added to the square root of the second moment."""


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon for the hidden matrices."""

    learning_rate: Rate = 0.02
    """Learning rate after warm-up."""
    weight_decay: Decay = 0.1
    """Decoupled weight decay. Each step shrinks matrices by this × the learning rate."""
    beta: Average = 0.95
    """Decay rate of the momentum."""
    nesterov: bool = True
    """Use Nesterov momentum."""
    ns_coeffs: ScheduleName = "jordan"
    """Coefficients of the Newton-Schulz iteration."""
    ns_dtype: Literal["bfloat16", "float32"] = "float32"
    """Precision of the matrix products in Newton-Schulz."""
    scale: ScaleName = "spectral"
    """Shape scale of the update, a function of fan_in and fan_out."""


@dataclasses.dataclass(frozen=True)
class Variants:
    """Settings of single variants of Muon and AdamW."""

    rank: Annotated[int | float, _RANK] = 0.25
    """dion, low_rank: rank, as a number or as a fraction of a matrix's shorter side."""
    blocks: tuple[Count, Count] = (2, 2)
    """muonbp: number of blocks along fan_in and fan_out."""
    period: Count = 5
    """muonbp: number of steps between orthogonalisations of the whole matrix."""
    clip_threshold: Positive = 100.0
    """muonclip: largest attention logit that is not clipped."""
    eigenbases_every: Count = 100
    """splus: number of steps between eigendecompositions."""
    soap_every: Count = 10
    """soap, soap_muon: number of steps between eigendecompositions."""
    fraction: Part = 0.25
    """dion2, dion3: fraction of a matrix's rows that each step orthogonalises."""
    gluon_norm: Positive = 1.0
    """gluon: dual norm of the gradient at which the step has half its maximal size, L0 / L1."""
    gluon_smoothness: tuple[Decay, Decay, Decay, Decay, Decay, Decay] | None = None
    """gluon: L0 and L1 of the hidden matrices, of embedding and head, and of the gains, as
    `python -m experiments.grok.smoothness` measures them. By default L1 is 1 / Scion's radius, and
    L0 is L1 times --variants.gluon-norm."""
    sgd_learning_rate: Rate = 0.1
    """muon_sgd: SGD's learning rate for all parameters except hidden matrices."""
    lion_learning_rate: Rate = 1e-3
    """muon_lion: Lion's learning rate for all parameters except hidden matrices."""
    tuned_weight_decay: Decay = 4.0
    """adamw_tuned: weight decay."""


class Arm(NamedTuple):
    """One of the optimizers that are compared.

    Attributes:
        about: A description in a few words.
        build: A function `builders.Given -> transformation`.
        rate: The default learning rate. None means Muon's, at which variants that differ from Muon
            in one respect are compared.
        eval_params: A function `(state, params) -> params` that returns the params to evaluate, if
            they differ from those that are trained.
        member: Whether it is a variant of Muon, and not a baseline or an ablation.
    """

    about: str
    build: make.Build
    rate: float | None = None
    eval_params: Callable[[Any, Any], Any] = lambda state, params: params
    member: bool = True


def clip_threshold(name: str, settings: "Settings") -> float | None:
    """Returns the threshold of an arm's QK-clip, or None if the arm has no QK-clip."""
    return settings.variants.clip_threshold if name == "muonclip" else None


# AdamW, Muon and its variants
_FAMILY: dict[str, Arm] = {
    "adamw": Arm("AdamW for all parameters", make.adamw),
    "muon": Arm("Muon for the hidden matrices", make.muon()),
    "adamw_rest": Arm(
        "AdamW, with the learning rate of all but the hidden matrices swept",
        make.adamw_of("other"),
        6e-3,
    ),
    "muon_rest": Arm(
        "Muon, with the learning rate of the AdamW beside it swept", make.muon_rest, 6e-3
    ),
    "muon_only": Arm("Muon, with all other parameters frozen", make.muon_only),
    "muon_sgd": Arm("Muon for hidden matrices, SGD for all other parameters", make.beside("sgd")),
    "muon_lion": Arm(
        "Muon for hidden matrices, Lion for all other parameters", make.beside("lion")
    ),
    "muon_bf16": Arm("Muon with momentum in bfloat16", make.muon(mu_dtype=jnp.bfloat16)),
    "muon_int8": Arm("Muon with momentum in int8", make.muon(mu_dtype=jnp.int8)),
    "muon_int4": Arm("Muon with momentum in int4", make.muon(mu_dtype=jnp.int4)),
    "muon_cautious": Arm("Muon with cautious decay", make.muon(cautious_weight_decay=True)),
    "muon_split": Arm(
        "Muon, with each head of queries, keys and values by itself",
        make.muon(chosen=make.split_heads),
    ),
    "polar": Arm(
        "Muon with the exact polar factor", make.muon(orthogonalizer=muon_jax.polar_factor)
    ),
    "low_rank": Arm("Muon restricted to the top singular triplets, by SVD", make.low_rank("svd")),
    "low_rank_subspace": Arm(
        "Muon restricted to the top singular triplets, by subspace iteration",
        make.low_rank("subspace"),
    ),
    "normuon": Arm("NorMuon", make.muon(muon_jax.normuon)),
    "adamuon": Arm("AdaMuon", make.muon(muon_jax.adamuon, scale="match_rms_adamw"), 0.02),
    "muonbp": Arm(
        "MuonBP: orthogonalises blocks, and the whole matrix periodically",
        make.muon(muon_jax.muonbp, make.of_variants(blocks="blocks", period="period")),
    ),
    "muonclip": Arm(
        "Muon with QK-clip",
        make.muon(
            muon_jax.muonclip,
            lambda of: {"specs": of.attention_spec, "threshold": of.variants.clip_threshold},
        ),
    ),
    "dion": Arm("Dion", make.dion),
    "dion2": Arm(
        "Dion2: orthogonalises a fraction of the rows",
        make.muon(muon_jax.dion2, make.of_variants(fraction="fraction")),
    ),
    "dion3": Arm(
        "Dion3: Dion2 with NorMuon's second moment",
        make.muon(muon_jax.dion3, make.of_variants(fraction="fraction")),
    ),
    "muonh": Arm("MuonH: Muon on the hyperball", make.on_hyperball(muon_jax.muon), 0.02),
    "normuonh": Arm("NorMuon on the hyperball", make.on_hyperball(muon_jax.normuon), 0.02),
    "muon_sphere": Arm(
        "MuonSphere: updates and weights of fixed spectral norm",
        make.muon(muon_jax.muon_sphere, weight_decay=0.0),
        0.02,
    ),
    "spel": Arm(
        "SPEL: weights with orthonormal rows or columns", make.muon(muon_jax.spel, weight_decay=0.0)
    ),
    "muown": Arm("Muown: Adam trains the norms of neurons", make.muon(muon_jax.muown)),
    "muon_eq": Arm("MuonEq: momentum with rows of equal norm", make.muon(muon_jax.muon_eq)),
    "muon_plus": Arm("Muon+: orthogonal factors of fixed norm", make.muon(muon_jax.muon_plus)),
    "muon_squared": Arm(
        "Muon²: Adam's second moment before orthogonalisation", make.muon(muon_jax.muon_squared)
    ),
    "namo": Arm("NAMO: one adaptive scale for each matrix", make.muon(muon_jax.namo), 0.08),
    "polargrad": Arm(
        "PolarGrad: updates scaled by the nuclear norm", make.muon(muon_jax.polargrad), 0.5
    ),
    "aurora": Arm("Aurora: polar factors with rows of equal norm", make.muon(muon_jax.aurora)),
    "soap": Arm(
        "SOAP: Adam in Shampoo's eigenbases",
        make.muon(muon_jax.soap, make.of_variants(every="soap_every")),
        6e-3,
    ),
    "soap_muon": Arm(
        "SOAP's whitening, then Muon",
        make.muon(muon_jax.soap_muon, make.of_variants(every="soap_every")),
    ),
    "splus": Arm(
        "SPlus, evaluated at its average of weights", make.splus, 0.8, muon_jax.evaluation_params
    ),
    "scion": Arm("Scion, unconstrained", make.scion, 1e-3),
    "gluon": Arm("Gluon: Scion with step sizes from smoothness constants", make.gluon, 2e-3),
}
# Parts of Muon, other readings of equal settings, and baselines
_ABLATIONS: dict[str, Arm] = {
    "low_rank_whole": Arm(
        "Muon of the top singular triplets, at the Frobenius norm of a whole update",
        make.low_rank("svd", after=muon_jax.snap_norm()),
    ),
    "splus_adamw": Arm(
        "SPlus for hidden matrices, AdamW for all other parameters",
        make.splus_adamw,
        0.8,
        muon_jax.evaluation_params,
    ),
    "muon_equal_decay": Arm(
        "Muon with AdamW's weight decay",
        make.muon(chosen=lambda of: {"weight_decay": of.adamw.weight_decay}),
    ),
    "muon_equal_shrink": Arm("Muon with AdamW's learning rate × weight decay", make.equal_shrink),
    "muon_one_step": Arm("Muon with one Newton-Schulz step", make.muon(ns_steps=1)),
    "optax_muon": Arm("optax.contrib.muon with the routing of muon_jax", make.optax_muon),
    "orthogonal": Arm("Muon without a shape scale", make.muon(scale="none")),
    "spectral": Arm(
        "Momentum scaled to Muon's spectral norm, not orthogonalised",
        make.muon(orthogonalizer=baselines.unit_spectral_norm),
    ),
    "adamw_tuned": Arm("AdamW with a high learning rate and weight decay", make.adamw_tuned, 0.01),
    "adamw_hidden": Arm(
        "AdamW, with the learning rate of the hidden matrices swept", make.adamw_of("muon"), 6e-3
    ),
    "orthogonal_gradient": Arm(
        "⊥Grad, then AdamW without weight decay, as published",
        make.after(baselines.orthogonal_gradient, weight_decay=0.0),
        1e-3,
    ),
    "adamw_fixed_table": Arm(
        "AdamW, with the embedding fixed as it starts", make.fixed_table(make.adamw), 1e-3
    ),
    "muon_fixed_table": Arm(
        "Muon, with the embedding fixed as it starts", make.fixed_table(make.muon())
    ),
    "grokfast": Arm("Grokfast-EMA, then AdamW", make.after(baselines.grokfast), 1e-3),
}
ARMS = _FAMILY | {name: arm._replace(member=False) for name, arm in _ABLATIONS.items()}

OptimizerName = Literal[*ARMS]

# The options `--rates.NAME`: one field for each arm that has no group of options in `Settings`.
Rates = dataclasses.make_dataclass(
    "Rates",
    [
        (
            name,
            Annotated[
                Rate if arm.rate else Rate | None,
                tyro.conf.arg(
                    help=f"{arm.about}{'' if arm.rate else '; by default --muon.learning-rate'}."
                ),
            ],
            dataclasses.field(default=arm.rate),
        )
        for name, arm in ARMS.items()
        if name not in ("adamw", "muon")
    ],
    frozen=True,
)
Rates.__module__ = __name__
Rates.__doc__ = "Learning rates of the other optimizers, after warm-up."


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of all arms. The config of a study inherits from them."""

    adamw: AdamW = dataclasses.field(default_factory=AdamW)
    """AdamW as a baseline, and beside the other optimizers for embedding, head and gains."""
    muon: Muon = dataclasses.field(default_factory=Muon)
    """Muon, which optimizes the hidden matrices."""
    variants: Variants = dataclasses.field(default_factory=Variants)
    """Settings of single variants of Muon and AdamW."""
    rates: Rates = dataclasses.field(default_factory=Rates)  # type: ignore[valid-type]
    """Learning rates of all other optimizers, after warm-up."""

    @property
    def attention_spec(self) -> muon_jax.GroupedQuery | muon_jax.MultiHeadLatent:
        """The attention specification of the study's model, which QK-clip needs."""
        raise NotImplementedError

    def rate(self, name: OptimizerName) -> float:
        """Returns the learning rate of an arm after warm-up."""
        own = getattr(self.rates, name, None)
        return getattr(self, name, self.muon).learning_rate if own is None else own

    def known_rates(self) -> dict[str, float]:
        """Returns `rates` as numbers, so that a run's files do not depend on later defaults."""
        return {field.name: self.rate(field.name) for field in dataclasses.fields(self.rates)}


def build(
    name: OptimizerName,
    settings: Settings,
    schedule: optax.Schedule,
    rate: float | jax.Array | None = None,
    *,
    course: Schedules | None = None,
    steps: int = 0,
    **placed: Any,
) -> optax.GradientTransformationExtraArgs:
    """Builds the optimizer of this name.

    Args:
        name: a key of `ARMS`.
        settings: of all arms.
        schedule: factor of the learning rates, from the step.
        rate: takes the place of the arm's own learning rate; AdamW's for the other leaves stays.
            It may be traced, so that one program serves all rates.
        course: what else changes on the way, over so many `steps`; by default nothing.
        **placed: `routing`, and `mesh` and `shardings` of the params, as `muon_jax.muon` takes
            them.
    """

    def scheduled(learning_rate: float | jax.Array) -> optax.Schedule:
        return lambda step: learning_rate * schedule(step)

    own = scheduled(settings.rate(name) if rate is None else rate)
    course = course or Schedules()
    course.check(name)
    given = course.of(settings, steps)
    rest = {f"adam_{key}": value for key, value in dataclasses.asdict(given.adamw).items()}
    rest["adam_learning_rate"] = scheduled(settings.adamw.learning_rate)
    tx = ARMS[name].build(make.Given(given, own, rest, placed))
    return course.averaged(optax.with_extra_args_support(tx))
