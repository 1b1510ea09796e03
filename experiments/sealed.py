"""JSON lines under seals: a log comes back as it was written, or what is wrong with it is told.

A seal is a line with a `sha256`: the digest of each record that it seals, which are those since the
seal before, and at last its own. It also has the settings of what wrote them as `config`, and as
`before` how many records had been sealed already. Lines after the last seal are work that a kill
cut short, of which the last one may be torn: that is no damage.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.json_files import loads

_DIGITS = 16  # of a digest, which has to show damage and no malice


class Block(NamedTuple):
    """A seal, and what it seals.

    Attributes:
        records: those that are as they were written.
        seal: what it says itself, without its digests.
        lost: how many of its records are damaged or missing.
        begin: its first line, counted from 0.
        until: how many records are sealed with it.
    """

    records: list[dict[str, Any]]
    seal: dict[str, Any]
    lost: int
    begin: int
    until: int


class Lines(NamedTuple):
    """A log that was read.

    Attributes:
        blocks: oldest first.
        tail: records after the last seal, each with its line, counted from 0.
        damage: what is wrong with it, in words.
        text: of each line that is whole.
        torn: what is after these, of a line whose end was not written.
    """

    blocks: list[Block]
    tail: list[tuple[int, dict[str, Any]]]
    damage: list[str]
    text: list[bytes]
    torn: bytes

    @property
    def config(self) -> dict[str, Any] | None:
        """The settings under the last seal."""
        return self.blocks[-1].seal.get("config") if self.blocks else None


def record_line(record: dict[str, Any]) -> str:
    """A record as a line; a number that is not finite is a ValueError."""
    return json.dumps(record, allow_nan=False) + "\n"


def seal_line(records: Sequence[str], before: int, **said: Any) -> str:
    """The line that seals records.

    Args:
        records: their lines.
        before: how many have been sealed before.
        said: what the seal says; `config` is the settings of what wrote them.
    """
    seal = said | {"before": before}
    digests = [_digest(line.encode().removesuffix(b"\n")) for line in records]
    return record_line(seal | {"sha256": [*digests, _own(seal, digests)]})


def read(path: Any) -> Lines:
    """The lines of a log, none where there is no file.

    Raises:
        OSError: it cannot be read.
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
            damage.append(_told(lost, len(wanted), others, number))
        elif before != total:
            damage.append(f"{abs(before - total)} records before line {begin + 1} are missing")
        total, pending = until, []
    tail = [(at, value) for at, _, value in pending if value is not None and "sha256" not in value]
    if odd := [at for at, _, value in pending if value is None or "sha256" in value]:
        damage.append(f"line {odd[0] + 1} is damaged")
    return Lines(blocks, tail, damage, lines, torn)


def _told(lost: int, wanted: int, others: list[int], seal: int) -> str:
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
