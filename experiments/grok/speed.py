"""`python -m experiments.grok.speed`: our training step beside an equal PyTorch loop, in one run.

Both train the same transformer on the same batches of `mul`, without dropout. The two programs
take turns, so that a noisy machine disturbs both; what counts is the ratio.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments.grok import tasks
from experiments.grok.config import Cell, Config
from experiments.grok.model import FEED_FORWARD_RATIO, RMS_EPSILON, ROPE_BASE
from experiments.grok.train import compile_arm, split
from experiments.optimizers import AdamW, OptimizerName


def torch_model(vocabulary: int, config: Config) -> Any:
    """The grokking transformer in PyTorch, as its users would write it.

    Raises:
        ImportError: PyTorch is not installed.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    width, heads = config.width, config.heads

    def linear(fan_in: int, fan_out: int) -> nn.Linear:
        layer = nn.Linear(fan_in, fan_out, bias=False)
        nn.init.uniform_(layer.weight, -(fan_in**-0.5), fan_in**-0.5)
        return layer

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hidden = FEED_FORWARD_RATIO * width
            self.attention_norm = nn.RMSNorm(width, eps=RMS_EPSILON)
            self.feed_forward_norm = nn.RMSNorm(width, eps=RMS_EPSILON)
            self.query, self.key = linear(width, width), linear(width, width)
            self.value, self.out = linear(width, width), linear(width, width)
            self.gate, self.up = linear(width, hidden), linear(width, hidden)
            self.down = linear(hidden, width)

        def forward(self, x, sin, cos):
            def split_heads(y):
                return y.unflatten(-1, (heads, -1)).transpose(1, 2)

            def rotate(y):
                first, second = y.chunk(2, dim=-1)
                return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

            y = self.attention_norm(x)
            q, k = rotate(split_heads(self.query(y))), rotate(split_heads(self.key(y)))
            v = split_heads(self.value(y))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).flatten(2))
            y = self.feed_forward_norm(x)
            return x + self.down(F.silu(self.gate(y)) * self.up(y))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(vocabulary, width)
            self.blocks = nn.ModuleList(Block() for _ in range(config.layers))
            self.norm = nn.RMSNorm(width, eps=RMS_EPSILON)
            self.head = linear(width, vocabulary)

        def forward(self, tokens):
            half = width // heads // 2
            frequency = ROPE_BASE ** (-torch.arange(half) / half)
            angle = torch.arange(tokens.shape[1])[:, None] * frequency
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x, angle.sin(), angle.cos())
            return self.head(self.norm(x[:, -1]))

    return Model()


def load_weights(model: Any, params: Any) -> None:
    """Copies the Flax model's parameters into the PyTorch one."""
    import torch

    named = {
        "/".join(str(key) for key in path): np.asarray(leaf)
        for path, leaf in nnx.to_flat_state(params)
    }
    for name, parameter in model.named_parameters():
        path = name.replace(".", "/")
        for layer in ("query", "key", "value", "out"):
            path = path.replace(f"/{layer}/", f"/attention/{layer}/")
        for layer in ("gate", "up", "down"):
            path = path.replace(f"/{layer}/", f"/feed_forward/{layer}/")
        path = path.removesuffix("/weight")
        kind = {"embedding": "embedding"}.get(path, "scale" if "norm" in path else "kernel")
        value = named[f"{path}/{kind}"]
        with torch.no_grad():
            parameter.copy_(torch.tensor(value.T if kind == "kernel" else value))


def torch_optimizer(model: Any, adamw: AdamW) -> Any:
    """AdamW with the study's settings."""
    import torch

    return torch.optim.AdamW(
        model.parameters(),
        lr=adamw.learning_rate,
        betas=(adamw.b1, adamw.b2),
        eps=adamw.eps,
        weight_decay=adamw.weight_decay,
    )


def torch_epoch(config: Config) -> tuple[Callable[[], float], int]:
    """An epoch of the PyTorch loop as a call, and its steps."""
    import torch
    from torch.nn import functional as F

    table = tasks.table("mul")
    rows = torch.from_numpy(split(config, Cell("mul", "softmax", "adamw", 0)).train).long()
    tokens = torch.from_numpy(table.tokens).long()
    answers = torch.from_numpy(table.answers).long()
    model = torch_model(table.vocabulary, config)
    optimizer = torch_optimizer(model, config.adamw)
    steps = len(rows) // config.batch

    def epoch() -> float:
        total = 0.0
        for batch in rows[torch.randperm(len(rows))][: steps * config.batch].split(config.batch):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(tokens[batch]), answers[batch])
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total / steps

    return epoch, steps


def our_epoch(config: Config, optimizer: OptimizerName) -> tuple[Callable[[], Any], int]:
    """An epoch of our loop as a call, and its steps."""
    cell = Cell("mul", "softmax", optimizer, 0)
    program = compile_arm(config, cell)
    rows = jnp.asarray(split(config, cell).train)
    state = program.start(jnp.int32(0))

    def epoch() -> Any:
        nonlocal state
        state, loss = jax.block_until_ready(program.epoch(state, rows, jnp.int32(0), jnp.int32(1)))
        return loss

    return epoch, program.steps


def main(layers: int = 2, width: int = 128, batch: int = 512, rounds: int = 9) -> None:
    """Prints steps per second of PyTorch, ours with AdamW, and ours with Muon.

    Args:
        layers: transformer blocks.
        width: embedding size.
        batch: rows a step.
        rounds: epochs of each loop; they take turns, and the medians are compared.
    """
    config = Config(layers=layers, width=width, batch=batch)
    loops = {
        "PyTorch, AdamW": torch_epoch(config),
        "ours, AdamW": our_epoch(config, "adamw"),
        "ours, Muon": our_epoch(config, "muon"),
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds + 1):
        for name, (epoch, steps) in loops.items():
            began = time.perf_counter()
            epoch()
            times[name].append((time.perf_counter() - began) / steps)
    median = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}

    table = Table(title=f"{layers} layers, width {width}, batch {batch}: median of {rounds} epochs")
    for heading in ("loop", "ms a step", "steps/s", "× PyTorch", "÷ our AdamW step"):
        table.add_column(heading, justify="left" if heading == "loop" else "right")
    for name, seconds in median.items():
        table.add_row(
            name,
            f"{seconds * 1e3:.1f}",
            f"{1 / seconds:.1f}",
            f"{median['PyTorch, AdamW'] / seconds:.2f}",
            f"{seconds / median['ours, AdamW']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
