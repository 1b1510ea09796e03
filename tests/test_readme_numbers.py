"""The READMEs' numbers, recomputed from the stored rows by other code than that of the reports.

What no stored row has (loops beside PyTorch, accuracies of fine-tuning, losses of `family.widths`)
is not checked, and the READMEs say of it that its rows are not stored.
"""

import functools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "experiments"
GROK = ("default", "paper", "paper_dropout", "parity", "rates", "tuned", "critics", "width")
GROK += ("batch", "rank", "width_batch")
HELD, MEMORISED = "grok_epoch_sustained", "memorized_epoch"


def stored(study, name, file="summary"):
    return json.loads((STUDIES / study / "results" / name / f"{file}.json").read_text())


def cells(name, **where):
    rows = stored("grok", name)["cells"]
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def budget(name):
    return stored("grok", name, "config")["epochs"]


def delay(row):
    return row[HELD] - row[MEMORISED]


def cost(row):
    return row["steps_per_epoch"] * row["step_flops"]


def logs(name, slow, fast, value=lambda row: row[HELD], weight=lambda row: 1.0):
    """Log ratios of pairs with one seed; a missing value counts as the budget, two tell nothing."""
    found, limit = [], budget(name)
    for a in slow:
        for b in fast:
            over, under = value(a), value(b)
            if a["seed"] == b["seed"] and (over, under) != (None, None):
                over, under = limit if over is None else over, limit if under is None else under
                found.append(math.log(over * weight(a) / (under * weight(b))))
    return found


def by_task(name, fast="muon", value=lambda row: row[HELD], **where):
    """AdamW over another: a mean for each task, of its output functions' means over the seeds."""
    found = []
    for task in dict.fromkeys(row["task"] for row in cells(name)):
        means = []
        for kind in dict.fromkeys(row["softmax"] for row in cells(name)):
            at = where | {"task": task, "softmax": kind}
            if where.get("softmax", kind) == kind and where.get("task", task) == task:
                pair = (cells(name, optimizer=o, **at) for o in ("adamw", fast))
                own = logs(name, *pair, value)
                means += [np.mean(own)] if own else []
        found += [np.mean(means)] if means and "task" not in where else means
    return found


def delays_by_task(name, fast="muon", value=lambda row: 1 + delay(row)):
    """Of delay + 1, over the pairs of trainings that both grokked."""
    found = []
    for task in dict.fromkeys(row["task"] for row in cells(name)):
        means = []
        for kind in dict.fromkeys(row["softmax"] for row in cells(name)):
            at = {"task": task, "softmax": kind, "censored": False}
            both = (cells(name, optimizer=o, **at) for o in ("adamw", fast))
            if own := logs(name, *both, value):
                means.append(np.mean(own))
        found += [np.mean(means)] if means else []
    return found


def interval(found):
    """Of logarithms: the geometric mean and its 95 % interval."""
    low, high = stats.t.interval(0.95, len(found) - 1, np.mean(found), stats.sem(found))
    return f"{math.exp(np.mean(found)):.2f} [{math.exp(low):.2f}, {math.exp(high):.2f}]"


def number(value):
    return f"{value:,.0f}" if value == round(value) or value >= 1000 else f"{value:.3g}"


def middle(values, limit):
    """A median, "> " where it is of values beyond the budget."""
    exact = np.median([np.inf if x is None else x for x in values])
    if np.isfinite(exact):
        return number(exact)
    return f"> {number(np.median([limit if x is None else x for x in values]))}"


def medians(name, rows):
    """Of the memorised epoch, the delay and the sustained grokking epoch."""
    limit = budget(name)
    late = [None if row["censored"] else delay(row) for row in rows]
    left = [limit - (row[MEMORISED] or limit) for row in rows]
    exact = np.median([np.inf if x is None else x for x in late])
    bound = np.median([b if x is None else x for x, b in zip(late, left, strict=True)])
    shown = number(exact) if np.isfinite(exact) else f"> {number(bound)}"
    return [
        middle([row[MEMORISED] for row in rows], limit),
        shown,
        middle([row[HELD] for row in rows], limit),
    ]


def counts(name, **where):
    """How many grokked; of these within five epochs of memorising, and not before twice its."""
    found = [row for row in cells(name, **where) if not row["censored"]]
    soon = sum(delay(row) <= 5 for row in found)
    strict = sum(row[HELD] >= 2 * row[MEMORISED] for row in found)
    return [f"{len(found)} of {len(cells(name, **where))}", str(soon), str(strict)]


def sign(name, slow, fast):
    """≥ or ≤ where a censored training counts at the budget on one side."""
    pairs = [(a, b) for a in slow for b in fast if all(a[k] == b[k] for k in ("task", "softmax"))]
    pairs = [(a["censored"], b["censored"]) for a, b in pairs if a["seed"] == b["seed"]]
    least, most = (any(pair == of for pair in pairs) for of in ((True, False), (False, True)))
    return {(True, False): "≥ ", (False, True): "≤ "}.get((least, most), "")


# --- The tables of the grokking study ------------------------------------------------------------


def grokking():
    found = []
    for name in GROK[:8] + GROK[8:10]:
        own = [counts(name, optimizer=of) for of in ("adamw", "muon")]
        found.append([f"`{name}`", *own[0], *own[1]])
    return found


def published():
    found, name = [], "paper"
    for optimizer in ("adamw", "muon", "muon_equal_decay", "muon_equal_shrink"):
        rows = cells(name, optimizer=optimizer)
        row = [counts(name, optimizer=optimizer)[0], *medians(name, rows)]
        if optimizer == "adamw":
            found.append([*row, "", "", ""])
            continue
        least = sign(name, cells(name, optimizer="adamw"), rows)
        early = by_task(name, optimizer, lambda row: row[MEMORISED])
        ratios = interval(early), interval(delays_by_task(name, optimizer))
        never = any(row[MEMORISED] is None for row in cells(name, optimizer="adamw"))
        text = [("≥ " if never and least else "") + ratios[0], ratios[1]]
        found.append([*row, *text, least + interval(by_task(name, optimizer))])
    return found


def dropout():
    found, name = [], "paper_dropout"
    for optimizer in ("adamw", "muon"):
        rows = cells(name, optimizer=optimizer)
        known = [[row[key] for row in rows if row[key]] for key in ("grok_epoch", HELD)]
        means = [f"{np.mean(own):.0f}" for own in known]
        first = middle([row["grok_epoch"] for row in rows], budget(name))
        found.append(
            [counts(name, optimizer=optimizer)[0], *medians(name, rows)[:2], *means, first]
            + medians(name, rows)[2:]
        )
    return found


def best_of(name, rate, decay, optimizer):
    point = {f"{optimizer}.learning-rate={rate}", f"{optimizer}.weight-decay={decay}"}
    rows = [r for r in cells(name, optimizer=optimizer) if set(r["point"].split()) == point]
    # It is the best: no other setting has a lower median.
    points = {r["point"] for r in cells(name, optimizer=optimizer)}
    others = [
        np.median([r[HELD] or np.inf for r in cells(name, optimizer=optimizer, point=p)])
        for p in points
    ]
    assert np.median([r[HELD] or np.inf for r in rows]) == min(others)
    return sorted(rows, key=lambda row: row["seed"])


def tuned():
    found = []
    for name, rates in (("rates", (0.004, 1, 0.08, 0.3)), ("tuned", (0.008, 1, 0.08, 0.3))):
        pair = best_of(name, *rates[:2], "adamw"), best_of(name, *rates[2:], "muon")
        for label, rows, at in zip(("AdamW", "Muon"), pair, (rates[:2], rates[2:]), strict=True):
            texts = [", ".join(str(r[key]) for r in rows) for key in (MEMORISED, HELD)]
            flops = np.median([row[HELD] * cost(row) for row in rows]) / 1e12
            late = ", ".join(str(delay(row)) for row in rows)
            found.append(
                [f"`{name}`", label, f"{at[0]} × {at[1]}", texts[0], late, texts[1], f"{flops:.2f}"]
            )
        ratios = [
            logs(name, *pair, lambda row: row[MEMORISED]),
            logs(name, *pair, lambda row: 1 + delay(row)),
            logs(name, *pair),
            logs(name, *pair, weight=cost),
        ]
        found.append([f"`{name}`", "ratio, 95 %", "", *map(interval, ratios)])
    return found


FRESH = {"division": "fresh_division", "multiplication": "fresh_multiplication"}


def judged(slow, fast):
    """Ratios over the seeds that did not choose the settings."""
    own = [[row for row in rows if row["seed"] >= 3] for rows in (slow, fast)]
    pairs = list(zip(*own, strict=True))
    assert all(a["seed"] == b["seed"] for a, b in pairs) and len(pairs) == 10

    def ratio(value):
        return interval([math.log(value(a) / value(b)) for a, b in pairs])

    return [
        ratio(lambda row: row[MEMORISED]),
        ratio(lambda row: 1 + delay(row)),
        ratio(lambda row: row[HELD]),
        ratio(lambda row: row[HELD] * cost(row)),
    ]


def fresh():
    both = {
        task: [cells(name, optimizer=o) for o in ("adamw", "muon")] for task, name in FRESH.items()
    }
    both["division, AdamW beside Muon at 0.004"] = [both["division"][0], cells("fresh_beside")]
    return [[task, *judged(*pair)] for task, pair in both.items()]


def pair_at(name, setting, value):
    """AdamW's trainings and Muon's; at width 32 Muon's are those of the longer run."""
    both = [cells(name, point=f"{setting}={value}", optimizer=o) for o in ("adamw", "muon")]
    return [both[0], cells("width_32")] if (name, value) == ("width", 32) else both


def swept(name, setting, values):
    found = []
    for value in values:
        both = pair_at(name, setting, value)
        row = [f"all {value}" if value == 4656 else str(value)]
        for rows in both:
            row += medians(name, rows)
        own = logs(name, *both)
        row += [sign(name, *both) + interval(own)] if own else [""]
        row += [sign(name, *both) + interval(logs(name, *both, weight=cost))] if own else [""]
        found.append(row)
    return found


def ranks():
    found, name = [], "rank"
    base = cells(name, optimizer="adamw")
    arms = [(f"rank {k}", {"point": f"variants.rank={k}"}) for k in (1, 2, 4, 8, 16, 32)]
    arms += [("all 128, SVD", {"optimizer": "polar"})]
    arms += [("all 128, Newton–Schulz", {"optimizer": "muon"}), ("AdamW", {"optimizer": "adamw"})]
    for label, where in arms:
        rows = cells(name, **where)
        own = [] if rows[0]["optimizer"] == "adamw" or all(r["censored"] for r in rows) else rows
        text = sign(name, base, rows) + interval(logs(name, base, own)) if own else ""
        found.append([label, *medians(name, rows), text])
    return found


def diagnostics():
    rows = stored("grok", "default", "diagnostics")["rows"]
    later = stored("grok", "full_length", "diagnostics")["rows"]
    assert not any(r["collapse_share"] for r in later)
    found = []
    for key, first in (
        ("logit_gini", ".1f"),
        ("validation_loss", ""),
        ("restricted_loss", ""),
        ("train_loss", ""),
        ("excluded_loss", ""),
        ("weight_stable_rank", ".0f"),
        ("update_stable_rank", ""),
        ("norm_hidden", ".0f"),
        ("norm_embedding", ".0f"),
    ):
        row = []
        for many, ends in ((rows, lambda epoch: epoch > 1), (later, lambda epoch: epoch == 200)):
            for name in ARMS:
                own = [r[key] for r in many if r["optimizer"] == name and ends(r["epoch"])]
                assert len(own) == 3
                row.append(f"{min(own):.2g} to {max(own):.2g}".replace("e-0", "e-"))
        begin = np.mean([r[key] for r in rows if r["epoch"] == 1])
        found.append([f"{begin:{first}} at first" if first else None, *row])
    return found


# --- The tables of the other studies -------------------------------------------------------------


def gap(ours, theirs, digits=3):
    """A difference paired by seed, with its interval, of losses by seed."""
    gaps = [ours[seed] - theirs[seed] for seed in sorted(ours)]
    ends = stats.t.interval(0.95, len(gaps) - 1, np.mean(gaps), stats.sem(gaps))
    mean, low, high = (f"{x:+.{digits}f}".replace("-", "−") for x in (np.mean(gaps), *ends))
    return f"{mean} [{low}, {high}]"


def p_of(ours, theirs):
    return stats.ttest_1samp([ours[seed] - theirs[seed] for seed in ours], 0).pvalue


def spread(losses):
    values = [*losses.values()]
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def arms(study, name):
    """By optimizer, the lowest loss first."""
    found = sorted(stored(study, name)["arms"], key=lambda arm: arm["validation_loss"])
    return {arm["optimizer"]: arm for arm in found}


def family():
    found, every = [], arms("family", "default")
    base = every["adamw"]["losses_by_seed"]
    for name, arm in every.items():
        losses, update = arm["losses_by_seed"], arm["update"]
        times = f"{update['times_baseline']:.1f}" if name != "adamw" else "1"
        found.append(
            [f"{arm['best_rate']:g}", spread(losses), "" if name == "adamw" else gap(losses, base)]
            + [times, f"{update['state_bytes_per_parameter']:.2f}"]
        )
        rates = arm["losses_by_rate"]
        assert min(rates, key=rates.get) == f"{arm['best_rate']:g}"
    return found


def beside_muon(name):
    """Of each optimizer but AdamW's baseline: its loss minus Muon's, and p after Holm."""
    every = arms("family", name)
    base = every["muon"]["losses_by_seed"]
    others = [own for own in every if own != "muon"]
    corrected = holm([p_of(every[o]["losses_by_seed"], base) for o in others])
    p = dict(zip(others, corrected, strict=True))
    found = []
    for own, arm in every.items():
        losses = arm["losses_by_seed"]
        assert arm["at_edge"] == name.endswith("long")  # which has one rate
        told = ["", ""] if own == "muon" else [gap(losses, base), small(p[own])]
        found.append([f"{arm['best_rate']:g}", spread(losses), *told])
    return found


def beside():
    """By AdamW's rate for the rest: the losses of Muon and of AdamW on the hidden matrices."""
    both = [arms("family", "rest")[name] for name in ("muon_rest", "adamw_rest")]
    found = [
        [
            f"{arm['losses_by_rate'][rate]:.3f}" if rate in arm["losses_by_rate"] else ""
            for arm in both
        ]
        for rate in both[1]["losses_by_rate"]
    ]
    assert [arm["best_rate"] for arm in both] == [0.024, 0.048]
    return [*found, [spread(arm["losses_by_seed"]) for arm in both]]


def updates():
    """The quickest first."""
    costs = sorted(
        stored("family", "costs", "costs")["costs"].values(), key=lambda cost: cost["milliseconds"]
    )
    base = next(cost["milliseconds"] for cost in costs if cost["times_baseline"] == 1)
    return [
        [f"{cost['milliseconds'] / base:.1f}"]
        + [f"{cost[name] / 1e6:.0f}" for name in ("flops", "decomposition_flops")]
        + [f"{cost['state_bytes_per_parameter']:.2f}"]
        for cost in costs
    ]


def transfer():
    """By the shape scale, of `mup` and of the hyperball; best rates are bold in the README."""
    return {of["scale"]: of for of in stored("family", "transfer")["scales"]}


def widths():
    arms_of = [transfer()[scale]["arms"] for scale in ("mup", "hyperball")]
    return [
        [
            ", ".join(f"{loss:.3f}" for loss in arms[width]["losses_by_rate"].values())
            for arms in arms_of
        ]
        for width in ("32", "64", "128")
    ]


def small(p):
    return "< 0.001" if p < 0.0005 else f"{p:.3f}"


def pretrain_default():
    runs = stored("pretrain", "default")["runs"]
    return [
        [f"{run['bits_per_byte']:.3f}", f"{run['validation_loss']:.3f}"]
        + [f"{run['tokens_per_second']:,.0f}".replace(",", " ")]
        for run in (runs["muon"], runs["adamw"])
    ]


def pretrain_optimizers():
    found, every = [], arms("pretrain", "optimizers")
    base = every["adamw"]["losses_by_seed"]
    p = {name: p_of(arm["losses_by_seed"], base) for name, arm in every.items() if name != "adamw"}
    corrected = dict(zip(p, holm([*p.values()]), strict=True))
    for name, arm in every.items():
        losses, row = arm["losses_by_seed"], [f"{arm['best_rate']:g}"]
        row.append(spread(losses))
        if name == "adamw":
            found.append([*row, "", "", "", "", ""])
            continue
        shares = arm["to_adamw_loss"].values()
        never = ["never" if x is None else f"{100 * x:.0f} %" for x in shares]
        found.append([*row, gap(losses, base), f"{corrected[name]:.2f}", *never])
    return found


def fresh_gains(name, optimizer, base="adamw"):
    """Losses minus those of a base, by the seeds that did not choose the rates."""
    every = arms("pretrain", name)
    ours, theirs = (every[o]["losses_by_seed"] for o in (optimizer, base))
    return [ours[seed] - theirs[seed] for seed in ours if seed != "0"]


def spans(values, form="+.3f"):
    """The mean and its 95 % interval."""
    ends = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    mean, low, high = (f"{x:{form}}".replace("-", "−") for x in (np.mean(values), *ends))
    return f"{mean} [{low}, {high}]"


def shares_to_adamw(name, optimizer):
    """Log shares of AdamW's tokens and FLOPs to its final loss, by the same seeds."""
    every = arms("pretrain", name)
    tokens, found = [at for at, _ in every["adamw"]["curve"]], []
    for seed, curve in every[optimizer]["curves"].items():
        end = every["adamw"]["losses_by_seed"][seed]
        after = next(i for i, loss in enumerate(curve) if loss <= end)
        near = slice(after - 1, after + 1)
        needed = np.interp(-end, np.negative(curve[near]), tokens[near])
        found += [math.log(needed / tokens[-1])] if seed != "0" else []
    own, base = (every[o]["cost"] for o in (optimizer, "adamw"))
    step = (own["model_flops"] + own["optimizer_flops"]) / base["model_flops"]
    return found, [x + math.log(step) for x in found]


def pretrain_seeds():
    found = []
    for name in ("seeds", "dense"):
        for optimizer, arm in arms("pretrain", name).items():
            losses = {seed: loss for seed, loss in arm["losses_by_seed"].items() if seed != "0"}
            row = [f"{arm['best_rate']:g}", spread(losses)]
            if optimizer != "adamw":
                row.append(spans(fresh_gains(name, optimizer)))
                row += [interval(own) for own in shares_to_adamw(name, optimizer)]
            found.append([*row, "", "", ""][:5] + [str(len(losses))])
    return found


def fine_tuned(name, variant, order):
    groups = {(g["variant"], g["arm"]): g for g in stored("finetune", name)["groups"]}
    return {arm: groups[variant, arm]["losses_by_seed"] for arm in order}


def controlled():
    order = ("muon_frozen1d", "muon_adamw", "muonclip", "adamw")
    losses = fine_tuned("controlled", "controlled", order)
    others = order[:3]
    p = dict(zip(others, holm([p_of(losses[arm], losses["adamw"]) for arm in others]), strict=True))
    # The last column, accuracy, is not in stored rows.
    return [
        [spread(losses[arm])]
        + ([gap(losses[arm], losses["adamw"]), f"{p[arm]:.2f}"] if arm in p else ["", ""])
        + [None]
        for arm in order
    ]


def post_claims():
    return [[of["verdict"], None] for of in stored("finetune", "controlled")["claims"]]


def as_released():
    order = ("adamw", "muonclip", "muon_adamw", "muon_frozen1d")
    losses = fine_tuned("as_published", "as published", order)
    base = losses["adamw"]
    return [[spread(own), "" if own is base else gap(own, base)] for own in losses.values()]


def bases():
    found, order = [], ("adamw", "muon_frozen1d", "muon_adamw", "muonclip")
    sides = [fine_tuned("mismatch", base, order) for base in ("AdamW base", "Muon base")]
    for arm in order:
        row, gaps = [], []
        for losses in sides:
            row += [
                spread(losses[arm]),
                "" if arm == "adamw" else gap(losses[arm], losses["adamw"]),
            ]
            gaps.append({s: losses[arm][s] - losses["adamw"][s] for s in losses[arm]})
        found.append([*row, "" if arm == "adamw" else gap(*gaps)])
    return found


def clips():
    groups = {g["variant"]: g for g in stored("finetune", "qk")["groups"]}
    shown = ("QK-norm, no clip", "QK-norm, W_q and W_k clipped", "QK-norm, gains clipped")
    shown += ("no QK-norm, no clip", "no QK-norm, W_q and W_k clipped")
    found = []
    for name in shown:
        losses, plain = groups[name]["losses_by_seed"], groups[f"{name.split(',')[0]}, no clip"]
        same = plain["losses_by_seed"] is losses
        found.append([spread(losses), "" if same else gap(losses, plain["losses_by_seed"])])
    return found


# By a README's section and the place of a table in it: the last cells of each of its rows; None
# where no stored row tells.
TABLES = {
    ("grok", "Is it grokking?", 0): grokking,
    ("grok", "The published study", 0): published,
    ("grok", "With dropout", 0): dropout,
    ("grok", "Diagnostics", 0): diagnostics,
    ("grok", "After tuning", 0): tuned,
    ("grok", "After tuning", 1): fresh,
    ("grok", "Width", 0): lambda: swept("width", "width", (32, 64, 128, 256, 512)),
    ("grok", "Batch", 0): lambda: swept("batch", "batch", (64, 128, 256, 512, 1024, 2048, 4656)),
    ("grok", "Rank", 0): ranks,
    ("family", "The family study", 0): family,
    ("family", "The variants of 2026", 0): functools.partial(beside_muon, "norms"),
    ("family", "The variants of 2026", 1): functools.partial(beside_muon, "long"),
    ("family", "AdamW's rate for the rest", 0): beside,
    ("family", "AdamW's rate for the rest", 1): functools.partial(beside_muon, "rest_leaders"),
    ("family", "AdamW's rate for the rest", 2): functools.partial(beside_muon, "rest_long"),
    ("family", "What an update costs", 0): updates,
    ("family", "Rates and width", 1): widths,
    ("pretrain", "The default run", 0): pretrain_default,
    ("pretrain", "Optimizers at equal effort", 0): pretrain_optimizers,
    ("pretrain", "Ten seeds, and a dense model beside the mixture", 0): pretrain_seeds,
    ("finetune", "On equal terms", 0): controlled,
    ("finetune", "On equal terms", 1): post_claims,
    ("finetune", "As the code was released", 0): as_released,
    ("finetune", "From models that AdamW and Muon pretrained", 0): bases,
    ("finetune", "QK-clip", 0): clips,
}


def tables(study, section):
    """The tables of a README's section, cell by cell, without their headings."""
    text = (STUDIES / study / "README.md").read_text(encoding="utf-8").replace("**", "")
    (own,) = (
        of for of in re.split(r"^#+ ", text, flags=re.MULTILINE) if of.split("\n")[0] == section
    )
    blocks = re.findall(r"^\|.*(?:\n\|.*)*", own, re.MULTILINE)
    return [
        [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()[2:]]
        for block in blocks
    ]


@pytest.mark.parametrize(("study", "section", "place"), TABLES)
def test_a_table_is_what_the_rows_tell(study, section, place):
    shown, expected = tables(study, section)[place], TABLES[study, section, place]()
    assert len(shown) == len(expected)
    for line, row in zip(shown, expected, strict=True):
        told = line[len(line) - len(row) :]
        if section == "Diagnostics":  # whose first cell ends with what it was at first
            told = [row[0] and told[0][-len(row[0]) :], *told[1:]]
        assert [t if r is not None else None for t, r in zip(told, row, strict=True)] == row


# --- Sentences -----------------------------------------------------------------------------------


def holm(p_values):
    order = np.argsort(p_values)
    steps = [(len(order) - place) * p_values[i] for place, i in enumerate(order)]
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected


def p_values(name, setting, values, weight):
    found = {}
    for value in values:
        both = pair_at(name, setting, value)
        if own := logs(name, *both, weight=weight):
            found[value] = stats.ttest_1samp(own, 0).pvalue
    return dict(zip(found, holm([*found.values()]), strict=True))


def spearman(name, setting, optimizer, unit):
    """Of a setting and the cost, by the values without a censored cell where budgets differ."""
    rows = cells(name, optimizer=optimizer)
    value = [float(row["point"].removeprefix(f"{setting}=")) for row in rows]
    costs = [unit(row) * (row[HELD] or budget(name)) for row in rows]
    budgets = {round(unit(row), -len(str(int(unit(row)))) + 3) for row in rows}
    if len(budgets) > 1:
        out = {x for x, row in zip(value, rows, strict=True) if row["censored"]}
        kept = [(x, y) for x, y in zip(value, costs, strict=True) if x not in out]
        value, costs = zip(*kept, strict=True)
    found = stats.spearmanr(value, costs)
    return found.statistic, found.pvalue


def signed(value, digits=2):
    return f"{value:+.{digits}f}".replace("-", "−")


def of_grok():
    paper = {o: cells("paper", optimizer=o) for o in ("adamw", "muon")}
    for kind, mark in (("softmax", ""), ("stablemax", "≥ "), ("sparsemax", "≥ ")):
        yield f"{mark}{interval(by_task('paper', softmax=kind))} |"
    without = [m for m, t in zip(by_task("paper"), TASKS, strict=True) if t != "sub"]
    yield f"≥ {interval(without)} | 6 tasks"
    yield f"≥ {interval(by_task('paper_dropout'))} | 6 tasks"
    yield f"{interval(by_task('paper', task='sub'))} | 3 output functions"
    helped = []
    for task in TASKS[:-1]:
        stable, soft = (
            cells("paper", optimizer="adamw", task=task, softmax=kind)
            for kind in ("stablemax", "softmax")
        )
        helped.append(np.mean(logs("paper", stable, soft)))
    yield f"≥ {interval(helped)} times its softmax epochs"
    held = [np.array([r[HELD] for r in rows if r[HELD]]) for rows in paper.values()]
    for known, form in ((held, ".1f"), ([np.log(x) for x in held], ".2f")):
        spans = [f"{np.subtract(*np.percentile(x, [75, 25])):{form}}" for x in known]
        p = stats.levene(*known, center="median").pvalue
        yield f"{spans[0].removesuffix('.0')} and {spans[1]}"
        yield f"p = {p:.3f}" if p < 0.01 else f"p = {p:.2f}"
    medians_of = {
        name: np.median([r[HELD] for r in cells("critics", optimizer=name)])
        for name in ("orthogonal", "muon", "spectral", "adamw", "muon_one_step", "polar")
    }
    alone, muon, spectral, adamw, step, polar = (f"{x:.0f}" for x in medians_of.values())
    yield f"epoch {alone} alone, Muon's {muon}; its spectral norm alone {spectral}, AdamW's {adamw}"
    yield f"takes {step}, the exact polar factor {polar}"
    rest = [np.median([r[HELD] for r in cells("critics", optimizer=f"muon_{o}")]) for o in OTHERS]
    yield "with SGD there {:.0f}, with Lion {:.0f}, with nothing there learning {:.0f}".format(
        *rest
    )
    yield f"groks at {alone} (Muon {muon}), the spectral norm"
    yield f"without orthogonalising at {spectral}, later than AdamW ({adamw})"
    widths, batches = (32, 64, 128, 256, 512), (64, 128, 256, 512, 1024, 2048, 4656)
    epochs = p_values("width", "width", widths, lambda row: 1)
    flops = p_values("width", "width", widths, cost)
    narrow = pair_at("width", "width", 32)
    told = interval(logs("width", *narrow)), interval(logs("width", *narrow, weight=cost))
    yield f"at 32 {told[0]}, FLOPs {told[1]}, p = {flops[32]:.2f} after Holm over five widths"
    at_64 = interval(logs("width", *pair_at("width", "width", 64), weight=cost))
    yield f"at 64 FLOPs {at_64}, p = {flops[64]:.2f}"
    texts = [f"{epochs[w]:.2f} at {w}" for w in (32, 256, 128)]
    yield f"p is {texts[0]}, {texts[1]}, {texts[2]} and {epochs[64]:.2f} at 64 and 512 in epochs"
    assert f"{epochs[512]:.2f}" == f"{epochs[64]:.2f}"
    assert len({round(p, 2) for width, p in flops.items() if width != 32}) == 1
    yield f"in FLOPs {flops[32]:.2f} at 32 and {flops[64]:.2f} at all others"
    assert round(math.exp(-np.mean(logs("width", *narrow)))) == 3
    told = []
    for threshold in (1, 4):
        own = cells("clip", point=f"variants.clip-threshold={threshold}")
        told.append(interval(logs("clip", cells("clip", optimizer="muon"), own)))
        shares = sorted(row["clipped_share"] for row in own)
        told.append(f"{shares[0]:.0%} to {shares[-1]:.0%}".replace("%", " %"))
    yield "threshold 1 {}, clipping in {} of the steps; 4 {}, in {}".format(*told)
    bare = {o: cells("no_norm", optimizer=o, point="norm=none") for o in ARMS}
    normed = {o: cells("no_norm", optimizer=o, point="norm=rms") for o in ARMS}
    assert not any(row["collapse_epoch"] for rows in bare.values() for row in rows)
    assert [row["collapse_epoch"] for row in normed["adamw"]].count(None) == 2
    strict = [sum(r[HELD] >= 2 * r[MEMORISED] for r in rows) for rows in bare.values()]
    yield "{} of 3 AdamW and {} of 3 Muon trainings grok strictly".format(*strict)
    slower = interval(logs("no_norm", bare["muon"], normed["muon"]))
    lead = interval(logs("no_norm", bare["adamw"], bare["muon"]))
    yield f"Muon takes {slower} times its epochs with norms, AdamW over Muon {lead} | 3 seeds |"
    theory, thrice = cells("gluon_theory"), cells("gluon")
    assert [row["censored"] for row in theory].count(True) == 2
    epochs = ([row[MEMORISED] for row in rows] for rows in (theory, thrice))
    memorised = [f"{min(own)} to {max(own)}" for own in epochs]
    assert memorised[0] == "12 to 12"
    yield "at the rate of the theory memorises at 12 and groks in 1 of 3 by epoch 200"
    yield f"at three times that at {memorised[1]} and groks at " + ", ".join(
        str(row[HELD]) for row in sorted(thrice, key=lambda row: row["seed"])
    )
    fixed = [cells("fixed_table", optimizer=f"{o}_fixed_table") for o in ARMS]
    learnt = [cells("default", optimizer=o) for o in ARMS]
    more = [interval(logs("fixed_table", *pair)) for pair in zip(fixed, learnt, strict=True)]
    yield f"Muon {more[1]} times its epochs with one, AdamW ≥ {more[0]}; AdamW over Muon"
    yield f"≥ {interval(logs('fixed_table', *fixed))}, with a learnt one"
    yield f"{interval(logs('default', *learnt))} | 3 seeds"
    epochs = p_values("batch", "batch", batches, lambda row: 1)
    flops = p_values("batch", "batch", batches, cost)
    told = ", ".join(f"{epochs[b]:.2f}" for b in (256, 512))
    yield f"(p = {told} and {epochs[1024]:.3f} after Holm over the six batches with a ratio,"
    yield f"(p = {flops[1024]:.3f}; {flops[512]:.2f} at 512)"
    units = {"epochs": lambda row: 1, "steps": lambda row: row["steps_per_epoch"], "FLOPs": cost}
    for name in ("width", "batch"):
        found = {
            unit: [signed(spearman(name, name, o, of)[0]) for o in ("adamw", "muon")]
            for unit, of in units.items()
        }
        if name == "width":
            yield "Spearman {} AdamW, {} Muon; FLOPs {}, {}".format(
                *found["epochs"], *found["FLOPs"]
            )
            yield "(Spearman {} for AdamW, {} for Muon, which turns".format(*found["epochs"])
            yield "the reverse in FLOPs ({}, {})".format(*found["FLOPs"])
            assert found["epochs"] == found["steps"]
        else:
            tokens = (spearman(name, name, o, lambda r: r["tokens_per_epoch"]) for o in ARMS)
            yield "tokens ({} for AdamW, {} for Muon)".format(*(signed(of[0]) for of in tokens))
            yield "epochs {}, {}; steps {}, {}; FLOPs {}, {}".format(
                *found["epochs"], *found["steps"], *found["FLOPs"]
            )
            yield f"(p = {spearman(name, name, 'muon', cost)[1]:.2f})"
    own, whole = (cells("rank_norm", optimizer=f"low_rank{of}") for of in ("", "_whole"))
    yield f"rank 16 is later still, {interval(logs('rank_norm', own, whole))} |"
    ends = [[f([row[HELD] for row in rows]) for f in (min, max)] for rows in (whole, own)]
    muon = [row[HELD] for row in cells("default", optimizer="muon")]
    yield "at {} to {} epochs and {} to {}, Muon at {} to {}".format(
        *ends[0], *ends[1], min(muon), max(muon)
    )
    ranked = cells("rank", optimizer="low_rank")
    yield f"Spearman {signed(spearman('rank', 'variants.rank', 'low_rank', lambda row: 1)[0])}"
    assert len(ranked) == 18
    for study, name, n in (("family", "default", 19), ("pretrain", "optimizers", 10)):
        loss = {a["optimizer"]: a["validation_loss"] for a in stored(study, name)["arms"]}
        grok = {
            o: np.median([r[HELD] or np.inf for r in rows])
            for o in loss
            if (rows := cells("critics", optimizer=o))
        }
        rho = stats.spearmanr([*grok.values()], [loss[o] for o in grok]).statistic
        half = 1.96 * math.sqrt((1 + rho**2 / 2) / (n - 3))
        low, high = (signed(np.tanh(np.arctanh(rho) + x)) for x in (-half, half))
        assert len(grok) == n
        yield f"{rho:.2f} [{low.removeprefix('+')}, {high.removeprefix('+')}]"
        if study == "family":
            assert max(loss, key=loss.get) == "muon_only"
            yield f"`muon_only` groks at epoch {grok['muon_only']:.0f} and is the last of the 19"
    every = [row for name in GROK for row in cells(name)]
    digests = {row["params_sha256"] for row in every}
    yield f"{len(every)} rows are of {len(digests)} trainings"
    for deviation in (0.15, 0.2):
        ratios = [f"{detectable(deviation, n):.2f}" for n in (3, 5, 10)]
        yield f"| {deviation} | {' | '.join(ratios)} |"
    pair = best_of("rates", 0.004, 1, "adamw"), best_of("rates", 0.08, 0.3, "muon")
    deviation = np.std(logs("rates", *pair, weight=cost), ddof=1)
    chances = [round(100 * power(math.log(1.25), deviation, n)) for n in (3, 10)]
    yield f"it is {deviation:.2f}: of a true ratio of FLOPs of 1.25, three seeds had a chance of "
    yield f"{chances[0]} %, and ten would have {chances[1]} %"
    seconds = logs("rates", *pair, weight=lambda r: r["steps_per_epoch"] / r["steps_per_second"])
    yield f"seconds ({interval(seconds)})"
    for name, settings in (("rates", ("10 of its 15", "11 of Muon's 12")), ("tuned", ("8 of",))):
        whole = []
        for o in ("adamw", "muon"):
            points = {r["point"] for r in cells(name, optimizer=o)}
            done = [p for p in points if not any(r["censored"] for r in cells(name, point=p))]
            whole.append((len(done), len(points)))
        assert whole == {"rates": [(10, 15), (11, 12)], "tuned": [(8, 12), (12, 12)]}[name]
        yield from settings
    found = [row for row in cells("critics") if not row["censored"]]
    assert sum(row[HELD] >= 2 * row[MEMORISED] for row in found) == 1
    yield f"Of the {len(found)} trainings in `critics` that grok, one does so strictly"
    relative = {}
    for name, rows in paper.items():
        by = {
            t: [math.log(r[HELD] / r[MEMORISED]) for r in rows if r["task"] == t and r[HELD]]
            for t in TASKS[:-1]
        }
        relative[name] = math.exp(np.mean([np.mean(x) for x in by.values()]))
    yield f"Muon's grokking epoch is {relative['muon']:.2f} times its memorised one"
    yield f"AdamW's {relative['adamw']:.2f} times"
    both = delays_by_task("paper", value=lambda row: row[HELD] / row[MEMORISED])
    yield f"where both grok, {interval(both)}"
    means = [np.mean([r["grok_epoch"] for r in rows if r["grok_epoch"]]) for rows in paper.values()]
    capped = [np.mean([r["grok_epoch"] or 500 for r in rows]) for rows in paper.values()]
    yield f"1.49, is {means[0] / means[1]:.2f} here over the trainings that grokked"
    yield f"{capped[0] / capped[1]:.2f} with the others counted at the budget"
    first = [[r["grok_epoch"] for r in rows if r["grok_epoch"]] for rows in paper.values()]
    yield f"t is {stats.ttest_ind(*first, equal_var=False).statistic:.2f} (p = 5e-5)"
    for optimizer in ("adamw", "muon"):
        rows = sorted(cells("parity", optimizer=optimizer), key=lambda row: row["seed"])
        yield "{}, {} and {}".format(*(row["grok_epoch"] for row in rows))
    yield f"at most {['', 'nine'][max(delay(r) for r in cells('parity')) == 9]} epochs"
    soft = {"task": "mul", "softmax": "stablemax"}
    pair = [cells("paper", optimizer=o, **soft) for o in ("adamw", "muon")]
    yield f"on `mul` ({interval(logs('paper', *pair))})"
    for task in ("mul", "exp"):
        own = [
            np.exp(np.mean(by_task("paper", o, task=task, softmax="softmax")))
            for o in ("muon", "muon_equal_decay")
        ]
        yield f"from {own[0]:.1f} to {own[1]:.1f}" + (" on `exp`" if task == "exp" else "")
    ranks_p = [
        stats.wilcoxon(by_task("paper", o)).pvalue
        for o in ("muon", "muon_equal_decay", "muon_equal_shrink")
    ]
    corrected = holm(ranks_p)
    yield f"(signed-rank p over tasks {corrected[1]:.2f} after Holm; Muon {corrected[0]:.2f})"
    by = dict(zip(TASKS[:-1], by_task("paper", "muon_equal_decay"), strict=True))
    assert max(by, key=by.get) == "mul"
    yield f"makes most of it ({math.exp(by['mul']):.2f})"
    both = [cells("paper_dropout", optimizer=o) for o in ARMS]
    first = [[r["grok_epoch"] for r in rows if r["grok_epoch"]] for rows in both]
    pooled = stats.ttest_ind(*first, equal_var=False)
    early = interval(by_task("paper_dropout", value=lambda row: row[MEMORISED]))
    p = stats.wilcoxon(by_task("paper_dropout")).pvalue
    yield f"p = {p:.2f}; pooled as in the paper t = {pooled.statistic:.2f}, p = {pooled.pvalue:.3f}"
    yield f"≥ {early} times to memorise"
    yield "2412, 2196 and 2475 at width 64"
    steps = [
        r[HELD] * r["steps_per_epoch"]
        for b in (128, 256, 512)
        for r in cells("width_batch", optimizer="adamw", point=f"width=64 batch={b}")
    ]
    assert steps == [2412, 2196, 2475]


def claims_of_family():
    """The measured cells of its table of claims: differences to Muon's loss, and p after Holm."""
    loss, p = {}, {}
    for file in ("default", "norms", "long", "rest_leaders"):
        every = {name: arm["losses_by_seed"] for name, arm in arms("family", file).items()}
        others = [name for name in every if name != "muon"]
        found = holm([p_of(every[name], every["muon"]) for name in others])
        loss[file], p[file] = every, dict(zip(others, found, strict=True))

    def minus(file, name, base="muon"):
        return gap(loss[file][name], loss[file][base])

    assert [len(p[file]) for file in p] == [18, 17, 6, 4]
    rest = {name: arm["losses_by_seed"] for name, arm in arms("family", "rest").items()}
    apart = gap(rest["muon_rest"], rest["adamw_rest"])
    lead = f"{minus('norms', 'muon', 'adamw')}, p {small(p['norms']['adamw'])}"
    yield f"minus AdamW's {lead}; rest swept {apart} |"
    lead = minus("long", "muon", "adamw")
    yield f"in 900 steps {lead}, p = {small(p['long']['adamw'])}"
    for name in ("normuon", "muon_squared", "muon_eq", "aurora", "soap_muon"):
        files = [file for file in ("norms", "rest_leaders") if name in loss[file]]
        told = [f"{minus(file, name)}, p = {small(p[file][name])}" for file in files]
        yield f"| {'; rest swept '.join(told)}; in 900 {minus('long', name)} |"
    assert min(p["long"][name] for name in p["long"] if name != "adamw") > 0.3
    (chance,) = {small(p["norms"][name]) for name in ("namo", "polargrad")}
    yield f"| {minus('norms', 'namo')} and {minus('norms', 'polargrad')}, p = {chance} |"
    yield f"| {minus('norms', 'muon_plus')}, p = {small(p['norms']['muon_plus'])} |"
    bound = [minus("norms", name) for name in ("muonh", "muon_sphere", "spel")]
    assert max(p["norms"][name] for name in ("muonh", "muon_sphere", "spel")) < 0.0015
    yield f"| {bound[0]}, {bound[1]} and {bound[2]}, p ≤ 0.001 |"
    yield f"| {minus('norms', 'dion2')}, p {small(p['norms']['dion2'])} |"
    for name in ("dion", "adamuon", "muonbp", "scion", "muon_cautious"):
        yield f"| {minus('default', name)}, p = {p['default'][name]:.2f} |"
    stored_as = [minus("default", f"muon_{kind}") for kind in ("bf16", "int8")]
    yield f"| {' and '.join(stored_as)}, p = {p['default']['muon_int8']:.2f} |"
    yield f"| exact {minus('default', 'polar')}, p = {p['default']['polar']:.2f} |"
    assert p["default"]["muon_bf16"] == p["default"]["muon_int8"]
    yield f"minus AdamW's {minus('default', 'splus', 'adamw')} |"
    yield f"minus AdamW's {minus('norms', 'soap', 'adamw')} |"
    seen = {o: found_by(loss["default"][o], loss["default"]["muon"]) for o in p["default"]}
    assert all(0.015 < seen[o] < 0.025 for o in ("muon_bf16", "polar"))
    yield "one of 0.02 (int8 {:.2f}, Scion {:.2f})".format(seen["muon_int8"], seen["scion"])


def claims_of_pretrain():
    """The measured cells of its table of claims, and what it says of mixtures and dense models."""
    gains = {name: fresh_gains(name, "muon") for name in ("seeds", "dense")}
    assert stats.ttest_1samp(gains["seeds"], 0).pvalue < 0.001
    yield f"| {spans(gains['seeds'])}, p < 0.001 | {len(gains['seeds'])} fresh seeds |"
    tokens, flops = map(interval, shares_to_adamw("seeds", "muon"))
    yield f"{tokens} of the tokens, {flops} of the FLOPs with the update's"
    yield f"the mixture {spans(gains['seeds'])}, of a dense one {spans(gains['dense'])}"
    apart = stats.ttest_ind(gains["seeds"], gains["dense"], equal_var=False)
    ends = (signed(x, 3) for x in apart.confidence_interval())
    between = signed(np.mean(gains["seeds"]) - np.mean(gains["dense"]), 3)
    yield "seeds {} [{}, {}] (p = {:.2f})".format(between, *ends, apart.pvalue)
    tokens, dense = (interval(shares_to_adamw(name, "muon")[0]) for name in gains)
    yield f"tokens to AdamW's loss {tokens} and {dense}"
    costs = [arms("pretrain", name)["muon"]["cost"] for name in gains]
    update = [100 * of["optimizer_flops"] / of["model_flops"] for of in costs]
    yield "costs {:.0f} % of the mixture's FLOPs and {:.0f} % of the dense model's".format(*update)
    split = fresh_gains("seeds", "muon_split", "muon")
    every = arms("pretrain", "seeds")
    pairs = zip(*(every[o]["losses_by_seed"].values() for o in ("muon_split", "muon")), strict=True)
    assert stats.ttest_1samp(split, 0).pvalue < 0.001 and all(
        ours < theirs for ours, theirs in pairs
    )
    yield f"minus Muon's {spans(split)}, p < 0.001 | {len(split)} fresh seeds |"
    for width in (32, 48, 64):
        pair = {
            arm["optimizer"]: arm["losses_by_seed"]
            for arm in stored("pretrain", "scaling")["arms"]
            if arm["width"] == width
        }
        yield f"{gap(pair['muon'], pair['adamw'])} at " + f"{'width ' * (width == 32)}{width}"
    losses = {o: arm["losses_by_seed"] for o, arm in arms("pretrain", "optimizers").items()}
    others = [o for o in losses if o != "muon"]
    p = dict(zip(others, holm([p_of(losses[o], losses["muon"]) for o in others]), strict=True))
    for o in ("scion", "normuon", "muon_cautious", "muon_bf16", "muonclip"):
        yield f"minus Muon's {gap(losses[o], losses['muon'])}, p = {p[o]:.2f} |"
    ends = [gap(losses[o], losses["adamw"]) for o in ("splus", "splus_adamw")]
    yield f"minus AdamW's {ends[0]}; with AdamW for the rest {ends[1]}"


ARMS = ("adamw", "muon")
OTHERS = ("sgd", "lion", "only")


def of_others():
    """Of the other studies, by the README that has the sentence."""
    losses = {name: arm["losses_by_seed"] for name, arm in arms("family", "default").items()}
    means = {name: np.mean([*own.values()]) for name, own in losses.items()}
    near = [name for name in [*losses][:8] if name != "muon"]
    assert means[near[-1]] - means[near[0]] < 0.03
    p = holm([p_of(losses[name], losses["muon"]) for name in near])[0]
    below = gap(losses["muon"], losses["normuon"]).replace("+", "")
    yield "family", f"NorMuon's loss is {below} below Muon's, with p = {p:.2f} after Holm"
    new = {name: arm["losses_by_seed"] for name, arm in arms("family", "norms").items()}
    *four, fifth = [name for name in new if name != "muon"][:5]
    assert four == ["muon_squared", "soap_muon", "aurora", "muon_eq"] and fifth == "normuon"
    mean = {name: np.mean([*own.values()]) for name, own in new.items()}
    leads = [mean["muon"] - mean[name] for name in (four[-1], four[0])]
    p = max(holm([p_of(new[name], new["muon"]) for name in new if name != "muon"])[:4])
    yield "", "end {:.3f} to {:.3f} nats below Muon".format(*leads) + ", each at its best rate"
    yield "", f"(p ≤ {p:.3f}, {len(new) - 1} comparisons)"
    lead = gap(new["adamw"], new["muon"]).replace("+", "").replace(" [", " nats [")
    yield "", f"Muon ends {lead} below AdamW"
    fair = {name: arm["losses_by_seed"] for name, arm in arms("family", "rest").items()}
    ahead = gap(fair["adamw_rest"], fair["muon_rest"]).replace("+", "")
    yield "", f"Muon's lead is {ahead.replace(' [', ' nats [')}"
    fair = {
        name: np.mean([*a["losses_by_seed"].values()])
        for name, a in arms("family", "rest_leaders").items()
    }
    yield "", f"no variant's over Muon is above {fair['muon'] - min(fair.values()):.3f}"
    beside = {name: a["losses_by_seed"] for name, a in arms("family", "rest_leaders").items()}
    pairs = gap(new["muon_eq"], new["muon"]), gap(beside["muon_eq"], beside["muon"])
    yield "", "({} to Muon's, {} with that rate swept; in longer ones none led)".format(*pairs)
    long = {
        name: np.mean([*a["losses_by_seed"].values()]) for name, a in arms("family", "long").items()
    }
    half = (long["adamw"] - long["muon"]) / (mean["adamw"] - mean["muon"])
    assert 0.45 < half < 0.55 and min(long, key=long.get) == "soap_muon"
    yield "", "Muon's over AdamW is halved"
    cost = [mean[name] - mean["muon"] for name in ("muonh", "spel")]
    yield "family", "cost {:.2f} (MuonH) to {:.2f} nats (SPEL)".format(*cost)
    yield "family", "by {:.3f} to {:.3f} nats".format(*leads)
    yield "family", f"(NorMuon {mean['muon'] - mean['normuon']:.3f})"
    rest = {name: arm["losses_by_seed"] for name, arm in arms("family", "rest").items()}
    yield "family", f"Muon is {gap(rest['muon_rest'], new['muon'])} below itself at 0.006"
    yield "family", f"AdamW with 0.048 {gap(rest['adamw_rest'], new['adamw'])} below its own"
    told, fair = gap(rest["muon_rest"], rest["adamw_rest"]), mean["adamw"] - mean["muon"]
    yield "family", f"falls from {fair:.3f} to {told[1:6]}: {told}"
    fair = {name: arm["validation_loss"] for name, arm in arms("family", "rest_leaders").items()}
    assert [*fair] == ["aurora", "muon_eq", "muon_squared", "soap_muon", "muon"]
    gone = [1 - (fair["muon"] - fair[of]) / (mean["muon"] - mean[of]) for of in four]
    least, most = 100 * min(gone), 100 * max(gone)
    yield "family", f"lead, by {fair['muon'] - fair['aurora']:.3f} nats at most: {least:.0f} to"
    yield "family", f"{least:.0f} to {most:.0f} % of the leads above went with the low rate"
    late = [arms("family", of)["muon"]["losses_by_seed"] for of in ("rest_long", "long")]
    yield "family", f"Muon is {gap(*late)} to itself beside 0.006"
    (own,) = arms("family", "rest_hidden").values()
    yield "family", f"(0.012 by seed 0) give AdamW no more: {spread(own['losses_by_seed'])}"
    packed = {name: arm["validation_loss"] for name, arm in arms("family", "int4").items()}
    yield "family", f"int8 {packed['muon_int8']:.3f}, as Muon itself; int4"
    yield "family", f"half a byte an entry, {packed['muon_int4']:.3f}."
    seen = [found_by(losses[name], losses["muon"]) for name in near if name[:5] != "muon_"]
    assert all(0.002 < x < 0.055 for x in seen)
    rest = [means[name] - means["muon"] for name in ("muon_sgd", "muon_lion")]
    yield "family", "Muon ends {:.3f} above Muon with AdamW, with Lion {:.3f}".format(*rest)
    mup, ball = (transfer()[scale] for scale in ("mup", "hyperball"))
    moves = [of["drift_by_seed"] for of in (mup, ball)]
    zero = dict.fromkeys(moves[0], 0.0)
    own, other, apart = (
        gap(*pair, 2) for pair in ((moves[0], zero), (moves[1], zero), moves[::-1])
    )
    yield "family", f"moves by {own} powers of two for a doubling of the width under `mup`"
    yield "family", f"by {other} on the hyperball, a difference of {apart}"
    at = [of["arms"]["128"]["losses_by_rate"] for of in (ball, mup)]
    flat, steep = at[0]["0.16"] - at[0]["0.08"], at[1]["0.08"] - at[1]["0.04"]
    yield "family", f"costs {flat:.3f} nats at width 128, and {steep:.3f} under `mup`"
    lower = [min(a["losses_by_rate"].values()) for of in (ball, mup) for a in of["arms"].values()]
    lower = [a - b for a, b in zip(lower[:3], lower[3:], strict=True)]
    yield "family", f"best losses are {min(lower):.2f} to {max(lower):.2f} lower"
    drifts = {of["scale"]: signed(of["drift"]) for of in stored("family", "widths")["scales"]}
    mup, spectral, rms = (drifts[name] for name in ("mup", "spectral", "match_rms_adamw"))
    yield "family", f"by {mup} powers of two for each doubling of the width under `mup`, {spectral}"
    yield "family", f"and {rms} under `match_rms_adamw`"

    order = ("adamw", "muon_frozen1d", "muon_adamw", "muonclip")
    tuned_losses = fine_tuned("controlled", "controlled", order)
    hybrid, base = tuned_losses["muon_adamw"], tuned_losses["adamw"]
    below = gap(base, hybrid).replace("+", "").replace(" [", " nats [")
    p = holm([p_of(tuned_losses[arm], base) for arm in order[1:]])[1]
    yield "", f"held-out loss {below} below AdamW, each at its best of swept rates (p = {p:.2f}"
    deviation = np.std([hybrid[s] - base[s] for s in base], ddof=1)
    yield "finetune", f"{deviation:.3f} nats, one of {found_by(hybrid, base):.3f} in 80 %"
    groups = stored("finetune", "controlled")["groups"]
    (logit,) = (g["max_logit"] for g in groups if g["arm"] == "muonclip")
    threshold = stored("finetune", "controlled", "config")["optimizer"]["clip_threshold"]
    yield "finetune", f"largest logit {logit:.1f}, threshold {threshold:.0f}"
    assert max(abs(tuned_losses["muonclip"][s] - hybrid[s]) for s in hybrid) < 1e-3
    sides = [fine_tuned("mismatch", side, order) for side in ("AdamW base", "Muon base")]
    first, second = (gap(of["muon_adamw"], of["adamw"]) for of in sides)
    yield "finetune", f"{first} from AdamW's base, {second} from Muon's"
    six = [p_of(of[arm], of["adamw"]) for of in sides for arm in order[1:]]
    crossed = [
        [{s: of[arm][s] - of["adamw"][s] for s in of[arm]} for of in sides] for arm in order[1:]
    ]
    three = [p_of(*pair) for pair in crossed]
    yield "finetune", f"ends lower (p = {holm(six)[0]:.2f} after Holm for the six"
    yield "finetune", f"(p = {holm(three)[0]:.2f} after Holm for three)"
    yield "finetune", f"over all nine together the first p is {holm([*six, *three])[0]:.3f}"
    once = stored("finetune", "qk", "config")["clips"]["QK-norm, W_q and W_k clipped"]
    assert f"{once['before']:.2f}" == f"{once['after']:.2f}"
    qk = {g["variant"]: g["losses_by_seed"] for g in stored("finetune", "qk")["groups"]}
    worse = gap(qk["QK-norm, W_q and W_k clipped"], qk["QK-norm, no clip"])
    yield "finetune", f"{once['before']:.2f} before and after; trained with it {worse}"

    removed = {of["name"]: of["mean"] for of in stored("finetune", "as_published")["contrasts"]}
    clip, frozen, hybrid = (
        f"{name} without" for name in ("MuonClip", "Muon, gains frozen", "Muon + AdamW")
    )
    yield "finetune", f"MuonClip is {removed[f'{clip} scale_in_root']:.3f} worse, without"
    yield "finetune", f"helps MuonClip by {removed[f'{clip} muon_of_tables']:.3f} and harms"
    better = [removed[f"{name} spectral_scale"] for name in (frozen, hybrid)]
    better += [removed[f"{name} muon_of_tables"] for name in (frozen, hybrid)]
    assert {round(-x, 2) for x in better} == {0.06}
    for claim in stored("finetune", "controlled")["claims"]:
        yield from (("finetune", text) for text in POINTS.findall(claim["measured"]))

    every = arms("pretrain", "optimizers")
    losses = {name: arm["losses_by_seed"] for name, arm in every.items()}
    below = [spans([-x for x in fresh_gains(name, "muon")], ".3f") for name in ("seeds", "dense")]
    for lead, text in zip(
        below, ("final loss {} below AdamW", "the lead is similar, {}"), strict=True
    ):
        yield "", text.format(lead.replace(" [", " nats ["))
    tokens, flops = map(interval, shares_to_adamw("seeds", "muon"))
    yield "", f"AdamW's final loss with {tokens} of its tokens and {flops} of its FLOPs"
    yield (
        "pretrain",
        f"find a difference of {found_by(losses['muon'], losses['adamw']):.2f} in 80 %",
    )
    forms = {"model": "needs {:.2f} of its model FLOPs (fit", "model_and_update": "or {:.2f} (fit"}
    for key, text in forms.items():
        (fit,) = stored("pretrain", "scaling")["fits"][key]["ratios"]
        ends = (*fit["interval"], *by_seed(key == "model_and_update"))
        told = "[{:.2f}, {:.2f}], seeds [{:.2f}, {:.2f}]".format(*ends)
        yield "pretrain", f"{text.format(fit['value'])} {told}"
    shares = [
        100 * arm["cost"]["optimizer_flops"] / arm["cost"]["model_flops"]
        for arm in stored("pretrain", "scaling")["arms"]
        if arm["optimizer"] == "muon"
    ]
    yield "pretrain", f"{min(shares):.0f} to {max(shares):.0f} % of the model's"
    speeds = stored("bench", "")["speed"]
    for ours, theirs in (
        ("float32", "optax.contrib"),
        ("bfloat16", "optax.contrib"),
        ("bfloat16", "torch.optim"),
    ):
        of = next(row["speedup"][theirs] for row in speeds if row["arm"] == f"muon_jax {ours}")
        digits = 2 if theirs == "torch.optim" else 1
        median, low, high = (f"{of[key]:.{digits}f}" for key in ("median", "min", "max"))
        yield "", f"| {median} ({low} to {high}) |"


def found_by(ours, theirs):
    """The difference that so many seeds, which deviate as these do, show in 80 % of studies."""
    gaps = [ours[seed] - theirs[seed] for seed in ours]
    return math.log(detectable(np.std(gaps, ddof=1), len(gaps)))


def by_seed(with_update):
    """Muon's compute over AdamW's at AdamW's lowest loss, a fit for each seed: the interval."""
    every = stored("pretrain", "scaling")["arms"]
    lowest = min(arm["validation_loss"] for arm in every if arm["optimizer"] == "adamw")
    ratios = []
    for seed in every[0]["losses_by_seed"]:
        needed = {}
        for name in ("adamw", "muon"):
            own = [arm for arm in every if arm["optimizer"] == name]
            steps = [arm["tokens"] / arm["tokens_per_step"] for arm in own]
            flops = [
                a["cost"]["model_flops"] + with_update * a["cost"]["optimizer_flops"] for a in own
            ]
            losses = np.log([arm["losses_by_seed"][seed] for arm in own])
            slope, level = np.polyfit(np.log(np.multiply(steps, flops)), losses, 1)
            needed[name] = (math.log(lowest) - level) / slope
        ratios.append(needed["muon"] - needed["adamw"])
    return np.exp(stats.t.interval(0.95, len(ratios) - 1, np.mean(ratios), stats.sem(ratios)))


TASKS = ("add", "sub", "mul", "div", "exp", "gcd", "parity")


def power(shift, deviation, n):
    """Of the two-sided paired t test at p < 0.05."""
    critical = stats.t.ppf(0.975, n - 1)
    moved = shift / deviation * math.sqrt(n)
    return stats.nct.sf(critical, n - 1, moved) + stats.nct.cdf(-critical, n - 1, moved)


def detectable(deviation, n):
    """By halving."""
    low, high = 0.0, 5.0
    for _ in range(60):
        half = (low + high) / 2
        low, high = (half, high) if power(half, deviation, n) < 0.8 else (low, half)
    return math.exp(high)


NUMBER = r"[+−]?\d+\.\d+"
POINTS = re.compile(rf"{NUMBER} points \[{NUMBER}, {NUMBER}\]")
INTERVAL = re.compile(rf"({NUMBER}) ?(?:nats |points |\(fit )?\[({NUMBER}), ({NUMBER})\]")


def of_root():
    """Of the first table, about grokking."""
    told = [f"≥ {interval(by_task('paper'))}"]
    told.append(f"≥ {interval(by_task('paper', value=lambda r: r[MEMORISED]))}")
    told.append(interval(delays_by_task("paper")))
    (*_, strict), (*_, muon) = (counts("paper", optimizer=o) for o in ARMS)
    told.append(f"AdamW {strict} of the 51 that generalised, Muon {muon} of 55")
    told.append(f"{interval(logs('width', *pair_at('width', 'width', 32)))} of Muon's epochs")
    epochs, flops = ([row[i] for row in fresh()[:2]] for i in (3, 4))
    told.append(f"division, {flops[0]}, and not established for multiplication, {flops[1]}")
    (muon, adamw), (more, fewer) = (
        sorted({cost(row) for row in cells(f"fresh_{task}")}, reverse=True)
        for task in ("division", "multiplication")
    )
    told.append(f"takes {muon / adamw:.2f} and {more / fewer:.2f} times the FLOPs of an AdamW step")
    (parameters,) = {row["parameters"] for row in cells("paper") if row["task"] != "parity"}
    told.append(f"two layers, {parameters / 1e6:.2f} M parameters")
    return ("", told + [" and ".join(epochs)])


@functools.cache
def sentences():
    root, told = of_root()
    own = {"grok": of_grok(), "family": claims_of_family(), root: told}
    own["pretrain"] = claims_of_pretrain()
    return [*of_others(), *((study, x) for study, texts in own.items() for x in texts)]


@functools.cache
def intervals():
    """Every one that the tables or the sentences have."""
    texts = [cell for rows in TABLES.values() for row in rows() for cell in row if cell]
    texts += [text for _, text in sentences()]
    return {found for text in texts for found in INTERVAL.findall(text)}


def text_of(study):
    path = STUDIES / study / "README.md" if study else ROOT / "README.md"
    return " ".join(path.read_text(encoding="utf-8").split())


@pytest.mark.parametrize("study", ["", "grok", "family", "pretrain", "finetune"])
def test_sentences_have_the_numbers_of_the_rows(study):
    told = [" ".join(sentence.split()) for name, sentence in sentences() if name == study]
    assert told and not [sentence for sentence in told if sentence not in text_of(study)]


@pytest.mark.parametrize("study", ["", "grok", "family", "pretrain", "finetune"])
def test_every_interval_is_one_of_the_rows(study):
    """Wherever a ratio or a difference is told with its interval, all three numbers are right."""
    shown = set(INTERVAL.findall(text_of(study)))
    assert shown and shown <= intervals()
