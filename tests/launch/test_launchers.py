"""The launchers, as far as a machine without
SLURM, Kubernetes and docker can try them.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "launchers"
# Stand-ins: the node's part of srun, and a Ray that runs the command behind `--` on the head.
STAND_INS = {
    "scontrol": 'printf "node1\\nnode2\\n"',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "ray": """
[ "$RAY_FAILS" = no ] || exit 0
stat -c %a "$RAY_AUTH_TOKEN_PATH" >token-mode; cp "$RAY_AUTH_TOKEN_PATH" token-copy
echo "$RAY_AUTH_MODE $*" >ray-arguments
while [ "$1" != -- ]; do shift; done; shift; exec "$@"
""",
    "ilrec": 'echo "$@" >ilrec-arguments; exit 7',
}


def submit(tmp_path: Path, ray_fails: str) -> subprocess.CompletedProcess[str]:
    binaries = tmp_path / ".venv/bin"
    binaries.mkdir(parents=True)
    for name, body in STAND_INS.items():
        (binaries / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (binaries / name).chmod(stat.S_IRWXU)
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2"}
    path = f"{binaries}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(LAUNCHERS / "slurm.sbatch"), "c.yaml", "launch.workers=16"],
        cwd=tmp_path,
        env={**os.environ, **job, "PATH": path, "RAY_FAILS": ray_fails},
        capture_output=True,
        text=True,
    )


def test_slurm_hands_one_private_token_to_all_nodes_and_ends_as_the_command_does(tmp_path):
    done = submit(tmp_path, "no")
    assert done.returncode == 7
    arguments = (tmp_path / "ray-arguments").read_text()
    assert arguments.startswith("token symmetric-run --address node1:20042 --min-nodes 2 -- ")
    command = (tmp_path / "ilrec-arguments").read_text().split()
    assert command == ["run", "c.yaml", "launch.workers=16", "launch.ray_address=node1:20042"]
    assert (tmp_path / "token-mode").read_text().strip() == "600"
    token = (tmp_path / "token-copy").read_text()
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert token not in done.stdout + done.stderr + arguments
    assert not list(tmp_path.glob(".ilrec-42-*"))


def test_slurm_says_so_where_ray_did_not_start_though_it_ended_well(tmp_path):
    done = submit(tmp_path, "yes")
    assert done.returncode == 1 and "did not start on all 2 nodes" in done.stderr
    assert not list(tmp_path.glob(".ilrec-42-*"))


def containers(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    return container


def test_the_rayjob_asks_for_as_many_gpus_as_its_command_has_workers():
    spec = yaml.safe_load((LAUNCHERS / "kuberay.yaml").read_text())["spec"]
    cluster = spec["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    head, worker = containers(cluster["headGroupSpec"]), containers(workers)
    settings = dict(word.split("=", 1) for word in shlex.split(spec["entrypoint"]) if "=" in word)
    gpus = worker["resources"]["limits"]["nvidia.com/gpu"]
    assert int(settings["launch.workers"]) == gpus * workers["replicas"]
    assert gpus % int(settings["launch.tp"]) == 0
    assert head["image"] == worker["image"]
    mounts = [{m["name"]: m["mountPath"] for m in c["volumeMounts"]} for c in (head, worker)]
    assert mounts[0]["data"] == mounts[1]["data"]
    assert settings["runs_dir"].startswith(mounts[0]["data"])


def test_the_image_has_what_the_rayjob_calls_and_copies_what_there_is():
    lines = (LAUNCHERS / "Dockerfile").read_text().splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line and line[0].isupper()]
    (folder,) = (rest for word, rest in instructions if word == "WORKDIR")
    job = yaml.safe_load((LAUNCHERS / "kuberay.yaml").read_text())
    assert job["spec"]["entrypoint"].startswith(f"{folder}/.venv/bin/ilrec run ")
    assert ["ENV", f"PATH={folder}/.venv/bin:$PATH"] in instructions
    for rest in (rest for word, rest in instructions if word == "COPY"):
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists(), source
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (chosen,) = (rest for word, rest in instructions if word == "ARG")
    for extra in chosen.removeprefix("EXTRA=").split(","):
        assert extra in extras["optional-dependencies"]


@pytest.mark.parametrize("path", sorted(LAUNCHERS.glob("*.sbatch")), ids=lambda path: path.name)
def test_the_scripts_are_bash(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
