"""`config.json` of a Hugging Face model: which families are supported, and what it may say."""

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
        name: of the class in transformers.
        fixed: beyond `_FIXED`; a config.json that leaves one out means the same.
        stated: what it may not leave out, since its default is another.
        qk_norm: RMSNorm of each query and key head.
        qkv_bias: of the projections to queries, keys and values.
        inferred: sizes that may be left out: of the hidden size each head has an equal share, and
            each query head has a key head.
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
        qkv_bias=True,  # which no setting changes
        inferred=("head_dim",),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        fixed={"attention_bias": False, "use_sliding_window": False},
        qk_norm=True,
    ),
}
# Of all of them.
_FIXED = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "quantization_config": None,
}
_SCALING = "rope_scaling"


def to_json(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` says of a model, for transformers 4 and 5.

    The former reads `rope_theta` and `rope_scaling`, the latter `rope_parameters`.
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
    """What a model's `config.json` says: all of it, and the fields by our names.

    Args:
        path: of the file.
        model: dataclass, of whose fields' types the values are; others are whole numbers.
        fields: our names of them and theirs, by the families that are supported; those with
            `rope_scaling` may have Llama 3's.

    Raises:
        ValueError: it is damaged, lacks a field, or tells of a model that is not supported.
        OSError: it cannot be read.
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
    said = {"tie_word_embeddings": False, **given, "rope_theta": rope_theta, _SCALING: scaling}
    if family.inferred:
        heads, width = (
            checked(path, name, given.get(name), int)
            for name in ("num_attention_heads", "hidden_size")
        )
        sizes = {"num_key_value_heads": heads, "head_dim": width // max(heads, 1)}
        said |= {name: sizes[name] for name in family.inferred if given.get(name) is None}
    return given, {
        ours: checked(path, theirs, said.get(theirs), types.get(ours, int))
        for ours, theirs in fields[kind].items()
    }


def require(
    path: Path, given: Mapping[str, Any], only: Mapping[str, Any], otherwise: Any = None
) -> None:
    """Raises a ValueError where a field has another value; left out, it has this or `otherwise`."""
    for name, value in only.items():
        found = given.get(name, value if otherwise is None else otherwise)
        if found != value:
            raise _unknown(path, name, found, repr(value))


def _rope(path: Path, given: dict[str, Any], scaled: bool) -> tuple[float, RopeScaling | None]:
    """RoPE's base and Llama 3's scaling, which is refused unless the model may be `scaled`.

    Transformers 4 has the base beside `rope_scaling`, 5 both in `rope_parameters`.
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
        found = " and ".join(map(str, sorted(bases, key=str))) or "missing"
        raise ValueError(f"{path}: rope_theta is {found} but must be one number.")
    if len(scalings) > 1:
        raise ValueError(
            f"{path}: rope_parameters and rope_scaling differ. Remove the one that is wrong."
        )
    return bases.pop(), scalings.pop() if scalings else None


def _scaling(path: Path, field: str, rope: dict[str, Any], scaled: bool) -> RopeScaling | None:
    """That of one field, whose settings must all be supported."""
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
    """A field's value; a ValueError where it has another type."""
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
