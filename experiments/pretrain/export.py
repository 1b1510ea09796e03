"""A model as a folder that Hugging Face transformers loads, and such a folder as a model.

Latent attention is written as DeepSeek-V3 (2412.19437) without query compression, multi-head
attention as Llama: `config.json`, safetensors, and the tokenizer if there is one.

`python -m experiments.pretrain.export RUN_DIR OUT_DIR` writes the newest checkpoint of a run.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tokenizers import Tokenizer

from experiments.command_line import parse
from experiments.commands import guard
from experiments.language import hugging_face
from experiments.optimizers import ARMS
from experiments.pretrain import export_config
from experiments.pretrain.config import Model
from experiments.pretrain.model import LanguageModel, Params
from experiments.pretrain.trained import load_run
from experiments.runs import write_json

Dtype = Literal["float32", "bfloat16"]

# Names of modules, theirs and ours.
_ATTENTION = {
    "latent": {
        "q_proj": "query",
        "kv_a_proj_with_mqa": "latent",
        "kv_a_layernorm": "latent_norm",
        "kv_b_proj": "key_value",
        "o_proj": "out",
    },
    "multi-head": {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"},
}
_SWIGLU = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


class _Tensor(NamedTuple):
    """A tensor of the files, and which entry along the leading axes of which leaf it is."""

    name: str
    path: tuple[str, ...]
    index: tuple[int, ...] = ()


def to_hugging_face(
    config: Model, params: Params, bias: jax.Array | np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors by their names in transformers, one at a time, float32, kernels `[out, in]`.

    Args:
        config: of the model.
        params: nested dicts of float32 arrays.
        bias: selection biases `(layers with experts, experts)`.

    Raises:
        ValueError: the model has multi-head attention and experts, or the params are not its.
    """
    tree = {**params, "bias": bias}
    _check_exportable(config)
    _check_params(config, tree)
    for tensor in _tensors(config):
        x = np.asarray(_leaf(tree, tensor.path)[tensor.index])
        if (order := _interleaved(config, tensor.path)) is not None:
            x = x[:, order]
        yield tensor.name, np.ascontiguousarray(x.T if _is_kernel(tensor.path) else x)


def write(
    folder: Path,
    config: Model,
    params: Params,
    bias: jax.Array | np.ndarray,
    *,
    context: int,
    dtype: Dtype = "float32",
    tokenizer: Tokenizer | None = None,
    end_of_text: int | None = None,
    shard: int = hugging_face.SHARD,
) -> None:
    """Makes a folder for `AutoModelForCausalLM` and, with a tokenizer, for `AutoTokenizer`.

    Args:
        folder: new or empty; it is there whole, or not at all.
        config, params, bias: as `to_hugging_face` takes them.
        context: tokens of the longest text that the model has seen.
        dtype: of the files; routers and their biases stay float32.
        tokenizer: of the text that the model has learnt.
        end_of_text: the token that ends a text.
        shard: bytes of a file of tensors at most, unless one tensor has more.

    Raises:
        ValueError: as `to_hugging_face`, or some params are not finite, or the folder has something
            in it.
        OSError: the folder cannot be written.
    """
    _check_exportable(config)
    with hugging_face.new_folder(folder) as partial:
        tensors = to_hugging_face(config, params, bias)
        hugging_face.write_tensors(partial, _cast(tensors, dtype), shard)
        vocabulary = len(params["embedding"]["embedding"])
        ours = export_config.to_json(config, vocabulary) | {
            "max_position_embeddings": context,
            "dtype": dtype,
            "torch_dtype": dtype,
            "bos_token_id": None,
            "eos_token_id": end_of_text,
            "pad_token_id": None,
        }
        write_json(partial / hugging_face.CONFIG, ours)
        if tokenizer is not None:
            (partial / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
            end = None if end_of_text is None else tokenizer.id_to_token(end_of_text)
            settings = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": end,
                "model_max_length": context,
                "clean_up_tokenization_spaces": False,
            }
            write_json(partial / "tokenizer_config.json", settings)


def read(folder: Path) -> tuple[Model, int, Params, np.ndarray]:
    """The model in a folder of `write`, or of `save_pretrained` of a model of these kinds.

    Returns:
        Its config, with the arithmetic in the dtype of the files; its vocabulary; params and
        selection biases as float32 NumPy arrays.

    Raises:
        ValueError: the folder is damaged, lacks a tensor or has one too many, or holds a model that
            is none of ours.
        OSError: it cannot be read.
    """
    config, vocabulary = export_config.read(folder / hugging_face.CONFIG)
    with contextlib.ExitStack() as stack:
        files = hugging_face.open_tensors(folder, stack)
        # An expert has tensors of its own, as a layer has.
        hugging_face.check_layers(folder, max(config.layers, config.experts), files)
        shapes = _shapes(config, vocabulary)
        wanted = {tensor.name: tensor for tensor in _tensors(config)}
        hugging_face.check_names(folder, wanted.keys(), files.keys())
        tree = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), shapes)
        for name, tensor in wanted.items():
            place = _leaf(tree, tensor.path)[tensor.index]
            shape = place.T.shape if _is_kernel(tensor.path) else place.shape
            x = hugging_face.read_tensor(files[name], name, shape)
            x = x.T if _is_kernel(tensor.path) else x
            order = _interleaved(config, tensor.path)
            place[..., slice(None) if order is None else order] = x
    bias = tree.pop("bias")
    return config, vocabulary, tree, bias


def _tensors(config: Model) -> Iterator[_Tensor]:
    yield _Tensor("model.embed_tokens.weight", ("embedding", "embedding"))
    for layer in range(config.layers):
        sparse = layer >= config.dense_layers
        stack = "moe_layers" if sparse else "dense_layers"
        at = layer - config.dense_layers if sparse else layer
        name = f"model.layers.{layer}"
        norms = {
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "feed_forward_norm",
        }
        for theirs, ours in norms.items():
            yield _Tensor(f"{name}.{theirs}.weight", (stack, ours, "scale"), (at,))
        for theirs, ours in _ATTENTION[config.attention].items():
            leaf = "scale" if ours.endswith("norm") else "kernel"
            path = (stack, "attention", ours, leaf)
            yield _Tensor(f"{name}.self_attn.{theirs}.weight", path, (at,))
        parts = {f"{name}.mlp": (stack, "feed_forward")}
        if sparse:
            router = (stack, "feed_forward", "router", "kernel")
            yield _Tensor(f"{name}.mlp.gate.weight", router, (at,))
            yield _Tensor(f"{name}.mlp.gate.e_score_correction_bias", ("bias",), (at,))
            shared = {f"{name}.mlp.shared_experts": (stack, "feed_forward", "shared")}
            parts = shared if config.shared else {}
        for theirs, ours in _SWIGLU.items():
            for part, path in parts.items():
                yield _Tensor(f"{part}.{theirs}.weight", (*path, ours, "kernel"), (at,))
            for expert in range(config.experts if sparse else 0):
                path = (stack, "feed_forward", "experts", ours)
                yield _Tensor(f"{name}.mlp.experts.{expert}.{theirs}.weight", path, (expert, at))
    yield _Tensor("model.norm.weight", ("norm", "scale"))
    if not config.tied:
        yield _Tensor("lm_head.weight", ("head", "kernel"))


def _cast(
    tensors: Iterator[tuple[str, np.ndarray]], dtype: Dtype
) -> Iterator[tuple[str, np.ndarray]]:
    for name, x in tensors:
        x = x.astype(jnp.float32 if ".mlp.gate." in name else dtype)
        if not np.isfinite(x).all():
            raise ValueError(f"{name} contains NaN or Inf; the model was not written.")
        yield name, x


def _leaf(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _is_kernel(path: tuple[str, ...]) -> bool:
    return path[-1] == "kernel" or "experts" in path


def _interleaved(config: Model, path: tuple[str, ...]) -> np.ndarray | None:
    """The columns of a projection with rotated ones as DeepSeek-V3 orders them.

    RoPE there turns columns (0, 1), (2, 3) and so on; ours each of a half with one of the other.
    """
    module = path[-2:-1]
    if config.attention != "latent" or module not in (("query",), ("latent",)):
        return None
    pairs = np.arange(config.rope).reshape(2, -1).T.ravel()
    heads, still = (config.heads, config.nope) if module == ("query",) else (1, config.latent)
    head = np.concatenate([np.arange(still), still + pairs])
    return (np.arange(heads)[:, None] * head.size + head).ravel()


def _shapes(config: Model, vocabulary: int) -> Params:
    model = LanguageModel(config, vocabulary)
    bias = jax.eval_shape(model.initial_bias)
    return {**jax.eval_shape(model.init, jax.random.key(0)), "bias": bias}


def _check_exportable(config: Model) -> None:
    if config.attention == "multi-head" and config.dense_layers < config.layers:
        raise ValueError(
            "A model with experts and --model.attention multi-head has no Hugging Face format: "
            "DeepSeek-V3 has experts and latent attention, Llama has neither."
        )


def _check_params(config: Model, tree: Params) -> None:
    table = tree.get("embedding", {}).get("embedding", np.zeros(0))
    hugging_face.check_params(tree, _shapes(config, len(table)))


@dataclasses.dataclass(frozen=True)
class Command:
    """Writes a run's model for Hugging Face transformers."""

    run: tyro.conf.Positional[str]
    """Folder of the run. It may be in gs:// or s3://."""
    out: tyro.conf.Positional[Path]
    """Folder to write."""
    dtype: Dtype = "float32"
    """Precision of the written files. Routers and their biases stay float32."""


def main() -> int:
    """Runs the command; returns its exit code."""

    def work() -> int:
        command = parse(Command, "python -m experiments.pretrain.export")
        loaded = load_run(command.run)
        state, tokenizer = loaded.state, loaded.tokenizer
        end_of_text = tokenizer and tokenizer.token_to_id(loaded.config.data.end_of_text)
        write(
            command.out,
            loaded.config.model,
            ARMS[loaded.optimizer].eval_params(state.opt_state, state.params),
            state.bias,
            context=loaded.config.context,
            dtype=command.dtype,
            tokenizer=tokenizer,
            end_of_text=end_of_text,
        )
        print(f"Wrote step {int(state.step)} of {command.run} to {command.out}.")
        return 0

    return guard(work)


if __name__ == "__main__":
    sys.exit(main())
