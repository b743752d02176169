"""A cluster that cannot run a job is refused
in time, by one line that says what is missing.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group, remove_placement_group

from ilrec_dist.cf.rewards.service import _places
from ilrec_dist.common.errors import UserError
from ilrec_dist.common.run_layout import MODELS
from ilrec_dist.items.spread import FEW_FOR_A_MODEL
from ilrec_dist.launch import cluster_check
from ilrec_dist.launch.cluster_check import (
    Demand,
    alive_nodes,
    check_nodes,
    require_resources,
    worker_nodes,
)
from ilrec_dist.launch.cluster_watch import WORKERS, ClusterWatch, waits_for_places
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.pipeline.execute import Executor, execute, open_run
from ilrec_dist.pipeline.stages.index import text_workers
from tests.support.commands import ended_commands
from tests.support.language_models import model_config
from tests.support.nodes import BARE_HEAD
from tests.support.tiny_run import tiny_config

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 60


@dataclass(frozen=True)
class TwoNodes:
    """A head and a node of 3 CPUs each. The node has a
    copy of the project with one line more, and what Ray takes for a GPU.
    """

    head: Cluster
    # In its place the node sees an empty folder.
    hidden: Path
    # The node's Python looks for packages here first.
    shadow: Path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    hidden = tmp_path_factory.mktemp("hidden")
    shadow = tmp_path_factory.mktemp("shadow")
    copy = tmp_path_factory.mktemp("copy")
    for package in ("ilrec_dist", "kernels/ilrec_kernels"):
        shutil.copytree(ROOT / package, copy / package)
        with open(copy / package / "__init__.py", "a") as file:
            file.write("# another version\n")
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a mount namespace")
    head = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 3, **BARE_HEAD},
    )
    start = f"{sys.executable} -m ray.scripts.scripts start --address={head.address} --num-cpus=3"
    start += " --num-gpus=1"
    hide = f"mount -t tmpfs none {hidden}"
    replace = f"mount --bind {copy}/ilrec_dist {ROOT}/ilrec_dist && "
    replace += f"mount --bind {copy}/kernels {ROOT}/kernels"
    with ended_commands() as commands:
        node = commands.start(
            ["unshare", "-m", "sh", "-c", f"{hide} && {replace} && exec {start} --block"],
            env={**os.environ, "PYTHONPATH": f"{shadow}:{ROOT}:{ROOT}/kernels"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            ray.init(address=head.address, log_to_driver=False)
            until = time.monotonic() + PATIENCE_SECONDS
            while ray.cluster_resources().get("CPU", 0) < 6:
                assert time.monotonic() < until and node.poll() is None
                time.sleep(0.2)
            yield TwoNodes(head, hidden, shadow)
        finally:
            ray.shutdown()
            node.terminate()
            node.wait(PATIENCE_SECONDS)
            head.shutdown()


def test_too_few_cpus_are_refused_with_what_is_there(cluster, capsys):
    began = time.monotonic()
    with pytest.raises(
        UserError,
        match=r"launch.workers 8: the workers need 8 CPUs, and after 1 s the cluster has 6 CPUs on "
        r"2 nodes \(.*: 3, .*: 3\); add nodes, or lower launch.workers",
    ):
        require_resources(LaunchConfig(workers=8), Demand("CPU", 8), seconds=1)
    assert time.monotonic() - began < 20
    assert "waiting up to 1 s for 8 CPUs: the cluster has 6" in capsys.readouterr().out
    with pytest.raises(UserError, match="need 2 GPUs, and after 0 s the cluster has 1 GPU on"):
        require_resources(LaunchConfig(workers=2), Demand("GPU", 2), seconds=0)


def test_nodes_that_cannot_hold_whole_groups_are_refused_unless_allowed(cluster):
    with pytest.raises(UserError, match=r"launch.tp 2: .* hold 2 groups of 3; .*tp_across_nodes"):
        require_resources(LaunchConfig(workers=6, tp=2), Demand("CPU", 6))
    require_resources(LaunchConfig(workers=6, tp=3), Demand("CPU", 6))
    allowed = LaunchConfig(workers=6, tp=2, tp_across_nodes=True)
    require_resources(allowed, Demand("CPU", 6))


def test_a_run_folder_that_a_node_does_not_see_is_refused(cluster):
    with pytest.raises(UserError, match=f"node .*: does not see {cluster.hidden}; .* set runs_dir"):
        check_nodes(cluster.hidden, (), PATIENCE_SECONDS)
    assert list(cluster.hidden.iterdir()) == []


def test_a_model_that_a_node_does_not_have_is_refused(cluster, tmp_path):
    model = cluster.hidden / "model"
    model.mkdir()
    try:
        line = f"node .*: does not see {model}, which the workers read; put it on storage"
        with pytest.raises(UserError, match=line):
            check_nodes(tmp_path, [str(model)], PATIENCE_SECONDS)
    finally:
        model.rmdir()
    # The project's folder is another one there.
    package = ROOT / "ilrec_dist"
    with pytest.raises(UserError, match=f"node .*: {package}/__init__.py is not the file that"):
        check_nodes(tmp_path, [str(package)], PATIENCE_SECONDS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("package", "name"), [("faiss-cpu", "FAISS"), ("pyarrow", "pyarrow")])
def test_another_version_of_a_package_on_a_node_is_refused(cluster, tmp_path, package, name):
    metadata = cluster.shadow / f"{package.replace('-', '_')}-0.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
    here = importlib.metadata.version(package)
    line = f"node .*: has {name} 0.1, and the node of this command has {name} {here};"
    try:
        with pytest.raises(UserError, match=line):
            check_nodes(tmp_path, (), PATIENCE_SECONDS)
    finally:
        shutil.rmtree(metadata.parent)


@pytest.mark.parametrize("package", ["ilrec_dist", "ilrec_kernels"])
def test_another_version_of_the_project_on_a_node_is_refused(
    cluster, tmp_path, monkeypatch, package
):
    # Both are others there; each is noticed by itself.
    monkeypatch.setattr(cluster_check, "SOURCES", [package])
    with pytest.raises(UserError, match=f"node .*: has {package} of source .*; install the same"):
        check_nodes(tmp_path, (), PATIENCE_SECONDS)


def test_packages_in_several_builds_are_compared_by_the_one_that_is_there():
    packages = {"FAISS": ("no-such-build", "faiss-cpu"), "other": ("no-such-package",)}
    found = cluster_check._make_probe()("/gone", (), packages, ["no_such_module"])["versions"]
    assert found.pop("Python") and found.pop("FAISS") == importlib.metadata.version("faiss-cpu")
    assert found == {"other": None, "no_such_module": None}


@pytest.fixture
def same_source(monkeypatch):
    """The node's copy of the project counts as the same, and nothing has passed yet."""
    monkeypatch.setattr(cluster_check, "SOURCES", ())
    monkeypatch.setattr(cluster_check, "_passed", {})


def test_a_node_that_has_passed_is_not_asked_again(cluster, same_source, tmp_path):
    read = tmp_path / "model"
    read.touch()
    check_nodes(tmp_path, [str(read)], PATIENCE_SECONDS)
    check_nodes(tmp_path, [str(read)], 0)
    check_nodes(tmp_path / "train", (), 0)
    other = tmp_path / "other"
    other.touch()
    for folder, reads in ((tmp_path, [str(other)]), (tmp_path.parent, [])):
        with pytest.raises(UserError, match="did not answer within 0 s"):
            check_nodes(folder, reads, 0)


def test_a_cluster_is_refused_before_the_first_stage(cluster, same_source, tmp_path):
    launch = {"engine": "ray", "workers": 6, "tp": 2, "ray_address": cluster.head.address}
    config = tiny_config(tmp_path, train={"methods": ["sft"]}, launch=launch)
    with pytest.raises(UserError, match=r"launch.tp 2: .* hold 2 groups of 3"):
        execute(config, "run")
    assert not config.run_dir.exists()


def test_data_and_a_text_model_that_a_node_does_not_see_are_refused(cluster, same_source, tmp_path):
    files = [cluster.hidden / f"part-{part}.csv" for part in range(2)]
    for file in files:
        file.write_text("user,item,timestamp\n1,2,3\n")
    launch = {"engine": "ray", "ray_address": cluster.head.address}
    data = {"format": "csv", "path": str(cluster.hidden)}
    items = {"text_model": str(cluster.hidden)}
    config = tiny_config(tmp_path, data=data, items=items, launch=launch)
    try:
        for command in ("prepare", "run"):
            with pytest.raises(UserError, match=f"node .*: does not see {files[0]}, which the"):
                execute(config, command)
            assert not config.run_dir.exists()
        config.run_dir.mkdir()
        line = f"node .*: {cluster.hidden}/part-0.csv is not the file that"
        with (
            pytest.raises(UserError, match=line),
            text_workers(config, FEW_FOR_A_MODEL),
        ):
            pass
    finally:
        for file in files:
            file.unlink()


def test_a_folder_for_dequantised_models_that_a_node_does_not_see_is_refused(
    cluster, same_source, tmp_path
):
    launch = {"engine": "ray", "ray_address": cluster.head.address}
    config = model_config(tmp_path, tmp_path / "model.gguf", launch=launch)
    models = Path(config.runs_dir) / MODELS
    models.symlink_to(cluster.hidden)
    line = f"node .*: does not see {models}; every node needs that folder under the same path"
    with pytest.raises(UserError, match=line):
        Executor(open_run(config), config)._check_cluster(["prepare", "train"])
    assert list(cluster.hidden.iterdir()) == []
    # Of a decoder that is trained from scratch nothing is made.
    other = tiny_config(tmp_path, launch=launch)
    Executor(open_run(other), other)._check_cluster(["prepare", "train"])


def test_reward_actors_lie_where_workers_can_be(cluster):
    with_gpu = [node["NodeID"] for node in alive_nodes() if "GPU" in node["Resources"]]
    one, other = (node["NodeID"] for node in alive_nodes())
    assert worker_nodes(LaunchConfig(device="cuda")) == with_gpu and len(with_gpu) == 1
    assert len(worker_nodes(LaunchConfig(device="cpu"))) == 2
    places = itertools.islice(_places([one, other]), 3)
    # Another node has to do where that one is lost.
    expected = [(one, True), (other, True), (one, True)]
    assert [(place.node_id, place.soft) for place in places] == expected
    assert next(_places([])) == "SPREAD"


def test_workers_that_get_no_places_are_given_up_with_one_line(cluster, capsys):
    # Places that the cluster does not have are asked for, as by workers beside another job's.
    group = placement_group([{"CPU": 1}] * 7)
    try:
        watch = ClusterWatch(Demand("CPU", 4), 2, lambda: None, replace(WORKERS, quiet_seconds=0.0))
        watch.start()
        watch.join(PATIENCE_SECONDS)
    finally:
        remove_placement_group(group)
    assert watch.failure is not None and watch.failure.startswith(
        "the workers got no places within launch.timeout_seconds = 2: they need 4 CPUs, the "
        "cluster has 6 CPUs on 2 nodes"
    )
    assert ", of which 6 are free; wait for the end of the jobs" in watch.failure
    said = capsys.readouterr().out
    assert said.count("waiting up to 2 s for 4 CPUs: the cluster has 6 CPUs on 2 nodes") == 1
    # Workers that have their places are not given up.
    group = placement_group([{"CPU": 1}] * 2)
    try:
        assert group.wait(PATIENCE_SECONDS)
        assert waits_for_places() is False
    finally:
        remove_placement_group(group)


def test_a_lack_that_lasts_is_given_up_with_one_line(cluster, capsys):
    given_up = []
    watch = ClusterWatch(Demand("CPU", 8), 0.5, lambda: given_up.append(True))
    watch.start()
    watch.join(PATIENCE_SECONDS)
    assert given_up == [True] and watch.failure is not None
    assert "the workers need 8 CPUs, the cluster has 6 CPUs on 2 nodes" in watch.failure
    assert "waiting up to 0 s for 8 CPUs" in capsys.readouterr().out


def test_a_node_that_joins_in_time_ends_the_wait(cluster, capsys):
    watch = ClusterWatch(Demand("CPU", 8), PATIENCE_SECONDS, lambda: None)
    watch.start()
    said = ""

    def wait_for(line):
        nonlocal said
        until = time.monotonic() + PATIENCE_SECONDS
        while line not in said:
            assert time.monotonic() < until and watch.is_alive()
            time.sleep(0.1)
            said += capsys.readouterr().out

    wait_for("waiting up to 60 s for 8 CPUs")
    node = cluster.head.add_node(num_cpus=2)
    wait_for("the cluster has 8 CPUs again")
    watch.stop()
    cluster.head.remove_node(node)
    assert watch.failure is None
