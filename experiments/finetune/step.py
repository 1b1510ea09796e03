"""One fine-tuning step: microbatches → gradient → guard → optimizer.

The loss is the mean over all trained-on tokens of a step, over all microbatches and devices.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import muon_jax
from experiments.finetune import arms, lora, model
from experiments.finetune.architecture import Architecture
from experiments.finetune.config import ArmName, Training
from experiments.finetune.model import LanguageModel, Params
from experiments.finetune.packing import Batch
from experiments.language import attention, guard, sharding, trainer
from experiments.language.guard import Guard
from experiments.language.processes import place_whole


class State(NamedTuple):
    """The state of a training; `step` counts all batches, including skipped ones."""

    step: jax.Array
    params: Params
    opt_state: Any
    guard: Guard
    frozen: Params  # in the model's dtype: with LoRA all but the adapters


class Trainer(trainer.Trainer):
    """The compiled functions of one fine-tuning, and the shardings of their arrays.

    Args:
        config: The settings, with known `steps` and `warmup`.
        arm: The name of the optimizer.
        architecture: The architecture of the model.
        mesh: The mesh, from `mesh.make_mesh`.

    Attributes:
        places: The shardings of the model's params, which have no adapters.

    Raises:
        ValueError: As for `arms.check`, or if the mesh does not divide an axis.
    """

    def __init__(
        self, config: Training, arm: ArmName, architecture: Architecture, mesh: jax.sharding.Mesh
    ):
        if not config.steps or config.warmup is None:
            raise ValueError("The config must have steps and warm-up; use `config.with_steps`.")
        self.config, self.name, self.architecture = config, arm, architecture
        arms.check(arm, config, architecture)
        self.model = LanguageModel(architecture, config.dtype, config.remat, config.lora)
        specs, frozen = self._split(check(config, architecture, mesh))
        self._wanted = model.shapes(architecture, config.lora)
        self.places = model.shardings(architecture, mesh)
        placed = {"mesh": mesh, "shardings": specs} if arm != "adamw" else {}
        self.arm = arms.make(arm, config, architecture, **placed)
        self.clips_at = self.arm.clips_at
        shape = config.accumulate, config.microbatch, config.context
        window = jax.ShapeDtypeStruct(shape, jnp.int32)
        super().__init__(
            config,
            mesh,
            rate=config.optimizer.learning_rate,
            params=self._split(self._wanted)[0],
            specs=specs,
            begin=model.shapes(architecture),
            windows=Batch(window, window, window),
            shows_logits=attention.shows_logits(
                mesh, config.context, architecture.head_dim, config.dtype, packed=True
            ),
            frozen=frozen,
        )
        whole = lora.join(self.shardings.params, self.shardings.frozen)
        donated = () if frozen and config.dtype != "float32" else 0
        self._compiled_start = jax.jit(
            self._start,
            in_shardings=(self.places,),
            out_shardings=self.shardings,
            donate_argnums=donated,
        )
        self._averaged = jax.jit(muon_jax.evaluation_params, out_shardings=self.shardings.params)
        self._compiled_evaluate = jax.jit(
            self._evaluate,
            in_shardings=(whole, self.windows),
            out_shardings=self._whole,
        )
        self._compiled_merge = jax.jit(
            functools.partial(lora.merge, lora=config.lora),
            in_shardings=(whole,),
            out_shardings=self.places,
        )

    def _split(self, tree: Params) -> tuple[Params, Params]:
        return arms.split(self.name, self.config, self.architecture, tree)

    def exported(self, state: State) -> Params:
        """Params of the architecture, without adapters, which compute what `evaluated` does."""
        if not self.config.lora.rank:
            return self.evaluated(state)
        with jax.set_mesh(self.mesh):
            return self._compiled_merge(self.evaluated(state))

    def place(self, batch: Batch) -> Batch:
        """Places a step's batch, of which this process has its `share`: `(microbatches, B, T)`."""
        return Batch(*map(self.share.place, batch))

    def place_whole(self, batch: Batch) -> Batch:
        """Places one microbatch for evaluation, which every process has in full."""
        return Batch(*(place_whole(x[None], self.windows) for x in batch))

    def start(self, params: Params) -> State:
        """Returns the state before the first step. `params`, sharded as `places`, are donated."""
        with jax.set_mesh(self.mesh):
            return self._compiled_start(params)

    def evaluated(self, state: State) -> Params:
        """Returns all params, adapters beside their kernels, or their average if one is kept."""
        params = state.params
        if self.config.schedules.average is not None:
            params = self._averaged(state.opt_state, params)
        return lora.join(params, state.frozen)

    def evaluate(self, params: Params, windows: Batch) -> dict[str, jax.Array]:
        """Returns the `loss` in nats and how many are `correct`, summed over `learnt` tokens."""
        with jax.set_mesh(self.mesh):
            return self._compiled_evaluate(params, windows)

    def _start(self, params: Params) -> State:
        tx = self.arm.build(self.config.optimizer.learning_rate)
        params, frozen = self._split(lora.begin(params, self._wanted, self.config.seed))
        frozen = jax.tree.map(lambda x: x.astype(self.config.dtype), frozen)
        return State(jnp.zeros([], jnp.int32), params, tx.init(params), guard.begin(), frozen)

    def _step(
        self, state: State, windows: Batch, rate: jax.Array, look: bool = False
    ) -> tuple[State, dict[str, Any]]:
        loss, gradient, seen = self._gradient(state.params, state.frozen, windows, look)
        counted = jax.tree.map(
            lambda g, counts: g if counts else jnp.zeros_like(g), gradient, self.arm.counted
        )
        norm = optax.tree.norm(counted)
        updates_before = state.step - state.guard.skipped
        taken, guarded = guard.judge(state.guard, updates_before, loss, norm)
        clipping = jnp.minimum(1.0, self.config.clip / jnp.maximum(norm, 1e-30))

        updates, opt_state = self.arm.build(rate).update(
            jax.tree.map(lambda g: clipping * g, counted),
            state.opt_state,
            state.params,
            max_logits=seen["max_logits"],
        )
        new = optax.apply_updates(state.params, updates), opt_state
        params, opt_state = guard.choose(taken, new, (state.params, state.opt_state))
        size = arms.by_group(updates, arms.rms)
        size = jax.tree.map(lambda rms: jnp.where(taken, rms, 0.0), size)
        learnt, correct = seen["learnt"], seen["correct"]
        metrics = {
            "loss": loss,
            "accuracy": jnp.sum(correct) / jnp.maximum(jnp.sum(learnt), 1),
            # As in trl, the mean over microbatches, whatever their numbers of trained-on tokens.
            "mean_token_accuracy": jnp.mean(correct / jnp.maximum(learnt, 1)),
            "learnt": jnp.sum(learnt),
            "gradient_norm": norm,
            "gradient_norms": arms.by_group(gradient, arms.norm),
            "update_rms": size,
            "max_logit": attention.largest_known(seen["max_logits"], self._threshold(look)),
            "learning_rate": rate * self.arm.schedule(updates_before),
            "taken": taken,
            "skipped": guarded.skipped,
            "nonfinite_in_a_row": guarded.in_a_row,
        }
        return State(state.step + 1, params, opt_state, guarded, state.frozen), metrics

    def _gradient(
        self, params: Params, frozen: Params, windows: Batch, look: bool = False
    ) -> tuple[jax.Array, Params, dict[str, Any]]:
        """Returns the mean loss over all trained-on tokens, its gradient and the observations."""
        told = look or self.clips_at is not None

        def loss_of(params: Params, *given: jax.Array) -> Any:
            whole, threshold = lora.join(params, frozen), self._threshold(look)
            return self.model.loss(whole, *given, max_logits=told, threshold=threshold)

        total = jnp.maximum(jnp.sum(windows.targets >= 0), 1).astype(jnp.float32)

        def microbatch(windows: Batch) -> tuple[jax.Array, Params, dict[str, Any]]:
            (loss, found), gradient = jax.value_and_grad(loss_of, has_aux=True)(
                params, *windows, total
            )
            # Makes XLA sum shards of the gradient, not whole gradients on every device.
            gradient = jax.tree.map(jax.lax.with_sharding_constraint, gradient, self.specs)
            gradient = jax.lax.optimization_barrier(gradient)
            seen = {
                "learnt": jnp.sum(windows.targets >= 0),
                "correct": jnp.sum(found.correct),
                "max_logits": found.max_logits,
            }
            return loss, gradient, seen

        if self.config.accumulate == 1:
            loss, gradient, seen = microbatch(jax.tree.map(lambda x: x[0], windows))
            return loss, gradient, seen | {k: seen[k][None] for k in ("learnt", "correct")}

        zeros = jnp.zeros([]), jax.tree.map(jnp.zeros_like, params)
        (loss, gradient), seen = trainer.sum_microbatches(microbatch, windows, zeros)
        largest = jax.tree.map(lambda x: jnp.max(x, axis=0), seen["max_logits"])
        return loss, gradient, seen | {"max_logits": largest}

    def _evaluate(self, params: Params, windows: Batch) -> dict[str, jax.Array]:
        def sums(windows: Batch) -> dict[str, jax.Array]:
            found = self.model.losses(params, *windows)
            learnt = windows.targets >= 0
            return {
                "loss": jnp.sum(found.loss),
                "correct": jnp.sum(found.correct),
                "learnt": jnp.sum(learnt),
            }

        return jax.lax.map(sums, windows)


def check(config: Training, architecture: Architecture, mesh: jax.sharding.Mesh) -> Any:
    """Checks that the mesh divides the batch and the model, and returns the specs of the params."""
    trainer.check_batch(config, mesh)
    sharding.check_heads(mesh, heads=architecture.heads, kv_heads=architecture.kv_heads)
    return sharding.param_specs(model.shapes(architecture, config.lora), mesh)
