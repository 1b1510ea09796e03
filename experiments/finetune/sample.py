"""Prints answers of a fine-tuned model: `python -m experiments.finetune.sample FOLDER`."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from experiments.command_line import parse
from experiments.commands import guard
from experiments.finetune import weights
from experiments.finetune.architecture import Architecture
from experiments.finetune.chat import TOKENIZER, Chat
from experiments.finetune.model import LanguageModel, Params
from experiments.language import generation
from experiments.language.mesh import one_device
from experiments.language.tensors import Dtype
from experiments.settings import Count, at_least, check

DIVIDER = f"\n{'─' * 40}\n"


@dataclasses.dataclass(frozen=True)
class Command:
    """Prints the answers of a model to a prompt, in the form of its chat template."""

    model: tyro.conf.Positional[str]
    """Folder of an optimizer's run, whose exported model is used, or of a Hugging Face model: a
    Llama 3, Qwen2.5 or Qwen3 with its tokenizer."""
    prompt: str
    """Text to continue. Without --raw the chat template makes it the user's message."""
    system: str | None = None
    """System message, before the user's message. By default none."""
    raw: bool = False
    """Continue the prompt without the chat template, for a model that was trained on rows with
    "prompt" and "completion"."""
    length: Count = 200
    """Maximum number of tokens to generate per text."""
    temperature: Annotated[float, at_least(0)] = 0.8
    """Sampling temperature. 0 always takes the most likely token."""
    top_k: Count | None = 40
    """Sample from this many of the most likely tokens. None means all tokens."""
    seed: int = 0
    """Random seed. It sets what is sampled."""
    count: Count = 1
    """Number of texts to generate."""
    dtype: Dtype = "float32"
    """Precision of the arithmetic. On accelerators bfloat16 takes half of the memory."""

    def __post_init__(self) -> None:
        check(self)
        if self.raw and self.system is not None:
            raise ValueError(
                f"--system {self.system!r} requires the chat template, which --raw leaves out; "
                "remove one of them."
            )


def folder_of(model: str) -> Path:
    """Returns the folder of the Hugging Face model that a command names.

    Raises:
        ValueError: There is none.
    """
    folder = Path(model).expanduser()
    for found in (folder / "model", folder):
        if (found / TOKENIZER).is_file():
            return found
    raise ValueError(
        f"{folder} has no {TOKENIZER}, and no folder model with one. Give the folder of a Hugging "
        "Face model, or of an optimizer's run, as runs/finetune/study/muon_adamw: it has its model "
        "when it is finished, if --model or --export True was given."
    )


def answers(
    folder: Path,
    messages: Sequence[dict[str, str]] | str,
    *,
    length: int = 200,
    count: int = 1,
    dtype: Dtype = "float32",
    **settings: Any,
) -> list[str]:
    """Returns answers of the model in a folder.

    Args:
        folder: The folder of a Hugging Face model.
        messages: The messages of the conversation so far, or a text to continue without the
            template.
        length: The maximum number of tokens of an answer.
        count: The number of answers.
        dtype: The precision of the arithmetic.
        **settings: Further arguments of `generation.generate`.

    Raises:
        ValueError, OSError: The folder cannot be read, the template rejects the messages, or they
            and the answer are longer than the model's context.
    """
    generation.check_numbers(count=(count, 1), length=(length, 1))
    chat = Chat(folder)
    tokens = chat.prompt(messages) if isinstance(messages, str) else chat.question(messages)
    mesh = one_device()
    architecture, params = weights.read(folder, mesh)
    if len(tokens) + length > architecture.context:
        raise ValueError(
            f"The prompt has {len(tokens):,} tokens and --length is {length:,}, but the model's "
            f"max_position_embeddings is {architecture.context:,}. Shorten one of them."
        )
    program = functools.partial(_extend, architecture, dtype, params)
    found = generation.generate(program, mesh, [tokens] * count, length, **settings).tolist()
    ends = architecture.end_token
    ends = [ends] if isinstance(ends, int) else ends or []
    return [chat.answer(row, ends) for row in found]


@functools.partial(jax.jit, static_argnums=(0, 1, 6))  # 6 is top_k
def _extend(
    architecture: Architecture, dtype: Dtype, params: Params, tokens: jax.Array, *how: Any
) -> jax.Array:
    model = LanguageModel(architecture, dtype, remat=False)
    params = jax.tree.map(lambda x: x.astype(dtype), params)  # once, and not for each token
    parts = (functools.partial(f, params) for f in (model.continued, model.logits))
    return generation.extend(*parts, tokens, *how, context=tokens.shape[1])


def main() -> int:
    """Runs the command; returns its exit code."""

    def work() -> int:
        settings = dataclasses.asdict(parse(Command, "python -m experiments.finetune.sample"))
        folder = folder_of(settings.pop("model"))
        prompt, system, raw = (settings.pop(name) for name in ("prompt", "system", "raw"))
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        print(DIVIDER.join(answers(folder, prompt if raw else messages, **settings)))
        return 0

    return guard(work)


if __name__ == "__main__":
    sys.exit(main())
