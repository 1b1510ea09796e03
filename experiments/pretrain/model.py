"""The language model: a stack of dense layers, then a stack of layers with experts.

Params are nested dicts of float32 arrays. Leaves of a stack are `(layers, ...)`, and those of
routed experts `(experts, layers, ...)`, so that no axis that the mesh splits is ever merged.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.language.attention import KEEP_KERNELS, GroupedQuery, Latent
from experiments.language.decoder import Layer, graph
from experiments.language.packed_attention import texts
from experiments.language.vocabulary import cross_entropy, logits, look_up, weighted_loss
from experiments.layers import Linear, RMSNorm, SwiGLU
from experiments.pretrain.config import Model as ModelConfig
from experiments.pretrain.experts import Experts, gate

Params = dict[str, Any]

# Stacks of at most this many layers are fully unrolled.
_UNROLLED = 12


class Observed(NamedTuple):
    """The observations of a forward pass beside its loss.

    Attributes:
        max_logits: The largest attention logits `(layers, heads)` by the path of the attention;
            empty if not requested.
        load: The number of tokens of each expert, `(layers with experts, E)` int32.
        entropy: The entropy of the normalised scores in nats, `(layers with experts,)`.
        balance: The sequence-wise balance loss before its factor, `(layers with experts,)`.
    """

    max_logits: dict[str, jax.Array]
    load: jax.Array
    entropy: jax.Array
    balance: jax.Array


class MixtureOfExperts(nnx.Module):
    """A feed-forward part with shared experts and with routed experts selected by a gate."""

    def __init__(self, config: ModelConfig, *, init, rngs: nnx.Rngs):
        self.active, self.scale = config.active, config.routed_scale
        self.exchange = config.exchange
        width, hidden = config.width, config.expert_hidden
        self.router = Linear(width, config.experts, init=init, rngs=rngs)
        self.experts = Experts(config.experts, width, hidden, init=init, rngs=rngs)
        if config.shared:
            self.shared = SwiGLU(width, config.shared * hidden, init=init, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array, bias_E: jax.Array) -> tuple[jax.Array, Any]:
        kernel = self.router.kernel[...].astype(jnp.float32)
        logits = jnp.dot(x_BxTxD.astype(jnp.float32), kernel, precision="highest")
        gated = gate(logits, bias_E, self.active, self.scale)
        y = self.experts(x_BxTxD, gated.ids, gated.weights, self.exchange)
        if hasattr(self, "shared"):
            y = y + self.shared(x_BxTxD)
        return y, (gated.load, gated.entropy, gated.balance)


class LanguageModel:
    """The configured model, as functions of plain params to call under `jax.set_mesh`."""

    def __init__(self, config: ModelConfig, vocabulary: int):
        self.config, self.vocabulary = config, vocabulary
        # The number of layers of each stack, and whether they have experts.
        depth, dense = config.layers, config.dense_layers
        stacks = {"dense_layers": (dense, False), "moe_layers": (depth - dense, True)}
        self.stacks = {name: stack for name, stack in stacks.items() if stack[0]}
        self._norm = graph(lambda rngs: RMSNorm(config.width, epsilon=config.epsilon, rngs=rngs))
        self._layers = {
            name: graph(functools.partial(_layer, config, sparse))
            for name, (_, sparse) in self.stacks.items()
        }

    def init(self, key: jax.Array) -> Params:
        """Returns the initial params."""
        config = self.config
        normal = nnx.initializers.normal(config.init_std)
        of = dict(zip(("embedding", "head", *self.stacks), jax.random.split(key, 4), strict=False))
        table = (self.vocabulary, config.width)
        params: Params = {"embedding": {"embedding": normal(of["embedding"], table)}}
        for name, (layers, sparse) in self.stacks.items():
            start = functools.partial(_start, functools.partial(_layer, config, sparse))
            params[name] = jax.vmap(start)(jax.random.split(of[name], layers))
        params["norm"] = {"scale": jnp.ones(config.width)}
        if not config.tied:
            params["head"] = {"kernel": normal(of["head"], table[::-1])}
        return _swap_expert_axes(params)

    @functools.cached_property
    def shapes(self) -> Params:
        """The shapes of the params."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def initial_bias(self) -> jax.Array:
        """Returns the initial selection biases, `(layers with experts, experts)`."""
        layers = self.config.layers - self.config.dense_layers
        return jnp.zeros((layers, self.config.experts if layers else 0))

    def hidden(
        self,
        params: Params,
        bias: jax.Array,
        tokens_BxT: jax.Array,
        *,
        segments_BxT: jax.Array | None = None,
        max_logits: bool = False,
        threshold: float | None = None,
    ) -> tuple[jax.Array, Observed]:
        """Returns the input of the head, `(B, T, D)`, and the observations.

        Args:
            params: The params.
            bias: The selection biases.
            tokens_BxT: The tokens, int32.
            segments_BxT: of tokens that see no others, as `packed_attention.texts` takes them;
                None is one in each row.
            max_logits: Whether to return the largest attention logits.
            threshold: As for `causal_attention`.
        """

        apart = (None, None) if segments_BxT is None else texts(segments_BxT)

        def of_layer(layer, x, bias, cache):
            limit = threshold if max_logits else math.inf
            x, (of_heads, routed) = layer(x, limit, *apart, bias_E=bias)
            return x, (of_heads if max_logits else None, routed)

        x_BxTxD, told = self._through(params, bias, tokens_BxT, of_layer)
        largest, routed = {}, (jnp.zeros((0, 0), jnp.int32), jnp.zeros(0), jnp.zeros(0))
        for name, (_, sparse) in self.stacks.items():
            each = told[name]
            if isinstance(each, list):
                each = jax.tree.map(lambda *x: jnp.stack(x), *each)
            largest[f"{name}/attention"], found = each
            routed = found if sparse else routed
        load, entropy, balance = routed
        return x_BxTxD, Observed(largest if max_logits else {}, load, entropy, balance)

    def continued(
        self,
        params: Params,
        bias: jax.Array,
        tokens_BxT: jax.Array,
        caches: Params | None = None,
        at: int | jax.Array = 0,
    ) -> tuple[jax.Array, Params]:
        """What the head reads of tokens from position `at` on, and the caches with them.

        Args:
            params, bias, tokens_BxT: as `hidden` takes them.
            caches, at: of each stack, as `decoder.Layer.continued` takes a layer's.
        """
        return self._through(
            params,
            bias,
            tokens_BxT,
            lambda layer, x, bias, cache: layer.continued(x, cache, at, bias_E=bias),
            caches or dict.fromkeys(self.stacks),
        )

    def _through(
        self,
        params: Params,
        bias: jax.Array,
        tokens_BxT: jax.Array,
        of_layer: Callable[..., tuple[jax.Array, Any]],
        caches: Params | None = None,
    ) -> tuple[jax.Array, Params]:
        """What the head reads, and what `of_layer(layer, x, bias, cache)` told beside its x.

        That is a list of an unrolled stack's layers, and stacked of one that is scanned; so are the
        `caches`.
        """
        x_BxTxD = look_up(params["embedding"]["embedding"], tokens_BxT, self.config.dtype)
        told: Params = {}
        stacks = self.unstacked(params)
        for name, (layers, sparse) in self.stacks.items():
            made = self._layers[name]

            def layer(x, inputs, made=made):
                params, bias, cache = inputs
                return of_layer(nnx.merge(made, params), x, bias, cache)

            run = jax.jit(_REMAT[self.config.remat](layer))
            cache = caches and caches[name]
            if layers > _UNROLLED:
                inputs = stacks[name], bias if sparse else None, cache
                x_BxTxD, told[name] = jax.lax.scan(run, x_BxTxD, inputs, unroll=8)
            else:
                told[name] = []
                for i, kernels in enumerate(stacks[name]):
                    inputs = kernels, bias[i] if sparse else None, cache and cache[i]
                    x_BxTxD, of_this = run(x_BxTxD, inputs)
                    told[name].append(of_this)
        return nnx.merge(self._norm, params["norm"])(x_BxTxD), told

    def unstacked(self, params: Params) -> Params:
        """Returns the params with a tuple of layers for each unrolled stack.

        Every method accepts these params, too. A loop over microbatches or tokens then does not
        slice the stack again in every iteration.
        """
        if any(isinstance(params[name], tuple) for name in self.stacks):
            return params
        apart = _swap_expert_axes({name: params[name] for name in self.stacks})
        for name, (layers, _) in self.stacks.items():
            if layers <= _UNROLLED:
                stack = apart[name]
                apart[name] = tuple(jax.tree.map(lambda x, i=i: x[i], stack) for i in range(layers))
        return params | apart

    def stacked(self, params: Params) -> Params:
        """Inverts `unstacked`."""
        stacks = {
            name: jax.tree.map(lambda *x: jnp.stack(x), *params[name])
            if layers <= _UNROLLED
            else params[name]
            for name, (layers, _) in self.stacks.items()
        }
        return params | _swap_expert_axes(stacks)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Returns the logits, `(..., D)` -> `(..., vocabulary)` float32."""
        return logits(self._head(params), hidden)

    def _head(self, params: Params) -> jax.Array:
        tied = self.config.tied
        kernel = params["embedding"]["embedding"].T if tied else params["head"]["kernel"]
        return kernel.astype(self.config.dtype)

    def losses(
        self, params: Params, bias: jax.Array, windows: jax.Array, **options: Any
    ) -> tuple[jax.Array, Observed]:
        """Returns the cross-entropy in nats of each next token, `(B, T)`, of windows `(B, T + 1)`.

        `options` are those of `hidden`.
        """
        hidden, observed = self.hidden(params, bias, windows[:, :-1], **options)
        losses, _ = cross_entropy(self._head(params), hidden, windows[:, 1:])
        return losses, observed

    def loss(
        self, params: Params, bias: jax.Array, windows: jax.Array, **options: Any
    ) -> tuple[jax.Array, Observed]:
        """Returns the mean of `losses`, which is faster to differentiate; see `weighted_loss`."""
        hidden, observed = self.hidden(params, bias, windows[:, :-1], **options)
        targets = windows[:, 1:]
        weights = jnp.full(targets.shape, 1 / targets.size, jnp.float32)
        loss, _ = weighted_loss(self._head(params), hidden, targets, weights, tied=self.config.tied)
        return loss, observed


_REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda layer: layer,
    "dots": functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable, KEEP_KERNELS
        ),
    ),
    "full": functools.partial(jax.checkpoint, policy=KEEP_KERNELS),
}


def _layer(config: ModelConfig, sparse: bool, rngs: nnx.Rngs) -> Layer:
    init, width, heads = nnx.initializers.normal(config.init_std), config.width, config.heads
    if config.attention == "latent":
        sizes = {name: getattr(config, name) for name in ("latent", "nope", "rope", "value")}
        attention = functools.partial(
            Latent, width, heads, rope_base=config.rope_base, init=init, **sizes
        )
    else:
        norm = config.epsilon if config.qk_norm else None
        own = heads, config.key_heads, config.key_columns, config.rope_base, norm
        attention = functools.partial(GroupedQuery, width, *own, init=init)
    if sparse:
        feed_forward = functools.partial(MixtureOfExperts, config, init=init)
    else:
        feed_forward = functools.partial(SwiGLU, width, config.hidden, init=init)
    return Layer(width, config.epsilon, attention, feed_forward, rngs=rngs)


def _start(make: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=key)), nnx.Param))


def _swap_expert_axes(params: Params) -> Params:
    """Swaps experts' axes between `(experts, layers, ...)` and, for scans, the reverse order."""

    def swap(path, leaf):
        return jnp.swapaxes(leaf, 0, 1) if jax.tree_util.DictKey("experts") in path else leaf

    return jax.tree_util.tree_map_with_path(swap, params)
