"""The numbers of the family study's README, recomputed from its stored rows."""

import functools

import numpy as np
from stored_rows import arms, found_by, gap, holm, p_of, signed, small, spread, stored

# Every optimizer, 5 seeds: the study's two widths in 300 steps, and the narrower one in 900.
WHOLE = ("default", "narrow", "narrow_long")


@functools.cache
def losses_of(name):
    """By optimizer, the lowest mean first, its losses by seed."""
    return {of: arm["losses_by_seed"] for of, arm in arms("family", name).items()}


@functools.cache
def p_beside_muon(name):
    """By optimizer, p of the difference to Muon after Holm over all others."""
    every = losses_of(name)
    others = [own for own in every if own != "muon"]
    corrected = holm([p_of(every[own], every["muon"]) for own in others])
    return dict(zip(others, corrected, strict=True))


def minus(name, optimizer, base="muon"):
    return gap(losses_of(name)[optimizer], losses_of(name)[base])


def marked(name, optimizer):
    """A difference to Muon, with a star where p is below 0.05 after Holm; "" if there is none."""
    if optimizer == "muon" or optimizer not in losses_of(name):
        return ""
    return minus(name, optimizer) + " ∗" * bool(p_beside_muon(name)[optimizer] < 0.05)


def family():
    found = []
    for name, arm in arms("family", "default").items():
        rates = arm["losses_by_rate"]
        assert min(rates, key=rates.get) == f"{arm['best_rate']:g}"
        row = [f"{arm['best_rate']:g}", spread(arm["losses_by_seed"])]
        found.append([*row, *(marked(of, name) for of in WHOLE)])
    return found


def beside_muon(name):
    """Of each optimizer but Muon: its loss minus Muon's, and p after Holm."""
    found = []
    for own, arm in arms("family", name).items():
        assert arm["at_edge"] == name.endswith("long")  # of one rate
        told = ["", ""] if own == "muon" else [minus(name, own), small(p_beside_muon(name)[own])]
        found.append([f"{arm['best_rate']:g}", spread(arm["losses_by_seed"]), *told])
    return found


def late_rates():
    """At 900 steps: seed 0's losses by ascending rate, then as `beside_muon`."""
    losses = [arm["losses_by_rate"] for arm in arms("family", "long_rates").values()]
    tried = [", ".join(f"{own[rate]:.3f}" for rate in sorted(own, key=float)) for own in losses]
    same = arms("family", "long")["muon"]["losses_by_seed"]  # of the same training
    assert arms("family", "long_rates")["muon"]["losses_by_seed"] == same
    return [[x, *row] for x, row in zip(tried, beside_muon("long_rates"), strict=True)]


def rest():
    """Muon and AdamW with one rate for all other leaves, and with AdamW's rate for them swept."""
    found = []
    for name in WHOLE:
        every, row = arms("family", name), []
        for own in ("muon", "adamw"):
            swept = every[f"{own}_rest"]
            row += [spread(losses_of(name)[own]), f"{swept['best_rate']:g}"]
            row.append(spread(swept["losses_by_seed"]))
        found.append([*row, minus(name, "muon", "adamw"), minus(name, "muon_rest", "adamw_rest")])
    return found


COSTLY = ("adamw", "dion2", "dion", "muon", "muonh", "muon_eq", "normuon", "muon_squared")
COSTLY += ("aurora", "muon_int8", "muon_int4", "spel", "soap_muon", "splus", "low_rank", "polar")


def updates():
    """The quickest first."""
    costs = sorted(
        (arms("family", "default")[name]["update"] for name in COSTLY),
        key=lambda cost: cost["milliseconds"],
    )
    return [
        [f"{cost['times_baseline']:.1f}"]
        + [f"{cost[name] / 1e6:.0f}" for name in ("flops", "decomposition_flops")]
        + [f"{cost['state_bytes_per_parameter']:.2f}"]
        for cost in costs
    ]


def transfer(name="transfer"):
    """By the shape scale, of `mup` and of the hyperball; best rates are bold in the README."""
    return {of["scale"]: of for of in stored("family", name)["scales"]}


def sized(name, *sizes):
    """The losses by ascending rate, of both scales, a row for each width or depth."""
    both = [transfer(name)[scale]["arms"] for scale in ("mup", "hyperball")]
    losses = [[arms[size]["losses_by_rate"].values() for arms in both] for size in sizes]
    return [[", ".join(f"{loss:.3f}" for loss in own) for own in row] for row in losses]


def widths():
    return sized("transfer", "32", "64", "128")


def depths():
    return sized("depths", "1", "2", "4")


def measured(*names, base="muon"):
    """The cell of a claim: the differences in the runs that have the optimizers."""
    found = []
    for run, where in zip(WHOLE, ("", "; at width 64 ", "; there in 900 steps "), strict=True):
        if losses_of(run).keys() >= {*names}:
            told = [marked(run, o) if base == "muon" else minus(run, o, base) for o in names]
            found.append(where + ", ".join(told))
    return "".join(found)


def claims_of_family():
    """The measured cells of its table of claims."""
    yield f"minus AdamW's {measured('muon', base='adamw')}; "
    leads = [minus(of, "muon_rest", "adamw_rest") for of in WHOLE]
    yield "AdamW's rate for the rest swept {}; {}; {} |".format(*leads)
    yield f"at width 128 in 900 steps {minus('long', 'muon', 'adamw')} (`long`, 3 seeds) |"
    for names in (
        ("normuon",), ("muon_squared",), ("muon_eq",), ("aurora",), ("soap_muon",), ("muon_plus",),
        ("namo", "polargrad"), ("muonh", "muon_sphere", "spel"), ("muown",), ("dion2", "dion3"),
        ("dion",), ("adamuon",), ("muonbp",), ("scion",), ("muon_cautious",), ("muon_split",),
        ("muon_bf16", "muon_int8"), ("polar",),
    ):  # fmt: skip
        yield f"| {measured(*names)} |"
    for name in ("splus", "soap"):
        yield f"| minus AdamW's {measured(name, base='adamw')} |"
    same = ("muon_bf16", "muon_int8", "polar")
    seen = [found_by(losses_of(of)[o], losses_of(of)["muon"]) for of in WHOLE[:2] for o in same]
    yield f"of {min(seen):.3f} to {max(seen):.3f} nats"


LEADERS = ("soap_muon", "muon_squared", "aurora", "muon_eq", "normuon")


def below(name, optimizer, base):
    """How far an optimizer ends below another, as "0.251 nats [0.218, 0.284]"."""
    return minus(name, base, optimizer).replace("+", "").replace(" [", " nats [")


def leads(name, *optimizers):
    """By how much they end below Muon, from the least to the most."""
    of = losses_of(name)
    found = [np.mean([*of["muon"].values()]) - np.mean([*of[o].values()]) for o in optimizers]
    return f"{min(found):.3f} to {max(found):.3f}"


def of_leaders():
    """Of the variants that end below Muon, and of what costs nothing."""
    for name in WHOLE[:2]:  # these lead, and no others do
        p = p_beside_muon(name)
        ahead = {o for o in p if p[o] < 0.05 and minus(name, o)[0] == "−"}
        assert ahead == {*LEADERS, "muon_rest"}
        same = (
            "muon_bf16",
            "muon_int8",
            "polar",
            "muonclip",
            "muon_split",
            "muon_plus",
            "muon_sgd",
        )
        assert all(p[o] > 0.3 for o in same)
    yield (
        "family",
        f"by {leads('default', *LEADERS)} nats at width 128 and {leads('narrow', *LEADERS)} at 64",
    )
    late = [p_beside_muon("narrow_long")[o] for o in LEADERS]
    told = f"at width 64 are {leads('narrow_long', *LEADERS)} nats and no longer certain"
    yield "family", f"{told} (p {min(late):.2f} to {max(late):.2f} after Holm)"
    soap = [minus(of, "soap") for of in WHOLE[1:]]
    yield "family", "SOAP, {} to Muon in 300 steps, is among them with {}".format(*soap)
    ratios = [
        float(minus("narrow_long", *pair)[1:6]) / float(minus("narrow", *pair)[1:6])
        for pair in (("muon", "adamw"), ("muon_rest", "adamw_rest"))
    ]
    yield "family", "shrinks to {:.1f} of that in 300 steps, and to {:.1f} with".format(*ratios)
    rates = [{o: arm["best_rate"] for o, arm in arms("family", of).items()} for of in WHOLE[1:]]
    assert all(rates[1][o] == rates[0][o] / 2 for o in ("muon", "muon_plus", "muonh", "namo"))
    assert rates[1]["adamw"] == 2 * rates[0]["adamw"]
    yield "family", f"by {below('default', 'muon', 'adamw')}, at width 64 by"
    yield "family", f"{below('narrow', 'muon', 'adamw')} and there in 900 steps by"
    yield "family", f"900 steps by {below('narrow_long', 'muon', 'adamw')}; with"
    swept = [below(of, "muon_rest", "adamw_rest") for of in WHOLE]
    yield "family", "in both, by {}, {} and {}".format(*swept)
    yield "family", f"Lion there costs {below('default', 'muon', 'muon_lion')}"
    bound = [[float(minus(of, o)[1:6]) for o in ("muonh", "spel")] for of in WHOLE[::2]]
    yield "family", "cost** {:.2f} (MuonH) to {:.2f} nats (SPEL)".format(*bound[0])
    yield "family", "and {:.2f} to {:.2f} in 900 at width 64".format(*bound[1])
    yield "family", f"int4, half a byte an entry, costs {below('default', 'muon', 'muon_int4')}"
    muon, adamw = ([below(of, f"{own}_rest", own) for of in WHOLE] for own in ("muon", "adamw"))
    yield "family", f"sweeping it gains Muon {muon[0]}, more than any variant, and AdamW {adamw[0]}"
    yield "family", f"{muon[1]} and {adamw[1]}, and in 900 steps {muon[2]} and {adamw[2]}."


def of_root():
    """Of the root README."""
    yield f"end {leads('default', *LEADERS)} nats below Muon, each at its best rate"
    yield f"(p ≤ {max(p_beside_muon('default')[o] for o in LEADERS):.3f}, 37 comparisons)"
    yield f"at width 64 {leads('narrow', *LEADERS)}"
    yield f"Muon ends {below('default', 'muon', 'adamw')} below AdamW"
    late = [p_beside_muon("narrow_long")[o] for o in LEADERS]
    told = f"are {leads('narrow_long', *LEADERS)} nats at width 64, no longer certain"
    yield f"{told} (p {min(late):.2f} to {max(late):.2f})"
    ahead = [minus(of, "muon", "adamw")[1:6] for of in WHOLE[1:]]
    yield "Muon's over AdamW falls from {} to {}".format(*ahead)
    gained = [minus(of, "muon_rest")[1:6] for of in ("default", "narrow_long")]
    yield "in 300 steps that gained more here, {} nats, than any variant; in 900 steps".format(
        *gained
    )
    yield f"it gained {gained[1]} at width 64 and nothing at 128"
    yield f"Muon's lead is {below('default', 'muon_rest', 'adamw_rest')}"
    fair = losses_of("rest_leaders")
    most = np.mean([*fair["muon"].values()]) - np.mean([*fair[next(iter(fair))].values()])
    yield f"no variant's over Muon is above {most:.3f}"
    pair = minus("default", "muon_eq"), minus("rest_leaders", "muon_eq")
    yield "({} to Muon's, {} with that rate swept".format(*pair)


def sentences():
    """Of this README and of the root's, by the study's name or an empty one."""
    yield from (("family", text) for text in claims_of_family())
    yield from of_leaders()
    yield from (("", text) for text in of_root())
    fair, new = losses_of("rest_leaders"), losses_of("default")
    assert [*fair] == ["aurora", "muon_eq", "muon_squared", "soap_muon", "muon"]
    lead = [
        {o: np.mean([*of["muon"].values()]) - np.mean([*of[o].values()]) for o in LEADERS[:4]}
        for of in (fair, new)
    ]
    gone = [100 * (1 - lead[0][o] / lead[1][o]) for o in LEADERS[:4]]
    yield "family", f"lead, by {lead[0]['aurora']:.3f} nats at most: the better rate"
    yield "family", f"the better rate takes {min(gone):.0f} to {max(gone):.0f} % of the leads above"
    late = losses_of("long_rates")
    seen = [f"{found_by(late[name], late['muon']):.2f}" for name in ("muon_eq", "muon_squared")]
    yield "family", "Muon of {} (MuonEq) and {} nats (Muon²), before Holm".format(*seen)
    far = [min(arm["losses_by_rate"].values()) for arm in arms("family", "long_rates").values()]
    kept = [losses_of("long")[name]["0"] for name in late]
    yield "family", f"cost at most {max(np.subtract(kept, far)):.3f} nats on seed 0"
    late = [losses_of(of)["muon"] for of in ("rest_long", "long")]
    yield "family", f"Muon is {gap(*late)} to itself beside 0.006"
    (own,) = losses_of("rest_hidden").values()
    yield "family", f"0.012 beside 0.048 gives {spread(own)}"
    mup, ball = (transfer()[scale] for scale in ("mup", "hyperball"))
    moves = [of["drift_by_seed"] for of in (mup, ball)]
    zero = dict.fromkeys(moves[0], 0.0)
    own, other, apart = (
        gap(*pair, 2) for pair in ((moves[0], zero), (moves[1], zero), moves[::-1])
    )
    yield "family", f"moves by {own} powers of two for a doubling of the width under `mup`"
    yield "family", f"by {other} on the hyperball, a difference of {apart}"
    moves = [transfer("depths")[scale]["drift_by_seed"] for scale in ("mup", "hyperball")]
    own, other, apart = (
        gap(*pair, 2) for pair in ((moves[0], zero), (moves[1], zero), moves[::-1])
    )
    yield (
        "family",
        f"by {own} for a doubling of the depth under `mup`, and by {other} on the hyperball",
    )
    yield "family", f"a difference of {apart}"
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
    ("family", "Longer trainings", 0): functools.partial(beside_muon, "long"),
    ("family", "Longer trainings", 1): late_rates,
    ("family", "AdamW's rate for the rest", 0): rest,
    ("family", "AdamW's rate for the rest", 1): functools.partial(beside_muon, "rest_leaders"),
    ("family", "AdamW's rate for the rest", 2): functools.partial(beside_muon, "rest_long"),
    ("family", "What an update costs", 0): updates,
    ("family", "Rates, width and depth", 1): widths,
    ("family", "Rates, width and depth", 2): depths,
}
