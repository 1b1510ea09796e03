"""Qwen3 params from a Hugging Face folder, and into one, tensor by tensor."""

import collections
import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.finetune import architecture as config_json
from experiments.finetune.architecture import Qwen3
from experiments.finetune.chat import copy_tokenizer
from experiments.finetune.model import Dtype, Params, shapes, shardings
from experiments.language import hugging_face
from experiments.language.hugging_face import CONFIG, SHARD, File
from experiments.language.mesh import one_device
from experiments.language.processes import on_host
from experiments.runs import write_json

# Paths of leaves, and tensors' names; those with a number are one of each layer.
_NAMES = {
    "embedding/embedding": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/attention/query/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attention/key/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attention/value/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention/out/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/attention/query_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/attention/key_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
    "layers/feed_forward_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/feed_forward/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/feed_forward/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/feed_forward/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
_EMBEDDING, _HEAD = _NAMES["embedding/embedding"], _NAMES["head/kernel"]
_GENERATION = "generation_config.json"
# Entries of the vocabulary that are compared at once.
_COMPARED = 4096


def check(folder: Path, architecture: Qwen3) -> None:
    """Refuses a folder whose tensors are not those of the model; reads their headers alone.

    Raises:
        ValueError: the folder is damaged, lacks a tensor or has one too many, or one has another
            shape or dtype.
        OSError: a file is missing, or cannot be read.
    """
    with contextlib.ExitStack() as stack:
        _open(folder, architecture, stack)


def read(folder: Path, mesh: Mesh | None = None) -> tuple[Qwen3, Params]:
    """The model in a folder, its params float32 and where they are to lie.

    One tensor is read at a time, in its file's dtype, and a few are in the host's memory.

    Args:
        folder: `config.json` and safetensors of bfloat16, float16 or float32, one file or several.
        mesh: of `mesh.make_mesh`; None is the first device.

    Raises:
        ValueError: the folder is damaged, lacks a tensor or has one too many, one has another shape
            or values that are not finite, or it holds a model that is no Qwen3; or the mesh does
            not divide an axis.
        OSError: it cannot be read.
    """
    architecture = config_json.read(folder / CONFIG)
    mesh = mesh or one_device()
    wanted, places = shapes(architecture), shardings(architecture, mesh)
    with contextlib.ExitStack() as stack:
        files = _open(folder, architecture, stack)
        if architecture.tied and _HEAD in files:
            _check_tied(folder, files)

        def leaf(path: Any, leaf: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.Array:
            return _read_leaf(files, architecture, path, leaf.shape, place)

        return architecture, jax.tree_util.tree_map_with_path(leaf, wanted, places)


def write(
    folder: Path,
    architecture: Qwen3,
    params: Params,
    tokenizer: Path | None = None,
    dtype: Dtype = "bfloat16",
    shard: int = SHARD,
) -> None:
    """Makes a folder for `AutoModelForCausalLM` and, with a tokenizer, for `AutoTokenizer`.

    Of several processes all must call, and the first one writes.

    Args:
        folder: new or empty; it is there whole, or not at all.
        architecture, params: the model; params may lie on a mesh.
        tokenizer: a folder whose tokenizer, chat template and settings of generation go along.
        dtype: of the files.
        shard: bytes of a file of tensors at most, unless one tensor has more; so many are in the
            host's memory at a time.

    Raises:
        ValueError: these are not the model's params, or some are not finite, or the folder has
            something in it.
        OSError: a folder cannot be read or written.
    """
    hugging_face.check_params(params, shapes(architecture))
    tensors = _exported(architecture, params, dtype)
    if jax.process_index() > 0:
        collections.deque(tensors, maxlen=0)  # its part in gathering them
        return
    with hugging_face.new_folder(folder) as partial:
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
            if (tokenizer / _GENERATION).exists():
                shutil.copyfile(tokenizer / _GENERATION, partial / _GENERATION)
        hugging_face.write_tensors(partial, tensors, shard)
        dtypes = {"dtype": dtype, "torch_dtype": dtype}  # for transformers 5 and 4
        write_json(partial / CONFIG, config_json.to_json(architecture) | dtypes)


def _open(folder: Path, architecture: Qwen3, stack: contextlib.ExitStack) -> dict[str, File]:
    """The open file of each tensor, all of the shapes that the model has."""
    files = hugging_face.open_tensors(folder, stack)
    hugging_face.check_layers(folder, architecture.layers, files)
    wanted = {
        name: _shape_of_one(path, leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes(architecture))
        for name in _names(architecture, path)
    }
    if architecture.tied and _HEAD in files:  # some writers repeat the embedding
        wanted[_HEAD] = wanted[_EMBEDDING]
    hugging_face.check_names(folder, wanted.keys(), files.keys())
    for name, shape in wanted.items():
        hugging_face.check_tensor(files[name], name, shape)
    return files


def _read_leaf(
    files: Mapping[str, File],
    architecture: Qwen3,
    path: Any,
    shape: tuple[int, ...],
    place: NamedSharding,
) -> jax.Array:
    """A leaf of one tensor, or of one in each layer, which are put into it one after another."""
    stacked, transposed = _is_stacked(path), _is_kernel(path)
    of_one = _shape_of_one(path, shape)
    lies = NamedSharding(place.mesh, PartitionSpec(*_shape_of_one(path, tuple(place.spec))))
    insert = _insertion(transposed, place)
    leaf: Any = jnp.zeros(shape, jnp.float32, device=place) if stacked else None
    for layer, name in enumerate(_names(architecture, path)):
        tensor = hugging_face.read_tensor(files[name], name, of_one)
        x = jax.make_array_from_callback(of_one, lies, tensor.__getitem__)
        leaf, finite = insert(leaf, x, layer)
        if not finite:  # which also waits, so that tensors do not pile up
            raise ValueError(f"{files[name].path}: {name} contains NaN or Inf; download it again.")
    return leaf


@functools.cache
def _insertion(transposed: bool, place: NamedSharding) -> Callable[..., tuple[jax.Array, Any]]:
    """(leaf or None, a tensor of a file, layer) -> the leaf with it, and whether it is finite."""

    def insert(leaf: Any, x: jax.Array, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        finite = jnp.all(jnp.isfinite(x))
        x = (x.T if transposed else x).astype(jnp.float32)
        return x if leaf is None else leaf.at[layer].set(x), finite

    whole = NamedSharding(place.mesh, PartitionSpec())
    return jax.jit(insert, donate_argnums=0, out_shardings=(place, whole))


def _check_tied(folder: Path, files: Mapping[str, File]) -> None:
    """A head in the files of a tied model must be the embedding once more."""
    embedding, head = (files[name].opened.get_slice(name) for name in (_EMBEDDING, _HEAD))
    entries, _ = embedding.get_shape()
    parts = (slice(i, min(i + _COMPARED, entries)) for i in range(0, entries, _COMPARED))
    if any((embedding[part] != head[part]).any() for part in parts):
        raise ValueError(
            f"{folder}: {CONFIG} has tie_word_embeddings true, and {_HEAD} differs from "
            f"{_EMBEDDING}. One of the two is wrong."
        )


def _exported(
    architecture: Qwen3, params: Params, dtype: Dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors by name, one at a time, kernels `[out, in]`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        for layer, name in enumerate(_names(architecture, path)):
            one = jnp.asarray(leaf[layer] if _is_stacked(path) else leaf)
            x = on_host((one.T if _is_kernel(path) else one).astype(dtype))
            if not np.isfinite(x).all():
                raise ValueError(f"{name} contains NaN or Inf; the model was not written.")
            yield name, np.ascontiguousarray(x)


def _names(architecture: Qwen3, path: Any) -> list[str]:
    """The names of a leaf's tensors: one of each layer if it is stacked."""
    name = _NAMES[jax.tree_util.keystr(path, simple=True, separator="/")]
    layers = architecture.layers if _is_stacked(path) else 1
    return [name.format(layer) for layer in range(layers)]


def _shape_of_one(path: Any, shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a leaf's shape, or its axes' names, those of one tensor in a file."""
    one = shape[_is_stacked(path) :]
    return one[::-1] if _is_kernel(path) else one


def _is_stacked(path: Any) -> bool:
    return path[0].key == "layers"


def _is_kernel(path: Any) -> bool:
    return path[-1].key == "kernel"
