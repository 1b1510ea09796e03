"""Compiled programs: as many for two cores as for one, and none anew in the next run."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import pytest

from experiments.commands import keep_compiled_programs

ROOT = Path(__file__).parent.parent
# A grokking run in a process that counts what JAX compiles and what it finds in its cache.
COUNTED = """
import collections, os, sys
sys.argv = ["grok", *"--tasks gcd --seeds 2 --epochs 2 --width 16 --batch 4096 --probe-every 0 "
            "--out".split(), sys.argv[1]]
os.sched_getaffinity = lambda pid, cores=int(os.environ["CORES"]): set(range(cores))
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **more: counts.update([name]))
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **more: counts.update([name]))
from experiments.grok.__main__ import main
code = main()
for name, count in counts.items():
    print("COUNT", name, count)
sys.exit(code)
"""


def counts(out, cache, cores=2, enabled="true"):
    """The events of a small run by name, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, str(out)],
        cwd=ROOT,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")},
            "XDG_CACHE_HOME": str(cache),
            "JAX_ENABLE_COMPILATION_CACHE": enabled,
            "CORES": str(cores),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^COUNT /jax/(\S+) (\d+)$", done.stdout, re.MULTILINE)
    return Counter({name.rsplit("/", 1)[-1]: int(count) for name, count in found}), done.stderr


@pytest.mark.slow
def test_cores_share_programs_and_the_next_run_compiles_none(tmp_path):
    alone, _ = counts(tmp_path / "alone", tmp_path, cores=1, enabled="false")
    assert not (tmp_path / "muon_jax" / "programs").exists()
    cold, _ = counts(tmp_path / "cold", tmp_path)
    assert cold["backend_compile_duration"] == alone["backend_compile_duration"] > 0
    assert cold["cache_misses"] > 0
    warm, _ = counts(tmp_path / "warm", tmp_path)
    assert warm["cache_misses"] == 0 < warm["cache_hits"] == warm["compile_requests_use_cache"]

    # A damaged file, an empty one: compiled anew, and the results are those of the first run.
    kept = sorted((tmp_path / "muon_jax" / "programs").glob("*-cache"))
    for i, path in enumerate(kept):
        whole = path.read_bytes()
        path.write_bytes([b"", whole[: len(whole) // 2], whole[:-9] + b"damaged !"][i % 3])
    damaged, told = counts(tmp_path / "damaged", tmp_path)
    assert damaged["cache_hits"] < len(kept) / 2 and "ompilation cache" in told
    digests = [
        re.findall(r"params_sha256\W+(\w+)", (tmp_path / run / "summary.json").read_text())
        for run in ("alone", "cold", "warm", "damaged")
    ]
    assert len(digests[0]) == 4 and digests.count(digests[0]) == 4


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_breaks_nothing(tmp_path):
    (tmp_path / "file").write_text("no folder")
    counts(tmp_path / "out", tmp_path / "file")


@pytest.mark.parametrize("chosen", [None, "/elsewhere"])
def test_the_users_folder_goes_before(chosen, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [getattr(jax.config, name) for name in names]
    try:
        jax.config.update(names[0], chosen)
        keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir == (
            chosen or str(tmp_path / "muon_jax" / "programs")
        )
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)
