"""Reads and writes a model's params in Hugging Face format, tensor by tensor."""

import shutil
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from experiments.finetune import architecture as config_json
from experiments.finetune.architecture import Architecture
from experiments.finetune.chat import copy_tokenizer
from experiments.finetune.model import Params, shapes, shardings
from experiments.language import tensors
from experiments.language.hugging_face import CONFIG, SHARD, open_tensors
from experiments.language.mesh import one_device
from experiments.language.tensors import Dtype

_GENERATION = "generation_config.json"


def check(folder: Path, architecture: Architecture) -> None:
    """Checks, from the files' headers, that a folder has the tensors of the model."""
    with open_tensors(folder, architecture.layers) as files:
        tensors.check(folder, files, shapes(architecture))


def read(folder: Path, mesh: Mesh | None = None) -> tuple[Architecture, Params]:
    """Reads the model in a folder, with float32 params that are sharded over the mesh.

    Args:
        folder: The folder, with `config.json` and safetensors of bfloat16, float16 or float32.
        mesh: The mesh, from `mesh.make_mesh`. None means the first device.

    Raises:
        ValueError, OSError: As for `tensors.read`, or if the model's family is not supported or the
            mesh does not divide an axis.
    """
    architecture = config_json.read(folder / CONFIG)
    with open_tensors(folder, architecture.layers) as files:
        places = shardings(architecture, mesh or one_device())
        return architecture, tensors.read(folder, files, shapes(architecture), places)


def write(
    folder: Path,
    architecture: Architecture,
    params: Params,
    tokenizer: Path | None = None,
    dtype: Dtype = "bfloat16",
    shard: int = SHARD,
    card: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes a folder that `AutoModelForCausalLM` and, with a tokenizer, `AutoTokenizer` load.

    Args:
        folder, params, dtype, shard: as `tensors.write` takes them.
        architecture: the model.
        card: writes `README.md`.
        tokenizer: a folder whose tokenizer, chat template and settings of generation go along.

    Raises:
        ValueError, OSError: As for `tensors.write`, or if the tokenizer's folder cannot be read.
    """

    def beside(partial: Path) -> None:
        card(partial)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
            if (tokenizer / _GENERATION).exists():
                shutil.copyfile(tokenizer / _GENERATION, partial / _GENERATION)

    dtypes = {"dtype": dtype, "torch_dtype": dtype}  # for transformers 5 and 4
    config = config_json.to_json(architecture) | dtypes
    wanted = shapes(architecture)
    tensors.write(folder, params, wanted, config, dtype, shard=shard, beside=beside)
