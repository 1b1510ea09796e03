"""Tokenised shards: files of token ids that another program wrote."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from etils import epath

from experiments.language.cache import alone
from experiments.language.documents import fingerprint

SUFFIXES = (".npy", ".bin")
_HEADER = np.dtype("<i4"), 256
_MAGIC, _VERSION = 20240520, 1


def load(path: Path) -> np.ndarray:
    """A shard, memory-mapped: `(tokens,)` uint16 or uint32.

    `.npy` holds one such array. `.bin` holds uint16, after the header of modded-nanogpt's shards
    (256 int32: a magic number, version 1, the number of tokens) or from its beginning.

    Raises:
        ValueError: it is empty or damaged, or has another type, shape or version.
        OSError: it cannot be read.
    """
    tokens = _npy(path) if path.suffix == ".npy" else _bin(path)
    if not tokens.size:
        raise ValueError(f"{path} has no tokens.")
    return tokens


def _npy(path: Path) -> np.ndarray:
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a complete .npy file: {error}.") from None
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise ValueError(
            f"{path} has {tokens.dtype} of shape {tokens.shape}; tokens must have one axis and "
            "be uint16 or uint32."
        )
    return tokens


def _bin(path: Path) -> np.ndarray:
    size = path.stat().st_size
    if not size or size % 2:
        raise ValueError(
            f"{path} has {size} bytes, which must be an even number greater than 0 for uint16 "
            "tokens."
        )
    header = np.fromfile(path, *_HEADER)
    if _MAGIC not in header[:1]:
        return np.memmap(path, "<u2", "r")
    if header.size < 3 or header[1] != _VERSION:
        raise ValueError(f"{path} must have a header of version {_VERSION}.")
    count = int(header[2])
    whole = 4 * _HEADER[1] + 2 * count
    if size != whole or not count:
        raise ValueError(
            f"{path} is damaged or empty: its header promises {count} tokens, which are {whole} "
            f"bytes, but it has {size}."
        )
    return np.memmap(path, "<u2", "r", offset=header.nbytes)


def check(tokens: np.ndarray, vocabulary: int, file: epath.Path) -> str:
    """The digest of a shard's tokens.

    Raises:
        ValueError: one of them is not less than `vocabulary`.
    """
    largest = int(tokens.max())
    if largest >= vocabulary:
        raise ValueError(
            f"{file} has the token {largest}, which must be less than --data.vocabulary "
            f"{vocabulary}. Give the size of its vocabulary, or its --data.tokenizer."
        )
    return hashlib.sha256(tokens).hexdigest()


def fetch(file: epath.Path, folder: Path, on_wait: Callable[[], None] = lambda: None) -> Path:
    """The file itself where it is on this machine, else a whole copy of it in `folder`.

    While another process fetches it, `on_wait` is called; it may raise to give up.

    Raises:
        OSError: it cannot be read or written.
    """
    if "://" not in str(file):
        return Path(file)
    copy = folder / (fingerprint(file) + file.suffix)
    with alone(copy, on_wait):
        if not copy.exists():
            partial = copy.with_name(f".{copy.name}.partial")
            with file.open("rb") as source, open(partial, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 24)
            if partial.stat().st_size != file.stat().length:
                raise OSError(
                    f"{file} was only partly downloaded: {partial.stat().st_size} bytes of it"
                )
            partial.replace(copy)
    return copy
