"""Nodes that say odd things: every value of every document of theirs is exchanged for something else, one at a time.

Whatever a node says, `bind` and `restore` say in their reports what could not be had, and raise nothing but the errors
that they promise; and a slot that is reported good is good.
"""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shm.errors import HotspareError
from tests.liars import ODD, changed, places
from transfer import Restorer
from transfer.engine import MooncakeEngine
from transfer.slots import Slots

DOCUMENTS = ("/v1/node", "/v1/nodes", "/v1/shard-map", "/v1/manifest")


class Liar:
    """Between a restorer and a real node: passes everything on but for one value of one document."""

    def __init__(self, url: str) -> None:
        self.change: Callable[[str, Any], Any] = lambda path, document: document
        liar = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                try:
                    with urllib.request.urlopen(url + self.path) as answer:
                        status, body = 200, answer.read()
                except urllib.error.HTTPError as error:
                    status, body = error.code, error.read()
                document = liar.change(self.path.split("?")[0], json.loads(body))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(document).encode())

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def documents(self) -> dict[str, Any]:
        """What the node says, by path."""
        found = {}
        for path in DOCUMENTS:
            with urllib.request.urlopen(self.url + path) as answer:
                found[path] = json.loads(answer.read())
        return found

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def liar(tiny_qwen3_moe: Path, cluster: Callable[..., Any]) -> Iterator[Liar]:
    """Before one of two nodes, which has half of the blocks; its segment has another name than it says."""
    nodes = cluster("qwen", tiny_qwen3_moe, count=2, replicas=1)
    made = Liar(nodes.urls[0])
    yield made
    made.close()


@pytest.mark.usefixtures("kept_engines")
def test_whatever_a_node_says_bind_and_restore_report_and_what_is_reported_good_is_good(
    tiny_qwen3_moe: Path, liar: Liar
) -> None:
    right = {
        name: tensor
        for file in sorted(tiny_qwen3_moe.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
        if ".mlp.experts." in name
    }
    engine, tried = MooncakeEngine("127.0.0.1"), 0
    for path, document in liar.documents().items():
        for number, at in enumerate(places(document)):
            for value in ODD[number % 3 :: 3]:
                liar.change = lambda asked, said, path=path, at=at, value=value: (
                    changed(said, at, value) if asked == path else said
                )
                _try(liar, right, engine, f"{path} {at} is {value!r}")
                tried += 1
    assert tried > 200


def _try(liar: Liar, right: dict[str, torch.Tensor], engine: Any, what: str) -> None:
    held = {name: tensor.clone() for name, tensor in right.items()}
    with Restorer(liar.url, engine=engine) as restorer:
        try:
            restorer.bind(Slots.plain(held))
        except HotspareError:
            return
        except Exception as error:
            raise AssertionError(f"bind, where {what}") from error
        for tensor in held.values():
            tensor.view(torch.uint8).fill_(0xA5)
        try:
            report = restorer.restore()
        except Exception as error:
            raise AssertionError(f"restore, where {what}") from error
    if report.ok:
        assert all(torch.equal(held[name].view(torch.uint8), right[name].view(torch.uint8)) for name in right), what
    else:
        assert report.failed, what
