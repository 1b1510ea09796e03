"""The params of a model as the tensors of its Hugging Face folder: one table, read in both ways.

A row of `NAMES` has the path of a leaf, in its layer if it is of one, and the name of its tensor.
A leaf that is stacked has a tensor in each layer, and one of the experts' in each of these for
every expert. Kernels are `(fan_in, fan_out)` here and `(fan_out, fan_in)` in the files.
"""

import collections
import functools
import math
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.json_files import write_json
from experiments.language import hugging_face
from experiments.language.hugging_face import CONFIG, SHARD, File
from experiments.language.processes import on_host

Params = dict[str, Any]
Dtype = Literal["float32", "bfloat16"]

# In the order of the files; which rows a model has, its params say.
NAMES = {
    "embedding/embedding": "model.embed_tokens.weight",
    # Of each layer; after `model.layers.NUMBER.`:
    "attention_norm/scale": "input_layernorm.weight",
    "feed_forward_norm/scale": "post_attention_layernorm.weight",
    # Llama, Qwen2 with biases, and Qwen3 with norms.
    "attention/query/kernel": "self_attn.q_proj.weight",
    "attention/query/bias": "self_attn.q_proj.bias",
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key/kernel": "self_attn.k_proj.weight",
    "attention/key/bias": "self_attn.k_proj.bias",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
    "attention/value/kernel": "self_attn.v_proj.weight",
    "attention/value/bias": "self_attn.v_proj.bias",
    # DeepSeek-V3 and Moonlight, without compression of queries.
    "attention/latent/kernel": "self_attn.kv_a_proj_with_mqa.weight",
    "attention/latent_norm/scale": "self_attn.kv_a_layernorm.weight",
    "attention/key_value/kernel": "self_attn.kv_b_proj.weight",
    "attention/out/kernel": "self_attn.o_proj.weight",
    "feed_forward/router/kernel": "mlp.gate.weight",
    "feed_forward/router/bias": "mlp.gate.e_score_correction_bias",
    "feed_forward/gate/kernel": "mlp.gate_proj.weight",
    "feed_forward/shared/gate/kernel": "mlp.shared_experts.gate_proj.weight",
    "feed_forward/experts/gate": "mlp.experts.{}.gate_proj.weight",
    "feed_forward/up/kernel": "mlp.up_proj.weight",
    "feed_forward/shared/up/kernel": "mlp.shared_experts.up_proj.weight",
    "feed_forward/experts/up": "mlp.experts.{}.up_proj.weight",
    "feed_forward/down/kernel": "mlp.down_proj.weight",
    "feed_forward/shared/down/kernel": "mlp.shared_experts.down_proj.weight",
    "feed_forward/experts/down": "mlp.experts.{}.down_proj.weight",
    # After all layers:
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
EMBEDDING, HEAD = NAMES["embedding/embedding"], NAMES["head/kernel"]
_STACKS = ("layers", "dense_layers", "moe_layers")
# Entries of the vocabulary that are compared at once.
_COMPARED = 4096

# By row of NAMES: which column of our kernel each column of the files' is.
Columns = Mapping[str, np.ndarray]


class Tensor(NamedTuple):
    """One tensor of the files.

    Attributes:
        name: in the files.
        row: of `NAMES`.
        path: of the leaf that it is a part of.
        index: along the leaf's leading axes: of its layer, or of its expert and layer, or none.
        shape: in the files.
    """

    name: str
    row: str
    path: tuple[str, ...]
    index: tuple[int, ...]
    shape: tuple[int, ...]


def tensors(shapes: Params) -> list[Tensor]:
    """Those of a model, layer after layer; `shapes` are of its params, or the params themselves.

    Raises:
        ValueError: a leaf that is not in `NAMES`.
    """
    rows = {row: number for number, row in enumerate(NAMES)}
    dense = shapes.get("dense_layers")
    first = {"moe_layers": dense["attention_norm"]["scale"].shape[0] if dense else 0}
    found = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        path = tuple(key.key for key in keys)
        row = "/".join(path[path[0] in _STACKS :])
        if row not in NAMES:
            raise ValueError(f"NAMES has no tensor of the leaf {'/'.join(path)}.")
        for index in np.ndindex(leaf.shape[: _leading(path)]):
            name, layer = NAMES[row], -1 if row == "embedding/embedding" else math.inf
            if index:
                layer = first.get(path[0], 0) + index[-1]
                name = f"model.layers.{layer}.{name.format(*index)}"
            shape = _of_one(path, leaf.shape)
            found.append(((layer, rows[row], index), Tensor(name, row, path, index, shape)))
    return [tensor for _, tensor in sorted(found)]


def check(folder: Path, files: Mapping[str, File], shapes: Params) -> list[Tensor]:
    """The tensors of a model, all of which a folder has, and no other; reads their headers alone.

    Raises:
        ValueError: the folder lacks a tensor or has one too many, or one has another shape or
            dtype.
    """
    wanted = tensors(shapes)
    expected = {tensor.name: tensor.shape for tensor in wanted}
    if HEAD not in expected and HEAD in files:  # some writers repeat a tied embedding
        expected[HEAD] = expected[EMBEDDING]
    surplus, missing = files.keys() - expected.keys(), expected.keys() - files.keys()
    for what, names in (("lacks", missing), ("has, beyond its config,", surplus)):
        if names:
            raise ValueError(
                f"{folder} {what} {len(names)} tensor(s), the first being "
                f"{', '.join(sorted(names)[:3])}: its files are not of the model in its {CONFIG}."
            )
    for name, shape in expected.items():
        header = files[name].opened.get_slice(name)
        found, dtype = tuple(header.get_shape()), header.get_dtype()
        if found != shape or dtype not in ("F32", "BF16", "F16"):
            raise ValueError(
                f"{files[name].path}: {name} is {dtype} {found}; the model in {CONFIG} has F32, "
                f"BF16 or F16 {shape}. Download both files again, of one model and in one of these "
                "dtypes."
            )
    return wanted


def read(
    folder: Path,
    files: Mapping[str, File],
    shapes: Params,
    places: Params,
    columns: Columns = types.MappingProxyType({}),
) -> Params:
    """The params in a folder, float32, and where they are to lie.

    One tensor is read at a time, in its file's dtype, and a few are in the host's memory.

    Args:
        folder: of the model.
        files: of `hugging_face.open_tensors`.
        shapes: of the params.
        places: a sharding of each.
        columns: where the files have those of a kernel in another order.

    Raises:
        ValueError: as `check`, or a tensor has values that are not finite, or the model is tied and
            the files have a head that is not its embedding.
    """
    parts = collections.defaultdict(list)
    for tensor in check(folder, files, shapes):
        parts[tensor.path].append(tensor)
    if "head" not in shapes and HEAD in files:
        _check_tied(folder, files)

    def leaf(keys: Any, wanted: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.Array:
        path = tuple(key.key for key in keys)
        lies = NamedSharding(place.mesh, PartitionSpec(*_of_one(path, tuple(place.spec))))
        insert = _insertion(_is_kernel(path), place)
        stack = _leading(path)
        made: Any = jnp.zeros(wanted.shape, jnp.float32, device=place) if stack else None
        for tensor in parts[path]:
            file, order = files[tensor.name], columns.get(tensor.row)
            x = file.opened.get_tensor(tensor.name)
            x = x if order is None else x[np.argsort(order)]
            x = jax.make_array_from_callback(tensor.shape, lies, x.__getitem__)
            made, finite = insert(made, x, tensor.index)
            if not finite:  # which also waits, so that tensors do not pile up
                raise ValueError(
                    f"{file.path}: {tensor.name} contains NaN or Inf; download it again."
                )
        return made

    return jax.tree_util.tree_map_with_path(leaf, shapes, places)


@functools.cache
def _insertion(transposed: bool, place: NamedSharding) -> Callable[..., tuple[jax.Array, Any]]:
    """(leaf or None, a tensor of a file, index) -> the leaf with it, and whether it is finite."""

    def insert(leaf: Any, x: jax.Array, index: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        finite = jnp.all(jnp.isfinite(x))
        x = (x.T if transposed else x).astype(jnp.float32)
        return x if leaf is None else leaf.at[index].set(x), finite

    whole = NamedSharding(place.mesh, PartitionSpec())
    return jax.jit(insert, donate_argnums=0, out_shardings=(place, whole))


def _check_tied(folder: Path, files: Mapping[str, File]) -> None:
    """A head in the files of a tied model must be the embedding once more."""
    embedding, head = (files[name].opened.get_slice(name) for name in (EMBEDDING, HEAD))
    entries, _ = embedding.get_shape()
    parts = (slice(i, min(i + _COMPARED, entries)) for i in range(0, entries, _COMPARED))
    if any((embedding[part] != head[part]).any() for part in parts):
        raise ValueError(
            f"{folder}: {CONFIG} has tie_word_embeddings true, and {HEAD} differs from "
            f"{EMBEDDING}. One of the two is wrong."
        )


def write(
    folder: Path,
    params: Params,
    shapes: Params,
    config: Mapping[str, Any],
    dtype: Dtype,
    *,
    columns: Columns = types.MappingProxyType({}),
    shard: int = SHARD,
    beside: Callable[[Path], None] = lambda partial: None,
    order: Callable[[Tensor], Any] = lambda tensor: 0,
) -> None:
    """Makes a folder of a model.

    Of several processes all must call, and the first one writes.

    Args:
        folder: new or empty; it is there whole, or not at all.
        params: of the model; they may lie on a mesh.
        shapes: that they must have.
        config: for `config.json`.
        dtype: of the files; routers stay float32.
        columns: as `read` takes them.
        shard: bytes of a file of tensors at most, unless one tensor has more; so many are in the
            host's memory at a time.
        beside: writes what else belongs into the folder.
        order: what to sort the tensors by; by default layers follow each other.

    Raises:
        ValueError: these are not the model's params, or some are not finite, or the folder has
            something in it.
        OSError: the folder cannot be written.
    """
    _check_params(params, shapes)

    def one_by_one() -> Iterator[tuple[str, np.ndarray]]:
        for tensor in sorted(tensors(shapes), key=order):
            leaf = functools.reduce(lambda tree, key: tree[key], tensor.path, params)
            one = jnp.asarray(leaf[tensor.index] if tensor.index else leaf)
            # A rounded router would choose other experts.
            one = one.astype("float32" if "router" in tensor.path else dtype)
            x = on_host(one.T if _is_kernel(tensor.path) else one)
            if not np.isfinite(x).all():
                raise ValueError(f"{tensor.name} contains NaN or Inf; the model was not written.")
            permuted = columns.get(tensor.row)
            yield tensor.name, np.ascontiguousarray(x if permuted is None else x[permuted])

    if jax.process_index() > 0:
        collections.deque(one_by_one(), maxlen=0)  # its part in gathering them
        return
    with hugging_face.new_folder(folder) as partial:
        beside(partial)
        hugging_face.write_tensors(partial, one_by_one(), shard)
        write_json(partial / CONFIG, config)


def _check_params(found: Params, wanted: Params) -> None:
    def shapes(tree: Params) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in leaves}

    ours, theirs = shapes(found), shapes(wanted)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"The parameters are not of this model: {name} is {ours.get(name, 'missing')}, "
                f"but its config requires {theirs.get(name, 'none')}."
            )


def _is_kernel(path: tuple[str, ...]) -> bool:
    return path[-1] == "kernel" or "experts" in path


def _leading(path: tuple[str, ...]) -> int:
    """How many axes of a leaf come before those of its matrix or vector: experts and layers."""
    return (path[0] in _STACKS) + ("experts" in path)


def _of_one(path: tuple[str, ...], axes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a leaf's sizes, or its axes' names, those of one tensor in the files."""
    one = axes[_leading(path) :]
    return one[::-1] if _is_kernel(path) else one
