"""`ilrec serve`: answers requests with a finished run's model over HTTP."""

from __future__ import annotations

import argparse
from pathlib import Path

from ilrec_dist.common.console import console
from ilrec_dist.pipeline.trained_model import open_trained_model
from ilrec_dist.serving.app import make_server
from ilrec_dist.serving.backend import LocalBackend


def run(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    with open_trained_model(Path(arguments.run), arguments.method, arguments.seed) as trained:
        backend = LocalBackend(
            trained.backbone,
            trained.artifacts.dataset,
            trained.artifacts.trie,
            beam=trained.config.evaluation.beam,
            batch_size=trained.config.evaluation.batch_size,
            softmax_scope=trained.softmax_scope,
            inputs=trained.inputs,
            parallel=trained.parallel,
        )
        with make_server(backend, arguments.host, arguments.port) as server:
            host, port = server.server_address[:2]
            console.print(f"listening on http://{host!s}:{port}/recommend", highlight=False)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                console.print("stopped")
