"""A training loop that saves after each step, and a supervisor that kills it and starts it again.

`python -m tests.checkpoint_loop FOLDER KILLS` prints, as JSON, what it came to.
"""

import functools
import json
import os
import random
import signal
import sys
import time
import traceback

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a kill may leave half a program there
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # one thread here: else a fork would not be sound

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.language.checkpoints import Checkpoints


def begin():
    jax.config.update("jax_num_cpu_devices", 2)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel = np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)
    state = {"kernel": kernel, "momentum": np.zeros((8, 4), jnp.bfloat16), "draw": np.uint32(1)}
    specs = {"kernel": P("data"), "momentum": P("data"), "draw": P()}
    return {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in state.items()}


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state):
    draw = state["draw"] * jnp.uint32(1664525) + jnp.uint32(1013904223)
    noise = draw.astype(jnp.float32) * 2.0**-32 - 0.5
    momentum = 0.9 * state["momentum"] + jnp.sin(3 * state["kernel"] + noise)
    kernel = state["kernel"] - 0.1 * momentum
    return {"kernel": kernel, "momentum": momentum.astype(jnp.bfloat16), "draw": draw}


def train(folder, report, last=10**9):
    """Says the step it begins at, then each step whose checkpoint is whole."""
    checkpoints = Checkpoints(folder, keep=2)
    state, step = begin(), 0
    if restored := checkpoints.restore(state):
        assert not restored.damaged and restored.meta == {"step": restored.step}, restored
        state, step = restored.state, restored.step
    report(step)
    while step < last:
        state, step = train_step(state), step + 1
        checkpoints.save(step, state, {"step": step})
        report(step - 1)
    checkpoints.close()
    return state


def forked(work):
    """Starts `work(report)` in a child: its process id and the file of its reports."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, open(reader)
    code = 1
    try:
        work(lambda step: os.write(writer, f"{step}\n".encode()))
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(folder, last):
    """Trains to the end and compares with a run that nothing interrupted."""
    resumed = train(folder, lambda step: None, last)
    straight = begin()
    for _ in range(last):
        straight = train_step(straight)
    for name in resumed:
        assert np.asarray(resumed[name]).tobytes() == np.asarray(straight[name]).tobytes(), name


def main(folder, kills):
    moments = random.Random(0)
    whole = midway = 0
    for _ in range(kills):
        child, reports = forked(lambda report: train(folder, report))
        first = int(reports.readline())
        assert first >= whole, f"step {whole} was whole, and the run went on from {first}"
        for _ in range(moments.randint(0, 3)):
            whole = max(whole, int(reports.readline()))
        time.sleep(moments.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        with reports:
            whole = max([whole, first, *map(int, reports)])
        steps = [name for name in os.listdir(folder) if name.startswith("step_")]
        midway += any(not os.path.exists(f"{folder}/{name}/manifest.json") for name in steps)
    child, reports = forked(lambda report: finish(folder, whole + 3))
    reports.close()
    same = os.waitpid(child, 0)[1] == 0
    print(json.dumps({"kills": kills, "midway": midway, "steps": whole + 3, "same": same}))


if __name__ == "__main__":
    os.makedirs(sys.argv[1], exist_ok=True)
    main(sys.argv[1], int(sys.argv[2]))
