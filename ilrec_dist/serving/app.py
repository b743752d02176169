"""The HTTP server: JSON in, JSON out, on the loopback interface unless it is told
otherwise.

    POST /recommend  {"histories": [["i1", "i2"], …], "top": 10, "exclude_seen": true}
                     -> {"recommendations": [[{"item": …, "title": …, "score": …}, …]]}
    GET  /health     -> {"status": "ok"}

A bad request is answered with status 400 and {"error": one line}.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ilrec_dist.common.errors import UserError
from ilrec_dist.serving.backend import Backend

DEFAULT_TOP = 10
# Bounds on one request, so that one client cannot take all of the memory.
MAX_BODY_BYTES = 16 << 20
MAX_HISTORIES = 4096
MAX_TOP = 1000


def make_server(backend: Backend, host: str, port: int) -> ThreadingHTTPServer:
    """A server that is ready for `serve_forever`; port 0 takes a free one.

    Requests are read side by side and computed one after the
    other. Raises UserError when the address cannot be used.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        """Answers for this backend."""

        def do_GET(self) -> None:  # noqa: N802
            if self.path == "/health":
                self._answer(200, {"status": "ok"})
            else:
                self._answer(404, {"error": f"no such path {self.path}; try /health"})

        def do_POST(self) -> None:  # noqa: N802
            if self.path != "/recommend":
                self._answer(404, {"error": f"no such path {self.path}; try /recommend"})
                return
            try:
                histories, top, exclude_seen = _parse(self._body())
                with lock:
                    lists = backend.recommend(histories, top, exclude_seen)
            except UserError as error:
                self._answer(400, {"error": str(error)})
                return
            plain = [[dataclasses.asdict(item) for item in items] for items in lists]
            self._answer(200, {"recommendations": plain})

        def _body(self) -> bytes:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
                self.close_connection = True
                raise UserError(f"expected a Content-Length of at most {MAX_BODY_BYTES:,} bytes")
            return self.rfile.read(int(length))

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Print nothing: histories are nobody's business."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot be listened on ({error.strerror or error}); "
            "choose another"
        ) from None


def _parse(body: bytes) -> tuple[list[list[str]], int, bool]:
    """(histories, top, exclude_seen) of a request. Raises UserError that names the
    field.
    """
    try:
        request = json.loads(body)
    except ValueError:
        raise UserError("the body is not JSON") from None
    if not isinstance(request, dict):
        raise UserError("expected an object with the field histories")
    unknown = sorted(request.keys() - {"histories", "top", "exclude_seen"})
    if unknown:
        raise UserError(f"unknown field {unknown[0]!r}; expected histories, top, exclude_seen")
    histories = request.get("histories")
    if not isinstance(histories, list) or not all(
        isinstance(history, list) and all(isinstance(item, str) for item in history)
        for history in histories
    ):
        raise UserError("field histories: expected a list of lists of item ids")
    if len(histories) > MAX_HISTORIES:
        raise UserError(f"field histories: {len(histories)} of them, at most {MAX_HISTORIES}")
    top = request.get("top", DEFAULT_TOP)
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= MAX_TOP:
        raise UserError(f"field top: expected a whole number from 1 to {MAX_TOP}, found {top!r}")
    exclude_seen = request.get("exclude_seen", False)
    if not isinstance(exclude_seen, bool):
        raise UserError(f"field exclude_seen: expected true or false, found {exclude_seen!r}")
    return histories, top, exclude_seen
