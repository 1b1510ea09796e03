"""`python -m experiments.report FOLDER`: draws the report of any run or suite again."""

import tyro
from rich.console import Console

from experiments.commands import reporting
from experiments.report.studies import show


def main(folder: tyro.conf.Positional[str]) -> None:
    """Write the report of a run, a suite or stored results from their files; nothing is trained.

    Args:
        folder: The run's, e.g. runs/grok/NAME, runs/pretrain/tiny or runs/finetune/controlled, or
            one of experiments/*/results.
    """
    with reporting(folder):
        show(folder, Console())


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.report")
