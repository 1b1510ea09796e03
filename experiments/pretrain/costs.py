"""The cost of a step, computed in advance: FLOPs of the model and of Newton-Schulz."""

import dataclasses
import math
from typing import Any

import jax

import muon_jax
from experiments.language.sharding import named_leaves
from experiments.optimizers import OptimizerName
from experiments.pretrain.config import Model, Training

# Dense bfloat16 FLOP/s of a device by its full `device_kind`, since cards of one name differ.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # a device is half of a chip
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA B200": 2250e12,
}

WITHOUT_NEWTON_SCHULZ = (
    "adamw",
    "polar",
    "low_rank",
    "low_rank_subspace",
    "low_rank_whole",
    "adamw_fixed_table",
    "dion",
    "splus",
    "splus_adamw",
    "soap",
)


@dataclasses.dataclass(frozen=True)
class Costs:
    """The cost of one optimizer step, over all devices.

    Attributes:
        model_flops: FLOPs of the forward and backward pass: 6 for each active parameter and token,
            plus the causal half of attention. Recomputation does not count.
        newton_schulz_flops: FLOPs of Newton-Schulz; 0 for optimizers without it.
        tokens: The number of tokens in a step.
        peak_flops_per_second: The peak of all devices; None if unknown.
    """

    model_flops: int
    newton_schulz_flops: int
    tokens: int
    peak_flops_per_second: float | None

    def rates(self, seconds: float) -> dict[str, float]:
        """Returns FLOP/s, and `mfu`, their share of the peak, for steps of this duration."""
        speed = self.model_flops / seconds
        peak = self.peak_flops_per_second
        return {"flops_per_second": speed} | ({"mfu": speed / peak} if peak else {})

    def as_json(self) -> dict[str, Any]:
        """Returns the costs with Newton-Schulz's share, which falls with the tokens per step."""
        total = self.model_flops + self.newton_schulz_flops
        share = self.newton_schulz_flops / total
        return dataclasses.asdict(self) | {"newton_schulz_share": share}


def unknown_peak() -> str | None:
    """Returns a message if the devices' peak is unknown; None if it is known, or on CPUs."""
    kind = jax.devices()[0].device_kind
    if kind in PEAKS or jax.default_backend() == "cpu":
        return None
    return f"MFU is unknown: the peak FLOP/s of {kind!r} is not in `pretrain.costs.PEAKS`."


def step_costs(config: Training, optimizer: OptimizerName, params: Any) -> Costs:
    """Returns the costs of a config's step; `params` are arrays or shapes."""
    plan = None
    if optimizer not in WITHOUT_NEWTON_SCHULZ:
        muon = config.muon
        plan = muon_jax.plan(params, ns_coeffs=muon.ns_coeffs, ns_dtype=muon.ns_dtype)
    peak = PEAKS.get(jax.devices()[0].device_kind)
    return Costs(
        model_flops=model_flops(config, params),
        newton_schulz_flops=plan.total("flops") if plan else 0,
        tokens=config.tokens_per_step,
        peak_flops_per_second=None if peak is None else peak * jax.device_count(),
    )


def model_flops(config: Training, params: Any) -> int:
    """Returns `Costs.model_flops`."""
    forward = active_entries(config.model, params) * 2 + attention_flops(config)
    return 3 * forward * config.tokens_per_step


def active_entries(model: Model, params: Any) -> int:
    """Returns the number of parameters that multiply a token, with the head, not the embedding."""
    total = 0
    for name, leaf in named_leaves(params):
        size = math.prod(leaf.shape)
        if "/experts/" in name:
            size = size // model.experts * model.active
        is_lookup = name.startswith("embedding/") and not model.tied
        total += 0 if is_lookup or name.endswith("/scale") else size
    return total


def attention_flops(config: Training) -> int:
    """Returns attention's forward FLOPs per token, which sees half of the positions on average."""
    model = config.model
    latent = model.attention == "latent"
    logits = model.key_columns
    value = model.value if latent else logits
    return model.layers * model.heads * (logits + value) * config.context
