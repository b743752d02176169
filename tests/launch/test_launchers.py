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
import psutil
import pytest
import yaml

from tests.support.commands import Commands
from tests.support.nodes import QUICK, Node, Nodes
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


def submit(commands: Commands, tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    """The batch script of a job on two nodes, with stand-ins for what it calls."""
    binaries = tmp_path / ".venv/bin"
    binaries.mkdir(parents=True)
    for name, body in STAND_INS.items():
        (binaries / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (binaries / name).chmod(stat.S_IRWXU)
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2"}
    path = f"{binaries}:{os.environ['PATH']}"
    return commands.start(
        ["bash", str(LAUNCHERS / "slurm.sbatch"), "c.yaml", "launch.workers=16"],
        cwd=tmp_path,
        env={**os.environ, **job, "PATH": path, "RAY_FAILS": "no", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_slurm_hands_one_private_token_to_all_nodes_and_ends_as_the_command_does(
    commands, tmp_path
):
    job = submit(commands, tmp_path)
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


def test_slurm_reads_a_list_of_nodes_that_fills_a_pipe(commands, tmp_path):
    # Whoever writes the list is not ended for a reader that wants its first line only.
    job = submit(commands, tmp_path, NODES="20000")
    _, errors = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 7, errors


def test_slurm_says_so_where_ray_did_not_start_though_it_ended_well(commands, tmp_path):
    job = submit(commands, tmp_path, RAY_FAILS="yes")
    _, errors = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 1 and "did not start on all 2 nodes" in errors
    assert not list(tmp_path.glob(".ilrec-42-*"))


def test_slurms_warning_ends_the_command_with_its_own_status(commands, tmp_path):
    warnings = re.findall("^#SBATCH --signal=(.*)$", (LAUNCHERS / "slurm.sbatch").read_text(), re.M)
    # B: the batch shell alone.
    assert warnings == [f"B:TERM@{GRACE_SECONDS}"]
    job = submit(commands, tmp_path, ILREC_WAITS="yes")
    until = time.monotonic() + PATIENCE_SECONDS
    while not (tmp_path / "ilrec-waits").exists():
        assert job.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    job.terminate()
    _, errors = job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == 143, errors
    assert not list(tmp_path.glob(".ilrec-42-*"))


def test_slurm_names_a_port_that_another_program_has(commands, tmp_path):
    with socket.socket() as listener:
        for port in range(20000, 32768):
            with contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", port))
                break
        listener.listen()
        job = submit(commands, tmp_path, HEAD="127.0.0.1", SLURM_JOB_ID=str(port - 20000))
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


class Machines(Nodes):
    """Two machines, each with its network, processes and
    /tmp/ray; the launcher starts Ray on them.
    """

    def _start(self, number: int, cpus: int, words: list[str]) -> Node:
        # As a machine's first process does, bash waits for those that have lost their parents; Ray
        # at its end would wait for those that nobody else does.
        stays = "mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && { sleep infinity & wait; }"
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        process = subprocess.Popen(self._inside(number, [*own, "bash", "-c", stays]))
        self.nodes.append(Node(number, self.address_of(number), process))
        return self.nodes[-1]

    def on(self, node: Node, folder: Path, command: list[str]) -> list[str]:
        """The command that runs this one in a folder on a machine."""
        until = time.monotonic() + PATIENCE_SECONDS
        while not (first := [one for one in self.processes(node) if comm(one) == "sleep"]):
            assert time.monotonic() < until and node.process.poll() is None
            time.sleep(0.05)
        enter = ["nsenter", f"--target={first[0]}", "--net", "--mount", "--pid"]
        return [*enter, "bash", "-c", 'cd "$1" && shift && exec "$@"', "bash", folder, *command]


def comm(process: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/comm").read_text().strip()
    return ""


# srun, which runs a job's command on all of its machines: on the head's here, and on the other the
# test does, to whom this machine's processes are all that there is.
SRUN = """
while [ "${1#--}" != "$1" ]; do shift; done
env -0 >environment; printf '%s\\0' "$@" >words; mv words other-command
status=0; "$@" || status=$?
date +%s.%N >head-ended
until [ -s other-status ]; do sleep 0.1; done
read -r other <other-status; exit $((status > other ? status : other))
"""
# Ports that Ray would take on the head, which another program has: those of its client server,
# dashboard and agent, and the first of its workers.
TAKEN_PORTS = (10001, 8265, 52365, 10002, 10003)
LISTEN = """
import socket, time
taken = [socket.create_server(("", port)) for port in %s]
print("listens", flush=True)
time.sleep(3600)
"""
# Until the nodes have found each other, which Ray looks for every five seconds.
CLUSTER_SECONDS = 300
# How long a node that asks for a head that is gone stays, and that Ray takes to end there.
LEAVE_SECONDS = 40


@contextlib.contextmanager
def another_program(machines: Machines, node: Node, folder: Path) -> Iterator[None]:
    """Has the ports that Ray would take."""
    listen = [sys.executable, "-S", "-c", LISTEN % (TAKEN_PORTS,)]
    entered = subprocess.Popen(machines.on(node, folder, listen), stdout=subprocess.PIPE)
    assert entered.stdout is not None
    try:
        assert entered.stdout.readline() == b"listens\n"
        yield
    finally:
        for child in psutil.Process(entered.pid).children():
            child.kill()
        entered.wait(PATIENCE_SECONDS)


@pytest.mark.slow
@pytest.mark.skipif("LAUNCHERS" not in os.environ, reason="`make launchers` runs it")
def test_slurm_starts_ray_on_two_nodes_for_the_command_and_ends_it(tmp_path: Path) -> None:
    machines = Machines(tmp_path, 0, **QUICK)
    try:
        if not machines.has_namespaces:
            pytest.skip("needs the right to make network namespaces")
        head, other = machines.nodes[0], machines.join(0)
        run_a_job_on(machines, head, other, tmp_path)
    finally:
        machines.close()


def run_a_job_on(machines: Machines, head: Node, other: Node, folder: Path) -> None:
    binaries = folder / ".venv/bin"
    binaries.mkdir(parents=True)
    scripts = {
        "scontrol": f'printf "%s\\n" {head.address} {other.address}',
        "srun": SRUN,
        "ray": f'exec {sys.executable} -m ray.scripts.scripts "$@"',
        "ilrec": f'exec {sys.executable} -m ilrec_dist.cli "$@"',
    }
    for name, body in scripts.items():
        (binaries / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (binaries / name).chmod(stat.S_IRWXU)
    # Both nodes together have the CPUs of this group, and neither has: the command compares what
    # all nodes of the cluster have before it trains.
    workers = 2 * (os.cpu_count() or 1)
    config = {
        "name": "tiny",
        "runs_dir": str(folder / "runs"),
        "data": {"synthetic": {"users": 150, "items": 60, "categories": 5, "mean_length": 7.0}},
        "items": {"levels": 2, "codes_per_level": 8},
        "cf": {"epochs": 1, "hidden_size": 16, "num_layers": 1},
        "backbone": {"num_layers": 1, "hidden_size": 8 * workers, "num_heads": workers},
        "train": {"methods": ["sft"], "epochs": 1},
        "launch": {"engine": "ray", "device": "cpu", "workers": workers, "tp": workers},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    (folder / "home").mkdir()
    environment = {k: v for k, v in machines.environment.items() if "RAY_AUTH" not in k}
    environment |= {"SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2"}
    environment |= {"HOME": str(folder / "home"), "PATH": f"{binaries}:{os.environ['PATH']}"}
    with (
        open(folder / "head.log", "w") as log,
        open(folder / "other.log", "w") as other_log,
        another_program(machines, head, folder),
    ):
        submitted = ["bash", str(LAUNCHERS / "slurm.sbatch"), "c.yaml"]
        job = subprocess.Popen(
            machines.on(head, folder, submitted), env=environment, stdout=log, stderr=log
        )
        until = time.monotonic() + CLUSTER_SECONDS
        while not (folder / "other-command").exists():
            assert job.poll() is None and time.monotonic() < until, (
                folder / "head.log"
            ).read_text()
            time.sleep(0.05)
        command = (folder / "other-command").read_text().split("\0")[:-1]
        given = (folder / "environment").read_text().split("\0")[:-1]
        task = subprocess.Popen(
            machines.on(other, folder, command),
            env=dict(entry.split("=", 1) for entry in given),
            stdout=other_log,
            stderr=other_log,
        )
        status = task.wait(CLUSTER_SECONDS)
        left = time.time()
        (folder / "other-status").write_text(f"{abs(status)}\n")
        code = job.wait(PATIENCE_SECONDS)
    said = (folder / "head.log").read_text()
    each = workers // 2
    line = f"ilrec: error: launch.tp {workers}: a tensor-parallel group lies on one node, and "
    line += f"{workers} CPUs on 2 nodes ("
    found = next((text for text in said.splitlines() if text.startswith(line)), None)
    assert found is not None, said + (folder / "other.log").read_text()
    assert f"{head.address}: {each}" in found and f"{other.address}: {each}" in found
    # The command's own status, whatever Ray's nodes end with.
    assert code == 2, said
    assert left - float((folder / "head-ended").read_text()) < LEAVE_SECONDS
    # Nothing of Ray is left, nor the token.
    for node in (head, other):
        assert {comm(process) for process in machines.processes(node)} == {
            "unshare",
            "bash",
            "sleep",
        }
    assert not list(folder.glob(".ilrec-42-*")) and not list((folder / "home").rglob("*token*"))
