"""Logs under seals, and a run's folder: what is damaged is told, whose it is is checked."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import pytest
from etils import epath

from experiments import log, sealed
from experiments.language.checkpoints import Checkpoints
from experiments.runs import Run, RunError, check_group, claim, known_settings

SETTINGS = {"rate": 0.1, "width": 8, "seed": 0, "seeds": 3}


def three_cells(folder, **changes):
    run = Run(folder, SETTINGS | changes, ("seeds",))
    for name in "abc":
        records = [{"of": name, "step": step, "loss": 0.5} for step in (1, 2)]
        run.extend([(records, {"name": name})])
    run.close()
    return folder / "metrics.jsonl"


def opened(folder, **changes):
    run = Run(folder, SETTINGS | changes, ("seeds",))
    run.close()
    return [cell["name"] for cell in run.finished], " ".join(run.notes)


def with_lines(path, change):
    lines = path.read_bytes().split(b"\n")
    change(lines)
    path.write_bytes(b"\n".join(lines))


def flip(number, old, new):
    def change(lines):
        assert old in lines[number]
        lines[number] = lines[number].replace(old, new, 1)

    return change


def delete(first, last):
    def change(lines):
        del lines[first:last]

    return change


# Of three cells of two records and a seal each: what is changed, and which cells stay.
DAMAGE = [
    (flip(3, b"0.5", b"0.4"), "ac"),
    (flip(5, b'"name": "b"', b'"name": "x"'), "ac"),
    (flip(5, b'"before"', b'"befor'), "ac"),  # a seal that is no JSON: once it cost two cells
    (flip(5, b"sha256", b"sha255"), "ac"),
    (flip(8, b'"name": "c"', b'"name": "x"'), "ab"),
    (flip(2, b"0.1", b"0.2"), "bc"),  # the settings under a seal
    (delete(4, 5), "ac"),
    (delete(5, 6), "ac"),
    (delete(3, 6), "ac"),
    (flip(0, b"{", b"\xff"), "bc"),
]


@pytest.mark.parametrize(("change", "stay"), DAMAGE)
def test_damage_costs_one_cell_and_is_told_and_kept(tmp_path, change, stay):
    path = three_cells(tmp_path)
    with_lines(path, change)
    damaged = path.read_bytes()
    found, notes = opened(tmp_path)
    assert found == [*stay] and "is damaged" in notes
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    assert opened(tmp_path) == ([*stay], "")


def test_a_cell_that_a_kill_cut_is_no_damage(tmp_path):
    path = three_cells(tmp_path)
    whole = path.read_bytes()
    for cut in range(len(whole) - 1, whole.rindex(b'{"of": "c", "step": 1'), -37):
        path.write_bytes(whole[:cut])
        found, notes = opened(tmp_path)
        assert found == ["a", "b"] and "damaged:" not in notes
    assert not (tmp_path / "metrics.jsonl.damaged").exists()


def test_a_log_that_is_gone_is_told(tmp_path):
    path = three_cells(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    path.unlink()
    found, notes = opened(tmp_path)
    assert found == [] and "metrics.jsonl is empty or missing" in notes


@pytest.mark.parametrize("config", [None, "", "{", "[]", "5", "[" * 100_000, b"\xff"])
def test_a_lost_config_is_made_again_from_the_seals_and_another_refused(tmp_path, config):
    three_cells(tmp_path)
    path = tmp_path / "config.json"
    for changes in ({"rate": 0.2}, {"seed": 1}, {"width": 16}):
        if config is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(config if isinstance(config, bytes) else config.encode())
        ((name, value),) = changes.items()
        with pytest.raises(RunError, match=f"{name}: there {SETTINGS[name]}, here {value}"):
            Run(tmp_path, SETTINGS | changes, ("seeds",))
    assert opened(tmp_path, seeds=5)[0] == ["a", "b", "c"]
    assert json.loads(path.read_text()) == SETTINGS | {"seeds": 5}


def test_a_config_that_differs_from_the_seals_is_refused(tmp_path):
    three_cells(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | {"rate": 0.2}))
    for rate in (0.1, 0.2):
        with pytest.raises(RunError, match="other settings according to"):
            Run(tmp_path, SETTINGS | {"rate": rate}, ("seeds",))
    with pytest.raises(RunError, match=r"config.json and metrics.jsonl.*rate: there 0.2, here 0.1"):
        known_settings(tmp_path)


def test_a_setting_that_a_run_of_an_earlier_version_lacks_had_its_default(tmp_path):
    three_cells(tmp_path, variants={"rank": 4})
    defaults = SETTINGS | {"variants": {"rank": 1, "share": 0.5}, "norm": "rms"}
    same = SETTINGS | {"variants": {"rank": 4, "share": 0.5}, "norm": "rms"}
    for changes, message in (
        ({"norm": "none"}, "norm: there 'rms', here 'none'"),
        ({"variants": {"rank": 4, "share": 0.1}}, "variants.share: there 0.5, here 0.1"),
        ({"variants": {"rank": 1, "share": 0.5}}, "variants.rank: there 4, here 1"),
    ):
        with pytest.raises(RunError, match=re.escape(message)):
            Run(tmp_path, same | changes, ("seeds",), defaults)
    run = Run(tmp_path, same, ("seeds",), defaults)
    run.close()
    assert [cell["name"] for cell in run.finished] == ["a", "b", "c"]
    assert known_settings(tmp_path) == same


def test_checkpoints_tell_the_settings_too(tmp_path):
    config = {"rate": 0.1, "width": 8}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(4, {"x": jnp.ones(2)}, {"config": config})
    checkpoints.close()
    assert known_settings(epath.Path(tmp_path)) == config
    with pytest.raises(
        RunError, match=r"according to its newest checkpoint .*width: there 8, here 16"
    ):
        claim(tmp_path, config | {"width": 16})
    claim(tmp_path, config).close()
    assert json.loads((tmp_path / "config.json").read_text()) == config


# --- The log of a long run -------------------------------------------------------------------


def trained(folder, steps=12, save=4):
    run = log.Log(epath.Path(folder), -1, SETTINGS)
    for step in range(1, steps + 1):
        run.add(step, loss=float(step))
        if step % save == 0:
            run.flush()
    run.close()
    return folder / "metrics.jsonl"


def steps_of(records):
    return [record["step"] for record in records]


def test_a_log_goes_on_from_any_save(tmp_path):
    path = trained(tmp_path, steps=10)
    whole = path.read_bytes()
    assert steps_of(log.read(epath.Path(tmp_path))[0]) == [*range(1, 11)]
    for step in (8, 4):
        path.write_bytes(whole[:-5])  # torn
        run = log.Log(epath.Path(tmp_path), step, SETTINGS)
        assert steps_of(run.records) == [*range(1, step + 1)] and run.damage == []
        run.close()
        assert whole.startswith(path.read_bytes())
    run = log.Log(epath.Path(tmp_path), 4, SETTINGS)
    for step in range(5, 9):
        run.add(step, loss=float(step))
    run.close()
    assert whole.startswith(path.read_bytes())
    assert sealed.read(path).config == SETTINGS


@pytest.mark.parametrize(
    ("change", "steps", "told"),
    [
        (
            flip(1, b"2.0", b"7.0"),
            [1, 3, 4, 5, 6, 7, 8],
            "1 of the 4 records before the seal in line 5",
        ),
        (delete(1, 2), [1, 3, 4, 5, 6, 7, 8], "1 of the 4 records"),
        (flip(4, b'"step"', b'"stop"'), [5, 6, 7, 8], "lines 1, 2, 3, 4, 5 without a valid seal"),
        (delete(0, 5), [5, 6, 7, 8], "4 records before line 1 are missing"),
        (delete(5, 15), [1, 2, 3, 4], "the records of steps 5 to 8 are missing"),
        (flip(9, b'"step"', b'"stop"'), [1, 2, 3, 4], "steps 5 to 8 are missing"),
        (delete(0, 15), [], "the records of steps 0 to 8 are missing"),
    ],
)
def test_damage_of_a_log_is_told_and_left_as_it_is(tmp_path, change, steps, told):
    path = trained(tmp_path)
    with_lines(path, change)
    damaged = path.read_bytes()
    run = log.Log(epath.Path(tmp_path), 8, SETTINGS)
    assert steps_of(run.records) == steps and told in "; ".join(run.damage)
    run.close()
    assert damaged.startswith(path.read_bytes())  # but for the steps that come again
    again = log.Log(epath.Path(tmp_path), 8, SETTINGS)
    assert again.records == run.records and again.damage
    for step in (9, 10):
        again.add(step, loss=0.0)
    again.close()
    assert steps_of(log.read(epath.Path(tmp_path))[0]) == [*steps, 9, 10]
    if "steps" not in told:
        assert told in "; ".join(log.read(epath.Path(tmp_path))[1])


# --- Other people's files --------------------------------------------------------------------


def listing(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "x"},
        {"config.json": '{"model_type": "qwen3", "rate": 1}', "model.safetensors": "x"},
        {"config.json": "[]"},
        {"metrics.jsonl": '{"step": 1}\n'},
        {".git/HEAD": "ref"},
        {"summary.json": "{}", "report.html": "mine"},
    ],
)
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = listing(tmp_path)
    with pytest.raises(RunError, match=r"no run of this study.*Give another --out"):
        claim(tmp_path, SETTINGS)
    with pytest.raises(RunError, match="no run of this study"):
        check_group(tmp_path, ("adamw", "muon"), SETTINGS)
    (tmp_path / "adamw").mkdir()
    with pytest.raises(RunError, match="no run of this study"):
        check_group(tmp_path, ("adamw", "muon"), SETTINGS)
    assert listing(tmp_path) == before
    with pytest.raises(RunError, match="is a file"):
        claim(next(iter(before)), SETTINGS)


def test_what_a_kill_leaves_is_no_stranger_and_is_swept(tmp_path):
    for name in (".lock", ".config.json.ab12_xyz", ".metrics.jsonl.cd345678"):
        (tmp_path / name).write_text("x")
    claim(tmp_path, SETTINGS).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.json"]
    group = tmp_path / "group"
    three_cells(group / "adamw")
    (group / "report.html").write_text("x")
    check_group(group, ("adamw", "muon"), SETTINGS)


def test_a_number_that_json_has_not_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config.json cannot be written: a.b is inf"):
        claim(tmp_path, {"a": {"b": float("inf")}})
    assert not re.findall("JSON compliant", str(listing(tmp_path)))
