"""`config.json` of a Hugging Face model: which families are supported, and what it may say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from experiments.json_files import read_json

Ids = int | tuple[int, ...] | None


class Family(NamedTuple):
    """What all supported models of a `model_type` have in common.

    Attributes:
        name: of the class in transformers.
        fixed: beyond `_FIXED`; a config.json that leaves one out means the same.
        stated: what it may not leave out, since its default is another.
    """

    name: str
    fixed: Mapping[str, Any]
    stated: Mapping[str, Any] = {}


FAMILIES = {
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        fixed={
            "rope_interleave": True,
            "norm_topk_prob": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
        },
        stated={"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    ),
    "llama": Family("LlamaForCausalLM", fixed={"mlp_bias": False}),
    "qwen3": Family("Qwen3ForCausalLM", fixed={"use_sliding_window": False}),
}
# Of all of them.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "quantization_config": None,
}
_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}


def to_json(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` says of a model, for transformers 4, which reads `rope_theta`, and 5."""
    return {
        "architectures": [FAMILIES[kind].name],
        "model_type": kind,
        **fields,
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["rope_theta"]},
        "hidden_act": _FIXED["hidden_act"],
        "attention_bias": _FIXED["attention_bias"],
    }


def read(
    path: Path, model: type, fields: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a model's `config.json` says: all of it, and the fields by our names.

    Args:
        path: of the file.
        model: dataclass, of whose fields' types the values are; others are whole numbers.
        fields: our names of them and theirs, by the families that are supported.

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
        raise _unknown(path, "model_type", kind, " or ".join(map(repr, fields)))
    require(path, given, _FIXED | FAMILIES[kind].fixed)
    require(path, given, FAMILIES[kind].stated, otherwise="missing")
    layers = given.get("layer_types") or []
    if not isinstance(layers, list):
        raise ValueError(f"{path}: layer_types is {layers!r} but must be a list.")
    for other in sorted(set(map(str, layers)) - {"full_attention"}):
        raise _unknown(path, "layer_types", other, "'full_attention'")
    types = get_type_hints(model)
    said = {"tie_word_embeddings": False, **given, "rope_theta": _rope_base(path, given)}
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


def _rope_base(path: Path, given: dict[str, Any]) -> float:
    """Transformers 4 has it beside `rope_scaling`, 5 in `rope_parameters`."""
    bases = set()
    if given.get("rope_theta") is not None:
        bases.add(checked(path, "rope_theta", given["rope_theta"], float))
    for field in ("rope_parameters", "rope_scaling"):
        rope = given.get(field) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{path}: {field} is {rope!r} but must be an object.")
        for name, value in rope.items():
            if name == "rope_theta":
                bases.add(checked(path, f"{field}.{name}", value, float))
            elif _ROPE.get(name) != value:
                only = repr(_ROPE[name]) if name in _ROPE else "no such setting"
                raise _unknown(path, f"{field}.{name}", value, only)
    if len(bases) != 1:
        found = " and ".join(map(str, sorted(bases, key=str))) or "missing"
        raise ValueError(f"{path}: rope_theta is {found} but must be one number.")
    return bases.pop()


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
