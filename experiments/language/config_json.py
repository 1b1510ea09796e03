"""Reads and writes the `config.json` of Hugging Face models of the supported families."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from experiments.json_files import read_json
from experiments.layers import RopeScaling

Ids = int | tuple[int, ...] | None


class Family(NamedTuple):
    """What all supported models of a `model_type` have in common.

    Attributes:
        name: The name of the class in transformers.
        fixed: Required settings, beside `_FIXED`. If config.json omits one, it has this value.
        stated: Required settings that config.json must state, since their default differs.
        qk_norm: Whether each query and key head has an RMSNorm.
        qkv_bias: Whether the projections to queries, keys and values have biases.
        inferred: Sizes that may be omitted. By default there are as many key heads as query heads,
            and the heads divide the hidden size equally.
    """

    name: str
    fixed: Mapping[str, Any]
    stated: Mapping[str, Any] = {}
    qk_norm: bool = False
    qkv_bias: bool = False
    inferred: Sequence[str] = ()


FAMILIES = {
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        fixed={
            "attention_bias": False,
            "rope_interleave": True,
            "norm_topk_prob": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
        },
        stated={"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    ),
    "llama": Family(
        "LlamaForCausalLM",
        fixed={"attention_bias": False, "mlp_bias": False},
        inferred=("head_dim", "num_key_value_heads"),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        fixed={"use_sliding_window": False},
        qkv_bias=True,  # always, in this family
        inferred=("head_dim",),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        fixed={"attention_bias": False, "use_sliding_window": False},
        qk_norm=True,
    ),
}
# Required settings of all families.
_FIXED = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "quantization_config": None,
}
_SCALING = "rope_scaling"


def to_json(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a model's `config.json`, for transformers 4 and 5.

    Version 4 reads `rope_theta` and `rope_scaling`, version 5 reads `rope_parameters`.
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling := fields.get(_SCALING):
        rope = {"rope_type": "llama3", **dataclasses.asdict(scaling)}
    return {
        "architectures": [FAMILIES[kind].name],
        "model_type": kind,
        **{name: value for name, value in fields.items() if name != _SCALING},
        **({_SCALING: rope} if scaling else {}),
        "rope_parameters": {**rope, "rope_theta": fields["rope_theta"]},
        "hidden_act": _FIXED["hidden_act"],
        **FAMILIES[kind].fixed,
    }


def read(
    path: Path, model: type, fields: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns all of a model's `config.json`, and its fields under our names.

    Args:
        path: The path of the file.
        model: A dataclass whose field types the values must have. Others must be integers.
        fields: For each supported family, the fields' names: ours, and those in the file. A family
            with `rope_scaling` may have Llama 3's scaling.

    Raises:
        ValueError: If the file is damaged, lacks a field, or is of a model that is not supported.
        OSError: If it cannot be read.
    """
    try:
        given = read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist. A model must be a local folder with {path.name}, tokenizer "
            "and safetensors; `hf download NAME --local-dir FOLDER` downloads one."
        ) from None
    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in fields:
        raise ValueError(
            f"{_unknown(path, 'model_type', kind, ' or '.join(map(repr, sorted(fields))))} Give "
            "the folder of one of these, such as Qwen/Qwen3-0.6B's."
        )
    family = FAMILIES[kind]
    require(path, given, _FIXED | family.fixed)
    require(path, given, family.stated, otherwise="missing")
    layers = given.get("layer_types") or []
    if not isinstance(layers, list):
        raise ValueError(f"{path}: layer_types is {layers!r} but must be a list.")
    for other in sorted(set(map(str, layers)) - {"full_attention"}):
        raise _unknown(path, "layer_types", other, "'full_attention'")
    types = get_type_hints(model)
    rope_theta, scaling = _rope(path, given, _SCALING in fields[kind].values())
    settings = {"tie_word_embeddings": False, **given, "rope_theta": rope_theta, _SCALING: scaling}
    if family.inferred:
        heads, width = (
            checked(path, name, given.get(name), int)
            for name in ("num_attention_heads", "hidden_size")
        )
        sizes = {"num_key_value_heads": heads, "head_dim": width // max(heads, 1)}
        settings |= {name: sizes[name] for name in family.inferred if given.get(name) is None}
    return given, {
        ours: checked(path, theirs, settings.get(theirs), types.get(ours, int))
        for ours, theirs in fields[kind].items()
    }


def require(
    path: Path, given: Mapping[str, Any], only: Mapping[str, Any], otherwise: Any = None
) -> None:
    """Checks that fields have these values. A missing field counts as `otherwise`, if given."""
    for name, value in only.items():
        stated = given.get(name, value if otherwise is None else otherwise)
        if stated != value:
            raise _unknown(path, name, stated, repr(value))


def _rope(path: Path, given: dict[str, Any], scaled: bool) -> tuple[float, RopeScaling | None]:
    """Returns RoPE's base and Llama 3's scaling, which is an error unless `scaled` allows it.

    Transformers 4 has `rope_theta` and `rope_scaling`; version 5 has both in `rope_parameters`.
    """
    bases, scalings = set(), set()
    if given.get("rope_theta") is not None:
        bases.add(checked(path, "rope_theta", given["rope_theta"], float))
    for field in ("rope_parameters", "rope_scaling"):
        rope = given.get(field) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{path}: {field} is {rope!r} but must be an object.")
        if "rope_theta" in rope:
            bases.add(checked(path, f"{field}.rope_theta", rope["rope_theta"], float))
        if rope:
            scalings.add(_scaling(path, field, rope, scaled))
    if len(bases) != 1:
        described = " and ".join(map(str, sorted(bases, key=str))) or "missing"
        raise ValueError(f"{path}: rope_theta is {described} but must be one number.")
    if len(scalings) > 1:
        raise ValueError(
            f"{path}: rope_parameters and rope_scaling differ. Remove the one that is wrong."
        )
    return bases.pop(), scalings.pop() if scalings else None


def _scaling(path: Path, field: str, rope: dict[str, Any], scaled: bool) -> RopeScaling | None:
    """Returns the scaling in one field, and checks that all of its settings are supported."""
    kinds = ["default", "llama3"] if scaled else ["default"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in kinds:
        raise _unknown(path, f"{field}.rope_type", kind, " or ".join(map(repr, kinds)))
    numbers = {}
    if kind == "llama3":
        numbers = {
            name: checked(path, f"{field}.{name}", rope.get(name), number)
            for name, number in get_type_hints(RopeScaling).items()
        }
    supported = {"rope_type": kind, "type": kind, "partial_rotary_factor": 1.0} | numbers
    for name, value in rope.items():
        if name != "rope_theta" and supported.get(name) != value:
            only = repr(supported[name]) if name in supported else "no such setting"
            raise _unknown(path, f"{field}.{name}", value, only)
    try:
        return RopeScaling(**numbers) if numbers else None
    except ValueError as error:
        raise ValueError(f"{path}: {field}: {error}") from None


def checked(path: Path, name: str, value: Any, kind: Any) -> Any:
    """Checks the type of a field's value, and returns it, lists as tuples."""
    if kind == Ids:
        if isinstance(value, list):
            return tuple(checked(path, name, one, int) for one in value)
        return value if value is None else checked(path, name, value, int)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{path}: {name} is {value!r} but must be of type {kind.__name__}.")
    return value


def _unknown(path: Path, name: str, value: Any, only: str) -> ValueError:
    return ValueError(f"{path}: {name} is {value!r}; only models with {only} are supported.")
