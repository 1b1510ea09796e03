"""`python -m experiments.report FOLDER` writes the report of any run or suite from its files."""

import tyro
from rich.console import Console

from experiments.commands import reporting
from experiments.report.studies import show


def main(folder: tyro.conf.Positional[str]) -> None:
    """Writes the report of a run, a suite or stored results from their files, without training.

    Args:
        folder: Folder of a run or suite, e.g. runs/grok/NAME, runs/pretrain/tiny or
            runs/finetune/controlled, or of stored results, e.g. experiments/grok/results/paper.
    """
    with reporting(folder):
        show(folder, Console())


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.report")
