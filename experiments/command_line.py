"""Parses the command line of every study, and names the successors of renamed options."""

import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

RENAMED = {
    "--arms": "--optimizers",
    "--optimizer": "--optimizers",
    "--base.hidden": "--base.width",
    "--final": "--final-lr-fraction",
    "--keep": "--max-checkpoints",
    "--patience": "--max-nonfinite-steps",
    "--name": "--out, the run's folder itself, as in --out runs/NAME",
}

Command = TypeVar("Command")


def parse(
    kind: type[Command], prog: str, arguments: Sequence[str] | None = None, **options: Any
) -> Command:
    """Parses a command line.

    Args:
        kind: The dataclass whose fields are the options.
        prog: The command, as a user types it.
        arguments: The arguments, by default those of this process.
        **options: Further arguments of `tyro.cli`.

    Raises:
        ValueError: An option has been renamed; the message gives its new name.
        SystemExit: The user asked for help, or tyro rejected the command line.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for word in arguments:
        name = word.partition("=")[0].replace("_", "-")
        if name in RENAMED:
            raise ValueError(f"{name} has been renamed; use {RENAMED[name]}.")
    return tyro.cli(kind, prog=prog, args=arguments, **options)
