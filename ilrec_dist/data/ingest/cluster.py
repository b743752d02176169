"""Reading spread over a Ray cluster.

Files are parsed where cores are free, and come in order.
"""

from __future__ import annotations

import json
import logging
import socket
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa

from ilrec_dist.common.errors import UserError, WorkersFailed
from ilrec_dist.common.places import Places
from ilrec_dist.data.reading.source import Rejects

ReadFile = Callable[[Path, Rejects], Iterator[pa.RecordBatch]]


def spread_batches(
    files: list[Path], read_file: ReadFile, rejects: Rejects, places: Places
) -> Iterator[pa.RecordBatch]:
    """Yield the batches of read_file(file) of all files, in the order of `files`.

    Ray Data parses them, one task a file; the result is what reading them one by one
    gives. Ray must be connected, and every node must see the files under the same
    paths. Raises UserError as read_file does, and for a file that a node cannot read;
    WorkersFailed where a task fails otherwise.
    """
    # Ray is heavy, and reading on one machine does not need it. Its import sets the level that is
    # set here again.
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    parse = partial(_parse, read_file=read_file, allowed=rejects.allowed)
    names = ray.data.from_items(
        [{"file": str(path)} for path in files], override_num_blocks=len(files)
    )
    with warnings.catch_warnings():
        # Ray 2.64 shall place tasks by itself alone.
        warnings.simplefilter("ignore", DeprecationWarning)
        parsed = names.map_batches(parse, batch_size=1, batch_format="pyarrow", **places.options)
    parsed.context.execution_options.preserve_order = True
    parsed.context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=places.count)
    parsed.context.enable_progress_bars = False
    tables = iter(parsed.iter_batches(batch_size=None, batch_format="pyarrow"))
    while True:
        try:
            table = next(tables, None)
        except ray.exceptions.RayError as failed:
            cause = getattr(failed, "cause", None)
            reason = f"{type(cause).__name__}: {cause}" if cause else str(failed)
            raise WorkersFailed(
                "prepare: a task that reads files failed on the cluster: "
                f"{' '.join(reason.split())}; give the same command again"
            ) from failed
        if table is None:
            return
        assert isinstance(table, pa.Table)
        columns = (table.column(name) for name in ("batch", "rejects", "error"))
        for batch, bad, error in zip(*columns, strict=True):
            rejects.absorb(json.loads(bad.as_py()))
            if error.is_valid:
                raise UserError(error.as_py())
            if batch.is_valid:
                yield from pa.ipc.open_stream(batch.as_buffer())


def _parse(names: pa.Table, read_file: ReadFile, allowed: int) -> Iterator[pa.Table]:
    """One row for each batch of a file, and one for what came after the last.

    A row has the batch as an Arrow stream and the bad rows that were met on the way to
    it.
    """
    for name in names.column("file").to_pylist():
        rejects, reported = Rejects(allowed), 0
        error = None
        try:
            for batch in read_file(Path(name), rejects):
                yield _row(batch, rejects.rows[reported:], None)
                reported = len(rejects.rows)
        except UserError as refused:
            error = str(refused)
        except OSError as failed:
            error = f"{name}: cannot be read on node {socket.gethostname()} "
            error += f"({failed.strerror or failed}); every node reads files of data.path"
        yield _row(None, rejects.rows[reported:], error)


def _row(
    batch: pa.RecordBatch | None, bad: list[dict[str, str | int]], error: str | None
) -> pa.Table:
    content = None
    if batch is not None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        content = sink.getvalue().to_pybytes()
    columns = [
        pa.array([content], pa.large_binary()),
        pa.array([json.dumps(bad)], pa.large_string()),
        pa.array([error], pa.large_string()),
    ]
    return pa.table(columns, ["batch", "rejects", "error"])
