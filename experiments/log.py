"""The log of a run: `metrics.jsonl`, and the same values for TensorBoard."""

import itertools
import json
import os
from typing import Any

from etils import epath
from tensorboardX import SummaryWriter

from experiments import sealed
from experiments.json_files import write_bytes
from experiments.runs import flat


class Log:
    """The records of a run by step, in a log of `experiments.sealed`, which survives any kill.

    `flush` seals records. A damaged line stays in the file, is reported in `damage`, and its record
    is not read.

    Args:
        folder: The run's folder. In gs:// and s3://, which cannot append, `flush` rewrites it all.
        step: Records of later steps are removed, since the run computes them again.
        config: The run's settings, for the seals.

    Attributes:
        records: The records in the file.
        damage: A description of what is wrong with the file.
    """

    def __init__(self, folder: epath.Path, step: int, config: dict[str, Any] | None = None):
        self._path = folder / "metrics.jsonl"
        self._remote = "://" in str(folder)
        self._config = config
        stored = sealed.read(self._path)
        blocks = [*itertools.takewhile(lambda block: block.seal["step"] <= step, stored.blocks)]
        later = [block.begin for block in stored.blocks[len(blocks) :]]
        later += [line for line, record in stored.tail if record["step"] > step]
        kept = stored.text[: min(later, default=len(stored.text))] if step >= 0 else []
        self._lines = [line + b"\n" for line in kept]
        self._sealed = blocks[-1].until if blocks else 0
        self.records = [record for block in blocks for record in block.records]
        self.damage = stored.damage if step >= 0 else []
        last = blocks[-1].seal["step"] if blocks else -1
        if last < step:
            self.damage = [*self.damage, f"the records of steps {last + 1} to {step} are missing"]
        self._pending: list[str] = []
        if len(self._lines) < len(stored.text) or stored.torn or not self._path.exists():
            self._write_all()
        self._file = None if self._remote else open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, **values: Any) -> None:
        """Adds a record of numbers, lists or dicts. Values that are not finite become None."""
        text = json.dumps({"step": step} | values)
        record = json.loads(text, parse_constant=lambda constant: None)
        self.records.append(record)
        self._pending.append(sealed.record_line(record))
        self._append(self._pending[-1])
        for name, value in flat(record).items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name.replace(".", "/"), value, step)

    def flush(self) -> None:
        """Seals the records. Call it before saving a checkpoint of these steps."""
        if self._pending:
            facts = {"step": self.records[-1]["step"], "config": self._config}
            self._append(sealed.seal_line(self._pending, self._sealed, **facts))
            self._sealed, self._pending = self._sealed + len(self._pending), []
        if self._file:
            os.fsync(self._file.fileno())
        else:
            self._write_all()
        self._board.flush()

    def close(self) -> None:
        self.flush()
        self._board.close()
        if self._file:
            self._file.close()

    def _append(self, line: str) -> None:
        self._lines.append(line.encode())
        if self._file:
            self._file.write(line)
            self._file.flush()

    def _write_all(self) -> None:
        write_bytes(self._path, b"".join(self._lines))


def read(folder: epath.Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns a run's records and the damage of its log; a last line cut by a kill is no damage."""
    stored = sealed.read(folder / "metrics.jsonl")
    sure = [record for block in stored.blocks for record in block.records]
    return sure + [record for _, record in stored.tail], stored.damage
