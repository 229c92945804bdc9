"""The page in a server of this process: clients that leave, the memory of an open page, and a full disk."""

import errno
import json

import pytest
from app_runs import write_run
from served import Server
from waiting import wait_until

from app.runs import BASE

LONG = {
    "run": None, "weights": BASE.label, "adapter": None, "beside": False, "random": False, "prompt": "red disc",
    "negative": "", "seed": 3, "steps": 2, "guidance": 2, "width": 32, "height": 32, "images": 8, "strength": 1,
    "reference": None,
}  # fmt: skip


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
def test_who_leaves_ends_what_is_generated_for_him(server):
    """At the next image; then the next request is served. `wait_until` fails at its limit."""
    drawn, image = [], server.studio._image
    server.studio._image = lambda picture, step: drawn.append(picture.request.seed) or image(picture, step)
    with server.listen_until(server.call("generate", *(LONG | {"steps": 20}).values()), b"event: generating"):
        wait_until(server.studio.lock.locked, "the first image")
    wait_until(lambda: not server.studio.lock.locked(), "the end of the request")
    assert len(drawn) < 8
    server.listen_until(server.call("generate", *(LONG | {"images": 1}).values()), b"event: complete").close()


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
        write_run(server.folder / name)  # there is something new
    assert sees_something()
    assert sorted(sessions["page"].blocks_config.blocks) == sorted(server.demo.blocks)  # their numbers
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
    code, text = server.ask("/gradio_api/upload", b"{}")
    assert code == status and text.startswith(said)


def test_a_look_takes_a_step_beyond_the_end_of_the_slider(server):
    """It was sent while a shorter run was being selected; an error would cover the page."""
    number, look = next((number, fn) for number, fn in server.demo.fns.items() if fn.name == "watch")
    values = [{"run": "tiny", "step": 99, "others": []}.get(part.elem_id) for part in look.inputs]
    answer = server.post("run/predict", {"fn_index": number, "data": values, "session_hash": "a-look"})
    assert '"maximum": 4' in json.dumps(answer["data"])
