"""Reads the rows of one .parquet, in a process of its own whose memory is bounded.

A file from elsewhere may expand to anything: a page names a long string by its number, or by how
much of the last one it repeats, as often as it likes. `experiments.language.documents` runs this
file, which imports nothing of ours, and reads pickles: a row, after its length in eight bytes, or a
text that says what is wrong.
"""

import pickle
import resource
import struct
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow
from pyarrow import parquet

MEMORY = 4 << 30  # bytes
LENGTH = struct.Struct("<Q")
_ROWS, _BUFFER = 16, 1 << 20  # that are decoded at a time, and bytes that are read


def _rows(file: str, columns: list[str]) -> Iterator[dict[str, Any] | str]:
    try:
        with parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False) as rows:
            names = rows.schema_arrow.names
            found = [name for name in names if name in columns]
            if not found:
                wanted = " or ".join(f'"{name}"' for name in columns)
                yield f"has no column {wanted}, but {', '.join(names)}"
                return
            for batch in rows.iter_batches(_ROWS, columns=found, use_threads=False):
                yield from batch.to_pylist()
    except MemoryError:  # pyarrow's own is one, too
        yield f"takes more than {MEMORY >> 20} MB to read; convert it to .jsonl"
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        yield f"cannot be read: {error}"


def main() -> None:
    """Writes the rows of the file and columns that are its arguments."""
    file, *columns = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for row in _rows(file, columns):
        packed = pickle.dumps(row)
        sys.stdout.buffer.write(LENGTH.pack(len(packed)) + packed)


if __name__ == "__main__":
    main()
