"""Reads and writes folders of Hugging Face models, with one or several safetensors files."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from experiments.json_files import read_json, write_json

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SHARD = 5 * 10**9  # maximum bytes of a tensor file


class File(NamedTuple):
    """An open safetensors file and its path."""

    path: Path
    opened: Any


def write_tensors(
    folder: Path, tensors: Iterator[tuple[str, np.ndarray]], shard: int = SHARD
) -> None:
    """Writes tensors to one file, or to several with an index. One file is in memory at a time.

    Args:
        folder: The folder to write to.
        tensors: Names and arrays.
        shard: Maximum bytes of a file, unless a single tensor is larger.

    Raises:
        OSError: If the disk is full.
    """
    weight_map: dict[str, int] = {}
    pending: dict[str, np.ndarray] = {}
    files = total = size = 0

    def flush() -> None:
        try:
            save_file(pending, folder / f"{files}.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder} cannot be written ({error}); is the disk full?") from None
        pending.clear()

    for name, x in tensors:
        if pending and size + x.nbytes > shard:
            flush()
            files, size = files + 1, 0
        pending[name], weight_map[name] = x, files
        size, total = size + x.nbytes, total + x.nbytes
    flush()
    files += 1
    final = [f"model-{i:05}-of-{files:05}.safetensors" for i in range(1, files + 1)]
    if files == 1:
        final = [WEIGHTS]
    else:
        index = {name: final[i] for name, i in weight_map.items()}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    for i, name in enumerate(final):
        written = (folder / f"{i}.safetensors").rename(folder / name)
        written.chmod(0o644)  # the library makes files that only their owner can read


@contextlib.contextmanager
def open_tensors(folder: Path, layers: int) -> Iterator[dict[str, File]]:
    """Opens a model's tensor files, and gives the file of each tensor by the tensor's name.

    Args:
        folder: The model's folder.
        layers: The number of layers in its config. Each has at least one tensor.

    Raises:
        ValueError: If a file is damaged, there are two models, or fewer tensors than layers.
        OSError: If a file is missing.
    """
    with contextlib.ExitStack() as stack:
        opened: dict[str, File] = {}
        for name in _files(folder):
            path = folder / name
            try:
                file = stack.enter_context(safe_open(path, "np"))
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}); download it again.") from None
            opened |= dict.fromkeys(file.keys(), File(path, file))
        if layers > len(opened):
            raise ValueError(
                f"{folder / CONFIG} has {layers} layers, but there are {len(opened)} tensors: the "
                "files are not of that model. Download them again."
            )
        yield opened


def _files(folder: Path) -> list[str]:
    """Returns the names of a folder's tensor files, and checks that all of them exist."""
    single = (folder / WEIGHTS).exists()
    if not (folder / INDEX).exists():
        if single:
            return [WEIGHTS]
        pickled = any(folder.glob("pytorch_model*.bin"))
        raise FileNotFoundError(
            f"{folder} has neither {WEIGHTS} nor "
            f"{INDEX}{'; pytorch_model.bin is not supported' if pickled else ''}; download the "
            "model's safetensors files, or save it with transformers' save_pretrained, which "
            "writes them."
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{folder / INDEX}: weight_map is {short(weight_map)} but must be an object of "
            "tensors and their files; download it again."
        )
    for tensor, name in weight_map.items():
        # A link may lead out of the folder, as in the Hub's cache, but a name may not.
        if not isinstance(name, str) or {"..", "/"} & {*Path(name).parts} or not Path(name).name:
            raise ValueError(
                f"{folder / INDEX}: the file of {short(tensor)} is {short(name)} but must name "
                "one in this folder; download it again."
            )
    names = sorted(set(weight_map.values()))
    if single and names != [WEIGHTS]:  # transformers would read this one, and others the shards
        raise ValueError(
            f"{folder} has {WEIGHTS} and, by its {INDEX}, {min({*names} - {WEIGHTS})}: these may "
            f"be two models. Remove {WEIGHTS}, or {INDEX} and its files, whichever is out of date."
        )
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder / INDEX} names {name}, which does not exist; download it again."
            )
    return names


def read_files(folder: Path) -> list[Path]:
    """Returns the files of a model's folder that are read: config, tensors and tokenizer.

    Raises:
        ValueError, OSError: As for `open_tensors`.
    """
    others = [path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".txt")]
    tensors = (folder / name for name in _files(folder))
    return sorted({*filter(Path.is_file, others), *tensors})


def fingerprint(folder: Path) -> str:
    """Returns the model's name, with a digest of all its files that are read."""
    digest = hashlib.sha256()
    for path in read_files(folder):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return f"{folder.name} {digest.hexdigest()[:12]}"
