"""Many files of interactions, and the texts of many items, which one process reads and
a Ray cluster of two nodes.

The prepared folder, and the texts' vectors, are the same to the byte.
"""

from __future__ import annotations

import gzip
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster

from ilrec_dist.common.errors import UserError, WorkersFailed
from ilrec_dist.common.places import Places
from ilrec_dist.config.tree import Config
from ilrec_dist.data.config import DataConfig
from ilrec_dist.data.ingest.cluster import ReadFile, spread_batches
from ilrec_dist.data.prepare import prepare
from ilrec_dist.data.reading.source import Rejects
from ilrec_dist.items.ray_tasks import ray_tasks
from ilrec_dist.items.spread import FEW_TEXTS, Spread
from ilrec_dist.items.text_embeddings import embed_documents
from ilrec_dist.items.tfidf import TfidfSpace
from ilrec_dist.launch import task_places as places_module
from ilrec_dist.launch.cluster import ray_session
from ilrec_dist.launch.config import LaunchConfig
from ilrec_dist.launch.task_places import task_places
from ilrec_dist.pipeline.stages.index import text_workers
from ilrec_dist.pipeline.stages.prepare import prepare as prepare_stage
from tests.support.embedders import lengths
from tests.support.item_words import words
from tests.support.nodes import BARE_HEAD

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.slow,
    pytest.mark.usefixtures("warm_ray"),
]


# Before the fixture that connects this process to a cluster, after which no address is looked at.
def test_an_address_where_no_head_answers_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The port is bound, and nobody listens on it.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        began = time.monotonic()
        with (
            pytest.raises(
                UserError, match=f"launch.ray_address {address}: no Ray head answers there"
            ),
            ray_session(LaunchConfig(ray_address=address)),
        ):
            pass
        monkeypatch.setenv("RAY_ADDRESS", address)
        with (
            pytest.raises(
                UserError,
                match=f"RAY_ADDRESS={address}: no Ray head answers there .*; "
                "start one with `ray start --head`",
            ),
            ray_session(LaunchConfig()),
        ):
            pass
        monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
        with (
            pytest.raises(
                UserError, match=r"RAY_ADDRESS=http://127.0.0.1:8265: that is a dashboard's address"
            ),
            ray_session(LaunchConfig()),
        ):
            pass
        assert time.monotonic() - began < 25


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **BARE_HEAD})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def places(most: int | None, seconds: float = 60) -> AbstractContextManager[Places]:
    return task_places(most, "test", seconds)


def read_by_tasks(files: list[Path], read_file: ReadFile) -> list[pa.RecordBatch]:
    with places(len(files)) as taken:
        return list(spread_batches(files, read_file, Rejects(), taken))


@contextmanager
def held(count: int) -> Iterator[list[Any]]:
    """As many CPUs are another job's: actors."""

    # Of this function: an actor of a class of this file would import all that the file does.
    class Other:
        def is_there(self) -> bool:
            return True

    kind: Any = ray.remote(Other)
    actors = [kind.options(num_cpus=1).remote() for _ in range(count)]
    ray.get([actor.is_there.remote() for actor in actors])
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)
        until = time.monotonic() + 60
        while ray.available_resources().get("CPU", 0) < count:
            assert time.monotonic() < until
            time.sleep(0.1)


def write_parts(folder: Path, form: str, bad: bool = False) -> DataConfig:
    """Six files of one shop's interactions: users are in several of them, some rows in
    two.
    """
    folder.mkdir()
    rng = np.random.default_rng(5)
    for part in range(6):
        rows = {
            "user": rng.integers(0, 80, 900),
            "item": rng.integers(0, 40, 900),
            "timestamp": 1_400_000_000 + rng.integers(0, 300, 900),
        }
        table = pa.table(rows)
        if form == "parquet":
            pq.write_table(table, folder / f"part-{part}.parquet")
            continue
        pacsv.write_csv(table, folder / f"part-{part}.csv")
        if bad and part in (2, 4):
            with open(folder / f"part-{part}.csv", "a") as file:
                file.write("7,3,yesterday\n")
        if part == 3:
            (folder / "part-3.csv.gz").write_bytes(
                gzip.compress((folder / "part-3.csv").read_bytes())
            )
            (folder / "part-3.csv").unlink()
    # Other systems leave this file beside their parts.
    (folder / "_SUCCESS").touch()
    return DataConfig(format=form, path=str(folder), max_bad_rows=2 if bad else 0)


@pytest.mark.parametrize(("form", "bad"), [("csv", False), ("csv", True), ("parquet", False)])
def test_the_cluster_gives_the_same_bytes(
    cluster: Cluster, tmp_path: Path, form: str, bad: bool
) -> None:
    config = write_parts(tmp_path / "parts", form, bad)
    alone, together = (
        prepare(config, tmp_path / "alone"),
        prepare(config, tmp_path / "together", spread=places),
    )
    # The hash of every written file is in the manifest.
    assert alone == together
    assert alone["read"]["interactions"] == 5400 and len(alone["inputs"]) == 6
    assert alone["read"]["bad_rows"] == (2 if bad else 0)


def test_both_nodes_parse_and_the_order_is_that_of_the_files(
    cluster: Cluster, tmp_path: Path
) -> None:
    def read_file(path: Path, _: Rejects) -> Iterator[pa.RecordBatch]:
        # The first file is ready last.
        time.sleep(1.5 if path.name == "0" else 0.5)
        for batch in range(2):
            yield pa.record_batch(
                {
                    "user": [f"{path.name}-{batch}"],
                    "item": [ray.get_runtime_context().get_node_id()],
                }
            )

    found = read_by_tasks([Path(str(part)) for part in range(8)], read_file)
    assert [batch.column("user")[0].as_py() for batch in found] == [
        f"{part}-{batch}" for part in range(8) for batch in range(2)
    ]
    assert len({batch.column("item")[0].as_py() for batch in found}) == 2


def test_errors_of_a_file_are_those_of_one_machine(cluster: Cluster, tmp_path: Path) -> None:
    config = write_parts(tmp_path / "parts", "csv")
    with open(tmp_path / "parts" / "part-4.csv", "a") as file:
        file.write("1,2,1400000000\n7,3,yesterday\n")
    messages = []
    for spread in (None, places):
        with pytest.raises(
            UserError, match=r"part-4.csv: line 903: time 'yesterday' is not an integer"
        ) as error:
            prepare(config, tmp_path / "out", spread)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_what_fails_on_a_node_is_one_line(cluster: Cluster) -> None:
    def read_file(path: Path, _: Rejects) -> Iterator[pa.RecordBatch]:
        if path.name == "gone":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        raise ValueError("no reader expects this")
        yield

    files = [Path("/data/gone"), Path("/data/gone")]
    with pytest.raises(
        UserError, match=r"^/data/gone: cannot be read on node .* \(No such file or directory\);"
    ) as refused:
        read_by_tasks(files, read_file)
    with pytest.raises(
        WorkersFailed, match="^prepare: a task that reads .*: ValueError: no reader expects"
    ) as failed:
        read_by_tasks([Path("/data/other")] * 2, read_file)
    assert "\n" not in str(refused.value) + str(failed.value)


def test_the_stage_uses_the_cluster_it_is_given(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    monkeypatch.setattr(
        "ilrec_dist.data.prepare.spread_batches",
        lambda *given: used.append(1) or spread_batches(*given),
    )
    data = write_parts(tmp_path / "parts", "csv")
    prepare_stage(
        Config(
            runs_dir=str(tmp_path / "a"),
            data=data,
            launch=LaunchConfig(ray_address=cluster.address),
        )
    )
    assert used
    prepare_stage(Config(runs_dir=str(tmp_path / "b"), data=data))
    assert len(used) == 1
    names = ("interactions.parquet", "users.parquet", "items.parquet", "manifest.json")
    assert all(
        (tmp_path / "a" / "run" / "data" / name).read_bytes()
        == (tmp_path / "b" / "run" / "data" / name).read_bytes()
        for name in names
    )


def test_texts_become_the_vectors_of_one_process_on_both_nodes(
    cluster: Cluster, tmp_path: Path
) -> None:
    def embed(texts: Sequence[str]) -> np.ndarray:
        node = int(ray.get_runtime_context().get_node_id()[:5], 16)
        (tmp_path / str(node)).touch()
        # The node that is ready first would do all of it.
        until = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        return np.array([(len(text), node) for text in texts], np.float32)

    texts = [text * (1 + number % 3) for number, text in enumerate(words(900))]
    space = TfidfSpace(texts[:300], 16, 0)
    alone, together = (np.empty((900, space.dim), np.float32) for _ in range(2))
    embed_documents(space.embed, texts, alone)
    launch = LaunchConfig(ray_address=cluster.address)
    config = Config(runs_dir=str(tmp_path.with_name("runs")), launch=launch)
    with text_workers(config, FEW_TEXTS) as found:
        assert found is not None
        spread = replace(found, texts=64)
        embed_documents(space.embed, texts, together, spread)
        assert together.tobytes() == alone.tobytes()
        seen = np.empty((900, 2), np.float32)
        embed_documents(embed, texts, seen, spread)
        assert seen[:, 0].tolist() == [len(text) for text in texts] and len(set(seen[:, 1])) == 2
        with pytest.raises(UserError, match="^items.text_model: /gone is not a model folder$"):
            embed_documents(lengths, ["oak", "refuse"], seen, spread)
    once = Spread(partial(ray_tasks, take_places=places, retries=0))
    with pytest.raises(WorkersFailed, match="^index: a task that turns texts into vec") as died:
        embed_documents(lengths, ["oak", "kill"], seen, once)
    assert "\n" not in str(died.value)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places_module, "PLACE_SECONDS", 1.0)


def test_reading_that_gets_no_place_says_so_and_is_given_up(
    cluster: Cluster, soon: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = LaunchConfig(ray_address=cluster.address, timeout_seconds=2)
    data = write_parts(tmp_path / "parts", "csv")
    config = Config(runs_dir=str(tmp_path / "runs"), data=data, launch=launch)
    line = "the tasks got no places within launch.timeout_seconds = 2: they need 1 CPU, the "
    line += "cluster has 2 CPUs on 2 nodes (.*), of which 0 are free; wait for the end of the jobs"
    with held(2):
        for stage, work in (("prepare", prepare_stage), ("index", embed_some)):
            with pytest.raises(WorkersFailed, match=f"^{stage}: {line}") as failure:
                work(config)
            assert "\n" not in str(failure.value)
            said = capsys.readouterr().out
            assert said.count(f"{stage}: waiting up to 2 s for 1 CPU: the cluster has 2 CPUs") == 1
    assert not list((tmp_path / "runs/run").glob("data*"))


def embed_some(config: Config) -> None:
    with text_workers(config, FEW_TEXTS) as spread:
        embed_documents(lengths, ["oak"], np.empty((1, 2), np.float32), spread)


def test_tasks_go_on_with_what_other_jobs_leave(
    cluster: Cluster, soon: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_parts(tmp_path / "parts", "csv")
    alone = prepare(config, tmp_path / "alone")
    capsys.readouterr()
    with held(2) as others:
        # One is done while this job waits.
        timer = threading.Timer(4, ray.kill, [others[0]])
        timer.start()
        together = prepare(config, tmp_path / "together", places)
    assert alone == together
    said = capsys.readouterr().out
    assert said.index("test: waiting up to 60 s for 1 CPU") < said.index("test: the tasks have")
    assert "test: runs on 1 of the cluster's 2 CPUs; other jobs have the others" in said
    # And all are given back.
    with places(None) as taken:
        assert taken.count == 2


def test_a_lost_node_of_several_is_done_without_and_the_last_is_waited_for(
    cluster: Cluster, soon: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = np.zeros((400, 2), np.float32)

    def embed(seconds: float, texts: Sequence[str]) -> np.ndarray:
        # What has begun.
        tempfile.mkstemp(dir=tmp_path)
        time.sleep(seconds)
        return np.array([(len(text), 1) for text in texts], np.float32)

    def lose(node: Any, begun: int) -> None:
        until = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < begun:
            assert time.monotonic() < until
            time.sleep(0.05)
        cluster.remove_node(node)

    # Ray's head is busy as long as it looks for another place, so the tasks are short.
    with held(2), ThreadPoolExecutor(1) as beside:
        first, second = (cluster.add_node(num_cpus=1) for _ in range(2))
        spread = Spread(partial(ray_tasks, take_places=partial(places, seconds=2)), texts=100)
        losing = beside.submit(lose, first, 2)
        embed_documents(partial(embed, 0.5), ["oak"] * 400, found, spread)
        losing.result()
        assert found[:, 0].tolist() == [3] * 400
        assert "waiting" not in capsys.readouterr().out
        losing = beside.submit(lose, second, len(list(tmp_path.iterdir())) + 1)
        line = "^test: the tasks got no places within launch.timeout_seconds = 2"
        with pytest.raises(WorkersFailed, match=line):
            embed_documents(partial(embed, 60), ["oak"] * 400, found, spread)
        losing.result()
    assert capsys.readouterr().out.count("test: waiting up to 2 s for 1 CPU") == 1


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    config = write_parts(tmp_path / "parts", "parquet")
    table = pq.read_table(tmp_path / "parts" / "part-1.parquet")
    pq.write_table(
        table.set_column(0, "user", table.column("user").cast(pa.string())),
        tmp_path / "parts" / "part-1.parquet",
    )
    with pytest.raises(
        UserError, match=r"part-1.parquet: column 'user' is string, but int64 in part-0.parquet"
    ):
        prepare(config, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no file named \*.csv"):
        prepare(DataConfig(format="csv", path=str(tmp_path / "empty")), tmp_path / "out")
