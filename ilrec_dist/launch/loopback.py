"""A store of torch.distributed that only this machine can reach.

torch's own stores listen on all of the machine's addresses.
"""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

LOOPBACK = "127.0.0.1"
# Of what torchrun itself and a worker that joins ask the store for.
STORE_SECONDS = 300.0


def loopback_store() -> TCPStore:
    """A store whose server is in this process, on a free port of loopback."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        port = listener.getsockname()[1]
        return TCPStore(
            LOOPBACK,
            port,
            is_master=True,
            timeout=timedelta(seconds=STORE_SECONDS),
            wait_for_workers=False,
            # The store closes it.
            master_listen_fd=listener.detach(),
        )
