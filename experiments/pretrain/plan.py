"""The facts of a pretraining that `language.planning` plans from."""

import functools

import jax

from experiments import optimizers
from experiments.language import sharding
from experiments.language.dry_run import many
from experiments.language.planning import Case
from experiments.language.sharding import on_device
from experiments.optimizers import OptimizerName
from experiments.pretrain.config import Training
from experiments.pretrain.costs import WITHOUT_NEWTON_SCHULZ, model_flops
from experiments.pretrain.step import Trainer
from experiments.report.figures import optimizer_label


def case(config: Training, optimizer: OptimizerName, mesh: jax.sharding.Mesh) -> Case:
    """Returns the case of a training. The memory of its passes does not include activations.

    Raises:
        ValueError: If the mesh does not divide an axis.
    """
    trainer, model = Trainer(config, optimizer, mesh, config.data.vocabulary), config.model
    params = trainer.abstract.params
    value = model.value if model.attention == "latent" else model.key_columns
    routed = sum(x.size for x in jax.tree.leaves(_experts(params)))
    savings = {
        "use --model.remat full": model.remat != "full",
        "use --model.dtype bfloat16": model.dtype == "float32",
        "use --muon.ns-dtype bfloat16": config.muon.ns_dtype == "float32",
    }
    return Case(
        config=config,
        name=optimizer,
        trainer=trainer,
        again=case,
        muon=None if optimizer in WITHOUT_NEWTON_SCHULZ else config.muon,
        routing=trainer.routing,
        labels=trainer.labels,
        heads=(model.heads, model.key_columns, value),
        flops=model_flops(config, params),
        idle=routed - routed * model.active // model.experts,
        arithmetic=f"{model.dtype}, remat {model.remat}",
        passes=_passes(trainer),
        savings=[words for words, helps in savings.items() if helps],
        optimizers=("adamw", "muon"),
        updates=functools.partial(_updates, trainer),
    )


def _experts(params):
    """Returns the subtree of the routed experts, with their paths; empty without experts."""
    if "moe_layers" not in params:
        return {}
    experts = params["moe_layers"]["feed_forward"]["experts"]
    return {"moe_layers": {"feed_forward": {"experts": experts}}}


def _passes(trainer: Trainer) -> dict[str, int]:
    config = trainer.config
    size = on_device(trainer.abstract_windows)
    batch = {"batch, without activations (see --compile-only)": size}
    if config.model.dtype == "float32":
        return batch
    with jax.set_mesh(trainer.mesh):
        compute = jax.eval_shape(trainer.in_model_dtype, trainer.abstract.params)
    placed = sharding.placed(compute, trainer.shardings.params)
    return {f"params, {config.model.dtype}": on_device(placed)} | batch


def _updates(trainer: Trainer):
    config, params, specs = trainer.config, trainer.abstract.params, trainer.specs
    trees = [(trainer.optimizer, params, specs)]
    if experts := _experts(params):
        trees.append(("muon", experts, _experts(specs)))
    for name, tree, its in trees:
        placed = {"mesh": trainer.mesh, "shardings": its, "routing": trainer.routing}
        course = {"course": config.schedules, "steps": config.steps}
        yield optimizers.build(name, config, trainer.schedule, **course, **placed), tree, its


def schedule_text(config: Training, names: tuple[OptimizerName, ...]) -> str:
    """Returns a description of the learning rates, the schedule and the number of tokens."""
    rates = ", ".join(f"{optimizer_label(name)} {config.rate(name):g}" for name in names)
    warmup = f"warm-up over {many(config.warmup, 'step')}"
    course = f"{warmup}, then {config.decay}"
    if config.decay != "constant":
        course += f" to {config.final_lr_fraction:g}"
    if config.cooldown:
        course += f", then linearly to 0 in the last {many(config.cooldown, 'step')}"
    return (
        f"Learning rates: {rates}. Parameters that another optimizer leaves to AdamW: "
        f"{config.adamw.learning_rate:g}.\n"
        f"Schedule: {course}.\n"
        f"{config.steps:,} steps of {config.batch:,} sequences of {config.context:,} tokens, in "
        f"{many(config.accumulate, 'microbatch')}: {config.tokens_per_step:,} tokens per step, "
        f"{config.steps * config.tokens_per_step:,} in total."
    )
