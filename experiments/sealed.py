"""Logs of JSON lines with checksums, so that reading detects every damage.

A seal is a line whose `sha256` lists the digests of all records since the last seal, followed by
its own digest. Its `before` is the number of records that earlier seals cover, and its `config` the
settings of the run. Lines after the last seal are unfinished work that a kill interrupted, and the
last line may be incomplete. Neither is damage.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.json_files import loads

_DIGITS = 16  # of a digest, enough to detect accidental damage


class Block(NamedTuple):
    """A seal and its records.

    Attributes:
        records: The undamaged records.
        seal: The contents of the seal, without its digests.
        lost: The number of records that are damaged or missing.
        begin: The index of its first line.
        until: The number of records up to and including this seal.
    """

    records: list[dict[str, Any]]
    seal: dict[str, Any]
    lost: int
    begin: int
    until: int


class Lines(NamedTuple):
    """The contents of a log.

    Attributes:
        blocks: The seals with their records, oldest first.
        tail: The records after the last seal, each with the index of its line.
        damage: Descriptions of the damage.
        text: The complete lines.
        torn: The beginning of a last line whose end was not written.
    """

    blocks: list[Block]
    tail: list[tuple[int, dict[str, Any]]]
    damage: list[str]
    text: list[bytes]
    torn: bytes

    @property
    def config(self) -> dict[str, Any] | None:
        """The settings in the last seal."""
        return self.blocks[-1].seal.get("config") if self.blocks else None


def record_line(record: dict[str, Any]) -> str:
    """Returns a record as a line. Numbers that are not finite raise a ValueError."""
    return json.dumps(record, allow_nan=False) + "\n"


def seal_line(records: Sequence[str], before: int, **contents: Any) -> str:
    """Returns the line that seals records.

    Args:
        records: The lines of the records.
        before: The number of records that earlier seals cover.
        contents: The contents of the seal. `config` are the settings of the run.
    """
    seal = contents | {"before": before}
    digests = [_digest(line.encode().removesuffix(b"\n")) for line in records]
    return record_line(seal | {"sha256": [*digests, _own(seal, digests)]})


def read(path: Any) -> Lines:
    """Reads a log. A missing file gives an empty log.

    Raises:
        OSError: The file cannot be read.
    """
    text = path.read_bytes() if path.exists() else b""
    *lines, torn = text.split(b"\n")
    blocks: list[Block] = []
    damage: list[str] = []
    pending: list[tuple[int, bytes, dict[str, Any] | None]] = []
    total = 0
    for number, line in enumerate(lines):
        record = _object(line)
        if record is None or not _is_whole_seal(record):
            pending.append((number, line, record))
            continue
        *wanted, _ = record.pop("sha256")
        before = record.pop("before")
        left = list(wanted)
        found, others = [], []
        for at, other, value in pending:
            if value is not None and (digest := _digest(other)) in left:
                left.remove(digest)
                found.append((at, value))
            else:
                others.append(at)
        begin = found[0][0] if found else number
        lost, until = len(wanted) - len(found), before + len(wanted)
        blocks.append(Block([value for _, value in found], record, lost, begin, until))
        if lost or others:
            damage.append(_damage_text(lost, len(wanted), others, number))
        elif before != total:
            damage.append(f"{abs(before - total)} records before line {begin + 1} are missing")
        total, pending = until, []
    tail = [(at, value) for at, _, value in pending if value is not None and "sha256" not in value]
    if odd := [at for at, _, value in pending if value is None or "sha256" in value]:
        damage.append(f"line {odd[0] + 1} is damaged")
    return Lines(blocks, tail, damage, lines, torn)


def _damage_text(lost: int, wanted: int, others: list[int], seal: int) -> str:
    parts = []
    if lost:
        parts.append(
            f"{lost} of the {wanted} records before the seal in line {seal + 1} are damaged or "
            "missing"
        )
    if others:
        which = ", ".join(str(at + 1) for at in others[:5]) + (", …" if len(others) > 5 else "")
        parts.append(f"line{'s' * (len(others) > 1)} {which} without a valid seal")
    return ", with ".join(parts)


def _is_whole_seal(record: dict[str, Any]) -> bool:
    digests = record.get("sha256")
    if not isinstance(digests, list) or not digests or not isinstance(record.get("before"), int):
        return False
    seal = {key: value for key, value in record.items() if key != "sha256"}
    return digests[-1] == _own(seal, digests[:-1])


def _own(seal: dict[str, Any], digests: list[Any]) -> str:
    return _digest(json.dumps([seal, digests]).encode())


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:_DIGITS]


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        record = loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
