"""Conversion between a model's params and the tensors of its Hugging Face folder.

The table `NAMES` maps the path of a leaf (within its layer, if it belongs to one) to the name of
its tensor. A leaf that stacks layers has one tensor for each layer, and a leaf of routed experts
has one for each layer and expert. Kernels are `(fan_in, fan_out)` here and transposed in the files.
"""

import collections
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.cache import new_folder
from experiments.json_files import write_json
from experiments.language import hugging_face
from experiments.language.hugging_face import CONFIG, SHARD, File
from experiments.language.processes import on_host
from experiments.language.sharding import named_leaves

Params = dict[str, Any]
Dtype = Literal["float32", "bfloat16"]

# A model has the rows of the params that it has.
NAMES = {
    "embedding/embedding": "model.embed_tokens.weight",
    # For each layer, after the prefix `model.layers.NUMBER.`:
    "attention_norm/scale": "input_layernorm.weight",
    "feed_forward_norm/scale": "post_attention_layernorm.weight",
    # Llama; Qwen2, which has biases; and Qwen3, which has norms.
    "attention/query/kernel": "self_attn.q_proj.weight",
    "attention/query/bias": "self_attn.q_proj.bias",
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key/kernel": "self_attn.k_proj.weight",
    "attention/key/bias": "self_attn.k_proj.bias",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
    "attention/value/kernel": "self_attn.v_proj.weight",
    "attention/value/bias": "self_attn.v_proj.bias",
    # DeepSeek-V3 and Moonlight, without query compression.
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
# Number of vocabulary entries that are compared at once.
_COMPARED = 4096

# For rows of NAMES: the index of our kernel's column for each column in the files.
Columns = Mapping[str, np.ndarray]


class Tensor(NamedTuple):
    """One tensor of the files.

    Attributes:
        name: The name in the files.
        row: The row of `NAMES`.
        path: The path of the leaf that contains it.
        index: The index along the leaf's leading axes: (layer,), (expert, layer) or ().
        shape: The shape in the files.
    """

    name: str
    row: str
    path: tuple[str, ...]
    index: tuple[int, ...]
    shape: tuple[int, ...]


def tensors(shapes: Params) -> list[Tensor]:
    """Returns the tensors of a model with these params or shapes, leaf after leaf.

    Raises:
        ValueError: If a leaf is not in `NAMES`.
    """
    dense = shapes.get("dense_layers")
    first = {"moe_layers": dense["attention_norm"]["scale"].shape[0] if dense else 0}
    found = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        path = tuple(key.key for key in keys)
        row = "/".join(path[path[0] in _STACKS :])
        if row not in NAMES:
            raise ValueError(f"NAMES has no tensor of the leaf {'/'.join(path)}.")
        shape = _of_one(path, leaf.shape)
        for index in np.ndindex(leaf.shape[: _leading(path)]):
            name = NAMES[row].format(*index)
            if index:
                name = f"model.layers.{first.get(path[0], 0) + index[-1]}.{name}"
            found.append(Tensor(name, row, path, index, shape))
    return found


def check(folder: Path, files: Mapping[str, File], shapes: Params) -> list[Tensor]:
    """Checks the headers of a folder's tensors, and returns the tensors of the model.

    Raises:
        ValueError: If a tensor is missing, superfluous, or of another shape or dtype.
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
        actual, dtype = tuple(header.get_shape()), header.get_dtype()
        if actual != shape or dtype not in ("F32", "BF16", "F16"):
            raise ValueError(
                f"{files[name].path}: {name} is {dtype} {actual}; the model in {CONFIG} has F32, "
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
    """Reads the params in a folder, as float32 arrays with the given shardings.

    Tensors are read one at a time, in their file's dtype, and few are in host memory at once.

    Args:
        folder: The model's folder.
        files: The files, from `hugging_face.open_tensors`.
        shapes: The shapes of the params.
        places: The shardings of the params.
        columns: The columns' order of kernels whose columns are in another order in the files.

    Raises:
        ValueError: As for `check`; or if a tensor has NaN or infinity, or the model is tied and the
            files have a head that differs from the embedding.
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
        array: Any = jnp.zeros(wanted.shape, jnp.float32, device=place) if stack else None
        for tensor in parts[path]:
            file, order = files[tensor.name], columns.get(tensor.row)
            x = file.opened.get_tensor(tensor.name)
            x = x if order is None else x[np.argsort(order)]
            x = jax.make_array_from_callback(tensor.shape, lies, x.__getitem__)
            array, finite = insert(array, x, tensor.index)
            if not finite:  # this also waits, so that tensors do not pile up in memory
                raise ValueError(
                    f"{file.path}: {tensor.name} contains NaN or Inf; download it again."
                )
        return array

    return jax.tree_util.tree_map_with_path(leaf, shapes, places)


@functools.cache
def _insertion(transposed: bool, place: NamedSharding) -> Callable[..., tuple[jax.Array, Any]]:
    """Returns `(leaf or None, tensor, index) -> (leaf with the tensor, whether it is finite)`."""

    def insert(leaf: Any, x: jax.Array, index: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        finite = jnp.all(jnp.isfinite(x))
        x = (x.T if transposed else x).astype(jnp.float32)
        return x if leaf is None else leaf.at[index].set(x), finite

    whole = NamedSharding(place.mesh, PartitionSpec())
    return jax.jit(insert, donate_argnums=0, out_shardings=(place, whole))


def _check_tied(folder: Path, files: Mapping[str, File]) -> None:
    """Checks that the output head in the files of a tied model equals the embedding."""
    embedding, head = (files[name].opened.get_slice(name) for name in (EMBEDDING, HEAD))
    entries, _ = embedding.get_shape()
    parts = (slice(i, min(i + _COMPARED, entries)) for i in range(0, entries, _COMPARED))
    if any((embedding[part] != head[part]).any() for part in parts):
        raise ValueError(
            f"{folder}: {HEAD} must equal {EMBEDDING}, since {CONFIG} has tie_word_embeddings "
            "true, but they differ. Download the model again, or correct the setting."
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
) -> None:
    """Writes a model's folder. All processes must call it; the first one writes.

    Args:
        folder: A new or empty folder. It appears when it is complete.
        params: The model's params, which may be sharded.
        shapes: The shapes that the params must have.
        config: The content of `config.json`.
        dtype: The dtype of the files. Routers stay float32.
        columns: As for `read`.
        shard: Maximum bytes of a tensor file, unless a single tensor is larger. This much is in
            host memory at a time.
        beside: Writes the other files into the folder.

    Raises:
        ValueError: If the params are not the model's or not finite, or the folder is not empty.
        OSError: If the folder cannot be written.
    """
    _check_params(params, shapes)

    def one_by_one() -> Iterator[tuple[str, np.ndarray]]:
        for tensor in tensors(shapes):
            leaf = functools.reduce(lambda tree, key: tree[key], tensor.path, params)
            one = jnp.asarray(leaf[tensor.index] if tensor.index else leaf)
            # Rounding a router would change which experts it chooses.
            one = one.astype("float32" if "router" in tensor.path else dtype)
            x = on_host(one.T if _is_kernel(tensor.path) else one)
            if not np.isfinite(x).all():
                raise ValueError(f"{tensor.name} contains NaN or Inf; the model was not written.")
            permuted = columns.get(tensor.row)
            yield tensor.name, np.ascontiguousarray(x if permuted is None else x[permuted])

    if jax.process_index() > 0:
        collections.deque(one_by_one(), maxlen=0)  # takes part in gathering the arrays
        return
    with new_folder(folder) as partial:
        beside(partial)
        hugging_face.write_tensors(partial, one_by_one(), shard)
        write_json(partial / CONFIG, config)


def _check_params(found: Params, wanted: Params) -> None:
    ours, theirs = ({name: x.shape for name, x in named_leaves(t)} for t in (found, wanted))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"The parameters are not of this model: {name} is {ours.get(name, 'missing')}, "
                f"but its config requires {theirs.get(name, 'none')}."
            )


def _is_kernel(path: tuple[str, ...]) -> bool:
    return path[-1] == "kernel" or "experts" in path


def _leading(path: tuple[str, ...]) -> int:
    """Returns the number of leading axes of a leaf: those of experts and layers."""
    return (path[0] in _STACKS) + ("experts" in path)


def _of_one(path: tuple[str, ...], axes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the sizes (or names) of the axes of one tensor, from those of its leaf."""
    one = axes[_leading(path) :]
    return one[::-1] if _is_kernel(path) else one
