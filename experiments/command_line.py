"""The command line of every study: its options, and what those of earlier versions are called."""

import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

RENAMED = {
    "--arms": "--optimizers",
    "--optimizer": "--optimizers",
    "--final": "--final-lr-fraction",
    "--keep": "--max-checkpoints",
    "--patience": "--max-nonfinite-steps",
    "--name": "--out, the run's folder itself, as in --out runs/NAME",
}

Command = TypeVar("Command")


def parse(
    kind: type[Command], prog: str, arguments: Sequence[str] | None = None, **options: Any
) -> Command:
    """Reads a command line.

    Args:
        kind: dataclass whose fields are the options.
        prog: the command, as a user types it.
        arguments: by default those of this process.
        **options: further ones of `tyro.cli`.

    Raises:
        ValueError: an option has another name today; the message says which.
        SystemExit: help was asked for, or tyro refused the command line.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for word in arguments:
        name = word.partition("=")[0].replace("_", "-")
        if name in RENAMED:
            raise ValueError(f"{name} has been renamed; use {RENAMED[name]}.")
    return tyro.cli(kind, prog=prog, args=arguments, **options)
