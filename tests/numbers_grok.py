"""The numbers of the grokking study's README, recomputed from its stored rows."""

import math

import numpy as np
from stored_rows import interval, stored

GROK = ("default", "paper", "paper_dropout", "parity", "rates", "tuned", "critics", "width")
GROK += ("batch", "rank", "width_batch")
HELD, MEMORISED = "grok_epoch_sustained", "memorized_epoch"
ARMS = ("adamw", "muon")
OTHERS = ("sgd", "lion", "only")
TASKS = ("add", "sub", "mul", "div", "exp", "gcd", "parity")
FRESH = {"division": "fresh_division", "multiplication": "fresh_multiplication"}


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


def judged(slow, fast, first=3):
    """Ratios over the seeds that did not choose the settings."""
    own = [[row for row in rows if row["seed"] >= first] for rows in (slow, fast)]
    pairs = list(zip(*own, strict=True))
    assert all(a["seed"] == b["seed"] for a, b in pairs)
    assert len(pairs) == {3: 10, 1: 5}[first]

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
    found = [[task, *judged(*pair)] for task, pair in both.items()]
    narrow = cells("fresh_64", optimizer="adamw")
    for rate, decay in ((0.08, 0.3), (0.02, 1)):
        point = f"muon.learning-rate={rate} muon.weight-decay={decay}"
        pair = narrow, cells("fresh_64", point=point)
        found.append([f"division, width 64, Muon at {rate} × {decay}", *judged(*pair, first=1)])
    return found


def pair_at(name, setting, value):
    """AdamW's trainings and Muon's, those that the budget cut off from the longer runs."""
    both = [cells(name, point=f"{setting}={value}", optimizer=o) for o in ("adamw", "muon")]
    if (name, value) == ("width", 32):
        return [both[0], cells("width_32")]
    if name == "batch" and value in (1024, 2048):
        at = {"point": f"batch={value}"}
        return [cells("batch_steps", optimizer=o, **at) for o in ("adamw", "muon")]
    return both


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
}
