"""Reads tokenised shards, which are files of token ids written by other programs."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from etils import epath

from experiments.cache import alone
from experiments.language.documents import fingerprint

SUFFIXES = (".npy", ".bin")
_HEADER = np.dtype("<i4"), 256
_MAGIC, _VERSION = 20240520, 1


def load(path: Path) -> np.ndarray:
    """Returns a shard as a memory-mapped array `(tokens,)`, uint16 or uint32.

    A `.npy` file holds one such array. A `.bin` file holds uint16, optionally after the header of
    modded-nanogpt's shards (256 int32: a magic number, version 1, the number of tokens).

    Raises:
        ValueError: If the file is empty or damaged, or has another type, shape or version.
        OSError: If it cannot be read.
    """
    tokens = _npy(path) if path.suffix == ".npy" else _bin(path)
    if not tokens.size:
        raise ValueError(f"{path} has no tokens; remove it from --data.files.")
    return tokens


def _npy(path: Path) -> np.ndarray:
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a complete .npy file ({error}); write it again.") from None
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise ValueError(
            f"{path} must have one axis of uint16 or uint32; got {tokens.dtype} of shape "
            f"{tokens.shape}."
        )
    return tokens


def _bin(path: Path) -> np.ndarray:
    size = path.stat().st_size
    if not size or size % 2:
        raise ValueError(
            f"{path} must have an even number of bytes, greater than 0, for uint16 tokens; got "
            f"{size}."
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
            f"bytes, but it has {size}. Download it again, or remove it from --data.files."
        )
    return np.memmap(path, "<u2", "r", offset=header.nbytes)


def check(tokens: np.ndarray, vocabulary: int, file: epath.Path) -> str:
    """Checks that a shard's tokens are less than `vocabulary`, and returns their digest.

    Raises:
        ValueError: If a token is not less than `vocabulary`.
    """
    largest = int(tokens.max())
    if largest >= vocabulary:
        raise ValueError(
            f"Tokens of {file} must be less than --data.vocabulary {vocabulary}; got {largest}. "
            "Give the size of its vocabulary, or its --data.tokenizer."
        )
    return hashlib.sha256(tokens).hexdigest()


def fetch(file: epath.Path, folder: Path, on_wait: Callable[[], None] = lambda: None) -> Path:
    """Returns the path of a local file, or of a complete copy in `folder` of a remote one.

    While another process downloads it, `on_wait` is called repeatedly. It may raise to give up.

    Raises:
        OSError: If the file cannot be read, or the copy cannot be written.
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
