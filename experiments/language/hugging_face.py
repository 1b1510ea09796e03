"""Folders of Hugging Face models: tensors in one safetensors file, or several with an index."""

import contextlib
import shutil
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from experiments.runs import read_json, write_json

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SHARD = 5 * 10**9  # bytes of a file of tensors at most


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which then takes its place: it is there whole, or not at all.

    Raises:
        ValueError: there is something in the folder already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; remove it, or give another folder.")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_tensors(
    folder: Path, tensors: Iterator[tuple[str, np.ndarray]], shard: int = SHARD
) -> None:
    """Into one file, or several with an index; one of them is in memory at a time.

    Args:
        folder: to write into.
        tensors: names and arrays.
        shard: bytes of a file at most, unless one tensor has more.

    Raises:
        OSError: the disk is full.
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
        written.chmod(0o644)  # the library's are for their maker alone


def open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """The open file of each tensor, by its name; `stack` closes them.

    Raises:
        ValueError: a file is damaged.
        OSError: one is missing.
    """
    names = {WEIGHTS}
    if (folder / INDEX).exists():
        names = set(read_json(folder / INDEX).get("weight_map", {}).values())
    found = {}
    for name in sorted(names):
        try:
            file = stack.enter_context(safe_open(folder / name, "np"))
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged ({error}); get it again.") from None
        found |= dict.fromkeys(file.keys(), file)
    return found


def check_params(found: Any, wanted: Any) -> None:
    """Raises a ValueError where params have not the shapes of their model's, trees both."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        named = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}
        return {name: tuple(leaf.shape) for name, leaf in named.items()}

    ours, theirs = shapes(found), shapes(wanted)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"These are not params of this model: {name} is {ours.get(name, 'missing')}, and "
                f"its config asks for {theirs.get(name, 'none')}."
            )


def check_names(folder: Path, wanted: Set[str], found: Set[str]) -> None:
    """Raises a ValueError where a folder's tensors are not those of its model."""
    for what, names in (("lacks", wanted - found), ("has, beyond its config,", found - wanted)):
        if names:
            first = ", ".join(sorted(names)[:3])
            raise ValueError(
                f"{folder} {what} {len(names)} tensors, {first} first: its files are not those of "
                f"the model in its {CONFIG}."
            )


def read_tensor(file: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of an open file, in the file's dtype; a ValueError where it has another shape."""
    found, dtype = tuple(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype()
    if found != shape or dtype not in ("F32", "BF16", "F16"):
        raise ValueError(
            f"{name} is {dtype} {found}; the model in {CONFIG} has F32, BF16 or F16 {shape}."
        )
    return file.get_tensor(name)
