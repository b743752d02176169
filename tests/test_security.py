"""docs/security.md, line by line: what comes
from strangers is refused or shown, never run.
"""

from __future__ import annotations

import ast
import http.client
import io
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from rich.console import Console
from safetensors import SafetensorError

from ilrec_dist.cli import recommend as recommend_command
from ilrec_dist.cli.main import main
from ilrec_dist.cli.parser import build_parser
from ilrec_dist.common import console as console_module
from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import map_array, sha256_file
from ilrec_dist.common.manifest import with_checksum
from ilrec_dist.common.run_layout import COUNTER
from ilrec_dist.config.load import load_config
from ilrec_dist.items.language_model import ExtendedTokenizer, LanguageModel
from ilrec_dist.model.hf.hub import is_hub_id
from ilrec_dist.model.hf.source import model_folder
from ilrec_dist.reporting import trackers
from ilrec_dist.reporting.counter import Count, write_counter
from ilrec_dist.reporting.html.examples import Example, examples_section
from ilrec_dist.reporting.metrics_log import MetricsLog
from ilrec_dist.serving.app import make_server
from ilrec_dist.serving.backend import ScoredItem
from ilrec_dist.training import checkpoint
from ilrec_dist.training.saved_tensors import SavedTensors
from tests.support.language_models import make_language_model
from tests.support.tiny_run import tiny_config

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
    layout = {"tp": 1, "step": 1.0, "shapes": {}}
    manifest = {"format": checkpoint.FORMAT, "step": 1, "fingerprint": "f", "state": {}}
    manifest["layout"] = layout
    for sha256 in ("0" * 64, sha256_file(part)):
        written = with_checksum({**manifest, "sha256": {part.name: sha256}})
        (folder / checkpoint.MANIFEST).write_text(json.dumps(written))
        if sha256 == "0" * 64:
            with pytest.raises(UserError, match=f"{part}: .*SHA-256"):
                checkpoint.latest(folder.parent, "f")
            continue
        found, _ = checkpoint.latest(folder.parent, "f")
        assert found is not None
        with pytest.raises(SafetensorError):
            SavedTensors(found.path)
    # Nor is a file read that the manifest does not name, whatever its name is.
    part.rename(part.with_name("part-00001.safetensors"))
    written = with_checksum({**manifest, "sha256": {}})
    (folder / checkpoint.MANIFEST).write_text(json.dumps(written))
    with pytest.raises(UserError, match="part-00001.safetensors: .*not of this checkpoint"):
        checkpoint.latest(folder.parent, "f")
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


def test_nothing_is_downloaded_but_models_of_the_hub(tmp_path: Path) -> None:
    """What is downloaded of those: tests/language_model/test_hub.py."""
    for name in ("some-model", "https://host/model", "s3://bucket/model", "a/b/c"):
        assert not is_hub_id(name)
        with pytest.raises(UserError, match="no local folder or file"):
            model_folder(name, tmp_path)


def test_titles_are_escaped_in_the_report() -> None:
    title = "<script>alert(1)</script>"
    example = Example(title, history=[title], target=title, methods={title: [(title, -1.0)]})
    page = examples_section([example])
    assert title not in page and "&lt;script&gt;" in page


def test_titles_and_prompts_are_no_commands_to_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = io.StringIO()
    for module in (console_module, recommend_command):
        monkeypatch.setattr(
            module, "console", Console(file=terminal, force_terminal=True, width=200)
        )
    title = "Strings [pack of 7] [/bold]"
    # It would clear the screen, and these are 8-bit beginnings of such commands.
    hostile, written = "\x1b[2J\x07\x9b2J\x7f", r"\x1b[2J\x07\x9b2J\x7f"
    columns = {
        "user": ["[/x]", f"[/x]{hostile}"],
        "rank": [1, 2],
        "item": ["i", hostile],
        "title": [title, title + hostile],
        "score": [-1.0] * 2,
    }
    recommend_command.print_recommendations(pa.table(columns), 3)
    console_module.print_plain(f"prompt: {title}{hostile}\n  and so on")
    shown = terminal.getvalue()
    assert shown.count(title) == 3 and shown.count("[/x]") == 2 and "and 3 more users" in shown
    assert shown.count(written) == 4 and "\n  and so on" in shown
    # rich's own commands are for bold.
    assert not {"\x07", "\x9b", "\x7f"} & set(shown) and "\x1b[2J" not in shown


def test_a_run_folder_and_what_errors_quote_are_no_commands_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile, written = "\x1b[2J\x07\x9b2J\r\n", r"\x1b[2J\x07\x9b2J\x0d\x0a"
    run = tmp_path / "tiny"
    config = tiny_config(tmp_path, train={"methods": ["sft"]})
    (run / ".stages").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    (run / ".stages/config.sha256").write_text(sha256_file(run / "config.yaml"))
    begun = {"fingerprint": "f", "settings": {}}
    for stage in ("cf", "train sft seed 0"):
        (run / f".stages/{stage}.begun.json").write_text(json.dumps(begun))
    training = run / "train/sft-seed0"
    training.mkdir(parents=True)
    (training / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss/total": hostile}) + "\n")
    (run / "train/.attempts").mkdir()
    attempts = [
        {"time": 1.0, "workers": 1, "is_restart": is_restart, "reason": hostile}
        for is_restart in (False, True)
    ]
    lines = "".join(json.dumps(attempt) + "\n" for attempt in attempts)
    (run / "train/.attempts/attempts.jsonl").write_text(lines)
    worker = {"host": hostile, "node": "0", "process": 1}
    (run / "train/.attempts/rank-0.json").write_text(json.dumps(worker))
    (run / ".cf-work").mkdir()
    write_counter(run / ".cf-work" / COUNTER, Count("cf", 1, 2, hostile))
    assert main(["status", str(run)]) == 0
    shown = capsys.readouterr().out
    # The reason of the restart, the worker's host, and the note of the CF models.
    assert shown.count(written) == 3
    (tmp_path / "c.yaml").write_text('"\\e[2J\\x07\\x9b2J": 1\n')
    assert main(["config", str(tmp_path / "c.yaml")]) == 2
    error = capsys.readouterr().err
    assert r"\x1b[2J\x07\x9b2J" in error and error.count("\n") == 1
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(shown + error)


TRACKER = """
import json, os
from pathlib import Path

def note(*given):
    with open(Path(__file__).parent / "given.jsonl", "a") as file:
        file.write(json.dumps(given) + "\\n")

note({name: value for name, value in os.environ.items() if name.startswith(("WANDB", "MLFLOW"))})

def Settings(**given):
    return given

class Run:
    id = "a"

    def define_metric(self, *given, **named):
        pass

    def log(self, given):
        note(given)

    def finish(self, exit_code):
        pass

def init(**given):
    note(given)
    return Run()
"""


def test_a_tracker_gets_names_and_numbers_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    # What is set by the test is taken away after it.
    for name in trackers.RESERVE | trackers.PATIENCE:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    folder = tmp_path / "runs/tiny/train/sft-seed0"
    given = tmp_path / "given.jsonl"
    try:
        for tracker in (None, "wandb"):
            with MetricsLog(folder, 0, tracker) as log:
                log.write(10, 1.0, {"loss": {"total": 3.0}})
            assert given.exists() == (tracker == "wandb")
    finally:
        sys.modules.pop("wandb", None)
    environment, begun, logged = (json.loads(line)[0] for line in given.read_text().splitlines())
    assert environment.items() >= (trackers.RESERVE | trackers.PATIENCE).items()
    assert begun == {
        "project": "tiny",
        "name": "sft-seed0",
        "id": None,
        "resume": "allow",
        "dir": str(folder),
        "settings": {"console": "off", "silent": True},
    }
    assert logged == {"step": 10, "epoch": 1.0, "loss/total": 3.0}


class Echo:
    """Recommends the history itself."""

    def recommend(
        self, histories: Sequence[Sequence[str]], top: int, exclude_seen: bool
    ) -> list[list[ScoredItem]]:
        return [[ScoredItem(item, None, 0.0) for item in history] for history in histories]


def test_the_server_is_on_loopback_takes_little_and_keeps_no_log(
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = build_parser().parse_args(["serve", "runs/quickstart"])
    with make_server(Echo(), arguments.host, 0) as server:
        host, port = server.server_address[:2]
        assert host == "127.0.0.1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answers = []
        body = json.dumps({"histories": [["a-secret-item"]]})
        # What is announced is refused before anything of it is read.
        for length in (len(body), 16 << 20 | 1):
            client = http.client.HTTPConnection(str(host), port, timeout=10)
            client.request("POST", "/recommend", body, {"Content-Length": str(length)})
            answer = client.getresponse()
            answers.append((answer.status, json.load(answer)))
            client.close()
        server.shutdown()
    (taken, lists), (refused, reason) = answers
    assert taken == 200 and lists["recommendations"][0][0]["item"] == "a-secret-item"
    assert refused == 400 and "at most 16,777,216 bytes" in reason["error"]
    assert capfd.readouterr() == ("", "")


LOCAL_RAY = """
import contextlib, os, subprocess, sys
import psutil, ray
from ilrec_dist.launch.cluster import ray_session
from ilrec_dist.launch.config import LaunchConfig
strangers = dict(os.environ)
with ray_session(LaunchConfig(workers=1)):
    address = ray.get_runtime_context().gcs_address
    subprocess.run([sys.executable, "-c", sys.argv[1], address], env=strangers)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(word.endswith("/dashboard.py") for word in process.cmdline()):
                links = process.net_connections("inet")
                print("dashboard", [link.laddr for link in links if link.status == "LISTEN"])
"""
STRANGER = """
import sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None)
    print("connected")
except Exception as error:
    print(type(error).__name__, flush=True)
"""


@pytest.mark.slow
def test_a_local_ray_has_a_token_of_its_own_and_no_dashboard(tmp_path: Path) -> None:
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", LOCAL_RAY, STRANGER],
        env={**plain, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    # Ray starts the dashboard's process all the same, for its other duties; it serves nobody.
    assert done.stdout.split("\n") == ["AuthenticationError", "dashboard []", ""], done.stderr
    assert not list(tmp_path.rglob("*token*"))
