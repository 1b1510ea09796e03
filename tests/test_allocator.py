"""Memory of a program's temporaries stays in the process."""

import platform
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import resource
from experiments.allocator import keep_temporaries
{keep}
import jax, jax.numpy as jnp

run = jax.jit(lambda x: jnp.cumsum(jnp.outer(x, x), axis=0)[-1])  # 64 MiB or more of temporaries
x = jnp.arange(4096.0)
for _ in range(8):
    run(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    run(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5)
"""


def faults(keep: str) -> float:
    program = textwrap.dedent(PROGRAM).format(keep=keep)
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return float(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_program_run_again_touches_no_new_page():
    assert faults("keep_temporaries()") < 500 < 10_000 < faults("")
