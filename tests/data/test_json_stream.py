"""What the streaming JSON parser would pass over in silence."""

from __future__ import annotations

import json
import random

import pytest

from ilrec_dist.common.errors import UserError
from ilrec_dist.common.json_stream import stream_json_object


@pytest.mark.parametrize("seed", range(8))
def test_half_pairs_are_found_wherever_blocks_end(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    whole = [
        "\\ud83d\\ude00",
        "\\\\ud83d",
        "\\\\\\\\",
        '\\"',
        "\\u00e9",
        "\\uDBFF\\uDFFF",
        "x",
        ",",
        "é",
    ]
    path = tmp_path / "some.json"
    for size in range(1, 40):
        monkeypatch.setattr("ilrec_dist.common.json_stream.CHUNK_BYTES", size)
        values = ["".join(rng.choices(whole, k=rng.randrange(6))) for _ in range(5)]
        path.write_text(
            "{" + ",\n".join(f'"{number}": "{value}"' for number, value in enumerate(values)) + "}"
        )
        assert dict(stream_json_object(path)) == json.loads(path.read_text())
        line = rng.randrange(5)
        values[line] += rng.choice(
            ["\\ud83d", "\\ude00", "\\ude00\\ud83d", "\\ud83dx\\ude00", "\\\\\\ud83d\\\\ude00"]
        )
        path.write_text(
            "{" + ",\n".join(f'"{number}": "{value}"' for number, value in enumerate(values)) + "}"
        )
        with pytest.raises(UserError, match=f"line {line + 1}: "):
            list(stream_json_object(path))
