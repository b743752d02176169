"""The launchers, as far as a machine without
SLURM, Kubernetes and docker can try them.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support.rayjob import RAY_JOB, schema_of

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "launchers"
# Stand-ins: the node's part of srun, and a Ray that runs the command behind `--` on the head.
STAND_INS = {
    "scontrol": 'printf "%s\\nnode2\\n" "${HEAD:-node1}"; seq -f node%.0f 3 "${NODES:-2}"',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "ray": """
[ "$RAY_FAILS" = no ] || exit 0
stat -c %a "$RAY_AUTH_TOKEN_PATH" >token-mode; cp "$RAY_AUTH_TOKEN_PATH" token-copy
echo "$RAY_AUTH_MODE $*" >ray-arguments
while [ "$1" != -- ]; do shift; done; shift; exec "$@"
""",
    "ilrec": """
echo "$@" >ilrec-arguments
[ "${ILREC_WAITS:-no}" = yes ] || exit 7
trap "exit 143" TERM
touch ilrec-waits
while true; do sleep 0.1; done
""",
}
PATIENCE_SECONDS = 30
# From the warning until a job is killed; the command takes at most a minute to end its workers.
GRACE_SECONDS = 120


def submit(tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    """The batch script of a job on two nodes, with stand-ins for what it calls."""
    binaries = tmp_path / ".venv/bin"
    binaries.mkdir(parents=True)
    for name, body in STAND_INS.items():
        (binaries / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (binaries / name).chmod(stat.S_IRWXU)
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2"}
    path = f"{binaries}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", str(LAUNCHERS / "slurm.sbatch"), "c.yaml", "launch.workers=16"],
        cwd=tmp_path,
        env={**os.environ, **job, "PATH": path, "RAY_FAILS": "no", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_slurm_hands_one_private_token_to_all_nodes_and_ends_as_the_command_does(tmp_path):
    job = submit(tmp_path)
    said = "".join(job.communicate(timeout=PATIENCE_SECONDS))
    assert job.returncode == 7
    arguments = (tmp_path / "ray-arguments").read_text()
    assert arguments.startswith("token symmetric-run --address node1:20042 --min-nodes 2 -- ")
    command = (tmp_path / "ilrec-arguments").read_text().split()
    assert command == ["run", "c.yaml", "launch.workers=16", "launch.ray_address=node1:20042"]
    assert (tmp_path / "token-mode").read_text().strip() == "600"
    token = (tmp_path / "token-copy").read_text()
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert token not in said + arguments
    assert not list(tmp_path.glob(".ilrec-42-*"))


def test_slurm_reads_a_list_of_nodes_that_fills_a_pipe(tmp_path):
    # Whoever writes the list is not ended for a reader that wants its first line only.
    job = submit(tmp_path, NODES="20000")
    _, errors = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 7, errors


def test_slurm_says_so_where_ray_did_not_start_though_it_ended_well(tmp_path):
    job = submit(tmp_path, RAY_FAILS="yes")
    _, errors = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 1 and "did not start on all 2 nodes" in errors
    assert not list(tmp_path.glob(".ilrec-42-*"))


def test_slurms_warning_ends_the_command_with_its_own_status(tmp_path):
    warnings = re.findall("^#SBATCH --signal=(.*)$", (LAUNCHERS / "slurm.sbatch").read_text(), re.M)
    # B: the batch shell alone.
    assert warnings == [f"B:TERM@{GRACE_SECONDS}"]
    job = submit(tmp_path, ILREC_WAITS="yes")
    until = time.monotonic() + PATIENCE_SECONDS
    while not (tmp_path / "ilrec-waits").exists():
        assert job.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    job.terminate()
    _, errors = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 143, errors
    assert not list(tmp_path.glob(".ilrec-42-*"))


def test_slurm_names_a_port_that_another_program_has(tmp_path):
    with socket.socket() as listener:
        for port in range(20000, 32768):
            with contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", port))
                break
        listener.listen()
        job = submit(tmp_path, HEAD="127.0.0.1", SLURM_JOB_ID=str(port - 20000))
        _, errors = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 1 and not (tmp_path / "ilrec-arguments").exists()
    assert f"another program on 127.0.0.1 has port {port}" in errors


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


def objects(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping of a YAML file, from the outside in."""
    if isinstance(tree, dict):
        yield tree
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    for child in children:
        yield from objects(child)


# KubeRay's own file of the definition, where somebody has it.
DEFINITIONS = [Path(path) for path in [os.environ.get("RAYJOB_CRD")] if path]


@pytest.mark.parametrize("definition", [None, *DEFINITIONS])
def test_the_rayjob_fits_its_definition_strictly(definition: Path | None) -> None:
    schema = RAY_JOB if definition is None else schema_of(definition)
    check = jsonschema.Draft202012Validator(schema)
    job = yaml.safe_load((LAUNCHERS / "kuberay.yaml").read_text())
    assert not [f"{error.json_path}: {error.message}" for error in check.iter_errors(job)]
    # A key that there is not, and a key that another object has, is an error wherever it stands.
    for number in range(len(list(objects(job)))):
        changed = copy.deepcopy(job)
        list(objects(changed))[number]["nonsense"] = []
        assert not check.is_valid(changed), list(objects(job))[number]
    cluster = job["spec"]["rayClusterSpec"]
    cluster["workerGroupSpecs"][0]["template"]["restartPolicy"] = "Never"
    assert not check.is_valid(job)


def test_the_rayjob_has_kuberay_make_a_token():
    cluster = yaml.safe_load((LAUNCHERS / "kuberay.yaml").read_text())["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    # KubeRay leaves what a pod says of tokens itself as it is.
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    names = [entry["name"] for group in groups for entry in containers(group).get("env", [])]
    assert not [name for name in names if name.startswith("RAY_AUTH_")]


@pytest.mark.slow
def test_the_rayjob_gives_the_command_time_to_end():
    spec = yaml.safe_load((LAUNCHERS / "kuberay.yaml").read_text())["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] == GRACE_SECONDS
    hook = containers(groups[0])["lifecycle"]["preStop"]["exec"]["command"]
    command = spec["entrypoint"].partition(" /")[0]
    # Among processes of their own, the hook ends this one and no other, and waits for it.
    script = (
        '(trap "" TERM; exec -a "$COMMAND x" sleep 1.5) & sleep 60 & other=$!; sleep 0.3; "$@"; '
        "kill -0 $other && ! pgrep -f '[/]opt/ilrec'"
    )
    if subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"]).returncode:
        pytest.skip("needs the right to make a process namespace")
    began = time.monotonic()
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "bash", "-c", script, "bash", *hook],
        env={**os.environ, "COMMAND": command},
    )
    assert done.returncode == 0 and time.monotonic() - began > 1.5


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


@pytest.mark.slow
def test_the_image_installs_from_what_it_copies(tmp_path):
    """The steps of `docker build` that need neither
    docker nor a registry, in a folder of their own.
    """
    text = (LAUNCHERS / "Dockerfile").read_text()
    source, extra = tmp_path / "source", re.search("^ARG EXTRA=(.*)$", text, re.M)[1]
    source.mkdir()
    for words in re.findall("^COPY (.*)$", text, re.M):
        *names, target = words.split()
        for name in names:
            # As docker does, a folder's content comes into the target, a file by its name.
            into = source / target if (ROOT / name).is_dir() else source / target / name
            if (ROOT / name).is_dir():
                leave_out = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, into, ignore=leave_out)
            else:
                shutil.copy(ROOT / name, into)
    (install,) = re.findall("^RUN make (install .*)$", text, re.M)
    said = subprocess.run(
        ["bash", "-c", f"make --dry-run {install}"],
        cwd=source,
        env={**os.environ, "EXTRA": extra},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    assert f"--constraint constraints.txt --editable '.[{extra},dev]'" in said.stdout
    # What pip would build there, without its own environment to build in.
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    built = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        (about,) = (name for name in names if name.endswith("/METADATA"))
        # The package's description.
        assert (ROOT / "README.md").read_bytes() in packed.read(about)
    assert about.replace("METADATA", "licenses/LICENSE") in names
    for folder, package in (("", "ilrec_dist"), ("kernels", "ilrec_kernels")):
        for path in (ROOT / folder / package).rglob("*"):
            if path.suffix in (".py", ".yaml"):
                assert str(path.relative_to(ROOT / folder)) in names
    # The command itself, from there alone.
    version = subprocess.run(
        [sys.executable, "-m", "ilrec_dist.cli", "--version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
    )
    assert version.returncode == 0 and wheel.name.split("-")[1] in version.stdout


@pytest.mark.parametrize("path", sorted(LAUNCHERS.glob("*.sbatch")), ids=lambda path: path.name)
def test_the_scripts_are_bash(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
