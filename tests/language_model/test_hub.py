"""A model that is named by its id on the hub is
downloaded once, by a server of the hub's protocol.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from ilrec_dist.common.config_fields import config_to_dict
from ilrec_dist.pipeline.run_config import run_config
from tests.support.language_models import make_language_model, model_config

MODEL, COMMIT = "someone/tiny", "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The answers of the hub for one model, whose files are those of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sent = folder, set[str]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.split("?")[0]
        headers, content = {"X-Repo-Commit": COMMIT}, b""
        files = sorted(file.name for file in self.folder.iterdir())
        if path == f"/api/models/{MODEL}/revision/main":
            siblings = [{"rfilename": name} for name in files]
            content = json.dumps({"id": MODEL, "sha": COMMIT, "siblings": siblings}).encode()
        elif path == f"/api/models/{MODEL}/tree/{COMMIT}":
            entries = [{"type": "file", "path": name} | self.entry(name) for name in files]
            content = json.dumps(entries).encode()
        elif path.startswith(f"/{MODEL}/resolve/{COMMIT}/"):
            name = path.rsplit("/", 1)[-1]
            content, headers["ETag"] = (self.folder / name).read_bytes(), self.etag(name)
            self.sent |= {name} if body else set()
        else:
            request.send_error(404)
            return
        request.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(key, value)
        request.end_headers()
        if body:
            request.wfile.write(content)

    def etag(self, name: str) -> str:
        data = (self.folder / name).read_bytes()
        if name.endswith(".safetensors"):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def entry(self, name: str) -> dict[str, object]:
        size = (self.folder / name).stat().st_size
        entry: dict[str, object] = {"size": size, "oid": "0" * 40}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": self.etag(name), "size": size, "pointerSize": 1}
        return entry


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = make_language_model(tmp_path / "on the hub", ["red lamp", "green chair"])
    (folder / "modeling_tiny.py").write_text("raise SystemExit\n")
    hub = Hub(folder)
    yield hub
    hub.server.shutdown()


def ilrec(tmp_path: Path, endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the hub's library reads its settings when imported."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "ilrec_dist.cli", *arguments],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )


def test_a_model_of_the_hub_is_downloaded_once(tmp_path: Path, hub: Hub) -> None:
    file = tmp_path / "c.yaml"
    config = model_config(tmp_path / "runs", MODEL)
    file.write_text(yaml.safe_dump(config_to_dict(config)))
    endpoint = f"http://127.0.0.1:{hub.server.server_port}"

    # What reads no model needs no network.
    assert ilrec(tmp_path, endpoint, "config", str(file)).returncode == 0
    assert ilrec(tmp_path, endpoint, "prepare", str(file)).returncode == 0
    assert not hub.sent
    built = ilrec(tmp_path, endpoint, "index", "build", str(file))
    assert built.returncode == 0, built.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= hub.sent
    assert "modeling_tiny.py" not in hub.sent
    stored = run_config(config.run_dir).backbone.from_
    assert stored is not None and Path(stored).is_relative_to(tmp_path / "hub")
    weights = (hub.folder / "model.safetensors").read_bytes()
    assert (Path(stored) / "model.safetensors").read_bytes() == weights

    # A study's cells read it too.
    study = {"name": "study", "runs_dir": str(tmp_path / "runs"), "methods": ["sft"]}
    (tmp_path / "s.yaml").write_text(
        yaml.safe_dump(study | {"configurations": {"shop": {"config": "c.yaml"}}})
    )
    estimated = ilrec(tmp_path, endpoint, "study", str(tmp_path / "s.yaml"), "--estimate")
    assert estimated.returncode == 0, estimated.stderr

    # What is there is used without the hub.
    hub.sent.clear()
    hub.server.shutdown()
    hub.server.server_close()
    again = ilrec(tmp_path, endpoint, "index", "build", str(file))
    assert again.returncode == 0, again.stderr
    assert "unchanged" in again.stdout + again.stderr

    # Another model is not there, and nothing is made.
    other = ilrec(tmp_path, endpoint, "run", str(file), "backbone.from=someone/other", "name=other")
    assert other.returncode == 2 and other.stderr.count("\n") == 1, other.stderr
    assert "hf download someone/other --local-dir models/other" in other.stderr
    assert not (tmp_path / "runs/other").exists()
