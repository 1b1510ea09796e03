"""Tokenizers: byte-level BPE trained on text, or any that is read from a file."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from etils import epath
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.json_files import read_json

_LARGEST = 1 << 22  # maximum vocabulary size, since memory grows with the largest id
_BYTES = pre_tokenizers.ByteLevel.alphabet()


class Vocabulary(NamedTuple):
    """A tokenizer and facts about its tokens.

    Attributes:
        tokenizer: The tokenizer. It reads the spelling of a special token as plain text.
        size: The vocabulary size; all ids are less.
        end_of_text: The id of the token that ends a document.
        bytes_per_token: `(size,)` int32, the bytes of text that each token stands for, 0 for
            special tokens. None for a tokenizer that is not byte-level.
    """

    tokenizer: Tokenizer
    size: int
    end_of_text: int
    bytes_per_token: np.ndarray | None


def train(texts: Iterable[str], size: int, end_of_text: str) -> bytes:
    """Trains a byte-level BPE. The result does not depend on the run or the number of threads.

    Args:
        texts: The texts to train on.
        size: The maximum number of tokens. Small texts result in fewer.
        end_of_text: The only special token, with id 0.

    Returns:
        The content of a `tokenizer.json`.

    Raises:
        ValueError: If `size` is too small for all bytes and `end_of_text`.
    """
    if size <= len(_BYTES):
        raise ValueError(
            f"--data.vocabulary must be at least {len(_BYTES) + 1}, for all bytes and an "
            f"end-of-text token; got {size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(_BYTES),
        special_tokens=[end_of_text],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str().encode()


def load(source: bytes, name: str, end_of_text: str, size: int = 0) -> Vocabulary:
    """Returns the vocabulary of a `tokenizer.json`.

    Args:
        source: The content of the file.
        name: The name of the file, for error messages.
        end_of_text: The spelling of the token that ends a document.
        size: The least vocabulary size to report. Ids without a token never occur.

    Raises:
        ValueError: If the content is damaged, or has no token `end_of_text`.
    """
    tokenizer = read(source, name)
    end = tokenizer.token_to_id(end_of_text)
    if end is None:
        raise ValueError(
            f"{name} has no token {end_of_text!r}; give the token that ends a document as "
            "--data.end-of-text."
        )
    tokenizer.encode_special_tokens = True
    size = max(size, *(index + 1 for index in tokenizer.get_vocab().values()))
    table = _bytes_per_token(tokenizer, size)
    if table is not None:
        table[end] = 0
    return Vocabulary(tokenizer, size, end, table)


def file_of(path: epath.PathLike) -> epath.Path:
    """The `tokenizer.json` of a folder, or the file itself."""
    found = epath.Path(path).expanduser()
    return found / "tokenizer.json" if found.is_dir() else found


def facts_of(folder: epath.Path) -> tuple[str | None, int]:
    """Of a Hugging Face folder: how the token that ends a document is spelt, and all ids are less.

    The first is that of `tokenizer_config.json`; None where that has no `eos_token`.

    Raises:
        ValueError: a file is damaged, or the eos_token is no text.
        OSError: there is no `tokenizer.json`.
    """
    path = folder / "tokenizer_config.json"
    end = read_json(path).get("eos_token") if path.exists() else None
    end = end.get("content") if isinstance(end, dict) else end
    if not isinstance(end, str | None):
        raise ValueError(f"{path}: the eos_token must be a text; got {end!r}.")
    path = file_of(folder)
    return end, 1 + max(read(path.read_bytes(), str(path)).get_vocab().values())


def read(source: bytes, name: str) -> Tokenizer:
    """Returns the tokenizer of a `tokenizer.json`, without truncation and padding.

    Raises:
        ValueError: If the content is damaged. The message has the file's name.
    """
    try:
        tokenizer = Tokenizer.from_buffer(source)
        largest = max(tokenizer.get_vocab().values(), default=-1)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exceptions and panics
        raise ValueError(f"{name} is not a valid tokenizer.json: {error}.") from None
    if not 0 <= largest < _LARGEST:
        found = "no tokens" if largest < 0 else f"the token {largest}"
        raise ValueError(
            f"{name} has {found}, but a vocabulary must have 1 to {_LARGEST:,} tokens; download "
            "it again."
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _bytes_per_token(tokenizer: Tokenizer, size: int) -> np.ndarray | None:
    """Returns the bytes per token, since byte-level BPE spells each byte as one character."""
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return None
    counts = np.zeros(size, np.int32)
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items():
        counts[index] = len(token)
    for index, token in tokenizer.get_added_tokens_decoder().items():
        counts[index] = 0 if token.special else len(token.content.encode())
    return counts
