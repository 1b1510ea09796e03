"""Reads the rows of a .parquet file, in a separate process with bounded memory.

An untrusted file may expand to any size, since its encodings can repeat a long string any number of
times. `experiments.language.documents` runs this file as a script and reads pickles from its
output, each after its length in eight bytes: a row, or a text that says what is wrong. The script
imports nothing else of this repository.
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
_ROWS, _BUFFER = 16, 1 << 20  # rows decoded at a time, and bytes read at a time


def _rows(file: str, columns: list[str]) -> Iterator[dict[str, Any] | str]:
    try:
        with parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False) as rows:
            names = rows.schema_arrow.names
            known = [name for name in names if name in columns]
            if not known:
                wanted = " or ".join(f'"{name}"' for name in columns)
                yield f"has no column {wanted}, but {', '.join(names)}"
                return
            for batch in rows.iter_batches(_ROWS, columns=known, use_threads=False):
                yield from batch.to_pylist()
    except MemoryError:  # includes pyarrow's own
        yield f"takes more than {MEMORY >> 20} MB to read; convert it to .jsonl"
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        yield f"cannot be read: {error}"


def main() -> None:
    """Writes the rows of the file and columns that are given as command-line arguments."""
    file, *columns = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for row in _rows(file, columns):
        packed = pickle.dumps(row)
        sys.stdout.buffer.write(LENGTH.pack(len(packed)) + packed)


if __name__ == "__main__":
    main()
