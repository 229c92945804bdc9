"""The page in a server of this process, with the settings of the command line, and plain HTTP requests to it."""

import http.client
import json
import socket
from pathlib import Path
from unittest import mock

from gradio import networking
from waiting import LIMIT

from app.__main__ import launch_settings, parse_args
from app.jobs import Jobs
from app.library import Library
from app.page import create_demo
from app.studio import Studio


class Server:
    """The page of a folder of runs."""

    def __init__(self, runs: Path, *flags: str) -> None:
        self.folder, self.studio, library = runs, Studio(), Library(runs)
        self.demo = create_demo(library, Jobs(library), self.studio)
        with mock.patch.object(networking, "url_ok", lambda _: True):  # it waits for three seconds, then gives up
            settings = launch_settings(parse_args(list(flags)))
            self.app, address, _ = self.demo.launch(prevent_thread_lock=True, quiet=True, **settings)
        self.port = int(address.strip("/").rpartition(":")[2])

    @property
    def own(self) -> str:
        """Host and port of the page."""
        return f"127.0.0.1:{self.port}"

    def ask(self, path: str, body: bytes | None = None, host: str = "", kind="application/json", **headers):
        """Return status and text of the answer to a request with these headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        headers = {"Host": host or self.own, "Content-Type": kind, **headers}
        connection.request("POST" if body is not None else "GET", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")

    def post(self, path: str, content: dict):
        """Return the JSON answer to a JSON request."""
        status, text = self.ask(f"/gradio_api/{path}", json.dumps(content).encode())
        assert status == 200, text
        return json.loads(text)

    def call(self, name: str, *data) -> str:
        """Call an endpoint, and return the path of its messages."""
        return f"/gradio_api/call/{name}/{self.post(f'call/{name}', {'data': data})['event_id']}"

    def listen_until(self, path: str, words: bytes) -> socket.socket:
        """Return a stream of messages, after these words."""
        stream = socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT)
        stream.sendall(f"GET {path} HTTP/1.1\r\nHost: {self.own}\r\n\r\n".encode())
        told = b""
        while words not in told:
            told += (more := stream.recv(4096))
            assert more, f"the stream ended with {told.decode()!r}"
        return stream
