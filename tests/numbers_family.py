"""The numbers of the family study's README, recomputed from its stored rows."""

import functools

import numpy as np
from stored_rows import arms, found_by, gap, holm, p_of, signed, small, spread, stored


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
        assert arm["at_edge"] == name.endswith("long")  # of one rate
        told = ["", ""] if own == "muon" else [gap(losses, base), small(p[own])]
        found.append([f"{arm['best_rate']:g}", spread(losses), *told])
    return found


def late_rates():
    """At 900 steps: seed 0's losses by ascending rate, then as `beside_muon`."""
    losses = [arm["losses_by_rate"] for arm in arms("family", "long_rates").values()]
    tried = [", ".join(f"{own[rate]:.3f}" for rate in sorted(own, key=float)) for own in losses]
    same = arms("family", "long")["muon"]["losses_by_seed"]  # of the same training
    assert arms("family", "long_rates")["muon"]["losses_by_seed"] == same
    return [[x, *row] for x, row in zip(tried, beside_muon("long_rates"), strict=True)]


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


def claims_of_family():
    """The measured cells of its table of claims: differences to Muon's loss, and p after Holm."""
    loss, p = {}, {}
    for file in ("default", "norms", "long", "long_rates", "rest_leaders", "narrow"):
        every = {name: arm["losses_by_seed"] for name, arm in arms("family", file).items()}
        others = [name for name in every if name != "muon"]
        found = holm([p_of(every[name], every["muon"]) for name in others])
        loss[file], p[file] = every, dict(zip(others, found, strict=True))

    def minus(file, name, base="muon"):
        return gap(loss[file][name], loss[file][base])

    assert [len(p[file]) for file in p] == [18, 17, 6, 3, 4, 4]
    rest = {name: arm["losses_by_seed"] for name, arm in arms("family", "rest").items()}
    apart = gap(rest["muon_rest"], rest["adamw_rest"])
    lead = f"{minus('norms', 'muon', 'adamw')}, p {small(p['norms']['adamw'])}"
    slim = f"{minus('narrow', 'muon', 'adamw')}, p {small(p['narrow']['adamw'])}"
    yield f"minus AdamW's {lead}; rest swept {apart}; at width 64 {slim} |"
    lead = minus("long", "muon", "adamw")
    yield f"in 900 steps {lead}, p = {small(p['long']['adamw'])}"
    for name in ("normuon", "muon_squared", "muon_eq", "aurora", "soap_muon"):
        files = [file for file in ("norms", "rest_leaders") if name in loss[file]]
        told = [f"{minus(file, name)}, p = {small(p[file][name])}" for file in files]
        slim = f"; at width 64 {minus('narrow', name)}" if name in loss["narrow"] else ""
        late = f", rate swept {minus('long_rates', name)}" if name in loss["long_rates"] else ""
        yield f"| {'; rest swept '.join(told)}; in 900 {minus('long', name)}{late}{slim} |"
    assert {small(p["narrow"][name]) for name in ("muon_squared", "muon_eq", "aurora")} == {"0.001"}
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


def sentences():
    """Of this README and of the root's, by the study's name or an empty one."""
    yield from (("family", text) for text in claims_of_family())
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
    yield "family", f"Muon's loss changes by {gap(rest['muon_rest'], new['muon'])} from"
    yield "family", f"changes by {gap(rest['adamw_rest'], new['adamw'])} from that with a"
    told, ahead = gap(rest["muon_rest"], rest["adamw_rest"]), mean["adamw"] - mean["muon"]
    yield "family", f"falls from {ahead:.3f} to {told[1:6]}: {told}"
    fair = {name: arm["validation_loss"] for name, arm in arms("family", "rest_leaders").items()}
    assert [*fair] == ["aurora", "muon_eq", "muon_squared", "soap_muon", "muon"]
    gone = [1 - (fair["muon"] - fair[of]) / (mean["muon"] - mean[of]) for of in four]
    least, most = 100 * min(gone), 100 * max(gone)
    yield "family", f"lead, by {fair['muon'] - fair['aurora']:.3f} nats at most: the better rate"
    yield "family", f"the better rate takes {least:.0f} to {most:.0f} % of the leads above"
    slim = {name: arm["validation_loss"] for name, arm in arms("family", "narrow").items()}
    yield "family", f"is smaller, {slim['adamw'] - slim['muon']:.3f} against {ahead:.3f}"
    few = [slim["muon"] - slim[name] for name in ("aurora", "muon_squared")]
    assert [*slim].index("muon") == 3
    yield (
        "",
        "At width 64 three of them lead again, by {:.3f} to {:.3f} nats (5 seeds)".format(*few),
    )
    late = {name: arm["losses_by_seed"] for name, arm in arms("family", "long_rates").items()}
    seen = [f"{found_by(late[name], late['muon']):.2f}" for name in ("muon_eq", "muon_squared")]
    yield "family", "Muon of {} (MuonEq) and {} nats (Muon²), before Holm".format(*seen)
    far = [min(arm["losses_by_rate"].values()) for arm in arms("family", "long_rates").values()]
    kept = [arms("family", "long")[name]["losses_by_seed"]["0"] for name in late]
    yield "family", f"cost at most {max(np.subtract(kept, far)):.3f} nats on seed 0"
    late = [arms("family", of)["muon"]["losses_by_seed"] for of in ("rest_long", "long")]
    yield "family", f"Muon is {gap(*late)} to itself beside 0.006"
    (own,) = arms("family", "rest_hidden").values()
    yield "family", f"(0.012 by seed 0) gains AdamW nothing more: {spread(own['losses_by_seed'])}"
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


TABLES = {
    ("family", "The family study", 0): family,
    ("family", "The variants of 2026", 0): functools.partial(beside_muon, "norms"),
    ("family", "The variants of 2026", 1): functools.partial(beside_muon, "long"),
    ("family", "The variants of 2026", 2): late_rates,
    ("family", "AdamW's rate for the rest", 0): beside,
    ("family", "AdamW's rate for the rest", 1): functools.partial(beside_muon, "rest_leaders"),
    ("family", "AdamW's rate for the rest", 2): functools.partial(beside_muon, "rest_long"),
    ("family", "A narrower model", 0): functools.partial(beside_muon, "narrow"),
    ("family", "What an update costs", 0): updates,
    ("family", "Rates and width", 1): widths,
}
