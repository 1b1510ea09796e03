"""Bits per byte of any text: `python -m experiments.pretrain.bits RUN_DIR "texts/*.jsonl"`."""

import dataclasses
import itertools
import math
import sys
from typing import NamedTuple

import numpy as np
import tyro

from experiments.command_line import parse
from experiments.commands import guard, print_warning
from experiments.language import documents, tokenizer
from experiments.pretrain.loop import summed_losses
from experiments.pretrain.trained import TOKENIZER, Loaded, load_run


class Measured(NamedTuple):
    """The measured loss of texts.

    Attributes:
        bits: The bits of all tokens, including the ends of documents.
        bytes: The bytes of the texts in UTF-8.
        tokens: The number of predicted tokens.
        exact: Whether the tokens decode to exactly these bytes.
    """

    bits: float
    bytes: int
    tokens: int
    exact: bool


def measure(loaded: Loaded, files: tuple[str, ...]) -> Measured:
    """Measures the bits of the concatenated texts, in windows of the run's context.

    Each token is predicted once, from the tokens before it in its window, as in validation.

    Args:
        loaded: The result of `load_run`.
        files: Globs of text files, as in --data.files. All documents are measured, including those
            that training on these files would use.

    Raises:
        ValueError: The run has no tokenizer, or a file is missing, damaged or not text.
        OSError: A file cannot be read.
    """
    config = loaded.config
    if loaded.tokenizer is None:
        raise ValueError(
            "The run was trained on tokens without a tokenizer, so other text cannot be measured. "
            "Give --data.tokenizer when training."
        )
    source = loaded.tokenizer.to_str().encode()
    bpe, _, end, table = tokenizer.load(source, TOKENIZER, config.data.end_of_text)
    found = documents.matching(files, documents.SUFFIXES)
    texts = documents.Documents(found, lambda _, text: [documents.Document(text, True)])
    stream, size, exact = [end], 0, table is not None
    for text, _ in itertools.chain.from_iterable(map(texts.of, found)):
        ids = bpe.encode(text, add_special_tokens=False).ids
        count = len(text.encode())
        exact = exact and int(table[ids].sum()) == count
        stream += [*ids, end]
        size += count
    if not size:
        raise ValueError(f"The files of {' '.join(files)} contain no text.")
    tokens, context = np.array(stream, np.int32), config.context
    whole = (len(tokens) - 1) // context
    places = np.arange(whole)[:, None] * context + np.arange(context + 1)
    nats = 0.0
    for rows in (tokens[places], tokens[None, whole * context :]):
        if len(rows) and rows.shape[1] > 1:
            nats += float(summed_losses(loaded.trainer, loaded.state, rows).sum())
    return Measured(nats / math.log(2), size, len(tokens) - 1, exact)


@dataclasses.dataclass(frozen=True)
class Command:
    """Prints how many bits per byte a run's newest checkpoint needs for texts of your own."""

    run: tyro.conf.Positional[str]
    """Folder of the run. It may be in gs:// or s3://."""
    files: tyro.conf.Positional[tuple[str, ...]]
    """Globs of text, which may be in gs:// or s3://: .txt and .py (one document each), .jsonl,
    .jsonl.gz or .parquet (documents in the field or column "text"). Only text that the run has not
    trained on tells how well it predicts."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("FILES requires one glob or more; got none.")


def main() -> int:
    """Runs the command; returns its exit code."""

    def work() -> int:
        command = parse(Command, "python -m experiments.pretrain.bits")
        found = measure(load_run(command.run), command.files)
        if not found.exact:
            print_warning(
                "The run's tokenizer does not keep this text byte for byte, so that the bits are "
                "of another one."
            )
        print(
            f"{found.bits / found.bytes:.4f} bits per byte: {found.bytes:,} bytes, "
            f"{found.tokens:,} tokens, {found.bits * math.log(2) / found.tokens:.4f} nats per "
            "token."
        )
        return 0

    return guard(work)


if __name__ == "__main__":
    sys.exit(main())
