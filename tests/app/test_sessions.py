"""app/sessions.py in a server of this process: clients that disconnect, and the memory of an open page."""

import contextlib
import errno
import json
import socket
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from unittest import mock

import pytest
from app_runs import write_run
from gradio import networking
from waiting import LIMIT, wait_until

from app import studio as studios
from app.jobs import Jobs
from app.library import Library
from app.page import create_demo
from app.runs import BASE
from app.sessions import LAUNCH
from app.studio import Studio

LONG = {
    "run": None, "weights": BASE.label, "adapter": None, "beside": False, "random": False, "prompt": "red disc",
    "negative": "", "seed": 3, "steps": 150, "guidance": 2, "width": 32, "height": 32, "images": 8, "strength": 1,
    "adapter_config": None, "reference": None,
}  # fmt: skip
SHORT = LONG | {"images": 1, "steps": 1}


class Server:
    """The page of a studio, and the requests that a program may send."""

    def __init__(self, runs: Path) -> None:
        self.runs, self.studio, library = runs, Studio(), Library(runs)
        self.demo = create_demo(library, Jobs(library), self.studio)
        with mock.patch.object(networking, "url_ok", lambda _: True):  # it waits for three seconds, then gives up
            self.app, address, _ = self.demo.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, **LAUNCH)
        self.api = f"{address}gradio_api"
        self.drawn = []
        """The step counts of all images whose turn has come."""
        draw = self.studio._draw
        self.studio._draw = lambda picture, *rest: self.drawn.append(picture.request.steps) or draw(picture, *rest)

    def post(self, path: str, content: dict):
        request = urllib.request.Request(f"{self.api}/{path}", json.dumps(content).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            return json.load(answer)

    def ask(self, values: dict) -> str:
        """Request images; return where the messages can be read."""
        return f"call/generate/{self.post('call/generate', {'data': list(values.values())})['event_id']}"

    def listen(self, path: str) -> str:
        """Return all messages."""
        with urllib.request.urlopen(f"{self.api}/{path}", timeout=LIMIT) as answer:
            return answer.read().decode()

    def events(self) -> list:
        """What Gradio is at work on."""
        return [event for events in self.demo._queue.active_jobs for event in events or ()]

    def begin_to_listen(self, path: str) -> socket.socket:
        """Return a stream after its first message."""
        address = urllib.parse.urlsplit(self.api)
        stream = socket.create_connection((address.hostname, address.port), timeout=LIMIT)
        stream.sendall(f"GET {address.path}/{path} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
        told = b""
        while b"event: generating" not in told:
            told += (more := stream.recv(4096))
            assert more, f"the stream ended with {told.decode()!r}"
        return stream


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("served")))
        found = Server(folder)
        yield found
        found.studio.cancel()
        found.demo.close()


@pytest.mark.exhaustive
def test_what_nobody_fetches_takes_neither_a_turn_nor_a_place(server, monkeypatch):
    """Eight requests that are never cancelled; a later client is served."""
    monkeypatch.setattr(studios, "PATIENCE", 10.0 * LIMIT)
    server.drawn.clear()
    for _ in range(8):
        server.ask(LONG | {"steps": 2})
    assert "event: complete" in server.listen(server.ask(SHORT))
    assert server.drawn == [SHORT["steps"]]
    wait_until(lambda: len(server.studio.running) == 8, "eight who wait to be heard")
    monkeypatch.setattr(studios, "PATIENCE", 0.0)
    wait_until(lambda: not server.studio.running, "all of them to be given up")


@pytest.mark.exhaustive
def test_who_leaves_ends_what_is_drawn_for_him(server, monkeypatch):
    """By Gradio alone: nothing is given up here. `wait_until` fails at its limit."""
    monkeypatch.setattr(studios, "PATIENCE", 10.0 * LIMIT)
    with server.begin_to_listen(server.ask(LONG)):
        wait_until(lambda: server.studio.turns.waiting, "the drawing")
    wait_until(lambda: not server.studio.running and not server.studio.turns.waiting, "the end of the drawing")


@pytest.mark.exhaustive
@pytest.mark.parametrize("noticed", ["first by either task", "by the one that marks his event"])
def test_who_leaves_while_waiting_loses_his_place(server, monkeypatch, noticed):
    """Gradio closes his handler when it says something, which it would with his turn; he is given up before.

    `wait_until` fails at its limit.
    """
    monkeypatch.setattr(studios, "PATIENCE", 10.0 * LIMIT)
    with server.studio.turns.turn():
        with server.begin_to_listen(server.ask(LONG)):
            wait_until(lambda: len(server.studio.turns.waiting) == 2, "a visitor who waits")
            if noticed == "by the one that marks his event":
                monkeypatch.setattr(studios, "PATIENCE", 0.0)
                wait_until(lambda: len(server.events()) == 1, "the end of those of earlier visitors")
                server.events()[0].alive = False
                wait_until(lambda: len(server.studio.turns.waiting) == 1, "his place to be given up")
        monkeypatch.setattr(studios, "PATIENCE", 0.0)
        wait_until(lambda: len(server.studio.turns.waiting) == 1, "his place to be given up")


@pytest.mark.exhaustive
def test_whoever_comes_after_five_who_ask_for_eight_images_has_his_after_their_first(server):
    """By default, Gradio serves four requests at once."""
    server.drawn.clear()
    with contextlib.ExitStack() as streams:
        with server.studio.turns.turn():
            for asked in [LONG | {"steps": 2}] * 5 + [SHORT]:
                before = len(server.studio.turns.waiting)
                streams.enter_context(server.begin_to_listen(server.ask(asked)))
                wait_until(lambda: len(server.studio.turns.waiting) > before, "his place")  # noqa: B023
        wait_until(lambda: SHORT["steps"] in server.drawn, "his image")
    assert server.drawn[:6] == [2] * 5 + [SHORT["steps"]]
    wait_until(lambda: not server.studio.running, "the end of the drawings")


def test_a_page_that_looks_on_leaves_nothing_behind(server):
    """Gradio itself would store one more copy of each component that an event both reads and updates."""
    asks = [each for each in server.demo.config["dependencies"] if any(on == "tick" for _, on in each["targets"])]
    watch = max(asks, key=lambda each: len(each["outputs"]))
    shown = [getattr(server.demo.blocks[number], "value", None) for number in watch["inputs"]]
    question = {"data": ["tiny", *shown[1:]], "fn_index": watch["id"], "session_hash": "page"}
    sessions = server.app.state_holder.session_data

    def sees_something() -> bool:
        return "maximum" in json.dumps(server.post("run/predict", question)["data"])  # of the slider

    for name in "abc":
        assert sees_something() and not sees_something()
        write_run(server.runs / name)  # there is something new
    assert sees_something()
    assert sorted(sessions["page"].blocks_config.blocks) == sorted(server.demo.blocks)  # their numbers
    assert not any(sessions["page"].config_values.values())
    assert not sees_something()
    del sessions["page"]  # as after a hundred others
    assert sees_something()


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (
            errno.ENOSPC,
            507,
            "The files cannot be stored (full): make room on the disk that has the system's temporary ",
        ),
        (errno.EIO, 500, "Internal Server Error"),
    ],
)
def test_an_upload_that_finds_no_room_is_told_so(server, monkeypatch, number, status, said):
    async def fails(*_: object, **__: object) -> None:
        raise OSError(number, "full")

    monkeypatch.setattr("gradio.routes.upload_fn", fails)
    with pytest.raises(urllib.error.HTTPError) as answer:
        server.post("upload", {})
    assert answer.value.code == status and answer.value.read().decode().startswith(said)


def test_a_look_takes_a_step_beyond_the_end_of_the_slider(server):
    """It was sent while a shorter run was being selected; an error would cover the page."""
    number, look = next((number, fn) for number, fn in server.demo.fns.items() if fn.name == "watch")
    values = [{"run": "tiny", "step": 99, "others": []}.get(part.elem_id) for part in look.inputs]
    answer = server.post("run/predict", {"fn_index": number, "data": values, "session_hash": "a-look"})
    assert '"maximum": 4' in json.dumps(answer["data"])
