"""Many processes are one run: what each loads of a batch, and that together they train the same."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from pretraining import mesh_of
from waiting import run_pair

from experiments.language import sharding
from experiments.language.mesh import MESH_AXES
from experiments.language.processes import Share
from experiments.pretrain import loop
from tests import training_pair

ROOT = Path(__file__).parent.parent


def windows_on(mesh):
    return jax.NamedSharding(mesh, sharding.spec(None, "batch", None))


@pytest.mark.parametrize(
    "sizes, processes, rows",
    [  # of 2 microbatches of 8 rows; devices go to processes in their order on the mesh
        ((4, 1, 1, 1), 2, [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]),
        ((1, 4, 1, 1), 4, [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]),
        ((1, 1, 1, 4), 2, [range(16)] * 2),
        ((1, 2, 1, 2), 4, [[*range(4), *range(8, 12)]] * 2 + [[*range(4, 8), *range(12, 16)]] * 2),
        ((1, 1, 1, 1), 1, [range(16)]),
    ],
)
def test_a_process_loads_the_rows_that_its_devices_read(sizes, processes, rows):
    mesh = mesh_of(*sizes)
    windows = windows_on(mesh)
    of_each = np.split(mesh.devices.ravel(), processes)
    found = [Share(windows, 2, 8, devices).rows.tolist() for devices in of_each]
    assert found == [list(places) for places in rows]


def test_rows_become_microbatches_in_their_order():
    batch = np.arange(16 * 3).reshape(16, 3)
    for sizes in ((2, 2, 1, 2), (1, 1, 1, 1)):
        share = Share(windows_on(mesh_of(*sizes)), 2, 8)
        placed = share.place(batch[share.rows])
        np.testing.assert_array_equal(placed, batch.reshape(2, 8, 3))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes of one device each saw."""
    folder = tmp_path_factory.mktemp("pair")

    def start(port, index):
        command = [sys.executable, "-m", "tests.training_pair", str(port), str(index), folder]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    run_pair(start, 600)
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process with one device sees."""
    patch = pytest.MonkeyPatch()
    patch.setattr(loop, "make_mesh", lambda sizes: mesh_of(*sizes))
    patch.setattr(training_pair.mesh, "make_mesh", lambda sizes: mesh_of(*sizes))
    folder, one = tmp_path_factory.mktemp("alone"), training_pair.mesh.Mesh(fsdp=1)
    yield {
        "pretrained": training_pair.pretrained(one, folder / "pretrain"),
        "finetuned": training_pair.finetuned(one, folder / "finetune"),
    }
    patch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("study", ["pretrained", "finetuned"])
@pytest.mark.parametrize("axis", MESH_AXES)
def test_two_processes_have_the_losses_of_one(pair, alone, study, axis):
    seen = pair[0][study][axis]
    assert len(seen["loss"]) == 3 and len(seen["validation_loss"]) == 3
    for name, values in alone[study].items():
        assert seen[name] == pytest.approx(values, rel=1e-4), name


@pytest.mark.slow
def test_processes_that_were_told_other_things_are_refused(pair):
    for found in pair:
        assert "differ in config.seed." in found["differing"]
