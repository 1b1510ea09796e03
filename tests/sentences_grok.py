"""The sentences with numbers in the grokking study's README, recomputed from its rows."""

import math

import numpy as np
from numbers_grok import (
    ARMS,
    GROK,
    HELD,
    MEMORISED,
    OTHERS,
    TASKS,
    best_of,
    budget,
    by_task,
    cells,
    cost,
    counts,
    delay,
    delays_by_task,
    fresh,
    logs,
    pair_at,
)
from scipy import stats
from stored_rows import detectable, holm, interval, power, signed, stored


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
    if name == "batch":  # the longer runs in place of those that were cut off
        longer = cells("batch_steps", optimizer=optimizer)
        rows = [row for row in rows if row["point"] not in {of["point"] for of in longer}] + longer
    value = [float(row["point"].removeprefix(f"{setting}=")) for row in rows]
    costs = [unit(row) * (row[HELD] or budget(name)) for row in rows]
    budgets = {round(unit(row), -len(str(int(unit(row)))) + 3) for row in rows}
    if len(budgets) > 1 or name == "batch":
        out = {x for x, row in zip(value, rows, strict=True) if row["censored"]}
        kept = [(x, y) for x, y in zip(value, costs, strict=True) if x not in out]
        value, costs = zip(*kept, strict=True)
    found = stats.spearmanr(value, costs)
    return found.statistic, found.pvalue


def tuned_narrow():
    """Of width 64 with both tuned: the settings that seed 0 tried, and the others' judgement."""
    first = {row["point"]: row[HELD] for row in cells("tuned_64")}
    adamw = [
        first[f"adamw.learning-rate={x} adamw.weight-decay=1"] for x in (0.008, 0.004, 0.002, 0.016)
    ]
    yield "AdamW groks at epoch {} at 0.008 × 1, at {} and {} with half and a quarter".format(
        *adamw
    )
    assert adamw[3] is None and budget("tuned_64") == 200
    muon = sorted(held for point, held in first.items() if point.startswith("muon"))
    yield "Muon groks at {} at 0.08 × 0.3, at {} at 0.02 × 1, and at {} to {} at four".format(
        *muon[:3], muon[-1]
    )
    settings = ("0.08 muon.weight-decay=0.3", "0.02 muon.weight-decay=1")
    points = [f"muon.learning-rate={setting}" for setting in settings]
    assert len(muon) == 6 and [first[point] for point in points] == muon[:2]
    base = cells("fresh_64", optimizer="adamw")
    p, ratios = [], []
    for weight in (lambda row: 1, cost):
        own = [logs("fresh_64", base, cells("fresh_64", point=x), weight=weight) for x in points]
        own = [of[1:] for of in own]  # of seeds 1 to 5
        ratios.append([interval(of) for of in own])
        p.append({f"{x:.2f}" for x in holm([stats.ttest_1samp(of, 0).pvalue for of in own])})
    ((late,), (dear,)) = p
    yield f"ahead of both, {ratios[1][0]} and {ratios[1][1]} (p = {dear} after Holm for both)"
    seen = detectable(
        np.std(logs("fresh_64", base, cells("fresh_64", point=points[0]))[1:], ddof=1), 5
    )
    yield f"distinguishable (p = {late}; five seeds find a ratio of {seen:.2f} in 80 % of studies)"
    yield f"at 64 with both tuned {ratios[0][0]}, FLOPs {ratios[1][0]}, p = {dear} |"


def spikes():
    """Of the gradient norm: how many a training has, and the largest over its running median."""
    for name in ("spikes", "spikes_tuned"):
        others = [row for row in cells(name) if row["optimizer"] not in ARMS]
        rows = {o: cells(name, optimizer=o) for o in ARMS}
        counts = {o: [row["spikes"] for row in own] for o, own in rows.items()}
        many = {o: f"{min(own)} to {max(own)}" for o, own in counts.items()}
        top = {o: f"{max(row['largest_spike'] for row in own):,.0f}" for o, own in rows.items()}
        more = np.subtract(*counts.values())
        low, high = stats.t.interval(0.95, 2, np.mean(more), stats.sem(more))
        yield f"AdamW {many['adamw']}, {np.mean(more):.0f} [{low:.0f}, {high:.0f}] more than Muon"
        if name == "spikes":
            assert not any(row["spikes"] for row in [*rows["muon"], *others]) and len(others) == 6
            yield f"AdamW has {many['adamw']} in 200 epochs, up to {top['adamw']} times the running"
        else:
            yield f"AdamW {many['adamw']} times, up to {top['adamw']} times the median, Muon"
            yield f"Muon {many['muon']} times, up to {top['muon']} times."


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
    yield from spikes()
    yield from tuned_narrow()
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
    told = [f"{epochs[b]:.2f}" for b in (256, 512, 1024, 2048)]
    yield "(p = {}, {}, {} and {} after Holm over the six batches".format(*told)
    told = [f"{flops[b]:.2f}" for b in (1024, 512, 2048)]
    yield "(p = {}; {} at 512 and {} at 2048)".format(*told)
    late, needed = [], {}
    for batch in batches[1:6]:
        late.append(logs("batch", *pair_at("batch", "batch", batch)))
        for optimizer, rows in zip(ARMS, pair_at("batch", "batch", batch), strict=True):
            steps = np.median([row[HELD] * row["steps_per_epoch"] for row in rows])
            needed.setdefault(optimizer, []).append(steps)
    ends = [f"{min(own):,.0f} to {max(own):,.0f}".replace(",", " ") for own in needed.values()]
    yield "the number of steps, {} for AdamW and {} for Muon".format(*ends)
    means = [math.exp(np.mean(own)) for own in late[1:]]
    yield f"it is {min(means):.2f} to {max(means):.2f} from batch 256 to 2048"
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
            yield "in FLOPs ({}, {}), up to batch 2048".format(*found["FLOPs"])
            trend, chance = spearman(name, name, "adamw", units["steps"])
            yield f"(Spearman {signed(trend)}, p = {chance:.2f}) and"
            yield "epochs {}, {}; steps {}, {}; FLOPs {}, {}".format(
                *found["epochs"], *found["steps"], *found["FLOPs"]
            )
            yield f"(p = {spearman(name, name, 'muon', cost)[1]:.2f})"
    own, whole = (cells("rank_norm", optimizer=f"low_rank{of}") for of in ("", "_whole"))
    yield f"rank 16 is later still, {interval(logs('rank_norm', own, whole))},"
    ends = [[f([row[HELD] for row in rows]) for f in (min, max)] for rows in (whole, own)]
    muon = [row[HELD] for row in cells("default", optimizer="muon")]
    yield "at {} to {} epochs and {} to {}, Muon at {} to {}".format(
        *ends[0], *ends[1], min(muon), max(muon)
    )
    ratios = []
    for rank in (8, 32):
        at = {"point": f"variants.rank={rank}"}
        own, whole = (cells("rank_norms", optimizer=f"low_rank{of}", **at) for of in ("", "_whole"))
        ratios.append(interval(logs("rank_norms", own, whole)))
    yield "ranks 8 and 32, {} and {}; on division".format(*ratios)
    own, whole = (cells("rank_norm_division", optimizer=f"low_rank{o}") for o in ("", "_whole"))
    yield f"≤ {interval(logs('rank_norm_division', own, whole))}"
    (first, last), (second, middle), (third, soon) = (
        (a[HELD], b[HELD]) for a, b in zip(own, whole, strict=True)
    )
    assert last is None and budget("rank_norm_division") == 400
    yield f"{middle} and more than 400 epochs where they took {second} and {first}"
    yield f"the third is not, {soon} and {third}"
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
    yield f"{len(every)} rows of {len(digests)} trainings"
    for deviation in (0.15, 0.2):
        ratios = [f"{detectable(deviation, n):.2f}" for n in (3, 5, 10)]
        yield f"| {deviation} | {' | '.join(ratios)} |"
    pair = best_of("rates", 0.004, 1, "adamw"), best_of("rates", 0.08, 0.3, "muon")
    deviation = np.std(logs("rates", *pair, weight=cost), ddof=1)
    chances = [round(100 * power(math.log(1.25), deviation, n)) for n in (3, 10)]
    yield f"the deviation is {deviation:.2f}: three seeds had a chance of {chances[0]} % to"
    yield f"show a true ratio of FLOPs of 1.25, and ten would have {chances[1]} %"
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


def of_root():
    """Of the root README's first table."""
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
    return [*told, " and ".join(epochs)]


def sentences():
    """Of this README and of the root's, by the study's name or an empty one."""
    yield from (("grok", text) for text in of_grok())
    yield from (("", text) for text in of_root())
