"""Text from a model: `python -m experiments.pretrain.sample RUN_DIR --prompt "def "`."""

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import tyro

from experiments.command_line import parse
from experiments.commands import guard
from experiments.language import sharding
from experiments.optimizers import ARMS
from experiments.pretrain.model import Params
from experiments.pretrain.step import State, Trainer
from experiments.pretrain.trained import load_run
from experiments.settings import Count, at_least, check

DIVIDER = f"\n{'─' * 40}\n"


def generate(
    trainer: Trainer,
    params: Params,
    bias: jax.Array,
    prompts: Sequence[Sequence[int]],
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Goes on from each prompt, seeing the last `trainer.config.context` tokens.

    Each token takes a forward pass over them all; one program serves all prompts of a length.

    Args:
        trainer: whose model, mesh and context it is.
        params: its params, float32.
        bias: its selection biases.
        prompts: B lists of one token or more.
        length: tokens to add.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: how many of the likeliest tokens are drawn from; by default all.
        seed: a prompt's tokens depend on it and on the prompt's place in the list, not on how many
            there are.

    Returns:
        `(B, length)` int32, the new tokens.

    Raises:
        ValueError: a prompt is empty, or a number is out of range.
    """
    if not prompts or not all(map(len, prompts)):
        raise ValueError("At least one prompt is required, and each must have at least one token.")
    _check(
        length=(length, 1), temperature=(temperature, 0), top_k=(1 if top_k is None else top_k, 1)
    )
    ways = math.prod(trainer.mesh.shape[axis] for axis in sharding.RULES["batch"])
    filled = [*prompts, *[prompts[0]] * (-len(prompts) % ways)]
    lengths = np.array([len(prompt) for prompt in filled], np.int32)
    tokens = np.zeros((len(filled), lengths.max() + length), np.int32)
    for row, prompt in zip(tokens, filled, strict=True):
        row[: len(prompt)] = prompt
    with jax.set_mesh(trainer.mesh):
        tokens = _extend(
            trainer,
            params,
            bias,
            tokens,
            lengths,
            np.float32(temperature),
            top_k,
            np.uint32(seed % 2**32),
        )
    rows = zip(np.asarray(tokens), lengths[: len(prompts)], strict=False)
    return np.stack([row[start : start + length] for row, start in rows])


@functools.partial(jax.jit, static_argnames=("trainer", "top_k"))
def _extend(trainer, params, bias, tokens_BxT, lengths_B, temperature, top_k, seed) -> jax.Array:
    """Fills each row from its length on."""
    model = trainer.model
    compute = trainer.in_model_dtype(params)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
        jnp.arange(len(tokens_BxT))
    )
    window = min(trainer.config.context, tokens_BxT.shape[1])

    def extend(at: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
        start = jnp.maximum(at - window, 0)
        seen = jax.lax.dynamic_slice_in_dim(tokens_BxT, start, window, axis=1)
        hidden = model.hidden(compute, bias, seen)[0]
        last = jax.lax.dynamic_index_in_dim(hidden, at - 1 - start, axis=1, keepdims=False)
        logits = model.logits(compute, last)
        if top_k is not None:
            least = jax.lax.top_k(logits, min(top_k, logits.shape[1]))[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        noise = jax.vmap(
            lambda key: jax.random.gumbel(jax.random.fold_in(key, at), logits.shape[1:])
        )
        drawn = jnp.argmax(logits + temperature * noise(keys), axis=1)
        given = jax.lax.dynamic_index_in_dim(tokens_BxT, at, axis=1, keepdims=False)
        new = jnp.where(at < lengths_B, given, drawn)
        return jax.lax.dynamic_update_index_in_dim(tokens_BxT, new, at, axis=1)

    filled = jax.lax.fori_loop(jnp.min(lengths_B), tokens_BxT.shape[1], extend, tokens_BxT)
    return jax.lax.with_sharding_constraint(filled, jax.P())


def write_texts(
    trainer: Trainer,
    state: State,
    tokenizer: tokenizers.Tokenizer | None,
    prompt: str,
    *,
    length: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 40,
    seed: int = 0,
    count: int = 3,
) -> list[str]:
    """Texts that begin with the prompt and end with a document, or after `length` tokens.

    Args:
        trainer, state: of the model; the params are those that are evaluated.
        tokenizer: of the text that it has learnt.
        prompt: an empty one stands for the beginning of a document.
        length, temperature, top_k, seed: as `generate` takes them.
        count: how many texts.

    Raises:
        ValueError: there is no tokenizer, or a number is out of range.
    """
    _check(count=(count, 1))
    if tokenizer is None:
        raise ValueError(
            "The run was trained on tokens without a tokenizer, so its samples cannot be shown "
            "as text. Give --data.tokenizer when training."
        )
    params = ARMS[trainer.optimizer].eval_params(state.opt_state, state.params)
    end_of_text = tokenizer.token_to_id(trainer.config.data.end_of_text)
    start = tokenizer.encode(prompt, add_special_tokens=False).ids or [end_of_text]
    settings = {"temperature": temperature, "top_k": top_k, "seed": seed}
    found = generate(trainer, params, state.bias, [start] * count, length, **settings).tolist()
    ends = [row.index(end_of_text) if end_of_text in row else None for row in found]
    return [
        tokenizer.decode(start + row[:end], skip_special_tokens=True)
        for row, end in zip(found, ends, strict=True)
    ]


def _check(**numbers: tuple[float, float]) -> None:
    for name, (value, least) in numbers.items():
        if not least <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}; got {value}.")


@dataclasses.dataclass(frozen=True)
class Command:
    """Prints texts that a run's newest checkpoint generates."""

    run: tyro.conf.Positional[str]
    """Folder of the run. It may be in gs:// or s3://."""
    prompt: str = ""
    """Beginning of the texts. By default the beginning of a document."""
    length: Count = 200
    """Largest number of tokens to generate for a text."""
    temperature: Annotated[float, at_least(0)] = 0.8
    """Sampling temperature. 0 takes the most likely token."""
    top_k: Count | None = 40
    """Number of most likely tokens to sample from. None takes all."""
    seed: int = 0
    """Random seed. It sets what is sampled."""
    count: Count = 3
    """Number of texts."""

    def __post_init__(self) -> None:
        check(self)


def main() -> int:
    """Runs the command; returns its exit code."""

    def work() -> int:
        settings = dataclasses.asdict(parse(Command, "python -m experiments.pretrain.sample"))
        loaded = load_run(settings.pop("run"))
        texts = write_texts(loaded.trainer, loaded.state, loaded.tokenizer, **settings)
        print(DIVIDER.join(texts))
        return 0

    return guard(work)


if __name__ == "__main__":
    sys.exit(main())
