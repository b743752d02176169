"""A large JSON object, key by key.

What the streaming parser passes over in silence is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ijson

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import read_json_object

CHUNK_BYTES = 1 << 20
# Characters before half a surrogate pair that the error shows.
SHOWN_BEFORE = 30
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# The alternatives are tried in this order: a whole pair, half of one, any other escape.
ESCAPES = re.compile(
    rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<half>\\u[dD][89a-fA-F]..)|\\.", re.DOTALL
)


def stream_json_object(path: Path, strip_keys: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the (key, value) pairs of a JSON file that holds one object.

    Memory holds one value, and the keys so far. strip_keys: keys lose the blanks around
    them. A file with NaN or Infinity, which are not JSON but which Python writes, is
    read whole. Raises UserError naming the file and the line or key, also for an object
    that has a key twice and for half a surrogate pair.
    """
    seen: dict[str, None] = {}
    repeated: list[str] = []

    class NotingRepeats(dict[str, Any]):
        # An exception raised here would be lost in the parser's C code.
        def __setitem__(self, key: str, value: Any) -> None:
            if key in self:
                repeated.append(key)
            super().__setitem__(key, value)

    def checked(key: str) -> str:
        key = key.strip() if strip_keys else key
        if key in seen or repeated:
            twice = (repeated or [key])[0]
            raise UserError(
                f"{path}: the key {twice!r} occurs twice in one object; keep one of them"
            )
        seen[key] = None
        return key

    try:
        _refuse_half_pairs(path)
        with open(path, "rb") as file:
            for key, value in ijson.kvitems(file, "", use_float=True, map_type=NotingRepeats):
                yield checked(key), value
    except (ijson.JSONError, OSError) as error:
        reason = str(error).splitlines()[0]
        after = f"; the last key that was read is {next(reversed(seen))!r}" if seen else ""
        if "integer overflow" in reason:
            raise UserError(
                f"{path}: an integer beyond 64 bits{after}; write such ids as strings, in quotes"
            ) from None
        # This says where the file is malformed and how, if Python's parser refuses it too.
        whole = read_json_object(path)
        if "lexical error" not in reason:
            raise UserError(f"{path}: malformed JSON: {reason}{after}") from None
        for key in list(whole)[len(seen) :]:
            yield checked(key), whole.pop(key)
    if not seen:
        # The top is not an object, which raises, or it is an empty one.
        read_json_object(path)


def _refuse_half_pairs(path: Path) -> None:
    r"""Raise UserError where an escape such as \ud83d lacks the other half of its pair.

    The parser would put a question mark in its place.
    """
    tail, line = b"", 1
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            block = tail + chunk
            # No escape goes on behind a quote mark or a comma.
            cut = max(block.rfind(b'"'), block.rfind(b",")) + 1
            block, tail = block[:cut], block[cut:]
            for escape in ESCAPES.finditer(block) if SURROGATE.search(block) else ():
                if escape["half"]:
                    line += block.count(b"\n", 0, escape.start())
                    before = block[max(0, escape.start() - SHOWN_BEFORE) : escape.start()]
                    half, context = (
                        part.decode("utf-8", "replace") for part in (escape["half"], before)
                    )
                    raise UserError(
                        f"{path}: line {line}: {half} after {context!r} is half a surrogate pair: "
                        f"not text; mend it"
                    )
            line += block.count(b"\n")
