"""Text files in blocks of whole lines, and where in a file its rows stand."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from ilrec_dist.common.errors import UserError
from ilrec_dist.data.reading.streams import UNPACK_ERRORS, open_bytes

BLOCK_BYTES = 16 << 20
UNBROKEN = bytes.maketrans(b"\r\n", b"  ")
BLANK = np.isin(np.arange(256), list(b" \t\r\n"))


def line_blocks(path: Path, size: int = BLOCK_BYTES) -> Iterator[tuple[bytes, int]]:
    """Yield (whole lines as bytes, number of the first one), a block at a time.

    The file is unpacked as its ending says; a byte order mark is left out. Raises
    UserError naming the file and the line where it cannot be read on.
    """
    line = 1
    tail = b""
    try:
        with closing(open_bytes(path)) as stream:
            tail = stream.read(len(BOM_UTF8)).removeprefix(BOM_UTF8)
            while chunk := stream.read(size):
                cut = chunk.rfind(b"\n") + 1
                if cut == 0:
                    tail += chunk
                    continue
                block, tail = tail + chunk[:cut], chunk[cut:]
                yield block, line
                line += block.count(b"\n")
    except (OSError, *UNPACK_ERRORS) as error:
        raise UserError(f"{path}: cannot be read near line {line}: {error}") from None
    if tail.strip():
        yield tail, line


def filled_lines(block: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(where each line that is not blank begins, its number from 0), both int64."""
    content = np.frombuffer(block, np.uint8)
    if len(content) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.flatnonzero(content[:-1] == ord("\n")) + 1])
    numbers = np.flatnonzero(np.logical_or.reduceat(~BLANK[content], starts))
    return starts[numbers], numbers


class RecordLines:
    """The lines on which a delimited file's records begin, found in one pass over the
    file.

    A record ends at a line break outside quotes; a quote opens only at the beginning of
    a field; empty lines are no records. So pyarrow counts.
    """

    def __init__(self, path: Path, delimiter: str, quoted: bool, header: int) -> None:
        """header: lines of the file that come before the first record."""
        self.blocks = line_blocks(path)
        quoted_field = rb'(?:\A|(?<=[%b\r\n]))"[^"]*+(?:""[^"]*+)*+(?:"|\Z)'
        self.quoted = re.compile(quoted_field % re.escape(delimiter.encode())) if quoted else None
        self.header = header
        # Whether the next block begins within quotes.
        self.open = False
        # Records before this one are not asked for again.
        self.oldest = 1
        # The lines of records first, first + 1, …
        self.first, self.lines = 1, np.zeros(0, np.int64)

    def forget(self, before: int) -> None:
        """Say that no record before that one will be asked for again."""
        self.oldest = before

    def of(self, records: np.ndarray) -> list[int]:
        """Line numbers of records, both from 1."""
        while self.first + len(self.lines) <= records.max(initial=0) and (
            block := next(self.blocks, None)
        ):
            self.lines = np.concatenate([self.lines, self._begin(*block)])
            passed = min(max(self.oldest - self.first, 0), len(self.lines))
            self.first, self.lines = self.first + passed, self.lines[passed:]
        numbers: list[int] = self.lines[records - self.first].tolist()
        return numbers

    def _begin(self, block: bytes, first_line: int) -> np.ndarray:
        """The lines on which the records of a block begin."""
        within = self.open
        content = np.frombuffer(self._unbroken(block), np.uint8)
        ends = (content == ord("\n")) | (content == ord("\r"))
        begins = ~ends
        begins[1:] &= ends[:-1]
        begins[0] &= not within
        breaks = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
        lines = first_line + np.searchsorted(breaks, np.flatnonzero(begins))
        return np.asarray(lines[lines > self.header])

    def _unbroken(self, block: bytes) -> bytes:
        """The block with spaces for the line breaks within quotes."""
        if self.quoted is None or not (self.open or b'"' in block):
            return block
        opened = b'"' * self.open
        self.open = False

        def unbreak(match: re.Match[bytes]) -> bytes:
            # A block ends with a line break, so a field that reaches its end goes on.
            self.open = match.end() == len(match.string)
            return match[0].translate(UNBROKEN)

        return self.quoted.sub(unbreak, opened + block)[len(opened) :]
