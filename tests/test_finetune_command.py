"""The command: its options, what it plans and refuses before work, and its runs."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest
from finetuning import finetune, written
from test_finetune_run import records, summary
from trajectories import apart
from waiting import wait_for

from experiments.finetune import __main__ as command
from experiments.finetune import plan, weights
from experiments.language import compile_only, planning
from experiments.roofline import CHIPS, Chip
from experiments.topology import MEMORY

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--accumulate 3", "--accumulate must divide --batch"),
        ("--optimizers adamw adamw", "requires one or more different values; got adamw adamw"),
        ("--preset 4b", "--preset requires --dry-run or --compile-only"),
        ("--warmup 500", "less than --steps 100; got 500"),
        ("--context 1", "--context must be at least 2; got 1"),
        ("--optimizer.b1 1", "--optimizer.b1 must be at least 0 and less than 1"),
        ("--optimizer.b2 1", "--optimizer.b2 must be at least 0 and less than 1"),
        ("--optimizer.beta -0.1", "as the decay rate of an average; got -0.1"),
        ("--optimizer.weight-decay -1", "--optimizer.weight-decay must be at least 0; got -1"),
        ("--optimizer.learning-rate inf", "a finite number of at most 3.4e+38; got inf"),
        ("--final-lr-fraction 1.5", "--final-lr-fraction must be from 0 to 1; got 1.5"),
        ("--seed -1", "--seed must be at least 0; got -1"),
        ("--epochs inf", "--epochs must be a finite number"),
        ("--warmup 3 --steps 3", "less than --steps 3; got 3. Use fewer"),
        ("--base.width 0", "--base.width must be at least 1; got 0"),
        ("--base.heads 3", "--base.heads must be even and at least 2"),
        ("--base.head-dim 3", "--base.head-dim must be even and at least 2, since RoPE"),
        ("--base.vocabulary 258", "--base.vocabulary must be at least 259"),
        ("--base.learning-rate 0", "--base.learning-rate must be greater than 0"),
        ("--model x --out gs://a/b", "Give --export False"),
        ("--suite qk --preset 4b --dry-run", "remove --preset 4b"),
        ("--topology h100:8", "--compile-only and --topology require each other"),
        ("--dry-run --topology h100:8", "require each other and exclude --dry-run"),
        ("--compile-only --topology h100:8 --suite qk", "--compile-only excludes --suite qk"),
        ("--suite bogus", "For full helptext, run python -m experiments.finetune"),
        ("--suite", "Missing value for argument '--suite'"),
        ("--model", "Missing value for argument '--model'"),
    ],
)
def test_wrong_options_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        command.parse(words.split())
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_defaults_depend_on_the_model_and_the_suite():
    small, real = command.parse([]), command.parse(["--model", "somewhere", "--context", "128"])
    assert (small.dtype, small.model) == ("float32", None)
    assert (real.dtype, real.remat, real.context) == ("bfloat16", True, 128)
    assert real.optimizer.learning_rate < small.optimizer.learning_rate
    assert small.steps == 100  # only the command without arguments is cut short
    assert (real.steps, real.evaluation_tokens) == (0, 32_768)
    for name in ("controlled", "as_published"):
        suite = command.parse(["--suite", name])
        assert (suite.steps, suite.evaluation_tokens) == (200, 32_768)


@pytest.mark.parametrize(
    ("words", "windows", "usual", "warmup"),
    [
        ("", 999, 10, 10),
        ("--suite controlled", 999, 10, 10),
        ("--model x --steps 400", 999, 20, 20),
        ("--model x --steps 3", 999, 20, 0),
        ("--model x", 8 * 50, 20, 5),
        ("--model x --steps 3 --warmup 2", 999, 20, 2),
    ],
)
def test_a_warm_up_that_nobody_asked_for_gives_way_to_a_short_training(
    words, windows, usual, warmup
):
    config = command.parse(words.split()).training()
    assert config.with_steps(windows, usual).warmup == warmup


def test_a_model_that_is_no_folder_is_refused_with_a_way_to_get_it(tmp_path):
    for name in ("Qwen/Qwen3-0.6B", "/nope"):
        code, _, said = finetune(f"--model {name}")
        assert code == 2 and f"{name} is not a folder here" in said
        assert "`hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B`" in said
    code, _, said = finetune(f"--suite controlled --model {tmp_path}")
    assert code == 2 and "has no config.json" in said


@pytest.mark.parametrize(
    ("words", "rows", "said"),
    [
        ("--data {}/none.jsonl", None, "does not exist"),
        ("--data {}/rows.csv", "{}", "must end in one of .jsonl"),
        ("--data {}/rows.jsonl", "[", "rows.jsonl:1: invalid JSON"),
        ("--data {}/rows.jsonl", "5", "an example must be an object; got int"),
        ("--mesh.tensor 3", None, "does not fit 16 devices"),
        ("--mesh.data 16 --mesh.fsdp 1 --batch 6", None, "a multiple of the mesh axes"),
    ],
)
def test_a_base_is_not_pretrained_for_what_will_be_refused(
    words, rows, said, monkeypatch, tmp_path
):
    words = words.format(tmp_path)
    if rows:
        Path(words.split()[1]).write_text(rows)
    monkeypatch.setattr(command.base, "prepare", lambda *_: pytest.fail("it was"))
    code, _, error = finetune(f"{words} --out {tmp_path / 'out'}")
    assert code == 2 and said in error


def test_a_context_beyond_the_models_positions_is_told():
    for context, told in (("40960", False), ("40961", True)):
        words = f"--dry-run --preset 0.6b --batch 1 --context {context} --device-memory 999"
        code, said, _ = finetune(words)
        assert code == 0
        assert ("exceeds the model's max_position_embeddings 40,960" in said) == told


def test_a_suite_is_planned_before_its_models_are_read(monkeypatch):
    monkeypatch.setattr(command, "suite", lambda *given: pytest.fail("it has begun"))
    code, said, _ = finetune("--suite as_published --dry-run")
    assert code == 0
    assert "without muon_of_tables\n" in said and "without decay_apart," in said
    code, _, said = finetune("--suite controlled --device-memory 0.129")
    assert code == 2 and "planned step of adamw requires" in said
    assert "--optimizers muon_frozen1d muon_adamw muonclip" in said
    assert "--mesh" not in said  # each training is one device's
    code, _, said = finetune("--suite controlled --device-memory 80 --preset 4b --dry-run")
    assert code == 2 and "84.70 GB" in said


def test_a_dry_run_shows_the_plan_and_refuses():
    words = "--dry-run --preset 4b --device-memory 80 --optimizers muon_adamw"
    code, said, _ = finetune(words)
    assert code == 0 and "16.09 GB" in said
    assert "one device for each optimizer" in said and "--mesh" not in said
    code, _, said = finetune(f"{words} adamw --device-memory 60")
    assert code == 2 and "requires" in said


def test_a_step_is_compiled_for_a_topology(monkeypatch):
    chip = Chip("made up", bandwidth=1e9, flops=1e10, launch=1e-6)
    monkeypatch.setitem(CHIPS, "cpu", chip)
    monkeypatch.setitem(MEMORY, "cpu", 1.0)
    monkeypatch.setattr(compile_only, "topology_devices", lambda name: jax.devices()[:2])
    words = "--compile-only --topology made:2 --optimizers muon_adamw --context 16"
    words += " --base.layers 1 --base.width 16 --base.ffn 16 --base.heads 2 --base.head-dim 8"
    code, said, _ = finetune(words)
    assert code == 0 and "on 2 devices of made:2 (cpu), data 1 × fsdp 2" in said
    for text in ("kernels", "HBM traffic", "roofline", "all-reduce", "temporaries"):
        assert re.search(rf"^{text} .*\d", said, re.MULTILINE), text
    assert "Roofline of made up" in said and "Most expensive kernels of" in said
    code, _, said = finetune(f"{words} --device-memory 0.001")
    assert code == 2 and "The planned step of muon_adamw requires" in said


# --- Runs ------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """The folder of a small model, and the words of a short training of it."""
    folder, rows = written(tmp_path)
    return folder, f"--model {folder} --data {rows} --context 32 --dtype float32"


def begin(words, out, devices=None):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    if devices:
        environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    line = [sys.executable, "-m", "experiments.finetune", *words.split(), "--out", str(out)]
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_a_killed_command_goes_on_and_writes_the_model(small, tmp_path):
    words = f"{small[1]} --batch 4 --accumulate 2 --steps 40 --warmup 2 --save-every 5"
    words += " --evaluate-every 20 --optimizers muonclip"
    process = begin(words, tmp_path / "killed")
    ours, whole = (tmp_path / out / "muonclip" for out in ("killed", "whole"))
    log = ours / "metrics.jsonl"
    wait_for(lambda: log.exists() and '"step": 7' in log.read_text(), process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (ours / "summary.json").exists()
    for folder in (ours, whole):
        said, error = begin(words, folder.parent).communicate(timeout=240)
        assert "MuonClip" in said, error[-3000:]
    assert summary(ours)["params_sha256"] == summary(whole)["params_sha256"]
    assert records(ours) == records(whole)
    _, params = weights.read(ours / "model")
    assert params["norm"]["scale"].shape == (32,)
    assert (ours / "model" / "tokenizer.json").exists()


@pytest.mark.slow
def test_two_processes_train_and_write_one_model(small, tmp_path):
    words = f"{small[1]} --batch 8 --accumulate 2 --steps 6 --warmup 1 --optimizers muonclip"
    words += " --mesh.data 1 --mesh.fsdp 4"
    # jordan's steep steps make rounding of the least singular values a hundredth of the update.
    words += " --optimizer.ns-coeffs exact"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = f"{words} --processes.coordinator localhost:{port} --processes.count 2"
    each = [begin(f"{shared} --processes.index {i}", tmp_path / "two", 2) for i in range(2)]
    said = [process.communicate(timeout=240) for process in each]
    assert [process.returncode for process in each] == [0, 0], said[0][1][-3000:]
    assert "MuonClip" in said[0][0] and "MuonClip" not in said[1][0]
    alone = begin(words, tmp_path / "one", 4)
    _, error = alone.communicate(timeout=240)
    assert alone.returncode == 0, error[-3000:]
    ours, theirs = (tmp_path / out / "muonclip" for out in ("two", "one"))
    assert [r["step"] for r in records(ours)] == [r["step"] for r in records(theirs)]
    models = (ours / "model", theirs / "model", small[0])
    assert apart(*jax.device_get([weights.read(folder)[1] for folder in models])) < 1e-3
    assert (ours / "model" / "tokenizer.json").exists()
    assert not list(ours.glob(".model*")) and (tmp_path / "two" / "report.html").exists()


def test_tensors_are_checked_before_rows_are_read(small, tmp_path, monkeypatch):
    folder, words = small
    architecture, params = weights.read(folder)
    (folder / "model.safetensors").unlink()
    weights.write(tmp_path / "shards", architecture, params, shard=20_000)
    shards = sorted((tmp_path / "shards").glob("*.safetensors*"))
    for path in shards:
        path.rename(folder / path.name)
    (folder / shards[1].name).unlink()
    monkeypatch.setattr(command.data, "prepare", None)
    code, _, said = finetune(f"{words} --steps 6 --optimizers adamw --out {tmp_path / 'runs'}")
    assert code != 0 and shards[1].name in said
    assert not (tmp_path / "runs").exists()


def test_a_rank_that_cannot_be_is_refused_before_rows_are_read(small, tmp_path, monkeypatch):
    monkeypatch.setattr(command.data, "prepare", None)
    code, _, said = finetune(f"{small[1]} --lora.rank 17 --out {tmp_path / 'runs'}")
    assert code == 2 and "Use at most 16, or remove key from --lora.targets" in said


def test_an_out_with_other_files_is_refused_before_rows_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_prepare", None)
    monkeypatch.setattr(plan, "plan_suite", lambda *given: None)
    (tmp_path / "thesis.tex").write_text("x")
    for more in ("", "--suite controlled"):
        code, _, said = finetune(f"{more} --out {tmp_path}")
        assert code == 2 and "holds thesis.tex but no run of this study" in said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_start_that_failed_leaves_the_folder_free(small, tmp_path, monkeypatch):
    def fail(*given, **callbacks):
        raise ValueError("the weights are broken")

    monkeypatch.setattr(command.loop, "FineTuning", fail)
    monkeypatch.setattr(planning, "compiled_bytes", lambda program: 0)
    for seed in "01":
        words = f"{small[1]} --steps 6 --optimizers adamw --seed {seed} --out {tmp_path / 'runs'}"
        code, _, said = finetune(words)
        assert code == 2 and "the weights are broken" in said


def test_side_by_side_and_again(small, tmp_path):
    folder, words = small
    words += " --batch 4 --steps 6 --warmup 1 --optimizers adamw muon_adamw"
    words += f" --out {tmp_path / 'runs'}"
    assert finetune(words)[0] == 0
    summaries = [tmp_path / "runs" / arm / "summary.json" for arm in ("adamw", "muon_adamw")]
    first = [path.read_text() for path in summaries]
    assert finetune(words)[0] == 0  # what is finished is not trained again
    assert [path.read_text() for path in summaries] == first
    assert finetune(f"{words} --seed 1")[0] == 2
    tensors = next(folder.glob("*.safetensors"))
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # other weights of equal size
    assert finetune(words)[0] == 2


def test_an_interrupted_command_reports_on_what_there_is(small, tmp_path, monkeypatch):
    words = f"{small[1]} --batch 4 --steps 6 --warmup 1 --optimizers adamw"
    words += f" --out {tmp_path / 'runs'}"
    stop, page = threading.Event(), tmp_path / "runs" / "report.html"
    stop_at_3 = lambda progress: progress.step < 3 or stop.set()  # noqa: E731
    monkeypatch.setattr(command, "showing", lambda *line: stop_at_3)
    code, said, _ = finetune(words, stop=stop)
    assert code == 130 and "of 6" in said
    assert "of 6 steps" in page.read_text()
    config = page.parent / "adamw" / "config.json"
    settings = json.loads(config.read_text())
    for name in ("lora", "rollback", "schedules"):  # earlier versions left these out
        del settings[name]
    config.write_text(json.dumps(settings))
    monkeypatch.setattr(command, "showing", lambda *line: lambda progress: None)
    assert finetune(words)[0] == 0
    assert "of 6 steps" not in page.read_text()
