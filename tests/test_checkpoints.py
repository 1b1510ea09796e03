"""Checkpoints come back bit for bit on any mesh, damage is noticed, a kill costs one save."""

import errno
import functools
import hashlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import lies_like, mesh_of
from orbax.checkpoint._src.serialization import tensorstore_utils

from experiments.language import manifests
from experiments.language.checkpoints import Checkpoints, params_sha256
from experiments.runs import RunError

ROOT = Path(__file__).parents[1]


class Router(NamedTuple):
    bias: jax.Array
    counts: jax.Array


def full_state(mesh):
    """All kinds of leaves and nodes that a training state has."""

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    params = {
        "layers": {"kernel": put(jnp.linspace(-1, 1, 128).reshape(16, 8), "data")},
        "embed": put(jnp.linspace(-3, 3, 64).reshape(4, 16), None, "data"),
        "frozen": put(jnp.ones((3,), jnp.bfloat16) / 3),
    }
    labels = {"layers": {"kernel": "muon"}, "embed": "other", "frozen": "frozen"}
    rules = {"muon": optax.sgd(1.0, 0.9), "other": optax.adamw(1.0), "frozen": optax.set_to_zero()}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(rules, labels))
    return {
        "params": params,
        "opt": optimizer.init(params),
        "router": Router(put(jnp.full((8,), 0.1), "data"), put(jnp.arange(8), "data")),
        "int8": put(jnp.arange(-8, 8, dtype=jnp.int8), "data"),
        "old_key": put(jax.random.PRNGKey(1)),
        "key": put(jax.random.key(2)),
        "keys": put(jax.random.split(jax.random.key(3, impl="rbg"), 8), "data"),
        "nan": put(jnp.array([jnp.nan, -0.0, jnp.inf])),
        "empty": put(jnp.zeros((0, 4))),
        "nothing": None,
        "step": 7,
        "rate": 0.1,
        "host": np.arange(3, dtype=np.uint16),
    }


def small_state(step=0, size=24):
    return {"kernel": jnp.arange(float(size)) + step, "bias": jnp.full((3,), step, jnp.bfloat16)}


def abstract(tree, mesh):
    """What is cut over `data` is cut over all axes of the mesh."""

    def one(x):
        if not isinstance(x, jax.Array):
            return x
        spec = getattr(x.sharding, "spec", ())
        spec = P(*(axis and mesh.axis_names for axis in spec))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def contents(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    if not hasattr(leaf, "dtype"):
        return type(leaf), leaf
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        assert contents(a) == contents(b), path


@pytest.fixture
def checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    yield checkpoints
    checkpoints.close()


def saved(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, small_state(step), {"step": step})
    checkpoints.wait()
    return Path(checkpoints.folder)


def test_any_state_comes_back_bit_for_bit(checkpoints, capfd):
    mesh = mesh_of("Auto", data=8)
    state = full_state(mesh)
    meta = {"config": {"layers": 4, "rate": 0.1}, "data": "ab12", "done": None, "é": [1, True]}
    checkpoints.save(5, state, meta)
    restored = checkpoints.restore(abstract(state, mesh))
    assert_same(restored.state, state)
    assert (restored.step, restored.meta, restored.damaged) == (5, meta, ())
    assert capfd.readouterr() == ("", "")


def test_arrays_are_the_same_on_8_4_2_and_1_devices(checkpoints):
    original = state = full_state(mesh_of("Auto", data=8))
    sizes = [{"data": 4}, {"data": 2, "fsdp": 2}, {"fsdp": 2}, {"data": 1}, {"data": 2, "fsdp": 4}]
    for step, size in enumerate(sizes):
        checkpoints.save(step, state, {})
        wanted = abstract(original, mesh_of("Auto", **size))
        state = checkpoints.restore(wanted).state
        assert_same(state, original)
        for want, got in zip(jax.tree.leaves(wanted), jax.tree.leaves(state), strict=True):
            assert not isinstance(want, jax.ShapeDtypeStruct) or lies_like(got, want.sharding)


def test_without_a_sharding_arrays_lie_on_the_first_device(checkpoints):
    saved(checkpoints, 1)
    state = checkpoints.restore(jax.eval_shape(small_state)).state
    assert_same(state, small_state(1))
    assert state["kernel"].sharding.device_set == {jax.local_devices()[0]}


def test_state_may_be_donated_at_once(checkpoints):
    mesh = mesh_of("Auto", data=4)
    shardings = {"cut": NamedSharding(mesh, P("data")), "whole": NamedSharding(mesh, P())}
    shape = (1 << 20,)

    @functools.partial(jax.jit, out_shardings=shardings)
    def begin(step):
        return {"cut": jnp.arange(shape[0]) + step, "whole": jnp.arange(shape[0]) - step}

    spoil = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    state = begin(0.0)
    wanted = abstract(state, mesh)
    spoil(state)
    assert all(x.is_deleted() for x in state.values())
    for step in range(4):
        state = begin(float(step))
        checkpoints.save(step, state, {})
        jax.block_until_ready(spoil(state))
        restored = checkpoints.restore(wanted).state
        assert_same(restored, begin(float(step)))
        jax.block_until_ready(spoil(restored))


def test_a_folder_with_nothing_has_no_checkpoint(checkpoints):
    assert checkpoints.restore(small_state()) is None
    assert checkpoints.steps() == []
    with pytest.raises(RunError, match=r"no checkpoint of step 3; it has \[\]"):
        checkpoints.restore(small_state(), step=3)


def test_the_newest_are_kept(checkpoints):
    folder = saved(checkpoints, 1, 3, 10)
    assert checkpoints.steps() == [3, 10]
    assert sorted(os.listdir(folder)) == ["step_10", "step_3"]
    assert checkpoints.restore(small_state()).step == 10
    restored = checkpoints.restore(small_state(), step=3)
    assert (restored.step, restored.meta) == (3, {"step": 3})
    assert_same(restored.state, small_state(3))


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_only_goes_forward(checkpoints, step):
    saved(checkpoints, 3)
    with pytest.raises(RunError, match=rf"later step than 3, .*; got step {step}\."):
        checkpoints.save(step, small_state(), {})
    assert_same(checkpoints.restore(small_state()).state, small_state(3))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def replace(path):
    path.with_name("added").write_bytes(path.read_bytes())
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, replace, Path.unlink])
def test_damage_to_any_file_is_noticed(tmp_path, checkpoints, damage):
    folder = saved(checkpoints, 1, 2)
    whole = tmp_path / "whole"
    shutil.copytree(folder / "step_2", whole)
    names = [path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()]
    assert len(names) > 5
    for name in names:
        if damage in (flip, truncate) and not (whole / name).stat().st_size:
            continue
        shutil.rmtree(folder / "step_2")
        shutil.copytree(whole, folder / "step_2")
        damage(folder / "step_2" / name)
        restored = Checkpoints(folder).restore(small_state())
        assert restored.step == 1
        assert_same(restored.state, small_state(1))
        if name == manifests.NAME and damage in (replace, Path.unlink):
            assert restored.damaged == ()  # as if it had never been finished
        else:
            (reason,) = restored.damaged
            assert reason.startswith("step 2: ") and name in reason


def test_an_added_file_and_a_moved_checkpoint_are_noticed(checkpoints):
    folder = saved(checkpoints, 1, 2)
    (folder / "step_2" / "state" / "more").write_text("")
    assert checkpoints.restore(small_state()).damaged == ("step 2: state/more was added",)
    (folder / "step_1").rename(folder / "step_9")
    with pytest.raises(RunError, match=r"step 9: manifest.json is damaged; step 2: state/more was"):
        checkpoints.restore(small_state())


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_bad_sector_is_damage_and_missing_rights_are_not(checkpoints, monkeypatch, number):
    saved(checkpoints, 1, 2)
    sha256 = manifests.file_digest

    def failing(path):
        if path.name == "_METADATA" and "step_2" in path.parts:
            raise OSError(number, os.strerror(number))
        return sha256(path)

    monkeypatch.setattr(manifests, "file_digest", failing)
    if number == errno.EIO:
        damaged = checkpoints.restore(small_state()).damaged
        assert damaged == ("step 2: state/_METADATA has changed since it was written",)
    else:
        with pytest.raises(PermissionError):
            checkpoints.restore(small_state())


def test_none_whole_is_an_error(checkpoints):
    folder = saved(checkpoints, 1, 2)
    (folder / "step_1" / "_CHECKPOINT_METADATA").unlink()
    flip(folder / "step_2" / "manifest.json")
    with pytest.raises(RunError) as caught:
        checkpoints.restore(small_state())
    assert str(folder) in str(caught.value)
    assert "step 2: manifest.json is damaged" in str(caught.value)
    assert "step 1: _CHECKPOINT_METADATA is missing" in str(caught.value)


def test_a_damaged_one_that_was_asked_for_is_an_error(checkpoints):
    folder = saved(checkpoints, 1, 2)
    truncate(folder / "step_1" / "_CHECKPOINT_METADATA")
    with pytest.raises(RunError, match=r"that step \(step 1: _CHECKPOINT_METADATA has \d+ bytes"):
        checkpoints.restore(small_state(), step=1)
    assert checkpoints.restore(small_state()).step == 2


def test_a_damaged_one_is_replaced_and_not_counted(checkpoints):
    folder = saved(checkpoints, 1, 2)
    flip(folder / "step_2" / "state" / "_METADATA")
    assert checkpoints.restore(small_state()).step == 1
    assert checkpoints.steps() == [1]
    saved(checkpoints, 2)
    assert checkpoints.steps() == [1, 2]
    assert_same(checkpoints.restore(small_state()).state, small_state(2))


def test_unfinished_ones_do_not_count_and_are_cleared(checkpoints):
    folder = saved(checkpoints, 1, 2)
    (folder / "step_2" / "manifest.json").unlink()
    shutil.copytree(folder / "step_2", folder / "step_5")
    (folder / "notes").mkdir()
    restored = checkpoints.restore(small_state())
    assert (restored.step, restored.damaged) == (1, ())
    saved(checkpoints, 2)
    assert sorted(os.listdir(folder)) == ["notes", "step_1", "step_2"]
    assert_same(checkpoints.restore(small_state()).state, small_state(2))


def test_only_an_unfinished_one_is_none(checkpoints):
    folder = saved(checkpoints, 1)
    (folder / "step_1" / "manifest.json").unlink()
    assert checkpoints.restore(small_state()) is None


OTHER_STATES = {
    "shape": (
        {"bias": jnp.zeros((4,), jnp.bfloat16)},
        r"bias: saved bfloat16\(3,\), wanted .*\(4",
    ),
    "rank": ({"kernel": jnp.zeros((24, 1))}, r"kernel: saved float32\(24,\), wanted .*\(24, 1\)"),
    "dtype": ({"bias": jnp.zeros((3,))}, r"bias: saved bfloat16\(3,\), wanted float32\(3,\)"),
    "missing": ({"bias": None}, r"bias: saved bfloat16\(3,\), wanted nothing"),
    "more": ({"more": {"x": jnp.zeros(2)}}, r"more.x: saved nothing, wanted float32\(2,\)"),
    "scalar": ({"bias": 3}, r"bias: saved bfloat16\(3,\), wanted int\(\)"),
}


@pytest.mark.parametrize("change", OTHER_STATES)
def test_another_state_is_an_error_that_names_the_leaves(checkpoints, change):
    saved(checkpoints, 1, 2)
    changes, message = OTHER_STATES[change]
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(small_state() | changes)


def test_what_cannot_be_saved_is_refused(checkpoints):
    folder = saved(checkpoints, 1)
    refused = [
        (TypeError, "bad is a str", {"bad": "text"}, {}),
        (TypeError, "bad is a float32", {"bad": np.float32(1)}, {}),
        (
            ValueError,
            "leaves have the name a.b",
            {"a.b": jnp.ones(1), "a": {"b": jnp.zeros(1)}},
            {},
        ),
        (TypeError, "not JSON serializable", small_state(), {"x": jnp.ones(1)}),
        (ValueError, "not JSON compliant", small_state(), {"x": float("nan")}),
    ]
    for kind, message, state, meta in refused:
        with pytest.raises(kind, match=message):
            checkpoints.save(2, state, meta)
    assert os.listdir(folder) == ["step_1"]
    with pytest.raises(
        ValueError, match="keep must be at least 1, since a run needs its last checkpoint; got 0"
    ):
        Checkpoints(folder, keep=0)


def test_meta_is_taken_when_save_is_called(checkpoints):
    meta = {"step": 1}
    checkpoints.save(1, small_state(), meta)
    meta["step"] = 2
    assert checkpoints.restore(small_state()).meta == {"step": 1}


def test_a_full_disk_costs_one_save(checkpoints, capfd, caplog):
    saved(checkpoints, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        checkpoints.save(2, small_state(2, size=1 << 20), {})
        with pytest.raises(OSError, match=r"step 2 could not be saved .*too large") as caught:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(checkpoints.folder)
    assert checkpoints.steps() == [1]
    restored = checkpoints.restore(small_state())
    assert (restored.step, restored.damaged) == (1, ())
    saved(checkpoints, 2)
    assert checkpoints.steps() == [1, 2]
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_no_room_for_the_manifest_surfaces_at_the_next_save(checkpoints, monkeypatch):
    saved(checkpoints, 1, 2)

    def full(path, value):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(manifests, "write_json", full)
        checkpoints.save(3, small_state(3), {})
        with pytest.raises(OSError, match=r"step 3 could not be saved .*No space left") as caught:
            checkpoints.save(4, small_state(4), {})
    assert caught.value.errno == errno.ENOSPC
    assert checkpoints.steps() == [1, 2]
    saved(checkpoints, 4)
    assert checkpoints.steps() == [2, 4]


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "run")
    with pytest.raises(OSError, match="file/run"):
        checkpoints.save(1, small_state(), {})
    checkpoints.close()


def test_relative_folders_and_moved_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("run")
    saved(checkpoints, 1)
    checkpoints.close()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert_same(Checkpoints("elsewhere").restore(small_state()).state, small_state(1))


def test_object_stores_have_their_driver(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9000")
    checkpoints = Checkpoints("s3://bucket/runs/one")
    drivers = {
        f"{checkpoints.folder}/step_1": (
            "s3",
            "bucket",
            "runs/one/step_1",
            "http://localhost:9000",
        ),
        "gs://bucket/runs/one": ("gcs", "bucket", "runs/one", None),
        "/runs/one/": ("file", None, "/runs/one/", None),
    }
    for folder, driver in drivers.items():
        base = tensorstore_utils.build_kvstore_tspec(folder)["base"]
        assert tuple(map(base.get, ("driver", "bucket", "path", "endpoint"))) == driver


@pytest.mark.slow
def test_twenty_kills_cost_nothing(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "tests.checkpoint_loop", tmp_path / "run", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr
    seen = json.loads(done.stdout)
    assert seen["same"] and seen["kills"] == 20
    assert seen["midway"] >= 5, "too few of the kills fell into a save"
    assert seen["steps"] > 5


@pytest.mark.slow
def test_two_processes_save_and_restore_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    folder = tmp_path / "run"
    command = [sys.executable, "-W", "error", "-m", "tests.checkpoint_pair", port]
    start = functools.partial(subprocess.Popen, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    pair = [start([*command, str(i), folder], stdout=subprocess.DEVNULL) for i in range(2)]
    try:
        errors = [process.communicate(timeout=100)[1] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], errors
    first, second = (json.loads(Path(f"{folder}.{i}.json").read_text()) for i in range(2))
    assert "No such file or directory: '/no/such/folder'" in first.pop("error")
    assert "in another process" in second.pop("error")
    assert first == second
    assert first["empty"] is None and first["same"] and first["same_fallback"]
    assert first["steps"] == [2, 3] and first["newest"] == [3, {"step": 3}, []]
    step, damaged = first["fallback"]
    assert step == 2 and damaged[0].startswith(
        "step 3: _CHECKPOINT_METADATA has 9 bytes instead of "
    )
    assert first["last"] == [2, 4]

    leaf = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    names = ("across", "within", "replicated")
    alone = Checkpoints(folder).restore(dict.fromkeys(names, leaf))
    x = np.arange(32, dtype=np.float32).reshape(8, 4)
    assert_same(jax.tree.map(np.asarray, alone.state), dict.fromkeys(names, x + 4))
    assert first["sha256"] == params_sha256(dict.fromkeys(names, x + 3))


def test_params_sha256_is_of_names_shapes_dtypes_and_bytes():
    x, y = np.arange(32, dtype=np.float32).reshape(8, 4), np.float32([0.5])
    digest = hashlib.sha256()
    digest.update(b'["a/b", [8, 4], "float32"]\n' + x.tobytes())
    digest.update(b'["a0", [1], "float32"]\n' + y.tobytes())
    params = {"a": {"b": x}, "a0": y}
    assert params_sha256(params) == digest.hexdigest()
    mesh = mesh_of("Auto", data=4, fsdp=2)
    for spec in (P(), P("data"), P(("data", "fsdp")), P("fsdp", "data")):
        params["a"] = {"b": jax.device_put(x, NamedSharding(mesh, spec))}
        assert params_sha256(params) == digest.hexdigest()
    negative = x.copy()
    negative[0, 0] = -0.0
    others = [{"b": negative}, {"b": x.T}, {"b": x.reshape(4, 8)}, {"c": x}, {"b": np.int32(x)}]
    digests = {params_sha256({"a": other, "a0": y}) for other in others}
    assert len(digests) == len(others) and digest.hexdigest() not in digests
