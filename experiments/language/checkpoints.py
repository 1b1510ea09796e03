"""Checkpoints of long runs: arrays written by Orbax, sealed by a manifest of digests."""

import concurrent.futures
import errno
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from experiments import manifests
from experiments.language.processes import from_every_process, on_host
from experiments.language.sharding import named_leaves
from experiments.runs import RunError

_NAMED = 8  # maximum number of leaves or files that an error names

# Orbax logs a traceback in each thread that an error passes through, though the caller gets it too.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Restored(NamedTuple):
    """A restored checkpoint.

    Attributes:
        step: The step at which it was saved.
        state: The tree `abstract` with the saved values.
        meta: The JSON that was saved beside it.
        damaged: Descriptions of newer checkpoints that were skipped because they are damaged.
    """

    step: int
    state: Any
    meta: dict[str, Any]
    damaged: tuple[str, ...]


class Checkpoints:
    """The checkpoints of one run. Incomplete ones are never used.

    Orbax writes the arrays to `folder/step_<step>`. When they are complete, `manifest.json` is
    added, with the size and sha256 of every file and the shape and dtype of every leaf. A folder
    without it is an unfinished save, which is never read, and which the next save removes. A kill
    at any moment loses only the save in progress.

    All processes of `jax.distributed` must make the same calls in the same order, with one shared
    folder. Each writes its shards; the first process seals, checks, deletes and decides for all.

    Use `contextlib.closing`: a process that ends without `close` loses the last save.

    Args:
        folder: The folder, local or in `gs://` or `s3://`. The first save makes it.
        keep: The number of newest checkpoints to keep. An older one is deleted when a newer one is
            complete.
    """

    def __init__(self, folder: epath.PathLike, *, keep: int = 3):
        if keep < 1:
            raise ValueError(
                f"keep must be at least 1, since a run needs its last checkpoint; got {keep}."
            )
        folder = epath.Path(folder)
        self.folder = folder if folder.is_absolute() else folder.resolve()
        if os.fspath(folder).startswith("s3://"):
            _teach_orbax_s3()
        self.keep = keep
        self._damaged: set[int] = set()
        self._saver = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._saving: tuple[int, concurrent.futures.Future[None]] | None = None

    def save(self, step: int, state: Any, meta: dict[str, Any], spare: int | None = None) -> None:
        """Starts a save in the background, and returns as soon as `state` may be donated.

        Args:
            state: A tree of JAX arrays (including PRNG keys), NumPy arrays and Python numbers.
            meta: Small, JSON-able data.
            spare: The step of a checkpoint to keep beside the newest ones.

        Raises:
            RunError: If the folder has a checkpoint of this step or a later one.
            OSError: If this save could not start, or the previous one could not be finished.
            TypeError, ValueError: If `state` or `meta` cannot be saved.
        """
        self.wait()
        manifest = {
            "step": int(step),
            "meta": json.loads(json.dumps(meta, allow_nan=False)),
            "leaves": _leaves(state),
        }
        _in_first_process(lambda: self._make_room(step))
        with _orbax():
            arrays = ocp.save_async(self._path(step), _without_empty(state))
        self._saving = step, self._saver.submit(self._finish, arrays, manifest, spare)

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
            OSError: If it could not be finished. Earlier checkpoints are untouched.
        """
        if self._saving is None:
            return
        step, saving = self._saving
        error = saving.exception()
        self._saving = None
        failed = _in_any_process(error is not None)
        if failed:
            reason = error or "in another process"
            raise OSError(
                _errno(error),
                f"The checkpoint of step {step} could not be saved ({reason}). Earlier "
                "checkpoints are untouched; once the storage works again, the run continues "
                "from the last",
                os.fspath(self.folder),
            ) from error

    def restore(self, abstract: Any, *, step: int | None = None) -> Restored | None:
        """Reads the newest complete checkpoint, or that of `step`.

        The size and digest of each file are checked first. A checkpoint with a missing, changed or
        added file is skipped, and the one before it is read.

        Args:
            abstract: A tree like the saved state, of `jax.ShapeDtypeStruct` with shardings on any
                mesh, or of arrays, whose values are not used. Leaves without a sharding are
                restored to the first device.

        Returns:
            The checkpoint; None if the folder contains none.

        Raises:
            RunError: If there are checkpoints, but none, or not that of `step`, is complete.
            ValueError: If the saved state has other leaves, shapes or dtypes.
        """
        self.wait()
        manifest, damaged = _in_first_process(lambda: self._choose(step))
        if manifest is None:
            return None
        self._damaged |= {int(number) for number, _ in damaged}
        path = self._path(manifest["step"])
        abstract = jax.tree.map(_as_abstract, abstract)
        _check_leaves(path, there=manifest["leaves"], here=_leaves(abstract))
        with _orbax():
            state = ocp.load(path, _without_empty(abstract))
        return Restored(
            manifest["step"],
            jax.tree.map(_with_empty, abstract, state),
            manifest["meta"],
            tuple(f"step {number}: {reason}" for number, reason in damaged),
        )

    def steps(self) -> list[int]:
        """Returns the steps of the finished checkpoints, ascending, without reading their files."""
        return _in_first_process(self._finished)

    def remove_later(self, step: int) -> None:
        """Removes the checkpoints of all later steps, so that these can be saved anew."""
        self.wait()

        def remove() -> None:
            for number in reversed(manifests.steps(self.folder)):
                if number > step:
                    _remove(self._path(number))

        _in_first_process(remove)

    def close(self) -> None:
        """Waits for the last save, and raises its error if it failed."""
        try:
            self.wait()
        finally:
            self._saver.shutdown()

    def _path(self, step: int) -> epath.Path:
        return self.folder / f"step_{step}"

    def _finished(self) -> list[int]:
        whole = (s for s in manifests.steps(self.folder) if manifests.of_step(self.folder, s))
        return [step for step in whole if step not in self._damaged]

    def _make_room(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        finished = self._finished()
        if finished and step <= finished[-1]:
            raise RunError(
                f"A new checkpoint must be of a later step than {finished[-1]}, the newest in "
                f"{self.folder}; got step {step}. Remove the later ones first."
            )
        for number in {*manifests.steps(self.folder)} - {*finished}:
            _remove(self._path(number))
        self._damaged.clear()

    def _finish(
        self, arrays: ocp.AsyncResponse[None], manifest: dict[str, Any], spare: int | None
    ) -> None:
        arrays.result()
        if jax.process_index() == 0:
            manifests.seal(self._path(manifest["step"]), manifest)
            for step in self._finished()[: -self.keep]:
                if step != spare:
                    _remove(self._path(step))

    def _choose(self, wanted: int | None) -> tuple[dict[str, Any] | None, list[tuple[int, str]]]:
        """Returns the manifest of the one to restore, and the faults of newer ones."""
        steps = manifests.steps(self.folder)
        steps = [step for step in steps if (self._path(step) / manifests.NAME).exists()]
        if wanted is not None and wanted not in steps:
            raise RunError(f"{self.folder} has no checkpoint of step {wanted}; it has {steps}.")
        damaged = []
        for step in reversed(steps) if wanted is None else [wanted]:
            manifest = manifests.of_step(self.folder, step)
            problems = manifests.problems(self._path(step), manifest)
            if not problems:
                return manifest, damaged
            damaged.append((step, _enumerated(problems)))
        if damaged:
            found = "; ".join(f"step {step}: {reason}" for step, reason in damaged)
            raise RunError(
                f"{self.folder} has no complete "
                f"checkpoint{'' if wanted is None else ' of that step'} ({found}). Restore one "
                "from a backup, or start again in another folder."
            )
        return None, []


def params_sha256(params: Any) -> str:
    """Returns a digest of the names, shapes, dtypes and bytes of all leaves, sorted by path.

    It does not depend on the sharding. Leaves that are sharded over several processes are gathered
    to the host one at a time, so all processes must call this.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(params), key=lambda item: item[0]):
        array = on_host(leaf)
        digest.update(json.dumps([name, array.shape, str(array.dtype)]).encode() + b"\n")
        digest.update(array.tobytes())
    return digest.hexdigest()


@functools.cache
def _teach_orbax_s3() -> None:
    """Makes Orbax use TensorStore's S3 driver, which Orbax 0.12 does not (its pull 2739)."""
    gcs_driver = gcs_utils.get_kvstore_for_gcs

    def driver(path: str) -> dict[str, Any]:
        if not path.startswith("s3://"):
            return gcs_driver(path)
        bucket, _, key = path.removeprefix("s3://").partition("/")
        # s3fs, which etils uses, reads this variable, but TensorStore does not.
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        return {"driver": "s3", "bucket": bucket, "path": key} | (
            {"endpoint": endpoint} if endpoint else {}
        )

    tensorstore_utils._normalize_path = lambda path: re.sub(
        "^(gs|s3):/+", r"\1://", os.path.normpath(path)
    )
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(("gs://", "s3://"))
    gcs_utils.get_kvstore_for_gcs = driver


def _orbax() -> ocp.Context:
    context = ocp.Context()
    # Our manifest marks a folder as complete, so no renaming is needed, which object stores lack.
    context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    # So a folder that cannot be made is an error at once; threads would wait for minutes.
    context.asynchronous.create_directories_asynchronously = False
    context.array.saving.use_compression = False  # trained weights do not shrink
    # Each slice compiles a program, which small replicated arrays, such as counters, do not need.
    context.array.saving.min_slice_bytes_for_replica_parallel = 1 << 20
    return context


def _leaves(tree: Any) -> dict[str, list[Any]]:
    """Returns `[shape, dtype]` of each leaf by name."""
    leaves: dict[str, list[Any]] = {}
    for name, leaf in named_leaves(tree, "."):
        if name in leaves:
            raise ValueError(
                f"Two leaves have the name {name}, and Orbax would keep only one. Rename one."
            )
        if type(leaf) in (bool, int, float):
            leaves[name] = [[], type(leaf).__name__]
        elif isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            leaves[name] = [list(leaf.shape), str(leaf.dtype)]
        else:
            raise TypeError(
                f"{name} is a {type(leaf).__name__}, which a checkpoint cannot hold. Make it an "
                "array, or put it into meta."
            )
    return leaves


def _check_leaves(path: epath.Path, *, there: dict[str, Any], here: dict[str, Any]) -> None:
    differences = [
        f"{name}: saved {_described(there.get(name))}, wanted {_described(here.get(name))}"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path} was saved from a different state ({_enumerated(differences)}). Give the "
            "settings of the run that saved it, or another folder."
        )


def _described(leaf: list[Any] | None) -> str:
    return "nothing" if leaf is None else f"{leaf[1]}{tuple(leaf[0])}"


def _enumerated(items: list[str]) -> str:
    more = len(items) - _NAMED
    return "; ".join(items[:_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _as_abstract(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _without_empty(tree: Any) -> Any:
    """Replaces empty arrays by None, since Orbax rejects them."""
    return jax.tree.map(lambda leaf: None if getattr(leaf, "size", 1) == 0 else leaf, tree)


def _with_empty(abstract: Any, leaf: Any) -> Any:
    if leaf is not None:
        return leaf
    return jnp.zeros(abstract.shape, abstract.dtype, device=abstract.sharding)


def _remove(path: epath.Path) -> None:
    """Removes a checkpoint. After a kill halfway, the rest counts as unfinished, not damaged."""
    (path / manifests.NAME).unlink(missing_ok=True)
    path.rmtree(missing_ok=True)


def _errno(error: BaseException | None) -> int:
    """Returns an error's errno, which TensorStore states only in the message."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else getattr(error, "errno", None) or errno.EIO


def _in_any_process(here: bool) -> bool:
    return bool(np.any(from_every_process(np.array(here))))


def _in_first_process(work: Callable[[], Any]) -> Any:
    """Runs `work` in the first process, and returns or raises its result in every process."""
    if jax.process_count() == 1:
        return work()
    answer = reason = error = None
    if jax.process_index() == 0:
        try:
            answer = work()
        except Exception as caught:
            error, reason = caught, str(caught)
    text = np.frombuffer(json.dumps([answer, reason]).encode(), np.uint8)
    size = int(from_every_process(np.array(len(text), np.int32))[0])
    text = from_every_process(np.resize(text, size))[0]
    answer, reason = json.loads(text.tobytes())
    if reason is not None:
        raise error or RunError(reason)
    return answer
