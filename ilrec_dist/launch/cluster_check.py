"""Whether a Ray cluster can run a job: enough
GPUs or CPUs, one code, and the job's files.

Every refusal comes within a minute and says what is needed and what is there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ilrec_dist.common.console import print_plain
from ilrec_dist.common.errors import UserError
from ilrec_dist.launch.cluster import cluster_address
from ilrec_dist.launch.config import LaunchConfig

# How long a cluster may take to have enough nodes, and nodes to answer, together under a minute.
NODES_SECONDS = 30.0
ANSWER_SECONDS = 25.0
POLL_SECONDS = 1.0
# Packages whose versions decide what a worker computes, or how it reads and writes, each with the
# names of its builds, of which one is installed.
ONE_BUILD = (
    *("torch", "deepspeed", "megatron-core", "transformers", "tokenizers", "safetensors"),
    *("pyarrow", "numpy", "scipy", "scikit-learn", "triton"),
)
PACKAGES = {name: (name,) for name in ONE_BUILD} | {"FAISS": ("faiss-cpu", "faiss-gpu-cu12")}
# The project's own packages, which are compared by their source: it changes more often than their
# version.
SOURCES = ("ilrec_dist", "ilrec_kernels")
# The folders and files with which nodes have passed, by the node's id.
_passed: dict[str, list[tuple[Path, frozenset[str]]]] = {}


@dataclass(frozen=True)
class Demand:
    """What the workers take, or the tasks of a stage: one unit of a resource each."""

    resource: str
    workers: int

    @property
    def words(self) -> str:
        return f"{self.workers} {self.resource}{'s' * (self.workers != 1)}"


def on_gpus(launch: LaunchConfig) -> bool:
    """Whether each worker gets a GPU; the cluster
    may have them where this process has none.

    A named cluster that has some GPUs, but too few, is not taken for one without any.
    """
    if launch.device != "auto":
        return launch.device == "cuda"
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    wanted = 1 if cluster_address(launch) is not None else launch.workers
    return resources.get("GPU", 0) >= wanted


def demand_of(launch: LaunchConfig) -> Demand:
    return Demand("GPU" if on_gpus(launch) else "CPU", launch.workers)


def worker_nodes(launch: LaunchConfig) -> list[str]:
    """The ids of the nodes that can hold workers, of the cluster
    that this process is connected to.
    """
    resource = demand_of(launch).resource
    return [node["NodeID"] for node in alive_nodes() if amount(node, resource)]


def check_cluster(launch: LaunchConfig, folder: Path, reads: Sequence[str] = ()) -> None:
    """`require_resources` and `check_nodes` of the cluster that this
    process is connected to.

    A command calls it before its first stage. What came well out
    of it is not looked at again when its workers start.
    """
    require_resources(launch, demand_of(launch))
    check_nodes(folder, reads)


def alive_nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def cluster_words(nodes: Sequence[Mapping[str, Any]], resource: str) -> str:
    """`4 GPUs on 2 nodes (10.0.0.1: 2, 10.0.0.2: 2)`."""
    counts = [(node["NodeManagerAddress"], amount(node, resource)) for node in nodes]
    total = sum(count for _, count in counts)
    counted = ", ".join(f"{address}: {count}" for address, count in counts)
    plural = "node" if len(counts) == 1 else "nodes"
    return f"{Demand(resource, total).words} on {len(counts)} {plural} ({counted})"


def amount(node: Mapping[str, Any], resource: str) -> int:
    return int(node["Resources"].get(resource, 0))


def is_missing(demand: Demand, nodes: Sequence[Mapping[str, Any]]) -> bool:
    return sum(amount(node, demand.resource) for node in nodes) < demand.workers


def require_resources(launch: LaunchConfig, demand: Demand, seconds: float = NODES_SECONDS) -> None:
    """Wait until the cluster has what the workers take, and say so.

    Raises UserError after `seconds`, and at once where the nodes
    are there but cannot hold whole tensor-parallel groups.
    """
    until, said = time.monotonic() + seconds, False
    while is_missing(demand, nodes := alive_nodes()):
        if time.monotonic() > until:
            raise UserError(
                f"launch.workers {demand.workers}: the workers need {demand.words}, and after "
                f"{seconds:.0f} s the cluster has {cluster_words(nodes, demand.resource)}; add "
                "nodes, or lower launch.workers"
            )
        if not said:
            say_waiting(demand, nodes, seconds)
            said = True
        time.sleep(POLL_SECONDS)
    groups = sum(amount(node, demand.resource) // launch.tp for node in nodes)
    if groups * launch.tp < demand.workers and not launch.tp_across_nodes:
        raise UserError(
            f"launch.tp {launch.tp}: a tensor-parallel group lies on one node, and "
            f"{cluster_words(nodes, demand.resource)} hold {groups} groups of "
            f"{demand.workers // launch.tp}; choose another launch.tp, give each node a multiple "
            "of it, or allow slow groups across nodes with launch.tp_across_nodes=true"
        )


def say_waiting(demand: Demand, nodes: Sequence[Mapping[str, Any]], seconds: float) -> None:
    line = f"waiting up to {seconds:.0f} s for {demand.words}: the cluster has "
    line += cluster_words(nodes, demand.resource)
    print_plain(line)


# What nodes see


def check_nodes(folder: Path, reads: Sequence[str] = (), seconds: float = ANSWER_SECONDS) -> None:
    """Compare every other node's view of a folder that is written here, of
    the files in `reads` and its packages with this process's.

    Raises UserError that names the first node that does not see the folder, has
    other files or another version, or does not answer in `seconds`. A node that has
    passed is not asked again for files that it had, or a folder within that one.
    """
    nodes = alive_nodes()
    if len(nodes) == 1:
        # It is this one.
        return
    nodes = [node for node in nodes if not _has_passed(node["NodeID"], folder, reads)]
    if not nodes:
        return
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".seen-{secrets.token_hex(8)}"
    mark.touch()
    try:
        probe = _make_probe()
        asks = (str(mark), tuple(reads), PACKAGES, SOURCES)
        expected = probe(*asks)
        task: Any = ray.remote(probe)
        asked = {
            task.options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(*asks): node["NodeManagerAddress"]
            for node in nodes
        }
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
        if silent:
            raise UserError(
                f"node {asked[silent[0]]}: joined the cluster but did not answer within "
                f"{seconds:.0f} s; is its Python environment the head's?"
            )
        for reference in answered:
            _compare(asked[reference], folder, expected, ray.get(reference))
    except BaseException:
        mark.unlink(missing_ok=True)
        if is_new:
            # Another command may have written there since.
            with suppress(OSError):
                folder.rmdir()
        raise
    mark.unlink(missing_ok=True)
    for node in nodes:
        _passed.setdefault(node["NodeID"], []).append((folder.resolve(), frozenset(reads)))


def _has_passed(node: str, folder: Path, reads: Sequence[str]) -> bool:
    """Whether earlier checks of this process saw that the node has all of these."""
    passed = _passed.get(node, [])
    had = frozenset[str]().union(*(files for _, files in passed))
    is_within = any(folder.resolve().is_relative_to(seen) for seen, _ in passed)
    return is_within and had.issuperset(reads)


def _make_probe() -> Callable[..., dict[str, Any]]:
    """The task that nodes run. A function of its own is sent whole, so that a
    node without this package, or with another version of it, can run it too.
    """

    def sizes(path: str) -> dict[str, int] | None:
        """The sizes of a folder's files by name, or of a file; else None."""
        if not os.path.isdir(path):
            return {"": os.path.getsize(path)} if os.path.exists(path) else None
        return {entry.name: entry.stat().st_size for entry in os.scandir(path) if entry.is_file()}

    def version(builds: Sequence[str]) -> str | None:
        """The version of the one of these that is installed; None for none."""
        for package in builds:
            try:
                return importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None

    def source(package: str) -> str | None:
        """A hash of the package's modules; None where there is no such package."""
        spec = importlib.util.find_spec(package)
        if spec is None:
            return None
        digest = hashlib.sha256()
        for root in spec.submodule_search_locations or ():
            for folder, folders, names in os.walk(root):
                folders.sort()
                for name in sorted(names):
                    if name.endswith(".py"):
                        with open(os.path.join(folder, name), "rb") as file:
                            digest.update(file.read())
        return f"of source {digest.hexdigest()[:12]}"

    def probe(
        mark: str,
        reads: Sequence[str],
        packages: Mapping[str, Sequence[str]],
        sources: Sequence[str],
    ) -> dict[str, Any]:
        versions: dict[str, Any] = {"Python": platform.python_version()}
        versions |= {package: version(builds) for package, builds in packages.items()}
        versions |= {package: source(package) for package in sources}
        files = {path: sizes(path) for path in reads}
        return {"sees": os.path.exists(mark), "files": files, "versions": versions}

    return probe


def _compare(address: str, folder: Path, expected: Mapping[str, Any], answer: Any) -> None:
    if not answer["sees"]:
        raise UserError(
            f"node {address}: does not see {folder}; every node needs that folder under the same "
            "path: set runs_dir to storage that all of them mount"
        )
    for path, sizes in expected["files"].items():
        other = answer["files"][path]
        if sizes is None or other == sizes:
            continue
        if other is None:
            raise UserError(
                f"node {address}: does not see {path}, which the workers read; put it on storage "
                "that all nodes mount, or copy it to the same path on each"
            )
        name = min(dict(sizes.items() ^ other.items()))
        raise UserError(
            f"node {address}: {os.path.join(path, name)} is not the file that the node of this "
            "command has there; copy the same to all nodes"
        )
    for package, version in expected["versions"].items():
        other = answer["versions"][package]
        if other != version:
            raise UserError(
                f"node {address}: has {_version(package, other)}, and the node of this command has "
                f"{_version(package, version)}; install the same on all nodes"
            )


def _version(package: str, version: str | None) -> str:
    return f"no {package}" if version is None else f"{package} {version}"
