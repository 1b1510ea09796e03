"""What a step costs, told before it runs: FLOPs of the model, and of Newton-Schulz apart."""

import dataclasses
import math
from typing import Any

import jax

import muon_jax
from experiments.optimizers import OptimizerName
from experiments.pretrain.config import Model, Training

# Dense bfloat16 FLOP/s of a device, by its whole `device_kind`: cards of one name differ.
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
    """Of one optimizer step, over all devices.

    Attributes:
        model_flops: forward and backward passes: 6 for each active entry of a kernel and token, and
            attention's causal half; nothing that is computed twice counts twice.
        newton_schulz_flops: of the optimizer's matrix products, 0 without any.
        tokens: of a step.
        peak_flops_per_second: of all devices; None where it is not known.
    """

    model_flops: int
    newton_schulz_flops: int
    tokens: int
    peak_flops_per_second: float | None

    def rates(self, seconds: float) -> dict[str, float]:
        """What a step that takes so long achieves; `mfu` is the model's share of the peak."""
        speed = self.model_flops / seconds
        peak = self.peak_flops_per_second
        return {"flops_per_second": speed} | ({"mfu": speed / peak} if peak else {})

    def as_json(self) -> dict[str, Any]:
        """With the share of Newton-Schulz, which falls as tokens rise."""
        total = self.model_flops + self.newton_schulz_flops
        share = self.newton_schulz_flops / total
        return dataclasses.asdict(self) | {"newton_schulz_share": share}


def unknown_peak() -> str | None:
    """Says that no MFU is told of this machine's devices; None where it is, or nobody would ask."""
    kind = jax.devices()[0].device_kind
    if kind in PEAKS or jax.default_backend() == "cpu":
        return None
    return f"MFU is unknown: the peak FLOP/s of {kind!r} is not in `pretrain.costs.PEAKS`."


def step_costs(config: Training, optimizer: OptimizerName, params: Any) -> Costs:
    """Of a config; `params` are arrays or shapes."""
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
    """As `Costs` has them."""
    forward = active_entries(config.model, params) * 2 + attention_flops(config)
    return 3 * forward * config.tokens_per_step


def active_entries(model: Model, params: Any) -> int:
    """Entries of the kernels that a token is multiplied with; the head's, not the embedding's."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        size = math.prod(leaf.shape)
        if "/experts/" in name:
            size = size // model.experts * model.active
        is_lookup = name.startswith("embedding/") and not model.tied
        total += 0 if is_lookup or name.endswith("/scale") else size
    return total


def attention_flops(config: Training) -> int:
    """Of the forward pass, for one token: logits and mixing, half of the positions on average."""
    model = config.model
    latent = model.attention == "latent"
    logits = model.key_columns
    value = model.value if latent else logits
    return model.layers * model.heads * (logits + value) * config.context
