"""Hands a worker that Ray starts over to tests/support/warm_ray.py.

Python imports this at its start where the folder is on its path. The process
that Ray has started waits here for the end of the worker that took its place.
"""

import os
import sys

SERVER = "ILREC_WARM_WORKERS"
SCRIPTS = ("/ray/_private/workers/default_worker.py", "/ray/_private/workers/setup_worker.py")


def hand_over(server: str, words: list[str]) -> None:
    import json
    import socket

    started = {
        "words": words,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": sys.path,
    }
    files = [1, 2, *(os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in ("net", "mnt"))]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(server)
        socket.send_fds(connection, [json.dumps(started).encode()], files)
        # Nothing is sent back: this ends when the worker does.
        connection.recv(1)


for number, word in enumerate(sys.orig_argv):
    if word.endswith(SCRIPTS) and SERVER in os.environ:
        hand_over(os.environ[SERVER], sys.orig_argv[number:])
        os._exit(0)
