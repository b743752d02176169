"""The faults of `tests/soak.py`, and what must follow each."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.support.soaked_training import TIMEOUT_SECONDS, WORKERS, Broken, SoakedTraining


@dataclass(frozen=True)
class Kind:
    # Of 200 faults; the cheap ones are the most.
    share: int
    # How long it may take until the next step is logged, where launch.timeout_seconds is
    # TIMEOUT_SECONDS.
    patience: float
    # Does it and sees to what must follow until the moment that it takes; notes what it was.
    act: Callable[[SoakedTraining, random.Random, float], None]
    # Whether the training goes on from a checkpoint after it.
    goes_back: bool = True


def kill_worker(run: SoakedTraining, chance: random.Random, until: float) -> None:
    rank = chance.randrange(WORKERS)
    run.what = f"rank {rank}"
    os.kill(run.worker(rank), signal.SIGKILL)


def kill_actor(run: SoakedTraining, chance: random.Random, until: float) -> None:
    actor = run.actor()
    if actor is None:
        raise Broken("not one reward actor, but none or several")
    os.kill(actor, signal.SIGKILL)
    run.wait_for("other reward actor", lambda: run.actor() not in (None, actor), until)


def lose_node(run: SoakedTraining, chance: random.Random, until: float) -> None:
    """Of a node with a worker, all processes at once, the
    raylet alone, or the network and then all of them.
    """
    run.wait_for_nodes()
    places = [run.node_of(run.worker(rank)) for rank in range(WORKERS)]
    node = chance.choice([node for node in places if node.number > 0])
    run.what = chance.choice(("all of it", "its raylet", "its power"))
    if run.what == "its raylet":
        since = time.time()
        os.kill(run.raylet_of(node), signal.SIGKILL)
        # The rest of it ends by itself.
        run.wait_for_resumption(since, until)
    run.nodes.lose(node, silent=run.what == "its power")
    # The next spare one.
    run.nodes.join(1)


def stop_rank(run: SoakedTraining, chance: random.Random, until: float) -> None:
    rank = chance.randrange(WORKERS)
    run.what = f"rank {rank}"
    os.kill(run.worker(rank), signal.SIGSTOP)


def kill_driver(run: SoakedTraining, chance: random.Random, until: float) -> None:
    run.what = chance.choice(("again at once", "again when all had ended"))
    run.end(-signal.SIGKILL, until, signal.SIGKILL)
    if run.what != "again at once":
        run.require_all_ended()
    run.start()


def terminate_driver(run: SoakedTraining, chance: random.Random, until: float) -> None:
    _terminate(run, until)
    run.start()


def _terminate(run: SoakedTraining, until: float) -> None:
    line = run.end(128 + signal.SIGTERM, until, signal.SIGTERM)
    if line != "ilrec: terminated; the same command goes on where it stopped":
        raise Broken(f"the last line after SIGTERM: {line}")
    run.require_all_ended()
    run.look()
    if run.newest != run.step:
        raise Broken(f"the last checkpoint is of step {run.newest}, the last step {run.step}")


def fill_disk(run: SoakedTraining, chance: random.Random, until: float) -> None:
    ballast = run.folder.parents[3] / "ballast"
    try:
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        line = run.end(1, until)
    finally:
        ballast.unlink(missing_ok=True)
    if not (line.startswith("ilrec: error: ") and "No space left on device; make room" in line):
        raise Broken(f"the last line on a full disk: {line}")
    run.require_all_ended()
    run.start()


def flip_byte(run: SoakedTraining, chance: random.Random, until: float) -> None:
    _terminate(run, until)
    before, newest = run.checkpoints[-2:]
    path = chance.choice(sorted(newest.iterdir()))
    run.what = path.name
    contents = bytearray(path.read_bytes())
    place = chance.randrange(len(contents))
    contents[place] ^= 1 << chance.randrange(8)
    path.write_bytes(contents)
    began = time.time()
    run.mark()
    run.start()
    run.wait_for_resumption(began, until)
    if f"warning: {path}: " not in run.printed():
        raise Broken(f"the damaged {path.name} is not named")
    if run.resumed[0] != int(before.name.rpartition("-")[2]):
        raise Broken(f"it went on from step {run.resumed[0]}, not from {before.name}")


KINDS = {
    "worker": Kind(56, 180, kill_worker),
    "actor": Kind(46, 120, kill_actor, goes_back=False),
    "node": Kind(26, 240, lose_node),
    "driver": Kind(18, 240, kill_driver),
    "terminate": Kind(14, 240, terminate_driver),
    "stop": Kind(14, TIMEOUT_SECONDS + 180, stop_rank),
    "disk": Kind(13, 300, fill_disk),
    "byte": Kind(13, 300, flip_byte),
}
