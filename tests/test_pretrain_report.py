"""Reports of pretraining runs from their files, and plans from shapes alone."""

import dataclasses
import io
import json
import math
import re

import jax
import numpy as np
import pytest
from etils import epath
from pretraining import DENSE, SMALL, mesh_of, training
from rich.console import Console

from experiments.language.dry_run import dry_run
from experiments.language.mesh import Mesh, mesh_of_config
from experiments.language.planning import TooLarge
from experiments.pretrain import plan
from experiments.pretrain.config import as_json
from experiments.pretrain.presets import PRESETS
from experiments.pretrain.report import abstract, report, table
from experiments.pretrain.report_data import found_optimizers, load_run, load_runs, measure_of
from experiments.pretrain.step import Trainer
from experiments.report.__main__ import main
from experiments.report.figures import smoothed
from experiments.report.page import write
from experiments.runs import RunError, read_json, write_json

BITS_A_NAT = 0.47
FIGURES = {"held_out", "loss", "optimization", "router", "experts"}


def make_run(folder, optimizer, floor, *, done=None, model=SMALL, bits=True, every=2, **changes):
    """A run's folder as training leaves it, with losses that fall to about `floor`."""
    config = training(model, **changes)
    steps = config.steps if done is None else done
    sparse = model.layers - model.dense_layers
    rng = np.random.default_rng(len(optimizer))
    lines = []
    for step in range(steps + 1):
        loss = floor + 3 * (1 + step) ** -0.5
        if step and step % every == 0:
            record = {
                "step": step,
                "loss": loss + 0.05 * rng.normal(),
                "gradient_norm": 4 / step + abs(rng.normal()),
                "learning_rate": config.rate(optimizer) * (1 - 0.9 * step / config.steps),
                "update_rms": {"matrices": 1e-3 / step, "others": 2e-3 / step},
                "max_logit": 8 * step / config.steps,
                "skipped": 0,
                "seconds": 40 + 0.5 * step,
                "tokens_per_second": 3.0 if step == every else 2 * config.tokens_per_step,
            }
            if sparse:
                load = np.exp(1.5 * step**-0.3 * rng.normal(size=(sparse, model.experts)))
                load /= load.mean(axis=1, keepdims=True)
                record |= {
                    "load": load.tolist(),
                    "largest_load": load.max(),
                    "smallest_load": load.min(),
                    "router_entropy": math.log(model.experts) - 0.01 * step / config.steps,
                }
            lines.append(record)
        if step % (2 * every) == 0:
            known = {"bits_per_byte": BITS_A_NAT * loss} if bits else {}
            lines.append({"step": step, "validation_loss": loss} | known)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"optimizer": optimizer} | as_json(config))
    write_records(folder, lines)
    if steps == config.steps:
        (folder / "samples.txt").write_text("to be <b>or</b> not to be\n")
        data = {"name": "a text", "train_tokens": 5000, "validation_tokens": 500}
        summary = {
            "optimizer": optimizer,
            "costs": {"newton_schulz_share": 0.0123},
            "params_sha256": "0123456789abcdef" * 4,
            "data": data | {"vocabulary": 64, "sha256": "fedc" * 16},
            "machine": {"device": "1 × cpu (cpu)", "command": f"python -m x --out {optimizer}"},
        }
        write_json(folder / "summary.json", summary)
    return epath.Path(folder)


def write_records(folder, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text)


def records_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def two(tmp_path, **options):
    make_run(tmp_path / "r" / "adamw", "adamw", 1.0, **options)
    make_run(tmp_path / "r" / "muon", "muon", 0.9, **options)
    return epath.Path(tmp_path / "r")


def write_report(folder, optimizers=()):
    return write(report(folder, optimizers), folder)


def text_of(folder):
    return " ".join(abstract(load_runs(folder, found_optimizers(folder))))


def pngs(folder):
    return {path.stem for path in folder.iterdir() if path.name.endswith(".png")}


def printed(folder):
    out = io.StringIO()
    Console(width=80, file=out).print(table(load_runs(folder)))
    return out.getvalue()


def test_two_runs_are_compared_by_the_files_alone(tmp_path, capsys):
    folder = two(tmp_path)
    settings = read_json(folder / "adamw" / "config.json")
    del settings["schedules"]  # as in a run of before there were any
    write_json(folder / "adamw" / "config.json", settings)
    loss = 0.9 + 3 / 13**0.5
    muon, adamw = BITS_A_NAT * loss, BITS_A_NAT * (0.1 + loss)
    text = text_of(folder)
    assert text.startswith(
        f"After 1,536 tokens, Muon predicts the held-out text at {muon:.4f} bits per byte, "
        f"AdamW at {adamw:.4f}. Muon is lower than AdamW by 0.0470 bits per byte, 5.5 %, "
    )
    assert text.endswith("Each is one training with one seed, so there are no statistics.")
    row = next(line for line in printed(folder).splitlines() if line.startswith("Muon")).split()
    assert row[:4] == ["Muon", "0.008", f"{muon:.4f}", f"{loss:.4f}"]
    # 256 tokens per second: the record that compiled, of 3, is not counted.
    assert row[5:] == ["12", "256", "46", "0", "1.23", "%"]
    assert max(map(len, printed(folder).splitlines())) <= 80

    main(str(folder))
    page = (folder / "report.html").read_text()
    assert pngs(folder) == FIGURES
    for said in (
        "AdamW: adamw; Muon: muon",
        "model.layers</th><td>3</td>",
        "device</th><td>1 × cpu (cpu)</td>",
        "AdamW: python -m x --out adamw; Muon: python -m x --out muon",
    ):
        assert said in page, said
    runs = read_json(folder / "summary.json")["runs"]
    assert runs["muon"] == read_json(folder / "muon" / "summary.json")
    main(str(folder))
    assert (folder / "report.html").read_text() == page
    assert str(folder / "report.html") in capsys.readouterr().out.replace("\n", "")


def test_share_of_the_tokens_to_the_other_ones_last_value(tmp_path):
    folder = two(tmp_path, bits=False, steps=64, every=4)
    for name, floor in (("adamw", 1.0), ("muon", 0.5)):
        losses = [
            {"step": n, "validation_loss": floor + math.log2(64 / n)} for n in (8, 16, 32, 64)
        ]
        write_records(folder / name, losses)
    # Muon passes AdamW's 1.0 half a doubling before the end.
    assert text_of(folder).startswith(
        "After 8,192 tokens, Muon predicts the held-out text at 0.5000 nats per token, "
        "AdamW at 1.0000. Muon is lower than AdamW by 0.5000 nats per token, 50 %, and passes its "
        "last value after 71 % of the tokens. "
    )
    write_records(folder / "adamw", [{"step": 64, "validation_loss": 0.5}])
    assert "AdamW and Muon are equal." in text_of(folder)
    write_records(folder / "muon", [{"step": 64, "validation_loss": 0.25}])
    assert "by 0.2500 nats per token, 50 %. Each" in text_of(folder)


def test_an_unfinished_run_is_compared_where_both_have_been(tmp_path):
    make_run(tmp_path / "r" / "adamw", "adamw", 1.0)
    make_run(tmp_path / "r" / "muon", "muon", 0.9, done=6)
    folder = epath.Path(tmp_path / "r")
    text = text_of(folder)
    assert text.startswith("Muon has done 6 of 12 steps. After 512 tokens, Muon predicts")
    write_report(folder, ("adamw", "muon"))
    runs = json.loads((folder / "summary.json").read_text())["runs"]
    assert runs["adamw"]["data"]["name"] == "a text" and runs["muon"] is None
    page = (folder / "report.html").read_text()
    assert "6 of 12" in page and "1 of 2 finished" in page


def test_a_run_that_has_only_begun(tmp_path):
    folder = make_run(tmp_path / "r", "muon", 0.9, done=0)
    write_records(folder, [])
    write_report(folder, ("muon",))
    assert "No evaluation has been reached" in text_of(folder) and not pngs(folder)
    assert "None" not in (folder / "report.html").read_text()
    write_records(folder, [{"step": 0, "validation_loss": 4.0, "bits_per_byte": 2.0}])
    write_report(folder, ("muon",))
    assert "After 0 tokens, Muon predicts the held-out text at 2.0000 bits" in text_of(folder)


def test_runs_that_differ_in_more_than_the_optimizer_say_so(tmp_path):
    make_run(tmp_path / "r" / "adamw", "adamw", 1.0)
    make_run(tmp_path / "r" / "muon", "muon", 0.9, model=DENSE, seed=1)
    folder = epath.Path(tmp_path / "r")
    path = folder / "muon" / "summary.json"
    path.write_text(path.read_text().replace("fedc", "0000"))
    text = text_of(folder)
    found = text[: text.index(".  After") if ".  After" in text else text.index(" After")]
    assert "Besides the optimizer the runs differ in model.layers, model.dense_layers" in found
    assert found.endswith("model.tied, seed, the text.")
    write_report(folder, ("adamw", "muon"))
    assert pngs(folder) == FIGURES


def test_one_run_is_not_compared(tmp_path):
    folder = make_run(tmp_path / "r", "muon", 0.9)
    before, after = (BITS_A_NAT * (0.9 + 3 / n**0.5) for n in (1, 13))
    assert text_of(folder) == (
        f"After 1,536 tokens, Muon predicts the held-out text at {after:.4f} bits per byte, "
        f"{before:.4f} before training."
    )
    summary = (folder / "summary.json").read_text()
    page = write_report(folder, found_optimizers(folder)).read_text()
    assert (folder / "summary.json").read_text() == summary
    assert pngs(folder) == FIGURES
    assert page.count('src="data:image/png;base64,') == 5
    assert "to be &lt;b&gt;or&lt;/b&gt; not to be" in page
    assert "AdamW" not in page[: page.index("How it was measured")]
    assert "<td>01234567</td>" in page and "5,000 tokens to train on" in page


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_losses_that_are_not_finite(tmp_path, share):
    folder = two(tmp_path)
    records = records_of(folder / "adamw")
    for record in records:
        if record["step"] > 12 * (1 - share):
            for key in ("loss", "gradient_norm", "validation_loss", "bits_per_byte"):
                record |= {key: None} if key in record else {}
            record |= {"skipped": 3} if "skipped" in record else {}
    write_records(folder / "adamw", records)
    text = text_of(folder)
    assert "Muon predicts the held-out text at" in text and "AdamW at" not in text
    assert "After 1,536 tokens, the held-out loss of AdamW is NaN or Inf." in text
    assert "AdamW skipped 3 steps." in text
    write_report(folder, ("adamw", "muon"))
    row = next(line for line in printed(folder).splitlines() if line.startswith("AdamW"))
    assert row.split()[2:5] == ["–", "–", "–"]


def test_dense_models_have_no_router_figures_and_unknown_bytes_no_bits(tmp_path):
    folder = two(tmp_path, model=DENSE, bits=False)
    page = write_report(folder, ("adamw", "muon")).read_text()
    assert pngs(folder) == {"held_out", "loss", "optimization"}
    assert "router" not in page.lower() and "Figure 3." in page and "Figure 4." not in page
    assert measure_of(load_runs(folder)) == "validation_loss"
    assert "nats per token" in text_of(folder) and "bits" not in text_of(folder)
    assert "bits per byte" not in page and "per byte" not in printed(folder)


def test_rates_are_medians_and_the_load_a_mean_of_the_last_records(tmp_path):
    folder = make_run(tmp_path / "r", "muon", 0.9, steps=40)
    records = records_of(folder)
    for record in records:
        mfu = 0.01 if record["step"] == 2 else 0.4
        record |= {"mfu": mfu, "flops_per_second": 1e13 * mfu} if "loss" in record else {}
    write_records(folder, records)
    assert "40 %" in printed(folder)
    assert "4 TFLOP/s" in write_report(folder, ("muon",)).read_text()
    last = [np.array(record["load"]) for record in records if "load" in record][-2:]
    np.testing.assert_allclose(load_run(folder).final_load(), np.mean(last, axis=0))
    # A torn last line is no record.
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text()[:-20])
    assert load_run(folder).records.evaluated[-1]["step"] == 36


def test_every_optimizer_has_its_color(tmp_path):
    names = ("normuon", "dion")
    for name in names:
        make_run(tmp_path / "r" / name, name, 1.0)
    folder = epath.Path(tmp_path / "r")
    first, second = load_runs(folder, names)
    assert load_run(folder / "dion").style == second.style != first.style
    assert found_optimizers(folder) == names


def test_smoothing_neither_lags_nor_spreads_what_is_not_finite():
    line = np.arange(200.0)
    found = smoothed(line)
    np.testing.assert_allclose(found[:-6], line[:-6])
    line[100] = np.nan
    found = smoothed(line)
    assert np.isnan(found).sum() == 1
    np.testing.assert_allclose(found[99], np.nanmean(line[93:106]))
    assert smoothed(np.array([np.nan, np.nan, 2.0]))[2] == 2.0


def test_folders_that_hold_no_run(tmp_path):
    folder = epath.Path(tmp_path)
    with pytest.raises(RunError, match="holds no run"):
        found_optimizers(folder / "nothing")
    with pytest.raises(SystemExit, match=r"error: .* holds no run"):
        main(str(folder))
    make_run(tmp_path / "r", "muon", 0.9)
    with pytest.raises(RunError, match="is a single run"):
        write_report(folder / "r", ("adamw", "muon"))
    for name in ("config.json", "summary.json"):
        whole = (folder / "r" / name).read_text()
        (folder / "r" / name).write_text("{")
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            load_run(folder / "r")
        (folder / "r" / name).write_text(whole)
    for name in ("summary.json", "config.json"):
        (folder / "r" / name).write_text("{}")
    with pytest.raises(ValueError, match=r"config.json is not of a run of this study"):
        load_run(folder / "r")


def dry(config, *optimizers):
    out, mesh = io.StringIO(), mesh_of_config(config.mesh)
    names = optimizers or ("adamw", "muon")
    cases = [plan.case(config, name, mesh) for name in names]
    schedule = plan.schedule_text(config, names)
    dry_run(cases, None, Console(width=80, file=out), schedule=schedule)
    return out.getvalue()


def test_dry_run_on_one_device():
    text = dry(training())
    assert "embedding/embedding                         (64, 32)        -   " in text
    assert re.search(r"experts/gate +\(8, 2, 32, 16\) +8 × 2 × \(32 × 16\) +muon", text)
    assert re.search(r"experts/gate, experts/up +experts, –, –, hidden +not split", text)
    assert "51,344 in total, 47,248 without embedding and head" in text
    # Two float32s of all; one of the 46,976 entries of hidden matrices, and counters.
    assert re.search(r"optimizer state, float32 +410.76 kB +222.86 kB", text)
    assert re.search(r"model +25 MFLOP +25 MFLOP", text)
    assert re.search(r"Newton-Schulz +– +21.9 MFLOP", text)
    assert "Muon's overhead: 87.85 % of the model's 25 MFLOP per step" in text
    assert "warm-up over 2 steps, then cosine to 0.1" in text
    assert "128 tokens per step, 1,536 in total" in text


@pytest.mark.parametrize("fsdp, devices", [(-1, 16), (8, 64)])
def test_dry_run_of_moonlight_on_devices_that_need_not_be_there(fsdp, devices):
    config = dataclasses.replace(PRESETS["moonlight-16b"], mesh=Mesh(fsdp=fsdp, expert=8))
    text = dry(config)
    assert f"= {devices} devices" in text
    assert ("this machine has 16." in text) is (devices > 16)
    assert "15,289,019,904 without embedding and head" in text
    assert "2,243,685,888 of these are active per token" in text
    assert f"experts/down expert 8 × fsdp {devices // 8}" in re.sub(
        " experts, –, hidden, – +", " ", re.sub(" +", " ", text)
    )
    # AdamW keeps two float32s of each param; experts lie on all devices, the rest along fsdp.
    experts, all_params = 64 * 26 * 3 * 2048 * 1408, 15_960_108_544
    state = float(re.search(r"optimizer state, float32 +([\d.]+) GB", text)[1])
    wanted = 8e-9 * (experts + 8 * (all_params - experts)) / devices
    assert math.isclose(state, wanted, rel_tol=0.002)
    assert re.search(r"model +317 PFLOP +317 PFLOP", text)
    assert "5,200,936,960,000 in total" in text


def test_memory_is_that_of_the_arrays():
    config = training(mesh=Mesh(fsdp=2, expert=2, tensor=2), accumulate=2)
    trainer = Trainer(config, "muon", mesh_of(1, 2, 2, 2), config.data.vocabulary)
    state = jax.tree.map(
        lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), trainer.abstract
    )

    def held(tree):
        shards = (x.addressable_shards for x in jax.tree.leaves(tree))
        first = jax.devices()[0]
        return sum(s.data.nbytes for own in shards for s in own if s.device == first)

    memory = plan.case(config, "muon", trainer.mesh).memory
    params, gradient, optimizer = memory.held.values()
    assert params == gradient == held(state.params) and optimizer == held(state.opt_state)
    assert list(memory.backward.values()) == [2 * 1 * 17 * 4]  # the batch
    assert memory.total == sum(memory.held.values()) + sum(memory.update.values())
    half = dataclasses.replace(config, model=dataclasses.replace(SMALL, dtype="bfloat16"))
    small = plan.case(half, "muon", trainer.mesh).memory.backward["params, bfloat16"]
    whole = held(state.params["moe_layers"]["feed_forward"]["router"])
    whole += held(state.params["embedding"])
    assert small == (held(state.params) + whole) // 2


def test_what_does_not_fit_is_refused_with_what_would_and_so_is_a_mesh_that_cannot_be():
    cases = [plan.case(PRESETS["moonlight-16b"], "adamw", mesh_of(1, 4, 1, 1))]
    said = (
        r"step of adamw requires 72.\d* GB.* has 20.00 GB\. .*over 16 devices with --mesh.fsdp 16"
    )
    with pytest.raises(TooLarge, match=said):
        dry_run(cases, 20 * 10**9, Console(file=io.StringIO()))
    with pytest.raises(ValueError, match="at most one may be -1"):
        mesh_of_config(Mesh(data=-1, fsdp=-1, expert=32))
    with pytest.raises(ValueError, match=r"must be a multiple of .*fsdp 1 = 32; got"):
        dry(training(mesh=Mesh(fsdp=-1, expert=32), batch=32))


def test_dry_run_of_the_default_and_of_adamw_alone():
    assert "Muon's overhead" in dry(dataclasses.replace(PRESETS["tiny"], mesh=Mesh(fsdp=1)))
    text = dry(training(DENSE), "adamw")
    assert "AdamW trains all parameters" in text and "Newton-Schulz: " not in text
