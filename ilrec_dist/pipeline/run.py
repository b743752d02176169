"""A run's folder and the state of its stages:
fingerprints, records, what is whole, the lock.

It knows stages only as `Stage` declares them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ilrec_dist.common.disk import not_writable
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.files import file_lock, sha256_file, sha256_json, write_json, write_text
from ilrec_dist.common.manifest import cached_sha256, with_checksum
from ilrec_dist.common.run_layout import CONFIG, CONFIG_SHA256, STAGES
from ilrec_dist.pipeline.records import (
    content_hash,
    damaged_file,
    describe_files,
    read_begun,
    read_record,
)
from ilrec_dist.pipeline.stage import Stage

# Raised when a stage's output changes for the same settings.
FORMAT = 5


class Run:
    """The stages of one configuration in one
    run folder, each after those it stands on.
    """

    def __init__(
        self, folder: Path, stages: Sequence[Stage], config_text: str, verify: bool = False
    ) -> None:
        self.folder, self.config_text = folder, config_text
        self.stages = {stage.name: stage for stage in stages}
        # Whether outputs are compared by their hashes, not by size and time alone.
        self.verify = verify
        self._fingerprints: dict[str, str] = {}

    # What decides whether a stage runs

    def fingerprint(self, name: str) -> str:
        """SHA-256 over the stage's settings, its
        inputs' bytes and the fingerprints before it.
        """
        if name not in self._fingerprints:
            stage = self.stages[name]
            parts = {
                "format": FORMAT,
                "settings": stage.settings,
                "inputs": [(path.name, cached_sha256(path)) for path in stage.inputs()],
                "after": [self.fingerprint(before) for before in stage.after],
            }
            self._fingerprints[name] = sha256_json(parts)
        return self._fingerprints[name]

    def fingerprints_before(self, name: str) -> dict[str, str]:
        """The fingerprints of the stages that this one stands on, by their names."""
        return {before: self.fingerprint(before) for before in self.stages[name].after}

    def record(self, name: str) -> dict[str, Any] | None:
        """The record of the stage's last complete run.

        None when there was none, when its output is gone, or when a later attempt with
        other settings or input was interrupted, so that the output may be of either.
        """
        record, begun = read_record(self.record_file(name)), self.begun(name)
        if record is None or not self.stages[name].output.exists():
            return None
        if begun is not None and begun["fingerprint"] != record["fingerprint"]:
            return None
        return record

    def begun(self, name: str) -> dict[str, Any] | None:
        """The fingerprint and settings of the stage's last attempt."""
        return read_begun(self.begun_file(name))

    def is_current(self, name: str) -> bool:
        return self.reason_to_run(name) is None

    def reason_to_run(self, name: str) -> str | None:
        """None where the stage is current; otherwise
        what it is, to follow "stage NAME".
        """
        record = self.record(name)
        if record is None:
            return "has not been made"
        if record["fingerprint"] != self.fingerprint(name):
            return "was made by another configuration or other input"
        damaged = damaged_file(self.stages[name].output, record, self.verify)
        if damaged is not None:
            return f"is damaged ({damaged} is missing or not what was written)"
        for before, digest in record["inputs"].items():
            earlier = self.record(before)
            if earlier is not None and content_hash(earlier) != digest:
                return f"stands on another output of stage {before}"
        return None

    def check_before(self, name: str, coming: Sequence[str]) -> None:
        """Every stage before this one must be
        current, unless it is among those `coming`.
        """
        for before in self.stages[name].after:
            if before not in coming:
                self.require_current(before)

    def require_current(self, name: str) -> None:
        """Raise UserError, which says what to run
        first, where the stage is not current.
        """
        reason = self.reason_to_run(name)
        if reason is not None:
            raise UserError(
                f"{self.folder}: stage {name} {reason}; run "
                f"`ilrec {self.stages[name].command} CONFIG` or `ilrec run CONFIG` first"
            )

    def check_resumable(self) -> None:
        """`--resume`: there is a run here, and what
        it finished or began is of these settings.
        """
        if not self.state_folder.is_dir():
            raise UserError(f"{self.folder}: nothing to resume; leave --resume out to start a run")
        for name in self.stages:
            latest = self.begun(name)
            if latest is not None and latest["fingerprint"] != self.fingerprint(name):
                raise UserError(
                    f"{self.folder}: stage {name} in this run folder is of another configuration "
                    f"or other input{self.changed_settings(name)}; resume with the configuration "
                    f"in {self.folder / CONFIG}, or leave --resume out to run what changed "
                    "anew"
                )

    def changed_settings(self, name: str) -> str:
        """ " (key: old → new, ...)" where the stage's
        last attempt had other settings, else "".
        """
        latest = self.begun(name)
        if latest is None or "settings" not in latest:
            return ""
        old, new = _flat(latest["settings"]), _flat(self.stages[name].settings)
        changes = [
            f"{key}: {old.get(key)} → {new.get(key)}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        return f" ({', '.join(changes)})" if changes else ""

    # What is written about a stage

    def begin(self, name: str) -> None:
        """Note that an attempt begins, and with which configuration."""
        self.state_folder.mkdir(parents=True, exist_ok=True)
        self._write_config()
        settings = json.loads(json.dumps(self.stages[name].settings))
        write_json(
            self.begun_file(name), {"fingerprint": self.fingerprint(name), "settings": settings}
        )

    def mend_config(self) -> None:
        """Write config.yaml again where it is not as the last command wrote it."""
        if self.state_folder.is_dir() and config_problem(self.folder) is not None:
            self._write_config()

    def _write_config(self) -> None:
        write_text(self.folder / CONFIG, self.config_text)
        digest = sha256_file(self.folder / CONFIG)
        write_text(self.state_folder / CONFIG_SHA256, f"{digest}\n")

    def finish(self, name: str, seconds: float) -> None:
        """Write the stage's record: what lies in its output now is whole."""
        stage = self.stages[name]
        earlier = {before: self.record(before) for before in stage.after}
        record = {
            "fingerprint": self.fingerprint(name),
            "seconds": seconds,
            "output": stage.output.relative_to(self.folder).as_posix(),
            "files": describe_files(stage.output, stage.required),
            "inputs": {
                before: content_hash(made) for before, made in earlier.items() if made is not None
            },
        }
        write_json(self.record_file(name), with_checksum(record))

    def stage_seconds(self) -> dict[str, float]:
        records = {name: self.record(name) for name in self.stages}
        return {name: record["seconds"] for name, record in records.items() if record is not None}

    # Where it is written

    @property
    def state_folder(self) -> Path:
        return self.folder / STAGES

    def record_file(self, name: str) -> Path:
        return self.state_folder / f"{name}.json"

    def begun_file(self, name: str) -> Path:
        return self.state_folder / f"{name}.begun.json"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Make the run's folder and hold it, so that one command at a time works in it.

        The system lets go of it when this process dies.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise not_writable(error, self.folder) or UserError(
                f"{self.folder}: cannot be used as the run's folder ({error.strerror}); choose "
                "another runs_dir or name"
            ) from None
        try:
            lock = file_lock(self.folder, wait=False)
            lock.__enter__()
        except BlockingIOError:
            raise UserError(
                f"{self.folder}: another ilrec command is at work in this folder; wait for its "
                "end, or choose another name"
            ) from None
        try:
            yield
        finally:
            lock.__exit__(None, None, None)


def config_problem(folder: Path) -> str | None:
    """Why a run's config.yaml is not to be read;
    None where it is as a command wrote it.
    """
    config, digest = folder / CONFIG, folder / STAGES / CONFIG_SHA256
    if not config.is_file():
        return f"{config}: missing"
    try:
        expected = digest.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return f"{config}: not known to be whole ({digest} is missing)"
    if sha256_file(config) == expected:
        return None
    return f"{config}: damaged or edited (its SHA-256 is not the one in {digest})"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
