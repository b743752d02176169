"""Finished stages are taken over from run folders
with the same fingerprints and whole files.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from ilrec_dist.config.tree import Config
from ilrec_dist.pipeline.adopt import adopt_stages
from ilrec_dist.pipeline.execute import execute, open_run
from tests.support.tiny_run import tiny_config

SHARED = ["prepare", "index", "cf", "rewards"]


def named(name: str, runs_dir: Path, **sections: dict) -> Config:
    return dataclasses.replace(tiny_config(runs_dir, **sections), name=name)


def test_a_run_takes_over_what_another_has_finished_with_the_same_settings(tiny, tmp_path, capsys):
    config = tiny_config(tmp_path, objective={"cpd_mu": 0.5})
    run = open_run(config)
    assert adopt_stages(run, [tmp_path / "none", tiny / "tiny"]) == SHARED
    assert all(run.is_current(name) for name in SHARED)
    for name in ("data/sequences.npy", "items/trie.npy", "cf/full.safetensors"):
        assert (run.folder / name).stat().st_ino == (tiny / "tiny" / name).stat().st_ino
    capsys.readouterr()
    execute(config, "cf", verify=True)
    assert capsys.readouterr().out.count("unchanged, not run again") == 2
    assert adopt_stages(run, [tiny / "tiny"]) == []


def test_other_settings_and_damaged_files_are_not_taken_over(tiny, tmp_path):
    other = open_run(named("other", tmp_path, cf={"epochs": 1}))
    assert adopt_stages(other, [tiny / "tiny"]) == ["prepare", "index"]
    shutil.copytree(tiny / "tiny", tmp_path / "copy")
    damaged = tmp_path / "copy/items/trie.npy"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"abcd")
    run = open_run(named("new", tmp_path))
    assert adopt_stages(run, [tmp_path / "copy"], ["prepare", "index"]) == ["prepare"]


def test_what_another_command_has_begun_to_change_is_not_taken_over(tiny, tmp_path):
    shutil.copytree(tiny / "tiny", tmp_path / "copy")
    changed = open_run(named("copy", tmp_path, items={"seed": 7}))
    changed.begin("index")
    run = open_run(named("new", tmp_path))
    assert adopt_stages(run, [tmp_path / "copy"]) == ["prepare", "cf", "rewards"]
    assert not run.is_current("index")
