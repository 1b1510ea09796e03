"""Generates text with a run's model: `python -m experiments.pretrain.sample RUN_DIR`."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tokenizers
import tyro

from experiments.command_line import parse
from experiments.commands import guard
from experiments.language import generation
from experiments.language.generation import DIVIDER, Sampling
from experiments.pretrain.model import Params
from experiments.pretrain.step import State, Trainer
from experiments.pretrain.trained import load_run


def generate(
    trainer: Trainer,
    params: Params,
    bias: jax.Array,
    prompts: Sequence[Sequence[int]],
    length: int,
    **settings: Any,
) -> np.ndarray:
    """Continues each prompt, as `generation.generate` does with the same arguments.

    The model, with these float32 params and selection biases, reads the last
    `trainer.config.context` tokens.
    """
    program = functools.partial(_extend, trainer, params, bias)
    return generation.generate(program, trainer.mesh, prompts, length, **settings)


@functools.partial(jax.jit, static_argnums=(0, 6))
def _extend(trainer, params, bias, tokens, lengths, temperature, top_k, seed) -> jax.Array:
    model = trainer.model
    # Apart once, and not again for each token.
    compute = model.unstacked(trainer.in_model_dtype(params))
    return generation.extend(
        functools.partial(model.continued, compute, bias),
        functools.partial(model.logits, compute),
        tokens,
        lengths,
        temperature,
        top_k,
        seed,
        context=trainer.config.context,
    )


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
    """Returns texts that begin with a prompt and end with a document or after `length` tokens.

    Args:
        trainer, state: The model's trainer and state; the evaluated params generate.
        tokenizer: The tokenizer that the model was trained with.
        prompt: The text to continue. If it is empty, each text is a new document.
        length, temperature, top_k, seed: As for `generate`.
        count: The number of texts.

    Raises:
        ValueError: If there is no tokenizer, or a number is out of range.
    """
    generation.check_numbers(count=(count, 1))
    if tokenizer is None:
        raise ValueError(
            "The run was trained on tokens without a tokenizer, so its samples cannot be shown "
            "as text. Give --data.tokenizer when training."
        )
    params = trainer.evaluated(state)
    end_of_text = tokenizer.token_to_id(trainer.config.data.end_of_text)
    start = tokenizer.encode(prompt, add_special_tokens=False).ids or [end_of_text]
    settings = {"temperature": temperature, "top_k": top_k, "seed": seed}
    found = generate(trainer, params, state.bias, [start] * count, length, **settings).tolist()
    ends = [row.index(end_of_text) if end_of_text in row else None for row in found]
    return [
        tokenizer.decode(start + row[:end], skip_special_tokens=True)
        for row, end in zip(found, ends, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Command(Sampling):
    """Prints texts generated with the newest checkpoint of a run."""

    run: tyro.conf.Positional[str]
    """Folder of the run, local or in gs:// or s3://."""
    prompt: str = ""
    """Text to continue. By default, each text is a new document."""


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
