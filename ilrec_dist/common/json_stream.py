"""A large JSON object, key by key, with what the streaming parser would pass over in silence refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ijson

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object

CHUNK_BYTES = 1 << 20
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
ESCAPES = re.compile(
    rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<half>\\u[dD][89a-fA-F]..)|\\.", re.DOTALL
)  # in this order from left to right


def stream_json_object(path: Path) -> Iterator[tuple[str, Any]]:
    """As `read_json_object`, key by key: memory holds one value, and the keys so far.

    Raises UserError naming the file and the line or key, also for an object that has a key twice and for half a surrogate pair.
    """
    seen: dict[str, None] = {}
    repeated: list[str] = []

    class Noting(dict[str, Any]):  # an exception here would be lost in the parser's C code
        def __setitem__(self, key: str, value: Any) -> None:
            if key in self:
                repeated.append(key)
            super().__setitem__(key, value)

    try:
        _refuse_half_pairs(path)
        with open(path, "rb") as file:
            for key, value in ijson.kvitems(file, "", use_float=True, map_type=Noting):
                if key in seen or repeated:
                    raise UserError(
                        f"{path}: the key {(repeated or [key])[0]!r} occurs twice in one object; keep one of them"
                    )
                seen[key] = None
                yield key, value
    except (ijson.JSONError, OSError) as error:
        read_json_object(path)  # says where and what
        after = f"; the last key that was read is {next(reversed(seen))!r}" if seen else ""
        if "integer overflow" in str(error):
            raise UserError(
                f"{path}: an integer beyond 64 bits{after}; write such ids as strings, in quotes"
            ) from None
        raise UserError(f"{path}: malformed JSON: {str(error).splitlines()[0]}{after}") from None
    if not seen:
        read_json_object(path)  # not an object, or an empty one


def _refuse_half_pairs(path: Path) -> None:
    """UserError where an escape such as \\ud83d lacks the other half of its pair: the parser would put a question mark in its place."""
    rest, line = b"", 1
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            block = rest + chunk
            cut = (
                max(block.rfind(b'"'), block.rfind(b",")) + 1
            )  # no escape goes on behind either of them
            block, rest = block[:cut], block[cut:]
            for escape in ESCAPES.finditer(block) if SURROGATE.search(block) else ():
                if escape["half"]:
                    line += block.count(b"\n", 0, escape.start())
                    half, before = (
                        part.decode("utf-8", "replace")
                        for part in (
                            escape["half"],
                            block[max(0, escape.start() - 30) : escape.start()],
                        )
                    )
                    raise UserError(
                        f"{path}: line {line}: {half} after {before!r} is half a surrogate pair: not text; mend it"
                    )
            line += block.count(b"\n")
