"""torchrun on one machine, which only that machine can reach.

`python -m ilrec_dist.launch.one_machine --nproc-per-node=2 -m MODULE`
"""

from __future__ import annotations

import sys

import torch.distributed.run
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from ilrec_dist.launch.loopback import LOOPBACK, loopback_store

NAME = "loopback"


class OneMachine(RendezvousHandler):
    """The rendezvous of a group that is on this machine
    alone, with a new store for each of its attempts.
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._store: TCPStore | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        self._store = loopback_store()
        # Of the keys without the prefix the workers make use.
        store = PrefixStore("torchrun", self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, self._store.port))

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return NAME

    def get_run_id(self) -> str:
        return self._run_id

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True


def main() -> None:
    rendezvous_handler_registry.register(NAME, OneMachine)
    # Nobody uses the endpoint, but without one torchrun warns.
    options = [f"--rdzv-backend={NAME}", f"--rdzv-endpoint={LOOPBACK}", f"--local-addr={LOOPBACK}"]
    torch.distributed.run.main([*options, *sys.argv[1:]])


if __name__ == "__main__":
    main()
