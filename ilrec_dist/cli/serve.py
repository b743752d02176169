"""`ilrec serve`: answers requests with a finished run's model over HTTP."""

from __future__ import annotations

import argparse
from pathlib import Path

from ilrec_dist.common.console import console
from ilrec_dist.pipeline.fusion import open_fusion
from ilrec_dist.pipeline.trained_model import open_trained_model
from ilrec_dist.serving.app import make_server
from ilrec_dist.serving.backend import LocalBackend


def run(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    with open_trained_model(Path(arguments.run), arguments.method, arguments.seed) as trained:
        fusion = arguments.fusion
        ranker = trained.ranker if fusion is None else open_fusion(trained, fusion)
        backend = LocalBackend(ranker, trained.artifacts.dataset)
        with make_server(backend, arguments.host, arguments.port) as server:
            host, port = server.server_address[:2]
            console.print(f"listening on http://{host!s}:{port}/recommend", highlight=False)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                console.print("stopped")
