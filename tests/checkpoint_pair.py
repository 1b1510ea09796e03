"""One of two processes that save and restore together: `python -m tests.checkpoint_pair PORT INDEX
FOLDER` writes what it saw to `FOLDER.INDEX.json`."""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what one writes the other might be reading
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import manifests
from experiments.language import checkpoints as lib
from experiments.language.processes import from_every_process


def main(port, index, folder):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"across": P("data", "fsdp"), "within": P("fsdp"), "replicated": P()}

    def state(step):
        x = np.arange(32, dtype=np.float32).reshape(8, 4) + step
        return {name: jax.device_put(x, NamedSharding(mesh, spec)) for name, spec in specs.items()}

    def mine(tree):
        return {name: [shard.data.tolist() for shard in x.addressable_shards] for name, x in tree}

    if index == 1:
        manifests.read = None  # only the first looks, and decides for both
    checkpoints = lib.Checkpoints(folder, keep=2)
    seen = {"empty": checkpoints.restore(state(0))}
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"step": step})
    checkpoints.wait()
    seen["steps"] = checkpoints.steps()
    restored = checkpoints.restore(state(0))
    seen["newest"] = [restored.step, restored.meta, restored.damaged]
    seen["same"] = mine(restored.state.items()) == mine(state(3).items())
    seen["sha256"] = lib.params_sha256(restored.state)

    if index == 0:
        os.truncate(f"{folder}/step_3/_CHECKPOINT_METADATA", 9)
    from_every_process(np.zeros(()))  # the other waits for the damage
    restored = checkpoints.restore(state(0))
    seen["fallback"] = [restored.step, restored.damaged]
    seen["same_fallback"] = mine(restored.state.items()) == mine(state(2).items())

    seal = manifests.seal
    manifests.seal = lambda *_: os.listdir("/no/such/folder")  # in the first only
    checkpoints.save(3, state(3), {})
    try:
        checkpoints.wait()
    except OSError as error:
        seen["error"] = str(error)
    manifests.seal = seal
    checkpoints.save(4, state(4), {"step": 4})
    checkpoints.close()
    seen["last"] = checkpoints.steps()
    with open(f"{folder}.{index}.json", "w") as file:
        json.dump(seen, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
