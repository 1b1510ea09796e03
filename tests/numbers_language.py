"""The numbers of the pretraining and fine-tuning READMEs, recomputed from their stored rows."""

import functools
import json
import math
import re

import numpy as np
from scipy import stats
from stored_rows import STUDIES, arms, found_by, gap, holm, interval, p_of, signed, spread, stored

NUMBER = r"[+−]?\d+\.\d+"
POINTS = re.compile(rf"{NUMBER} points \[{NUMBER}, {NUMBER}\]")


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


def of_bases(name, key):
    """Losses or rises by seed, of each base and arm."""
    return {
        (group["variant"], group["arm"]): group[key] for group in stored("finetune", name)["groups"]
    }


def forgetting(name):
    found, keys = [], ("losses_by_seed", "pretraining_rise_by_seed")
    losses, rises = (of_bases(name, key) for key in keys)
    rates = of_bases(name, "best_rate")
    for base, arm in losses:
        row = [f"{rates[base, arm]:g}"]
        for by_seed, sign in ((losses, ""), (rises, "+")):
            apart = gap(by_seed[base, arm], by_seed[base, "adamw"]) if arm != "adamw" else ""
            row += [sign + spread(by_seed[base, arm]), apart]
        found.append(row)
    return found


PAIRS = ("mismatch", "bases_1", "bases_2")  # of bases, whose pretrainings have seeds 0 to 2


def each_base(key):
    """Muon + AdamW minus AdamW, of AdamW's and of Muon's base of each pair, where it is known."""
    found = {"AdamW base": {}, "Muon base": {}}
    for name in PAIRS:
        groups = {(g["variant"], g["arm"]): g.get(key) for g in stored("finetune", name)["groups"]}
        for base, own in found.items():
            ours, theirs = (groups[base, arm] for arm in ("muon_adamw", "adamw"))
            if ours:
                own[name] = np.mean([ours[seed] - theirs[seed] for seed in ours])
    first, second = found.values()
    return [first, second, {name: first[name] - second[name] for name in first}]


def three_bases():
    losses, rises = (each_base(key) for key in ("losses_by_seed", "pretraining_rise_by_seed"))
    rows = [[signed(of[name], 3) if name in of else "" for of in losses + rises] for name in PAIRS]
    return [*rows, [spans([*of.values()]) for of in losses] + ["", "", ""]]


def of_three_bases():
    first, second, apart = (spans([*of.values()]) for of in each_base("losses_by_seed"))
    yield f"{first} from AdamW's bases and {second} from Muon's"
    yield f"differ by {apart}"
    counts = [
        n
        for of in PAIRS[1:]
        for own in of_bases(of, "spikes_by_seed").values()
        for n in own.values()
    ]
    assert counts == [0] * 8
    yield "no training of eight has one in 200 steps"
    rates = [of_bases(name, "best_rate") for name in PAIRS[1:]]
    muon, adamw = ([of["AdamW base", arm] for of in rates] for arm in ("muon_adamw", "adamw"))
    yield "higher best rates ({:g} and {:g}; AdamW's are {:g} and {:g})".format(*muon, *adamw)


def of_forgetting():
    rises, losses, rates = (
        of_bases("forgetting", key)
        for key in ("pretraining_rise_by_rate", "losses_by_rate", "best_rate")
    )
    by_seed = of_bases("forgetting", "pretraining_rise_by_seed")
    bases = "AdamW base", "Muon base"
    sides = [[by_seed[base, arm] for arm in ("muon_adamw", "adamw")] for base in bases]
    p = holm([p_of(*side) for side in sides])
    told = [f"{gap(*side)} nats (p = {of:.3f})" for side, of in zip(sides, p, strict=True)]
    yield f"by {told[0]} from AdamW's base and {told[1]} from Muon's"
    yield f"Muon forgets more, {gap(*sides[0])} from AdamW's base, {gap(*sides[1])} from Muon's"
    gaps = [{seed: ours[seed] - theirs[seed] for seed in ours} for ours, theirs in sides]
    yield f"smaller from its own base, by {gap(*gaps)[1:]} (p = {p_of(*gaps):.3f})"
    yield f"find {max(found_by(*side) for side in sides):.3f} nats in 80 %"
    less, more = [], []
    for base in bases:
        ours, theirs = rises[base, "muon_adamw"], rises[base, "adamw"]
        less += [theirs[rate] - ours[rate] for rate in ours if rate in theirs]
        # At Muon's lowest loss, on the line through AdamW's rates up to its best one.
        best = f"{rates[base, 'muon_adamw']:g}"
        line = [rate for rate in theirs if float(rate) <= rates[base, "adamw"]][::-1]
        known = [losses[base, "adamw"][rate] for rate in line], [theirs[rate] for rate in line]
        more.append(ours[best] - np.interp(losses[base, "muon_adamw"][best], *known))
    yield f"less at each of {len(less)} equal rates, by {min(less):.2f} to {max(less):.2f}"
    finals = of_bases("forgetting", "losses_by_seed")
    sides = [[finals[base, arm] for arm in ("muon_adamw", "adamw")] for base in bases]
    gaps = [{seed: ours[seed] - theirs[seed] for seed in ours} for ours, theirs in sides]
    yield f"after 50 steps {gap(*sides[0])} and {gap(*sides[1])}"
    p = holm([p_of(*side) for side in (*sides, gaps)])
    yield f"{gap(*gaps)}, p = {p[2]:.2f} after Holm for three"
    adapted = of_bases("lora", "losses_by_seed")
    pair = [adapted["controlled", arm] for arm in ("muon_adamw", "adamw")]
    yield f"{gap(*pair)}, p = {p_of(*pair):.3f}, after 50 steps at rank 16"
    yield f"three seeds find {found_by(*pair):.3f} nats in 80 %"
    yield "lowest, by {:.2f} and {:.2f} nats".format(*more)


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


def of_pretrain():
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


def of_finetune():
    order = ("adamw", "muon_frozen1d", "muon_adamw", "muonclip")
    tuned_losses = fine_tuned("controlled", "controlled", order)
    hybrid, base = tuned_losses["muon_adamw"], tuned_losses["adamw"]
    below = gap(base, hybrid).replace("+", "").replace(" [", " nats [")
    p = holm([p_of(tuned_losses[arm], base) for arm in order[1:]])[1]
    yield "", f"held-out loss {below} below AdamW, each at its best of swept rates (p = {p:.2f}"
    deviation = np.std([hybrid[s] - base[s] for s in base], ddof=1)
    seen = found_by(hybrid, base)
    yield "finetune", f"{deviation:.3f} nats, so that a difference of {seen:.3f} is found"
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
    digests = json.loads((STUDIES / "finetune" / "rows.json").read_text()).values()
    listed = f"{sum(map(len, digests)) // 8:,}".replace(",", " ")
    yield "finetune", f"({listed} rows from the standard library"
    yield "finetune", f"give the same {listed} rows"
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


def of_speed():
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


def of_root():
    """Of the root README's row on fine-tuning: what is forgotten, and LoRA."""
    rises = of_bases("forgetting", "pretraining_rise_by_seed")
    pairs = [
        [rises[f"{base} base", arm] for arm in ("muon_adamw", "adamw")]
        for base in ("AdamW", "Muon")
    ]
    less = [gap(*pair).replace("+", "") for pair in pairs]
    yield f"(by {less[0].replace(' [', ' nats [')} and {less[1]})"
    adapted = of_bases("lora", "losses_by_seed")
    ahead = gap(*(adapted["controlled", arm] for arm in ("adamw", "muon_adamw"))).replace("+", "")
    yield f"with LoRA Muon is ahead by then ({ahead.replace(' [', ' nats [')})"


def sentences():
    """Of these READMEs and of the root's, by the study's name or an empty one."""
    yield from (("pretrain", text) for text in claims_of_pretrain())
    yield from (("finetune", text) for text in (*of_forgetting(), *of_three_bases()))
    yield from (("", text) for text in of_root())
    yield from (*of_pretrain(), *of_finetune(), *of_speed())


TABLES = {
    ("pretrain", "The default run", 0): pretrain_default,
    ("pretrain", "Optimizers at equal effort", 0): pretrain_optimizers,
    ("pretrain", "Ten seeds, and a dense model beside the mixture", 0): pretrain_seeds,
    ("finetune", "On equal terms", 0): controlled,
    ("finetune", "On equal terms", 1): post_claims,
    ("finetune", "As the code was released", 0): as_released,
    ("finetune", "From models that AdamW and Muon pretrained", 0): bases,
    ("finetune", "Three bases of each kind", 0): three_bases,
    ("finetune", "What fine-tuning forgets", 0): functools.partial(forgetting, "forgetting"),
    ("finetune", "LoRA", 0): functools.partial(forgetting, "lora"),
    ("finetune", "QK-clip", 0): clips,
}
