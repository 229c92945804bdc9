"""app/access.py and forged requests: what a page of another site can do through the user's browser is nothing."""

import json

import pytest
from app_runs import write_run
from served import Server
from waiting import wait_until

from app.access import OwnPagesOnly

FOREIGN = "evil.example"


@pytest.fixture(scope="module", params=[(), ("--auth", "me:secret")], ids=["open", "with a password"])
def server(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder.parent / f"{folder.name}-served"))
        found = Server(folder, *request.param)
        yield found
        found.demo.close()


NOTES = ("/gradio_api/call/set_run_notes", json.dumps({"data": ["tiny", "", "written by another site"]}).encode())
UPLOAD = (
    "/gradio_api/upload",
    b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nx\r\n--b--\r\n',
)


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/info", "/gradio_api/file=/etc/passwd", "/login"])
def test_a_name_that_another_site_lets_point_here_is_refused(server, path):
    for host in (FOREIGN, f"{FOREIGN}:{server.port}", f"localhost.{FOREIGN}", "127.0.0.1.evil.example", "[::1", ""):
        status, text = server.ask(path, host=host or " ")
        assert status == 403 and "--allow-host" in text and text.count("\n") == 1
    assert server.ask(path)[0] != 403 or "passwd" in path


@pytest.mark.parametrize(("path", "body"), [NOTES, UPLOAD, ("/login", b"username=me&password=secret")])
def test_a_request_of_another_sites_page_is_refused(server, path, body):
    kind = "multipart/form-data; boundary=b" if path == UPLOAD[0] else "application/json"
    for origin in (
        f"http://{FOREIGN}",
        "null",
        f"http://{server.own}.evil.example",
        "http://localhost:1",
        "http://[",
        "",
    ):
        status, text = server.ask(path, body, kind=kind, Origin=origin)
        assert status == 403 and str(server.folder.parent) not in text
    assert server.ask(path, body, host=FOREIGN, kind=kind, Origin=f"http://{FOREIGN}")[0] == 403
    assert not (server.folder / "tiny" / "notes.txt").exists()
    assert not list(server.folder.parent.glob(f"{server.folder.name}-served/**/a.txt"))


def test_the_own_page_may_upload_and_write(server):
    if server.demo.auth:
        status, _ = server.ask(*UPLOAD, kind="multipart/form-data; boundary=b", Origin=f"http://{server.own}")
        assert status == 401
        return
    for host in (server.own, f"localhost:{server.port}"):
        status, text = server.ask(*UPLOAD, host=host, kind="multipart/form-data; boundary=b", Origin=f"http://{host}")
        assert status == 200 and json.loads(text)[0].endswith("a.txt")
    assert server.ask(*NOTES, Origin=f"http://{server.own}")[0] == 200
    notes = server.folder / "tiny" / "notes.txt"
    wait_until(notes.exists, "the notes")


def test_a_forged_path_is_refused_in_a_line(server, capfd):
    if server.demo.auth:
        assert server.ask("/gradio_api/call/generate", b'{"data": [null]}')[0] == 401
        return
    payload = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    asked = {"data": ["tiny", "", payload, *[None] * 12]}
    _, text = server.ask("/gradio_api/call/generate", json.dumps(asked).encode())
    event = json.loads(text)["event_id"]
    _, text = server.ask(f"/gradio_api/call/generate/{event}")
    assert "A file was not uploaded on this page; upload it." in text and "/etc/passwd" not in text
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("bound", "allowed", "shared", "headers", "is_refused"),
    [
        ("127.0.0.1", [], False, {"host": "LOCALHOST:7860", "origin": "http://localhost:7860"}, False),
        ("127.0.0.1", [], False, {"host": "192.168.1.2:7860"}, True),
        ("127.0.0.1", ["Me.Example"], False, {"host": "me.example", "origin": "https://me.example"}, False),
        ("127.0.0.1", ["me.example"], False, {"host": "127.0.0.1:7860", "origin": "https://me.example"}, False),
        ("127.0.0.1", ["me.example"], False, {"host": "127.0.0.1:7860", "origin": "https://not.me.example"}, True),
        ("::1", [], False, {"host": "[::1]:7860", "origin": "http://[::1]:7860"}, False),
        ("0.0.0.0", [], False, {"host": "192.168.1.2:7860", "origin": "http://192.168.1.2:7860"}, False),
        ("0.0.0.0", [], False, {"host": FOREIGN}, True),
        ("127.0.0.1", [], True, {"host": "abc.gradio.live", "origin": "https://abc.gradio.live"}, False),
        ("127.0.0.1", [], False, {"host": "abc.gradio.live"}, True),
        ("127.0.0.1", [], False, {}, True),
    ],
)
def test_who_may_ask(bound, allowed, shared, headers, is_refused):
    assert bool(OwnPagesOnly(None, bound, allowed, shared).problem(headers)) == is_refused
