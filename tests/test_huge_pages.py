"""Commands of the studies get huge pages, and what imports them does not start anew."""

import os
import pathlib
import platform
import subprocess
import sys
import textwrap

import pytest

THP = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads a variable of glibc")

PROGRAM = """
import resource
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


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env)


@glibc
@pytest.mark.skipif(
    not (THP.exists() and "[madvise]" in THP.read_text()),
    reason="the system gives huge pages to none, or to all",
)
def test_huge_pages_spare_a_program_its_page_faults():
    program = textwrap.dedent(PROGRAM)
    few = float(run("-c", program, GLIBC_TUNABLES="glibc.malloc.hugetlb=1").stdout)
    assert few < 2_000 < 10_000 < float(run("-c", program).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
@pytest.mark.parametrize(
    ("arguments", "variables", "starts"),
    [
        (("-m", "experiments.grok", "--help"), {}, 2),
        (("-m", "experiments.grok", "--help"), {"GLIBC_TUNABLES": "glibc.malloc.check=0"}, 1),
        (("-c", "import experiments.grok.__main__"), {}, 1),
    ],
)
def test_a_command_starts_anew_once_and_what_imports_it_does_not(arguments, variables, starts):
    found = run("-X", "importtime", *arguments, **variables)
    assert found.stderr.count("experiments.huge_pages") == starts
    assert "--help" not in arguments or found.stdout.startswith("usage: python -m experiments.grok")


def test_each_command_that_trains_restarts_itself_before_its_other_imports():
    root = pathlib.Path(__file__).parent.parent / "experiments"
    start = "from experiments.huge_pages import restart_with_huge_pages\n\n"
    start += 'if __name__ == "__main__":\n    restart_with_huge_pages()'
    found = set()
    for path in root.glob("**/*.py"):
        source = path.read_text(encoding="utf-8")
        if "restart_with_huge_pages()" in source and path.stem != "huge_pages":
            assert source.split('"""')[2].strip().startswith(start), path
            found.add(str(path.relative_to(root)))
    studies = ("bench", "family", "finetune", "grok", "pretrain")
    others = {"family/widths.py", "grok/speed.py", "pretrain/speed.py"}
    assert found == {f"{study}/__main__.py" for study in studies} | others


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_the_process_stays_the_same():
    then = "import os; print(os.getpid(), os.environ['GLIBC_TUNABLES'])"
    first = f"""
        import os, sys
        from experiments.huge_pages import restart_with_huge_pages
        print(os.getpid(), flush=True)
        sys.orig_argv[1:] = ["-c", {then!r}]
        restart_with_huge_pages()
    """
    before, after, value = run("-c", textwrap.dedent(first)).stdout.split()
    assert before == after and value == "glibc.malloc.hugetlb=1"
