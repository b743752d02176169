"""The example of kernels/README.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "kernels/README.md"


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    names: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), names)
    loss, shapes = capsys.readouterr().out.splitlines()
    assert re.match(r"loss \d+\.\d{4}, negatives a row \[[012]\.0(, [012]\.0){5}\]$", loss)
    assert shapes == "torch.Size([100, 16]) torch.Size([6, 16])"


def test_the_modules_it_names_exist():
    text = README.read_text(encoding="utf-8")
    library = README.parent / "ilrec_kernels"
    modules = {path.stem for path in library.rglob("*.py")} - {"__init__"}
    named = set(re.findall(r"`(?:\w+/)?(\w+)(?:\.py)?`", text))
    assert modules - named <= {"options", "kernels", "launch", "candidate_buffer"}
