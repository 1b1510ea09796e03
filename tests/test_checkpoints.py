"""Checkpoints come back bit for bit on any mesh, damage is noticed, a kill costs one save."""

import collections
import errno
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from full_disk import full_disk
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import lies_like, mesh_of
from orbax.checkpoint._src.serialization import tensorstore_utils
from same_bits import assert_same_bits
from waiting import run_pair

from experiments import manifests
from experiments.language.checkpoints import Checkpoints, params_sha256
from experiments.runs import RunError

ROOT = Path(__file__).parents[1]


Router = collections.namedtuple("Router", "bias counts")


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


def test_any_state_comes_back_bit_for_bit_on_any_mesh(checkpoints, capfd):
    original = state = full_state(mesh_of("Auto", data=8))
    meta = {"config": {"layers": 4, "rate": 0.1}, "data": "ab12", "done": None, "é": [1, True]}
    sizes = [{"data": 8}, {"data": 2, "fsdp": 2}, {"fsdp": 2}, {"data": 1}, {"data": 2, "fsdp": 4}]
    for step, size in enumerate(sizes):
        changing = dict(meta)
        checkpoints.save(step, state, changing)
        changing["data"] = "of a later step"
        wanted = abstract(original, mesh_of("Auto", **size))
        restored = checkpoints.restore(wanted)
        assert (restored.step, restored.meta, restored.damaged) == (step, meta, ())
        state = restored.state
        assert_same_bits(state, original)
        for want, got in zip(jax.tree.leaves(wanted), jax.tree.leaves(state), strict=True):
            assert not isinstance(want, jax.ShapeDtypeStruct) or lies_like(got, want.sharding)
    assert capfd.readouterr() == ("", "")


def test_relative_folders_and_moved_ones_on_the_first_device(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(Checkpoints("run"), 1)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    # Without a sharding arrays lie on the first device.
    state = Checkpoints("elsewhere").restore(jax.eval_shape(small_state)).state
    assert_same_bits(state, small_state(1))
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
        assert_same_bits(restored, begin(float(step)))
        jax.block_until_ready(spoil(restored))


def test_the_newest_are_kept_and_a_run_only_goes_forward(checkpoints):
    assert checkpoints.restore(small_state()) is None and checkpoints.steps() == []
    with pytest.raises(RunError, match=r"no checkpoint of step 3; it has \[\]"):
        checkpoints.restore(small_state(), step=3)
    folder = saved(checkpoints, 1, 3, 10)
    assert checkpoints.steps() == [3, 10]
    assert sorted(os.listdir(folder)) == ["step_10", "step_3"]
    assert checkpoints.restore(small_state()).step == 10
    for step in (9, 10):
        with pytest.raises(RunError, match=rf"later step than 10, .*; got step {step}\."):
            checkpoints.save(step, small_state(), {})
    restored = checkpoints.restore(small_state(), step=3)
    assert (restored.step, restored.meta) == (3, {"step": 3})
    assert_same_bits(restored.state, small_state(3))


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
        assert_same_bits(restored.state, small_state(1))
        if name == manifests.NAME and damage in (replace, Path.unlink):
            assert restored.damaged == ()  # as if it had never been finished
        else:
            (reason,) = restored.damaged
            assert reason.startswith("step 2: ") and name in reason


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


def test_none_whole_or_not_the_one_asked_for_is_an_error(checkpoints):
    folder = saved(checkpoints, 1, 2)
    truncate(folder / "step_1" / "_CHECKPOINT_METADATA")
    with pytest.raises(RunError, match=r"that step \(step 1: _CHECKPOINT_METADATA has \d+ bytes"):
        checkpoints.restore(small_state(), step=1)
    assert checkpoints.restore(small_state()).step == 2
    (folder / "step_1" / "_CHECKPOINT_METADATA").unlink()
    flip(folder / "step_2" / "manifest.json")
    with pytest.raises(RunError) as caught:
        checkpoints.restore(small_state())
    for text in (folder, "step 2: manifest.json is damaged", "step 1: _CHECKPOINT_METADATA is mis"):
        assert str(text) in str(caught.value)
    (folder / "step_1").rename(folder / "step_9")
    with pytest.raises(RunError, match=r"step 9: manifest\.json is damaged; step 2"):
        checkpoints.restore(small_state())


@pytest.mark.parametrize("how", ["damaged", "unfinished"])
def test_what_is_not_whole_does_not_count_and_is_replaced(checkpoints, how):
    folder = saved(checkpoints, 1, 2)
    if how == "damaged":
        flip(folder / "step_2" / "state" / "_METADATA")
    else:
        (folder / "step_2" / "manifest.json").unlink()
        shutil.copytree(folder / "step_2", folder / "step_5")
    (folder / "notes").mkdir()
    restored = checkpoints.restore(small_state())
    assert restored.step == 1 and bool(restored.damaged) == (how == "damaged")
    assert checkpoints.steps() == [1]
    saved(checkpoints, 2)
    assert sorted(os.listdir(folder)) == ["notes", "step_1", "step_2"]
    assert_same_bits(checkpoints.restore(small_state()).state, small_state(2))
    for step in (1, 2):
        (folder / f"step_{step}" / "manifest.json").unlink()
    assert checkpoints.restore(small_state()) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": jnp.zeros(4, jnp.bfloat16)}, r"bias: saved bfloat16\(3,\), wanted .*\(4"),
        ({"kernel": jnp.zeros((24, 1))}, r"kernel: saved float32\(24,\), wanted .*\(24, 1\)"),
        ({"bias": jnp.zeros(3)}, r"bias: saved bfloat16\(3,\), wanted float32\(3,\)"),
        ({"bias": None}, r"bias: saved bfloat16\(3,\), wanted nothing"),
        ({"more": {"x": jnp.zeros(2)}}, r"more.x: saved nothing, wanted float32\(2,\)"),
        ({"bias": 3}, r"bias: saved bfloat16\(3,\), wanted int\(\)"),
    ],
    ids=["shape", "rank", "dtype", "missing", "more", "scalar"],
)
def test_another_state_is_an_error_that_names_the_leaves(checkpoints, changes, message):
    saved(checkpoints, 1, 2)
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(small_state() | changes)


def test_what_cannot_be_saved_is_refused(checkpoints):
    folder = saved(checkpoints, 1)
    refused = [
        (TypeError, "bad is a str", {"bad": "text"}, {}),
        (TypeError, "bad is a float32", {"bad": np.float32(1)}, {}),
        (ValueError, "have the name a.b", {"a.b": jnp.ones(1), "a": {"b": jnp.zeros(1)}}, {}),
        (TypeError, "not JSON serializable", small_state(), {"x": jnp.ones(1)}),
        (ValueError, "not JSON compliant", small_state(), {"x": float("nan")}),
    ]
    for kind, message, state, meta in refused:
        with pytest.raises(kind, match=message):
            checkpoints.save(2, state, meta)
    assert os.listdir(folder) == ["step_1"]
    with pytest.raises(ValueError, match=r"keep must be at least 1, .*; got 0"):
        Checkpoints(folder, keep=0)


@pytest.mark.parametrize("number", [errno.EFBIG, errno.ENOSPC])
def test_a_full_disk_costs_one_save(checkpoints, capfd, caplog, monkeypatch, number):
    def no_room(path, value):
        raise OSError(number, os.strerror(number))

    saved(checkpoints, 1)
    with monkeypatch.context() as patch, full_disk(1 << 20 if number == errno.EFBIG else 1 << 30):
        if number == errno.ENOSPC:
            patch.setattr(manifests, "write_json", no_room)
        checkpoints.save(2, small_state(2, size=1 << 20), {})
        with pytest.raises(OSError, match=r"step 2 could not be saved .*(large|left)") as caught:
            checkpoints.save(3, small_state(3), {})  # the next one says so
    assert caught.value.errno == number
    assert caught.value.filename == str(checkpoints.folder)
    assert checkpoints.steps() == [1]
    restored = checkpoints.restore(small_state())
    assert (restored.step, restored.damaged) == (1, ())
    saved(checkpoints, 2)
    assert checkpoints.steps() == [1, 2]
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/run"):
        Checkpoints(tmp_path / "file" / "run").save(1, small_state(), {})


def test_object_stores_have_their_driver(monkeypatch):
    endpoint = "http://localhost:9000"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    checkpoints = Checkpoints("s3://bucket/runs/one")
    drivers = {
        f"{checkpoints.folder}/step_1": ("s3", "bucket", "runs/one/step_1", endpoint),
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
    folder = tmp_path / "run"

    def start(port, index):
        command = [sys.executable, "-W", "error", "-m", "tests.checkpoint_pair"]
        command += [str(port), str(index), folder]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    run_pair(start)
    first, second = (json.loads(Path(f"{folder}.{i}.json").read_text()) for i in range(2))
    assert "No such file or directory: '/no/such/folder'" in first.pop("error")
    assert "in another process" in second.pop("error")
    assert first == second
    assert first["empty"] is None and first["same"] and first["same_fallback"]
    assert first["steps"] == [2, 3] and first["newest"] == [3, {"step": 3}, []]
    step, (damaged,) = first["fallback"]
    assert step == 2 and damaged.startswith("step 3: _CHECKPOINT_METADATA has 9 bytes instead")
    assert first["last"] == [2, 4]

    leaf = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    names = ("across", "within", "replicated")
    alone = Checkpoints(folder).restore(dict.fromkeys(names, leaf))
    x = np.arange(32, dtype=np.float32).reshape(8, 4)
    assert_same_bits(jax.tree.map(np.asarray, alone.state), dict.fromkeys(names, x + 4))
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
    negative = np.where(x == 0, np.float32(-0.0), x)
    others = [{"b": negative}, {"b": x.T}, {"b": x.reshape(4, 8)}, {"c": x}, {"b": np.int32(x)}]
    digests = {params_sha256({"a": other, "a0": y}) for other in others}
    assert len(digests) == len(others) and digest.hexdigest() not in digests
