"""What a run tells on its way: `metrics.jsonl`, and the same for TensorBoard."""

import json
import math
from typing import Any

from etils import epath
from tensorboardX import SummaryWriter


class Log:
    """Records of a run by step, appended to a file that any kill leaves readable.

    Args:
        folder: the run's; in gs:// or s3://, where nothing can be appended, `flush` writes all.
        step: records of later steps are cut away: they come again.

    Attributes:
        records: what the file has.
    """

    def __init__(self, folder: epath.Path, step: int):
        self._path = folder / "metrics.jsonl"
        self._remote = "://" in str(folder)
        self.records = [r for r in read(folder) if r["step"] <= step]
        self._write_all()
        self._file = None if self._remote else open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, **values: Any) -> None:
        """Adds a record: numbers, lists or dicts of these, None for what is not finite."""
        record = {"step": step} | {key: _finite(value) for key, value in values.items()}
        self.records.append(record)
        if self._file:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        for name, value in _scalars(record):
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """To be called before a checkpoint says that these steps are done."""
        if self._remote:
            self._write_all()
        self._board.flush()

    def close(self) -> None:
        self.flush()
        self._board.close()
        if self._file:
            self._file.close()

    def _write_all(self) -> None:
        lines = (json.dumps(record, allow_nan=False) + "\n" for record in self.records)
        text = "".join(lines)
        if self._remote:
            self._path.write_text(text)
        else:
            partial = self._path.with_name(".metrics.jsonl.partial")
            partial.write_text(text)
            partial.replace(self._path)


def read(folder: epath.Path) -> list[dict[str, Any]]:
    """The records of a run; a last line that a kill cut short is none."""
    path = folder / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _scalars(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "step":
            found.append((prefix + key, float(value)))
    return found
