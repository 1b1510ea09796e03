"""One training step: microbatches → gradient → guard → optimizer → selection biases.

The forward and backward passes use a copy of the params in the model's dtype.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import muon_jax
from experiments import optimizers, schedules
from experiments.language import attention, guard, sharding, trainer
from experiments.language.guard import Guard
from experiments.optimizers import OptimizerName
from experiments.pretrain.config import Training
from experiments.pretrain.experts import updated_bias
from experiments.pretrain.model import LanguageModel, Observed, Params


class State(NamedTuple):
    """The state of a training; `step` counts all batches, including skipped ones."""

    step: jax.Array
    params: Params
    opt_state: Any
    bias: jax.Array
    guard: Guard


class Trainer(trainer.Trainer):
    """The compiled functions of one training, and the shardings of their arrays.

    Args:
        config: The settings of the training.
        optimizer: The name of the optimizer.
        mesh: The mesh, from `mesh.make_mesh`.
        vocabulary: The vocabulary size of the model.
        end_of_text: the token that begins a document, where documents are kept apart; any will do
            for a training that is only planned.

    Raises:
        ValueError: If the mesh does not divide an axis.
    """

    def __init__(
        self,
        config: Training,
        optimizer: OptimizerName,
        mesh: jax.sharding.Mesh,
        vocabulary: int,
        end_of_text: int | None = None,
    ):
        self._end_of_text = (end_of_text or 0) if config.isolate_documents else None
        self.config, self.optimizer, self.mesh = config, optimizer, mesh
        self.model = LanguageModel(config.model, vocabulary)
        self.schedule = schedules.warmup_then_decay(
            config.warmup,
            config.steps,
            config.decay,
            config.final_lr_fraction,
            config.cooldown,
            config.schedules.wsd_share,
        )
        self.clips_at = optimizers.clip_threshold(optimizer, config)
        params = self.model.shapes
        self.specs = check(config, mesh, params)
        self.routing = self._routing(params)
        self.labels = muon_jax.label_params(params, self.routing)
        rate = config.rate(optimizer)
        self.tx = self.transformation(rate)
        shape = config.accumulate, config.microbatch, config.context + 1
        super().__init__(
            config,
            mesh,
            rate=rate,
            params=params,
            specs=self.specs,
            begin=0,
            windows=jax.ShapeDtypeStruct(shape, jnp.int32),
            shows_logits=attention.shows_logits(
                mesh,
                config.context,
                config.model.key_columns,
                config.model.dtype,
                packed=config.isolate_documents,
            ),
        )
        self._compiled_start = jax.jit(self._start, out_shardings=self.shardings)
        self.evaluate = jax.jit(
            self._evaluate, in_shardings=(self.shardings, self.windows), out_shardings=self._whole
        )

    def transformation(self, rate: float | jax.Array) -> optax.GradientTransformationExtraArgs:
        placed = {"mesh": self.mesh, "shardings": self.specs, "routing": self.routing}
        return optimizers.build(
            self.optimizer,
            self.config,
            self.schedule,
            rate,
            course=self.config.schedules,
            steps=self.config.steps,
            **(placed if self.optimizer != "adamw" else {}),
        )

    def _routing(self, params: Params) -> Any:
        """Returns which params Muon updates, determined from their use in the loss.

        The loss is traced for a CPU, where no custom kernel hides matrix products.
        """

        def losses(params, bias, windows):
            return self.model.losses(self.in_model_dtype(params), bias, windows)

        rows = self.config.batch // self.config.accumulate
        windows = jax.ShapeDtypeStruct((rows, self.config.context + 1), jnp.int32)
        mesh = jax.sharding.AbstractMesh(
            self.mesh.axis_sizes,
            self.mesh.axis_names,
            axis_types=self.mesh.axis_types,
            abstract_device=jax.sharding.AbstractDevice("cpu", None, "cpu"),
        )
        with jax.sharding.use_abstract_mesh(mesh):
            bias = jax.eval_shape(self.model.initial_bias)
            return muon_jax.trace_routing(losses, params, bias, windows)

    def start(self, seed: int) -> State:
        """Returns the state before the first step. The params depend only on the seed."""
        with jax.set_mesh(self.mesh):
            return self._compiled_start(seed)

    def _start(self, seed: jax.Array) -> State:
        params = self.model.init(jax.random.key(seed))
        zero = jnp.zeros([], jnp.int32)
        opt_state, bias = self.tx.init(params), self.model.initial_bias()
        return State(zero, params, opt_state, bias, guard.begin())

    def _step(
        self, state: State, windows: jax.Array, rate: jax.Array, look: bool = False
    ) -> tuple[State, dict[str, Any]]:
        loss, gradient, observed = self._gradient(state, windows, look)
        new, updates, metrics = self._updated(
            state, loss, gradient, rate, observed.max_logits, look, self.config.spike
        )
        taken = metrics["taken"]
        rms = self._update_rms(updates)
        metrics["update_rms"] = jax.tree.map(lambda rms: jnp.where(taken, rms, 0.0), rms)
        if state.bias.size:
            config, updates_before = self.config, state.step - state.guard.skipped
            resting = updates_before >= config.steps - config.cooldown
            bias_rate = jnp.where(resting, 0.0, config.model.bias_rate)
            bias = updated_bias(state.bias, observed.load, bias_rate)
            new = new._replace(bias=jnp.where(taken, bias, state.bias))
            load = observed.load / jnp.mean(observed.load, axis=1, keepdims=True)
            metrics |= {
                "balance": jnp.mean(observed.balance),
                "router_entropy": jnp.mean(observed.entropy),
                "largest_load": jnp.max(load),
                "smallest_load": jnp.min(load),
                "load": load,
            }
        return new, metrics

    def _gradient(
        self, state: State, windows: jax.Array, look: bool = False
    ) -> tuple[jax.Array, Params, Observed]:
        """Returns the microbatches' mean loss, mean gradient and observations."""
        told = look or self.clips_at is not None
        loss_of = functools.partial(
            self.model.loss, max_logits=told, threshold=self._threshold(look)
        )
        compute = self.model.unstacked(self.in_model_dtype(state.params))

        def objective(params, windows):
            segments = self.segments(windows)
            loss, observed = loss_of(params, state.bias, windows, segments_BxT=segments)
            penalty = self.config.model.balance_loss * jnp.sum(observed.balance)
            return loss + penalty, (loss, observed)

        def microbatch(windows):
            (_, (loss, observed)), gradient = jax.value_and_grad(objective, has_aux=True)(
                compute, windows
            )
            gradient = self._pinned(self.model.stacked(gradient), jnp.float32)
            if sharding.platform() == "tpu":
                # Makes XLA sum shards of gradients; it would sum whole ones and scatter them later.
                gradient = jax.lax.optimization_barrier(gradient)
            return loss, gradient, observed

        if windows.shape[0] == 1:
            return microbatch(windows[0])

        shapes = jax.eval_shape(microbatch, windows[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[:2])
        zeros = zeros[0], self._pinned(zeros[1], jnp.float32)
        (loss, gradient), seen = trainer.sum_microbatches(microbatch, windows, zeros)
        loss, gradient = jax.tree.map(lambda x: x / len(windows), (loss, gradient))
        observed = Observed(
            jax.tree.map(lambda x: jnp.max(x, axis=0), seen.max_logits),
            jnp.sum(seen.load, axis=0),
            jnp.mean(seen.entropy, axis=0),
            jnp.mean(seen.balance, axis=0),
        )
        return loss, gradient, observed

    def in_model_dtype(self, params: Params) -> Params:
        """Casts params to the model's dtype before they are gathered, which halves the bytes.

        Routers stay float32, and so does the embedding, whose gradient is a sum over tokens.
        """

        def cast(path, x):
            whole = {"router", "embedding"} & {key.key for key in path}
            return x if whole else x.astype(self.config.model.dtype)

        return self._pinned(jax.tree_util.tree_map_with_path(cast, params))

    def _pinned(self, params: Params, dtype: Any = None) -> Params:
        return jax.tree.map(
            lambda x, s: jax.lax.with_sharding_constraint(x.astype(dtype or x.dtype), s),
            params,
            self.specs,
        )

    def _update_rms(self, updates: Params) -> dict[str, jax.Array]:
        """Returns the RMS of the updates of hidden matrices and of all other params."""
        found = {}
        pairs = list(zip(jax.tree.leaves(updates), jax.tree.leaves(self.labels), strict=True))
        for name, label in (("matrices", "muon"), ("others", "other")):
            leaves = [update for update, its in pairs if its == label]
            size = sum(update.size for update in leaves)
            found[name] = optax.tree.norm(leaves) / size**0.5
        return found

    def segments(self, windows: jax.Array) -> jax.Array | None:
        """The number of each input's document, where documents are kept apart; else None."""
        if self._end_of_text is None:
            return None
        return 1 + jnp.cumsum(windows[:, :-1] == self._end_of_text, axis=1, dtype=jnp.int32)

    def evaluated(self, state: State) -> Params:
        """The params to evaluate, sample and export: those of the step, or an average."""
        arm, course = optimizers.ARMS[self.optimizer], self.config.schedules
        read = arm.eval_params if course.average is None else muon_jax.evaluation_params
        return read(state.opt_state, state.params)

    def _evaluate(self, state: State, windows: jax.Array) -> jax.Array:
        """Returns each window's summed loss in nats, `(microbatches, B)`, at evaluated params."""
        compute = self.in_model_dtype(self.evaluated(state))

        def losses(windows):
            segments = self.segments(windows)
            found, _ = self.model.losses(compute, state.bias, windows, segments_BxT=segments)
            return jnp.sum(found, axis=1)

        return jax.lax.map(losses, windows)


def check(config: Training, mesh: jax.sharding.Mesh, params: Params | None = None) -> Any:
    """Checks that the mesh divides the batch and the model, and returns the specs of the params."""
    trainer.check_batch(config, mesh)
    sharding.check_heads(mesh, heads=config.model.heads, kv_heads=config.model.key_heads)
    params = params or LanguageModel(config.model, config.data.vocabulary).shapes
    return sharding.param_specs(params, mesh)
