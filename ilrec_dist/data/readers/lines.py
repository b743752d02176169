"""Text files in blocks of whole lines, and where in a file its rows stand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from ilrec_dist.errors import UserError

BLOCK_BYTES = 16 << 20
BLANK = np.isin(np.arange(256), list(b" \t\r\n"))


def line_blocks(path: Path, size: int = BLOCK_BYTES) -> Iterator[tuple[bytes, int]]:
    """(whole lines as bytes, number of the first one), a block at a time; unpacked by the file's ending."""
    line = 1
    rest = b""
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            while chunk := stream.read(size):
                cut = chunk.rfind(b"\n") + 1
                if cut == 0:
                    rest += chunk
                    continue
                block, rest = rest + chunk[:cut], chunk[cut:]
                yield block, line
                line += block.count(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read near line {line}: {error}") from None
    if rest.strip():
        yield rest, line


def filled_lines(block: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(where each line that is not blank begins, its number from 0), both int64."""
    content = np.frombuffer(block, np.uint8)
    if len(content) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.flatnonzero(content[:-1] == ord("\n")) + 1])
    numbers = np.flatnonzero(np.logical_or.reduceat(~BLANK[content], starts))
    return starts[numbers], numbers
