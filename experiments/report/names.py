"""The names and the colours under which reports show optimizers."""

import zlib
from typing import Any

# The label and the colour of every optimizer. The first two colours are Okabe and Ito's; each later
# one has the largest CIELAB distance from white and all earlier ones, so early ones are most
# distinct. The colours of the last two are those of names that are not listed.
_SHOWN = {
    "adamw": ("AdamW", "#0072B2"),
    "muon": ("Muon", "#D55E00"),
    "muon_equal_shrink": ("Muon, equal lr × decay", "#00CC00"),
    "muon_equal_decay": ("Muon, equal decay", "#FF00AA"),
    "polar": ("Exact polar", "#EE1177"),
    "orthogonal": ("Orthogonal alone", "#224400"),
    "spectral": ("Spectral alone", "#662233"),
    "normuon": ("NorMuon", "#11CC99"),
    "low_rank": ("Rank k, SVD", "#550088"),
    "muonclip": ("MuonClip", "#BBBB33"),
    "adamuon": ("AdaMuon", "#DD99FF"),
    "scion": ("Scion", "#FF9999"),
    "splus": ("SPlus", "#FF1155"),
    "dion": ("Dion", "#DD33FF"),
    "adamw_tuned": ("AdamW, 0.01 × 4", "#888877"),
    "orthogonal_gradient": ("⊥Grad", "#0077FF"),
    "grokfast": ("Grokfast", "#33BBCC"),
    "muon_one_step": ("Muon, 1 step", "#886611"),
    "gluon": ("Gluon", "#228811"),
    "muonbp": ("MuonBP", "#004444"),
    "muon_sgd": ("Muon + SGD", "#FF0000"),
    "muon_lion": ("Muon + Lion", "#992277"),
    "muon_only": ("Muon alone", "#880000"),
    "optax_muon": ("optax.contrib.muon", "#CCAACC"),
    "low_rank_subspace": ("Rank k, subspace", "#6644EE"),
    "low_rank_whole": ("Rank k, whole norm", "#667788"),
    "muon_split": ("Muon, heads split", "#55AA33"),
    "adamw_fixed_table": ("AdamW, fixed table", "#AA8855"),
    "muon_fixed_table": ("Muon, fixed table", "#CC88AA"),
    "splus_adamw": ("SPlus + AdamW", "#443366"),
    "muon_cautious": ("Muon, cautious", "#99BB77"),
    "muon_bf16": ("Muon, bf16 state", "#FF77BB"),
    "muon_int8": ("Muon, int8 state", "#DD9900"),
    "muonh": ("MuonH", "#110011"),
    "muown": ("Muown", "#EEBB77"),
    "soap": ("SOAP", "#BB3355"),
    "soap_muon": ("SOAP-Muon", "#88DD66"),
    "dion2": ("Dion2", "#007755"),
    "dion3": ("Dion3", "#AADD00"),
    "muon_eq": ("MuonEq", "#332200"),
    "muon_plus": ("Muon+", "#99CCFF"),
    "muon_squared": ("Muon²", "#BB33BB"),
    "namo": ("NAMO", "#BB6644"),
    "aurora": ("Aurora", "#7766BB"),
    "polargrad": ("PolarGrad", "#FF6655"),
    "normuonh": ("NorMuonH", "#AA6677"),
    "muon_sphere": ("MuonSphere", "#00EE88"),
    "spel": ("SPEL", "#667700"),
    "muon_rest": ("Muon, rest swept", "#FFBB99"),
    "muon_int4": ("Muon, int4 state", "#7799EE"),
    "adamw_rest": ("AdamW, rest swept", "#5599AA"),
    "adamw_hidden": ("AdamW, hidden swept", "#BB8899"),
    "muon_adamw": ("Muon + AdamW", "#661100"),
    "muon_frozen1d": ("Muon, gains frozen", "#777777"),
}
# The colours of other names, after Tol's muted scheme.
_OTHERS = ("#332288", "#117733", "#882255", "#999933", "#661100", "#777777")


def optimizer_label(name: str) -> str:
    """Returns an optimizer's display name: "AdamW" for "adamw", "Muon" for "muon"."""
    return _SHOWN[name][0] if name in _SHOWN else name[:1].upper() + name[1:]


def optimizer_color(name: str) -> str:
    """Returns the hex colour of an optimizer, the same in every figure and every run."""
    # crc32 is used, since hash() differs between Python processes.
    other = _OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)]
    return _SHOWN[name][1] if name in _SHOWN else other


def optimizer_style(name: str) -> dict[str, Any]:
    """Returns the style of an optimizer's lines."""
    return {"color": optimizer_color(name)}
