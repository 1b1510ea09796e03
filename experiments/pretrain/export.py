"""Writes and reads models in the format of Hugging Face transformers.

The format of models with latent attention is DeepSeek-V3 (2412.19437) without query compression;
that of models with multi-head attention is Llama, or Qwen3 with QK-norm.

`python -m experiments.pretrain.export RUN_DIR OUT_DIR` writes the newest checkpoint of a run.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from etils import epath
from tokenizers import Tokenizer

from experiments.command_line import parse
from experiments.commands import guard
from experiments.json_files import loads, write_json
from experiments.language import hugging_face, model_card, sharding, tensors
from experiments.language.hugging_face import CONFIG
from experiments.language.mesh import one_device
from experiments.language.tensors import Dtype
from experiments.optimizers import ARMS
from experiments.pretrain import export_config
from experiments.pretrain.config import Model
from experiments.pretrain.model import LanguageModel, Params
from experiments.pretrain.trained import Loaded, load_run
from experiments.report.figures import optimizer_label


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
    card: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes a folder that `AutoModelForCausalLM` and, with a tokenizer, `AutoTokenizer` load.

    Args:
        folder, params, dtype, shard: As for `tensors.write`.
        config: The config of the model.
        bias: The selection biases, `(layers with experts, experts)`.
        context: The context length that the model was trained with.
        tokenizer: The tokenizer that the model was trained with.
        end_of_text: The id of the token that ends a text.
        card: writes `README.md`.

    Raises:
        ValueError, OSError: As for `tensors.write`, or for multi-head attention with experts.
    """
    vocabulary = len(params["embedding"]["embedding"])
    ours = export_config.to_json(config, vocabulary) | {
        "max_position_embeddings": context,
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
    }

    def beside(partial: Path) -> None:
        card(partial)
        if tokenizer is None:
            return
        (partial / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        end = None if end_of_text is None else tokenizer.id_to_token(end_of_text)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
        }
        write_json(partial / "tokenizer_config.json", settings)

    tree, wanted, columns = _with_bias(params, bias), _shapes(config, vocabulary), _columns(config)
    tensors.write(folder, tree, wanted, ours, dtype, columns=columns, shard=shard, beside=beside)


def read(
    folder: Path, mesh: jax.sharding.Mesh | None = None
) -> tuple[Model, int, Params, jax.Array]:
    """Reads a model written by `write`, or by `save_pretrained` from a supported model.

    Args:
        folder: The folder, with `config.json` and safetensors of bfloat16, float16 or float32.
        mesh: The mesh, from `mesh.make_mesh`. None means the first device.

    Returns:
        The config, with the dtype of the files; the vocabulary size; the params and the selection
        biases, both float32 and sharded over the mesh.

    Raises:
        ValueError, OSError: As for `tensors.read`, or if the model is not supported, or the mesh
            does not divide an axis.
    """
    with _opened(folder) as (config, vocabulary, files):
        wanted, mesh = _shapes(config, vocabulary), mesh or one_device()
        places = sharding.shardings(sharding.param_specs(wanted, mesh), mesh)
        params = tensors.read(folder, files, wanted, places, _columns(config))
    if "moe_layers" in params:
        bias = params["moe_layers"]["feed_forward"]["router"].pop("bias")
    else:
        bias = LanguageModel(config, vocabulary).initial_bias()
    return config, vocabulary, params, bias


def check(folder: Path) -> None:
    """Checks, from the files' headers, that a folder has the tensors of the model in its config."""
    with _opened(folder) as (config, vocabulary, files):
        tensors.check(folder, files, _shapes(config, vocabulary))


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[tuple[Model, int, dict[str, hugging_face.File]]]:
    config, vocabulary = export_config.read(folder / CONFIG)
    # Each expert has its own tensors, as each layer has.
    with hugging_face.open_tensors(folder, max(config.layers, config.experts)) as files:
        yield config, vocabulary, files


def _with_bias(params: Params, bias: Any) -> Params:
    """Adds the selection biases beside the routers' kernels, where the files have them."""
    if "moe_layers" not in params:
        return params
    tree = jax.tree.map(lambda leaf: leaf, params)  # copies the dicts
    tree["moe_layers"]["feed_forward"]["router"]["bias"] = bias
    return tree


def _shapes(config: Model, vocabulary: int) -> Params:
    """Returns the shapes of a model's written params. Raises a ValueError if it has no format."""
    if config.attention == "multi-head" and config.dense_layers < config.layers:
        raise ValueError(
            "A model with experts and --model.attention multi-head has no Hugging Face format: "
            "DeepSeek-V3 has experts and latent attention, Llama and Qwen3 have neither."
        )
    model = LanguageModel(config, vocabulary)
    return _with_bias(model.shapes, jax.eval_shape(model.initial_bias))


def _columns(config: Model) -> dict[str, np.ndarray]:
    """Returns the order of columns in DeepSeek-V3 for the projections with RoPE.

    There, RoPE rotates columns (0, 1), (2, 3) and so on; here, each of a half with its other half.
    """
    if config.attention != "latent":
        return {}
    pairs = np.arange(config.rope).reshape(2, -1).T.ravel()
    query = np.concatenate([np.arange(config.nope), config.nope + pairs])
    heads = np.arange(config.heads)[:, None] * query.size
    return {
        "attention/query/kernel": (heads + query).ravel(),
        "attention/latent/kernel": np.concatenate(
            [np.arange(config.latent), config.latent + pairs]
        ),
    }


def write_card(folder: Path, loaded: Loaded, summary: Mapping[str, Any]) -> None:
    """Writes the model card of a run; `summary` is its `summary.json`, empty if unfinished."""
    config, optimizer, settings = loaded.config, loaded.optimizer, loaded.config.adamw
    data, step = summary.get("data") or {}, int(loaded.state.step)
    is_muon = config.muon if optimizer != "adamw" else None
    facts = {
        "Begun with": config.origin,
        "Data": data.get("name"),
        "Digest of the data's tokens": data.get("sha256"),
        "Optimizer": ARMS[optimizer].about,
        "Learning rate": f"{config.rate(optimizer):g}, after {config.warmup} steps of warm-up, "
        f"then {config.decay} decay to {config.final_lr_fraction:g} of it",
        "AdamW": dataclasses.asdict(settings),
        "Muon": is_muon and dataclasses.asdict(is_muon),
        "Steps": f"{step:,} of {config.steps:,}, each {config.batch} sequences of "
        f"{config.context:,} tokens",
        "Held-out loss, nats per token": summary.get("validation_loss"),
        "Held-out bits per byte": summary.get("bits_per_byte"),
        "Digest of the params": summary.get("params_sha256"),
    }
    name = "A mixture of experts" if config.model.dense_layers < config.model.layers else "A model"
    text = f"{name}, pretrained with {optimizer_label(optimizer)} by muon_jax."
    model_card.write(folder, f"Pretrained with {optimizer_label(optimizer)}", text, facts)


@dataclasses.dataclass(frozen=True)
class Command:
    """Writes the model of a run's newest checkpoint in the format of Hugging Face transformers."""

    run: tyro.conf.Positional[str]
    """Folder of the run, local or in gs:// or s3://."""
    out: tyro.conf.Positional[Path]
    """New folder to write the model to."""
    dtype: Dtype = "float32"
    """Precision of the written tensors. Routers and their biases stay float32."""


def main() -> int:
    """Runs the command; returns its exit code."""

    def work() -> int:
        command = parse(Command, "python -m experiments.pretrain.export")
        loaded = load_run(command.run)
        state, tokenizer = loaded.state, loaded.tokenizer
        path = epath.Path(command.run) / "summary.json"
        summary = loads(path.read_text()) if path.exists() else {}
        end_of_text = tokenizer and tokenizer.token_to_id(loaded.config.data.end_of_text)
        write(
            command.out,
            loaded.config.model,
            loaded.trainer.evaluated(state),
            state.bias,
            context=loaded.config.context,
            dtype=command.dtype,
            tokenizer=tokenizer,
            end_of_text=end_of_text,
            card=functools.partial(write_card, loaded=loaded, summary=summary),
        )
        print(f"Wrote step {int(state.step)} of {command.run} to {command.out}.")
        return 0

    return guard(work)


if __name__ == "__main__":
    sys.exit(main())
