"""Opening text files, plain or compressed, as bytes and as text."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from ilrec_dist.common.errors import UserError

INPUT_BYTES = 256 << 10
# `wbits` of zlib: a gzip header and trailer around the data.
GZIP = 16 + zlib.MAX_WBITS
# What reading a damaged compressed file raises.
UNPACK_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)


class GzipStream(io.RawIOBase):
    """The unpacked bytes of a gzip file.

    All its members; zero bytes behind one are padding.

    Tapes and some object stores pad files with zero bytes. Arrow's own reader refuses
    these.
    """

    def __init__(self, path: Path) -> None:
        self.file = open(path, "rb")
        self.packed = b""
        self.inflate: Any = None

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        """Up to `size` bytes, fewer only at the end. Raises one of UNPACK_ERRORS."""
        parts: list[bytes] = []
        missing = -1 if size is None else size
        while missing != 0 and (data := self._inflate_block(max(missing, 0))):
            parts.append(data)
            if missing > 0:
                missing -= len(data)
        return b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _inflate_block(self, size: int) -> bytes:
        """At least one and at most `size` bytes (0: any number); none at the end."""
        while True:
            if (self.inflate is None or self.inflate.eof) and not self._next_member():
                return b""
            if not self.packed:
                self.packed = self.file.read(INPUT_BYTES)
                if not self.packed:
                    raise EOFError("Compressed file ended before its end-of-stream marker")
            data: bytes = self.inflate.decompress(self.packed, size)
            self.packed = self.inflate.unconsumed_tail
            if self.inflate.eof:
                self.packed = self.inflate.unused_data
            if data:
                return data

    def _next_member(self) -> bool:
        """Pass over padding to the next member; False at the end of the file."""
        if self.inflate is not None:
            self.packed = self.packed.lstrip(b"\0")
        while len(self.packed) < 2 and (more := self.file.read(INPUT_BYTES)):
            self.packed += more
            if self.inflate is not None:
                self.packed = self.packed.lstrip(b"\0")
        if not self.packed:
            if self.inflate is None:
                raise EOFError("Compressed file ended before its end-of-stream marker")
            return False
        if not self.packed.startswith(b"\x1f\x8b"):
            raise gzip.BadGzipFile(f"Not a gzipped file ({self.packed[:2]!r})")
        self.inflate = zlib.decompressobj(GZIP)
        return True

    def close(self) -> None:
        self.file.close()
        super().close()


def open_bytes(path: Path) -> Any:
    """A file's bytes, unpacked as the ending of its name says.

    Has `read(size)` and `close()`.
    """
    if path.name.endswith(".gz"):
        return GzipStream(path)
    return pa.input_stream(str(path), compression="detect")


@contextmanager
def open_text(path: Path, encoding: str = "utf-8") -> Iterator[TextIO]:
    """A text file, unpacked where its name ends in .gz.

    Bytes that are no text are replaced, so this is for messages, headers and titles.
    """
    raw = GzipStream(path) if path.name.endswith(".gz") else open(path, "rb", buffering=0)
    try:
        with io.TextIOWrapper(
            io.BufferedReader(raw), encoding=encoding, errors="replace", newline="\n"
        ) as file:
            yield file
    except UNPACK_ERRORS as error:
        raise UserError(f"{path}: cannot be unpacked: {error}") from None
