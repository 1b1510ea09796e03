"""Named settings for `--preset NAME`, which explicit options override."""

from collections.abc import Sequence

from experiments.language.data import Data
from experiments.optimizers import AdamW, Muon
from experiments.pretrain.config import Model, PresetName, Training
from experiments.settings import fitting_divisor, given, given_text, replaced, tenth_at_most


def _rated(rate: float) -> dict[str, AdamW | Muon]:
    """Returns both optimizers with the same learning rate, which Muon's shape scale allows."""
    shared = {"learning_rate": rate, "weight_decay": 0.1}
    muon = Muon(**shared, scale="match_rms_adamw", ns_dtype="bfloat16")
    return {"adamw": AdamW(**shared, b2=0.95), "muon": muon}


def _dense(
    layers: int, width: int, hidden: int, tokens: float, rate: float, batch: int
) -> Training:
    """Returns a row of table 2 of Liu et al. (2502.16982), with heads = layers and 8 K context.

    The paper does not give hidden sizes. With those chosen here, the number of parameters without
    embeddings is that of the table within 3 %.
    """
    context = 8192
    return Training(
        model=Model(
            layers=layers,
            dense_layers=layers,
            width=width,
            heads=layers,
            attention="multi-head",
            hidden=hidden,
            remat="full",
        ),
        data=Data(vocabulary=163_840),
        context=context,
        batch=batch,
        steps=round(tokens / (batch * context)),
        warmup=500,
        **_rated(rate),
    )


_MOONLIGHT = Training(
    model=Model(
        layers=27,
        dense_layers=1,
        width=2048,
        heads=16,
        latent=512,
        nope=128,
        rope=64,
        value=128,
        hidden=11_264,
        experts=64,
        active=6,
        shared=2,
        expert_hidden=1408,
        remat="full",
    ),
    data=Data(vocabulary=163_840),
    context=8192,
    batch=2048,
    accumulate=8,
    steps=310_000,
    warmup=2000,
    cooldown=31_000,
    **_rated(4.2e-4),
)

PRESETS: dict[str, Training] = {
    # Learning rates: the best of 2, 4, 8 and 16e-3 on seed 0, first AdamW's, then Muon's beside it.
    "tiny": Training(model=Model(bias_rate=0.02, dtype="float32")),
    "small": Training(
        model=Model(
            layers=8,
            width=384,
            heads=6,
            latent=192,
            nope=64,
            rope=32,
            value=64,
            hidden=1536,
            experts=16,
            active=4,
            shared=1,
            expert_hidden=288,
            bias_rate=5e-3,
        ),
        data=Data(vocabulary=8192),
        context=512,
        batch=32,
        steps=4000,
        warmup=200,
        **_rated(2e-3),
    ),
    "nanogpt-124m": Training(
        model=Model(
            layers=12,
            dense_layers=12,
            width=768,
            heads=12,
            attention="multi-head",
            rope_base=10_000.0,
            hidden=2048,
            tied=True,
        ),
        data=Data(vocabulary=50_304),
        context=1024,
        batch=512,
        accumulate=8,
        steps=10_000,
        warmup=250,
        decay="linear",
        final_lr_fraction=0.0,
        **_rated(1.8e-3),
    ),
    "dense-399m": _dense(12, 1536, 5120, 8.92e9, 9.503e-4, 96),
    "dense-545m": _dense(14, 1792, 4864, 14.04e9, 9.143e-4, 128),
    "dense-822m": _dense(16, 2048, 5632, 20.76e9, 8.825e-4, 160),
    "dense-1.1b": _dense(18, 2304, 5888, 28.54e9, 8.561e-4, 192),
    "dense-1.5b": _dense(20, 2560, 6400, 38.91e9, 8.305e-4, 256),
    "moonlight-16b": _MOONLIGHT,
}


def fitted(default: Training, arguments: Sequence[str]) -> Training:
    """Returns a command's defaults, adjusted to the options that are given.

    Warm-up and cool-down are at most a tenth of the steps, microbatches divide the batch, a dense
    model stays dense, and a token has at most as many experts as there are.
    """
    model = default.model
    layers = given(arguments, "--model.layers", model.layers)
    experts = given(arguments, "--model.experts", model.experts)
    is_dense = model.dense_layers == model.layers
    model = replaced(
        model,
        layers=layers,
        dense_layers=layers if is_dense else min(model.dense_layers, layers),
        experts=experts,
        active=min(model.active, experts),
    )
    steps, batch = (given(arguments, f"--{x}", getattr(default, x)) for x in ("steps", "batch"))
    return replaced(
        default,
        model=model,
        steps=steps,
        warmup=tenth_at_most(steps, default.warmup),
        cooldown=tenth_at_most(steps, default.cooldown),
        batch=batch,
        accumulate=fitting_divisor(default.accumulate, batch),
    )


def preset_of(arguments: Sequence[str]) -> PresetName:
    """Returns the --preset of a command line, or the default one."""
    return given_text(arguments, "--preset", PRESETS) or "tiny"
