"""One fine-tuning step: microbatches → gradient → guard → optimizer.

Params, optimizer state and accumulated gradients are float32 and lie as `sharding` says. The loss
is the sum over all learnt tokens of a step, of all microbatches and devices, over their number.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.finetune import arms, model
from experiments.finetune.architecture import Qwen3
from experiments.finetune.config import ArmName, Training
from experiments.finetune.model import LanguageModel, Params
from experiments.finetune.packing import Batch
from experiments.language import attention, guard, sharding
from experiments.language.guard import Guard
from experiments.language.processes import Share, place_whole

_NONE = -1  # the target of a position that is not learnt


class State(NamedTuple):
    """What a step carries on; `step` counts batches, skipped ones too."""

    step: jax.Array
    params: Params
    opt_state: Any
    guard: Guard


class Windows(NamedTuple):
    """What a step reads, each `(microbatches, B, T)` int32; targets are -1 where none is learnt."""

    tokens: jax.Array
    targets: jax.Array
    segments: jax.Array


class Trainer:
    """The compiled functions of one fine-tuning, and where their arrays lie.

    Args:
        config: what to train; its `steps` and `warmup` are known.
        arm: which optimizer.
        architecture: of the params.
        mesh: of `mesh.make_mesh`.

    Attributes:
        abstract: the state as shapes with shardings.
        program: the compiled step; to be had before there are params.
        looking: the compiled step that tells the exact largest attention logit, too. It is
            `program` itself where attention has its logits at hand; else it is compiled when first
            needed, and updates as `program` does.

    Raises:
        ValueError: an axis that the mesh does not divide.
    """

    def __init__(
        self, config: Training, arm: ArmName, architecture: Qwen3, mesh: jax.sharding.Mesh
    ):
        if not config.steps or config.warmup is None:
            raise ValueError("A training has steps and a warm-up; `config.with_steps` gives them.")
        self.config, self.name, self.architecture, self.mesh = config, arm, architecture, mesh
        self.model = LanguageModel(architecture, config.dtype, config.remat)
        self.specs = check(config, architecture, mesh)
        wanted, self.places = model.shapes(architecture), model.shardings(architecture, mesh)
        placed = {"mesh": mesh, "shardings": self.specs} if arm != "adamw" else {}
        self.arm = arms.make(arm, config, architecture, **placed)
        with jax.set_mesh(mesh):
            shapes = jax.eval_shape(self._start, wanted)
        specs = jax.tree.map(lambda x: jax.P(), shapes)._replace(
            params=self.specs, opt_state=sharding.state_specs(shapes.opt_state, wanted, self.specs)
        )
        self.shardings = sharding.shardings(specs, mesh)
        self.abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings
        )
        self.windows = jax.NamedSharding(mesh, sharding.spec(None, "batch", None))
        self._whole = jax.NamedSharding(mesh, jax.P())
        self._compiled_start = jax.jit(
            self._start, in_shardings=(self.places,), out_shardings=self.shardings, donate_argnums=0
        )
        self._compiled_evaluate = jax.jit(
            self._evaluate, in_shardings=(self.places, self.windows), out_shardings=self._whole
        )

    @functools.cached_property
    def program(self) -> jax.stages.Compiled:
        return self._compile(look=self._shows_logits)

    @functools.cached_property
    def looking(self) -> jax.stages.Compiled:
        return self.program if self._shows_logits else self._compile(look=True)

    @property
    def _shows_logits(self) -> bool:
        columns = self.architecture.head_dim
        return attention.shows_logits(self.mesh, self.config.context, columns, packed=True)

    def _compile(self, look: bool) -> jax.stages.Compiled:
        with jax.set_mesh(self.mesh):
            step = jax.jit(
                functools.partial(self._step, look=look),
                in_shardings=(self.shardings, self.windows, self._whole),
                out_shardings=(self.shardings, self._whole),
                donate_argnums=0,
            )
            rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=self._whole)
            return step.lower(self.abstract, self.abstract_windows, rate).compile()

    @property
    def abstract_windows(self) -> Windows:
        """A step's as shapes with shardings."""
        config = self.config
        shape = config.accumulate, config.microbatch, config.context
        windows: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.windows)
        return Windows(windows, windows, windows)

    @functools.cached_property
    def share(self) -> Share:
        """What this process makes of a step's windows."""
        return Share(self.windows, self.config.accumulate, self.config.microbatch)

    def place(self, batch: Batch) -> Windows:
        """The windows of `share` as this process's part of a step's."""
        return Windows(*map(self.share.place, _parts(batch)))

    def place_whole(self, batch: Batch) -> Windows:
        """A batch that every process has whole, as one microbatch, to evaluate."""
        return Windows(*(place_whole(x[None], self.windows) for x in _parts(batch)))

    def start(self, params: Params) -> State:
        """The state before the first step; `params`, which lie as `places` says, are donated."""
        with jax.set_mesh(self.mesh):
            return self._compiled_start(params)

    def advance(
        self, state: State, windows: Windows, rate: float | None = None, look: bool = True
    ) -> tuple[State, dict[str, Any]]:
        """One step, `state` is donated.

        Args:
            state: of the step before.
            windows: of `place`.
            rate: takes the place of the config's learning rate; all share one program.
            look: whether to tell the exact `max_logit`, which changes nothing else; without it
                that may be NaN.

        Returns:
            The new state, and metrics: scalars, and dicts of these by group.
        """
        given = self.config.optimizer.learning_rate if rate is None else rate
        program = self.looking if look else self.program
        return program(state, windows, place_whole(np.float32(given), self._whole))

    def evaluate(self, params: Params, windows: Windows) -> dict[str, jax.Array]:
        """Sums over the learnt tokens: `loss` in nats, how many are `correct`, `learnt`."""
        with jax.set_mesh(self.mesh):
            return self._compiled_evaluate(params, windows)

    def _start(self, params: Params) -> State:
        tx = self.arm.build(self.config.optimizer.learning_rate)
        return State(jnp.zeros([], jnp.int32), params, tx.init(params), guard.begin())

    def _step(
        self, state: State, windows: Windows, rate: jax.Array, look: bool = False
    ) -> tuple[State, dict[str, Any]]:
        loss, gradient, seen = self._gradient(state.params, windows, look)
        counted = jax.tree.map(
            lambda g, counts: g if counts else jnp.zeros_like(g), gradient, self.arm.counted
        )
        norm = optax.tree.norm(counted)
        updates_before = state.step - state.guard.skipped
        taken, guarded = guard.judge(state.guard, updates_before, loss, norm)
        clipping = jnp.minimum(1.0, self.config.clip / jnp.maximum(norm, 1e-30))

        def update(params: Params, opt_state: Any, gradient: Params) -> tuple[Params, Any, Any]:
            updates, opt_state = self.arm.build(rate).update(
                jax.tree.map(lambda g: clipping * g, gradient),
                opt_state,
                params,
                max_logits=seen["max_logits"],
            )
            size = arms.by_group(updates, arms.rms)
            return optax.apply_updates(params, updates), opt_state, size

        def keep(params: Params, opt_state: Any, gradient: Params) -> tuple[Params, Any, Any]:
            return params, opt_state, arms.by_group(params, lambda leaves: jnp.zeros([]))

        # A choice between new and old would hold both; here the new take the old ones' place.
        params, opt_state, size = jax.lax.cond(
            taken, update, keep, state.params, state.opt_state, counted
        )
        learnt, correct = seen["learnt"], seen["correct"]
        metrics = {
            "loss": loss,
            "accuracy": jnp.sum(correct) / jnp.maximum(jnp.sum(learnt), 1),
            # trl's: a mean of the microbatches' own, however many tokens they learn.
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
        return State(state.step + 1, params, opt_state, guarded), metrics

    def _threshold(self, look: bool) -> float | None:
        """Up to where upper bounds of largest logits will do: a clip's own threshold."""
        return None if look else self.arm.clips_at

    def _gradient(
        self, params: Params, windows: Windows, look: bool = False
    ) -> tuple[jax.Array, Params, dict[str, Any]]:
        """Of the mean over all learnt tokens; and what was seen, by microbatch but the logits."""
        told = look or self.arm.clips_at is not None
        loss_of = functools.partial(
            self.model.loss, max_logits=told, threshold=self._threshold(look)
        )
        total = jnp.maximum(jnp.sum(windows.targets >= 0), 1).astype(jnp.float32)

        def microbatch(windows: Windows) -> tuple[jax.Array, Params, dict[str, Any]]:
            (loss, found), gradient = jax.value_and_grad(loss_of, has_aux=True)(
                params, *windows, total
            )
            # Summed where it lies, and not whole on every device.
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

        def add(sums: Any, windows: Windows) -> tuple[Any, dict[str, Any]]:
            loss, gradient, seen = microbatch(windows)
            return jax.tree.map(jnp.add, sums, (loss, gradient)), seen

        zeros = jnp.zeros([]), jax.tree.map(jnp.zeros_like, params)
        (loss, gradient), seen = jax.lax.scan(add, zeros, windows)
        largest = jax.tree.map(lambda x: jnp.max(x, axis=0), seen["max_logits"])
        return loss, gradient, seen | {"max_logits": largest}

    def _evaluate(self, params: Params, windows: Windows) -> dict[str, jax.Array]:
        def sums(windows: Windows) -> dict[str, jax.Array]:
            found = self.model.losses(params, *windows)
            learnt = windows.targets >= 0
            return {
                "loss": jnp.sum(found.loss),
                "correct": jnp.sum(found.correct),
                "learnt": jnp.sum(learnt),
            }

        return jax.lax.map(sums, windows)


def _parts(batch: Batch) -> list[np.ndarray]:
    """What `Windows` have, `(B, T)` int32 each."""
    parts = batch.tokens, np.where(batch.mask > 0, batch.targets, _NONE), batch.segments
    return [np.asarray(x, np.int32) for x in parts]


def check(config: Training, architecture: Qwen3, mesh: jax.sharding.Mesh) -> Any:
    """The specs of the params, or a ValueError of what the mesh does not divide."""
    _check_batch(config, mesh)
    sharding.check_heads(mesh, heads=architecture.heads, kv_heads=architecture.kv_heads)
    return sharding.param_specs(model.shapes(architecture), mesh)


def _check_batch(config: Training, mesh: jax.sharding.Mesh) -> None:
    ways = math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
    if config.microbatch % ways:
        raise ValueError(
            f"A microbatch has --batch {config.batch} / --accumulate {config.accumulate} = "
            f"{config.microbatch} sequences, which must be a multiple of the mesh axes data × "
            f"fsdp × expert = {ways}."
        )
