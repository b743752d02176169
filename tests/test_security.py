"""docs/security.md, line by line: what comes
from strangers is refused or shown, never run.
"""

from __future__ import annotations

import ast
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError

from ilrec_dist.cli.parser import build_parser
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import map_array, sha256_file
from ilrec_dist.config.load import load_config
from ilrec_dist.items.language_model import ExtendedTokenizer, LanguageModel
from ilrec_dist.model.hf.source import model_folder
from ilrec_dist.reporting.html.examples import Example, examples_section
from ilrec_dist.training import checkpoint
from ilrec_dist.training.optimizer_state import SavedState
from tests.support.language_models import make_language_model

ROOT = Path(__file__).resolve().parents[1]
# Names whose use would unpickle or run what a file says.
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"torch.load", "eval", "exec", "yaml.unsafe_load", "yaml.full_load"}


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "it ran"))


def test_no_module_unpickles() -> None:
    for path in [*(ROOT / "ilrec_dist").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        if path.is_relative_to(ROOT / "ilrec_dist/testing"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not FORBIDDEN & {name.name for name in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert node.module not in FORBIDDEN, path
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in CALLS, (path, node.lineno)
                for keyword in node.keywords:
                    if keyword.arg in ("allow_pickle", "trust_remote_code"):
                        assert ast.unparse(keyword.value) == "False", (path, node.lineno)


def test_an_array_file_with_objects_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    np.save(tmp_path / "a.npy", np.array([Payload(marker)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):
        map_array(tmp_path / "a.npy")
    assert not marker.exists()


def test_a_pickle_in_place_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = tmp_path / "checkpoints/step-00000001"
    folder.mkdir(parents=True)
    part = folder / "part-00000.safetensors"
    part.write_bytes(pickle.dumps(Payload(marker)))
    manifest = {"format": checkpoint.FORMAT, "step": 1, "fingerprint": "f", "state": {}}
    for sha256 in ("0" * 64, sha256_file(part)):
        text = json.dumps({**manifest, "sha256": {part.name: sha256}})
        (folder / checkpoint.MANIFEST).write_text(text)
        if sha256 == "0" * 64:
            with pytest.raises(UserError, match=f"{part}: .*SHA-256"):
                checkpoint.latest(folder.parent, "f")
            continue
        found, _ = checkpoint.latest(folder.parent, "f")
        assert found is not None
        with pytest.raises(SafetensorError):
            SavedState.open(found.parts)
    assert not marker.exists()


def test_a_configuration_makes_no_objects(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "c.yaml"
    path.write_text(f"name: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises(UserError, match=f"^{path}: malformed YAML"):
        load_config(path)
    assert not marker.exists()


def test_code_of_a_model_folder_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = make_language_model(tmp_path / "model", ["one", "two"])
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Evil: pass\n"
    )
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        tree = json.loads((folder / name).read_text())
        tree["auto_map"] = {key: ["evil.Evil", "evil.Evil"]}
        (folder / name).write_text(json.dumps(tree))
    try:
        ExtendedTokenizer(LanguageModel(folder, 500), ["<a_0>"])
    except UserError:
        # To refuse the folder is as good.
        pass
    assert not marker.exists()


def test_nothing_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no local folder or file; .* nothing is downloaded"):
        model_folder("someone/some-model", tmp_path)


def test_titles_are_escaped_in_the_report() -> None:
    title = "<script>alert(1)</script>"
    example = Example(title, history=[title], target=title, methods={title: [(title, -1.0)]})
    page = examples_section([example])
    assert title not in page and "&lt;script&gt;" in page


def test_the_server_listens_on_loopback_by_default() -> None:
    arguments = build_parser().parse_args(["serve", "runs/quickstart"])
    assert arguments.host == "127.0.0.1"
