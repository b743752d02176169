"""Text files in blocks of whole lines, and where in a file its rows stand."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from ilrec_dist.common.errors import UserError

BLOCK_BYTES = 16 << 20
UNBROKEN = bytes.maketrans(b"\r\n", b"  ")
BLANK = np.isin(np.arange(256), list(b" \t\r\n"))


def line_blocks(path: Path, size: int = BLOCK_BYTES) -> Iterator[tuple[bytes, int]]:
    """(whole lines as bytes, number of the first one), a block at a time; unpacked by the file's ending; without a byte order mark."""
    line = 1
    rest = b""
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            rest = stream.read(len(BOM_UTF8)).removeprefix(BOM_UTF8)
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


class RecordLines:
    """The lines on which a delimited file's records begin, found in one pass over it, however many are asked for.

    A record ends at a line break outside quotes; a quote opens only at the beginning of a field; empty lines are no records. So pyarrow counts.
    """

    def __init__(self, path: Path, delimiter: str, quoted: bool, header: int) -> None:
        """header: lines of the file that come before the first record."""
        self.blocks = line_blocks(path)
        field = rb'(?:\A|(?<=[%b\r\n]))"[^"]*+(?:""[^"]*+)*+(?:"|\Z)' % re.escape(
            delimiter.encode()
        )
        self.quoted = re.compile(field) if quoted else None
        self.header = header
        self.open = False  # the next block begins within quotes
        self.floor = 1
        self.first, self.lines = 1, np.zeros(0, np.int64)  # of records first, first + 1, …

    def forget(self, before: int) -> None:
        """No record before that one will be asked for again."""
        self.floor = before

    def of(self, records: np.ndarray) -> list[int]:
        """Line numbers of records, both from 1."""
        while self.first + len(self.lines) <= records.max(initial=0) and (
            block := next(self.blocks, None)
        ):
            self.lines = np.concatenate([self.lines, self._begin(*block)])
            passed = min(max(self.floor - self.first, 0), len(self.lines))
            self.first, self.lines = self.first + passed, self.lines[passed:]
        return self.lines[records - self.first].tolist()

    def _begin(self, block: bytes, first_line: int) -> np.ndarray:
        within = self.open
        content = np.frombuffer(self._unbroken(block), np.uint8)
        ends = (content == ord("\n")) | (content == ord("\r"))
        begins = ~ends
        begins[1:] &= ends[:-1]
        begins[0] &= not within
        breaks = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
        lines = first_line + np.searchsorted(breaks, np.flatnonzero(begins))
        return lines[lines > self.header]

    def _unbroken(self, block: bytes) -> bytes:
        """The block with spaces for the line breaks within quotes."""
        if self.quoted is None or not (self.open or b'"' in block):
            return block
        opened = b'"' * self.open
        self.open = False

        def unbreak(match: re.Match[bytes]) -> bytes:
            self.open = match.end() == len(
                match.string
            )  # a block ends with a line break, so this field does not end there
            return match[0].translate(UNBROKEN)

        return self.quoted.sub(unbreak, opened + block)[len(opened) :]
