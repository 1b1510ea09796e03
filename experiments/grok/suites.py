"""The studies that `--suite NAME` selects. Explicit options override their settings."""

from collections.abc import Sequence

from experiments.grok.config import Config, SuiteName
from experiments.optimizers import ARMS
from experiments.settings import fitting_divisor, given, given_text, replaced

# Muon with its own weight decay, with AdamW's, and with AdamW's learning rate × weight decay.
_DECAYS = ("adamw", "muon", "muon_equal_decay", "muon_equal_shrink")
_PARTS = ("orthogonal", "spectral", "muon_one_step", "polar")
_TUNED = ("adamw_tuned", "orthogonal_gradient", "grokfast")
_FAMILY = tuple(name for name, arm in ARMS.items() if arm.member and name not in ("adamw", "muon"))

SUITES: dict[SuiteName, Config] = {
    # The tasks of Tveit et al., 2504.16041, and subtraction, which is only in the code they cite.
    "paper": Config(
        suite="paper",
        tasks=("add", "sub", "mul", "div", "exp", "gcd", "parity"),
        softmax=("softmax", "stablemax", "sparsemax"),
        optimizers=_DECAYS,
        layers=2,
        heads=1,
        epochs=500,
        probe_every=0,
    ),
    "critics": Config(
        suite="critics",
        optimizers=tuple(dict.fromkeys(["adamw", "muon", *_PARTS, *_TUNED, *_FAMILY])),
        epochs=300,
        full_length=True,
        probe_every=0,
    ),
}

# Essential AI, 2025: division, trained on half of its equations.
_DIVISION = {
    "tasks": ("div",),
    "train_fraction": 0.5,
    "layers": 2,
    "heads": 1,
    "epochs": 400,
    "probe_every": 0,
}
SUITES |= {
    "width": Config(suite="width", grid=("width=32,64,128,256,512",), **_DIVISION),
    "batch": Config(suite="batch", grid=("batch=64,128,256,512,1024,2048,4656",), **_DIVISION),
    "rank": Config(
        suite="rank",
        optimizers=("adamw", "muon", "polar", "low_rank"),
        grid=("variants.rank=1,2,4,8,16,32",),
        **_DIVISION,
    ),
    "rates": Config(
        suite="rates",
        grid=(
            "adamw.learning-rate=0.001,0.002,0.004,0.008,0.016",
            "adamw.weight-decay=0.3,1,3",
            "muon.learning-rate=0.02,0.04,0.08,0.16",
            "muon.weight-decay=0.1,0.3,1",
        ),
        **_DIVISION,
    ),
}


def defaults(arguments: Sequence[str]) -> Config:
    """Returns the defaults of a command line: those of its --suite, with heads that fit --width."""
    suite = given_text(arguments, "--suite", SUITES)
    config = SUITES[suite] if suite else Config()
    # Unless the command line gives --heads, they must divide the width into even parts.
    width = given(arguments, "--width", config.width)
    heads = fitting_divisor(config.heads, width // 2)
    return replaced(config, width=width, heads=heads)
