"""The server answers what its backend says, and refuses bad requests in one line."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

import pytest

from ilrec_dist.common.errors import UserError
from ilrec_dist.serving.app import MAX_BODY_BYTES, make_server
from ilrec_dist.serving.backend import ScoredItem


class EchoBackend:
    """Recommends the history itself, newest first."""

    def recommend(
        self, histories: Sequence[Sequence[str]], top: int, exclude_seen: bool
    ) -> list[list[ScoredItem]]:
        if any("unknown" in history for history in histories):
            raise UserError("history 0 has the item 'unknown'")
        score = -1.0 if exclude_seen else -2.0
        return [[ScoredItem(item, None, score) for item in h[::-1][:top]] for h in histories]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with make_server(EchoBackend(), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def ask(address: str, path: str, body: object | None = None) -> tuple[int, dict]:
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(f"{address}{path}", data, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_lists_come_back_in_the_order_of_the_histories(address: str) -> None:
    body = {"histories": [["a", "b"], ["c"]], "top": 1, "exclude_seen": True}
    status, answer = ask(address, "/recommend", body)
    items = [[item["item"] for item in items] for items in answer["recommendations"]]
    assert (status, items) == (200, [["b"], ["c"]])
    assert answer["recommendations"][0][0]["score"] == -1.0
    assert ask(address, "/recommend", {"histories": [["a"]]})[1]["recommendations"][0] == [
        {"item": "a", "title": None, "score": -2.0}
    ]
    assert ask(address, "/health") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        ([], "expected an object"),
        ({}, "field histories: expected a list of lists"),
        ({"histories": [["a", 1]]}, "field histories: expected a list of lists"),
        ({"histories": [["a"]] * 5000}, "at most 4096"),
        ({"histories": [], "top": 0}, "field top: expected a whole number"),
        ({"histories": [], "top": True}, "field top: expected a whole number"),
        ({"histories": [], "exclude_seen": 1}, "field exclude_seen: expected true or false"),
        ({"histories": [], "user": 1}, "unknown field 'user'"),
        ({"histories": [["unknown"]]}, "history 0 has the item 'unknown'"),
    ],
)
def test_bad_requests_are_answered_with_one_line(address: str, body: object, message: str) -> None:
    status, answer = ask(address, "/recommend", body)
    assert status == 400 and message in answer["error"] and "\n" not in answer["error"]


def test_other_paths_and_bodies_that_are_too_large_are_refused(address: str) -> None:
    assert ask(address, "/")[0] == 404 and ask(address, "/other", {})[0] == 404
    request = urllib.request.Request(f"{address}/recommend", b"{}", method="POST")
    request.add_header("Content-Length", str(MAX_BODY_BYTES + 1))
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    assert caught.value.code == 400


def test_an_address_in_use_is_named() -> None:
    with make_server(EchoBackend(), "127.0.0.1", 0) as server:
        port = server.server_address[1]
        with pytest.raises(UserError, match=f"--port {port}: cannot be listened on"):
            make_server(EchoBackend(), "127.0.0.1", port)
