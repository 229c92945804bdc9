"""The application's command line and API, and the page in a real browser."""

import ast
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import browsers
import gradio as gr
import numpy as np
import PIL.Image
import pytest
from app_runs import REPOSITORY, trained
from experiment import examples
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from launching import free_port
from pipelines import image_folder
from waiting import LIMIT, ended, ignore_sigint, wait_until

from app import __main__ as command_line
from app.jobs import Jobs
from app.library import Library
from app.page import create_demo
from app.studio import Studio
from reslora.experiment.report import write_report
from reslora.images.experiment.report_sections import IMAGES

# -- command line ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--share"],
        ["--host", "0.0.0.0"],
        ["--host", "::"],
        ["--host", "example.org"],
        ["--auth", "nobody"],
        ["--auth", "x:"],
        ["--port", "0"],
        ["--data", "/no/such/folder"],
        ["--runs", __file__],
        ["--runs", str(REPOSITORY / "app" / "example")],
    ],
)
def test_refused_with_one_line_and_status_2(flags, capsys):
    with pytest.raises(SystemExit) as end:
        command_line.parse_args(flags)
    assert end.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_others_may_come_with_a_password():
    args = command_line.parse_args(["--share", "--host", "0.0.0.0", "--auth", "me:se:cret"])
    assert args.auth == ("me", "se:cret")
    assert command_line.parse_args([]).host == "127.0.0.1"
    for host in ("localhost", "127.0.0.2", "::1"):
        assert command_line.parse_args(["--host", host]).auth is None


def test_only_the_page_and_the_entry_import_gradio():
    """And the trainers' code is imported only for its parser: training runs in other processes."""
    for path in (REPOSITORY / "app").rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module} if isinstance(node, ast.ImportFrom) and node.level == 0 else set()
        may = path.parent.name == "tabs" or path.name in ("page.py", "handlers.py")
        assert may or not {name for name in names if name.startswith("gradio")}
        assert not names & {"train_llm", "train_glue", "reslora.texts", "reslora.images"}


def test_no_two_parts_have_one_id_and_none_is_told_of_progress_that_it_hides(tmp_path):
    """Scripts and styles find elements by id, so a second element with an id could be taken for the first.

    With hidden progress, Gradio's page would still search for each output of an event, which takes seconds.
    """
    library = Library(tmp_path)
    demo = create_demo(library, Jobs(library), Studio())
    ids = [part.elem_id for part in demo.blocks.values() if getattr(part, "elem_id", None)]
    assert sorted(ids) == sorted(set(ids))
    hidden = [event for event in demo.fns.values() if event.targets and event.show_progress == "hidden"]
    searching = [event for event in hidden if event.show_progress_on != []]
    rendered = [part for event in searching for part in event.outputs]  # by `gr.render`, into one column
    assert hidden and all(isinstance(part, gr.Column) for part in rendered) and len(rendered) == len(searching)


# -- a running application ---------------------------------------------------------------------------------------------


def start(runs: Path, log: Path, *flags: str, port: int = 0) -> tuple[subprocess.Popen, str]:
    """Start `python -m app` on a port, by default a free one, and wait for a response; return process and address.

    It is started in the background, as by `nohup`, with SIGINT ignored. It runs in a folder `tmp` next to the log,
    because in the checkout it would show the runs there.
    """
    port = port or int(free_port())
    command = [sys.executable, "-m", "app", "--runs", str(runs), "--port", str(port), *flags]
    (temporary := log.with_name("tmp")).mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(temporary)}
    environment["PYTHONPATH"] = str(REPOSITORY)
    with log.open("w") as output:  # not a pipe, which would fill up
        options = {"cwd": log.parent, "env": environment, "preexec_fn": ignore_sigint}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
    address = f"http://127.0.0.1:{port}"
    wait_until(lambda: status_of(address) is not None or process.poll() is not None, f"an answer of {address}")
    assert process.poll() is None, log.read_text()
    return process, address


def end(process: subprocess.Popen, log: Path, number: int) -> None:
    """End it by a signal, whatever it has inherited and served, and remove its temporary files."""
    said = log.read_text()
    process.send_signal(number)
    assert ended(process) == 0
    assert "Traceback" not in log.read_text().removeprefix(said)
    assert not list(log.with_name("tmp").glob("reslora-app-*"))


@contextlib.contextmanager
def serving(runs: Path, log: Path, *flags: str, end_by: int = signal.SIGTERM):
    """Run the application, and yield its address; a signal ends it."""
    process, address = start(runs, log, *flags)
    try:
        yield address
    finally:
        end(process, log, end_by)


def status_of(address: str) -> int | None:
    """Return the HTTP status of a GET request; None if nothing listens."""
    try:
        with urllib.request.urlopen(address, timeout=LIMIT) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    shown = tmp_path_factory.getbasetemp() / "shown"
    shutil.copytree(trained(tmp_path_factory) / "tiny", shown / "tiny")
    return shown


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("app") / "log"


@pytest.fixture(scope="module")
def address(runs, log):
    with serving(runs, log) as address:
        yield address


def client_of(address: str, **options) -> Client:
    """Return Gradio's client, without the time limit of five seconds that httpx has."""
    return Client(address, verbose=False, httpx_kwargs={"timeout": LIMIT}, **options)


@pytest.fixture(scope="module")
def client(address):
    return client_of(address)


GENERATE = {
    "run": "tiny", "weights": "ResLoRA: merged weights", "adapter": None, "beside": True, "random": False,
    "prompt": "red disc", "negative": "", "seed": 3, "steps": 3, "guidance": 2, "width": 64, "height": 64, "images": 1,
    "strength": 1, "reference": None,
}  # fmt: skip


def generated(client, **changes):
    return client.predict(*(GENERATE | changes).values(), api_name="/generate")


def pixels(path: str) -> bytes:
    return np.asarray(PIL.Image.open(path)).tobytes()


def test_a_program_can_use_adapters(client, runs):
    file = runs / "tiny" / "lora" / "kohya.safetensors"
    gallery, *_ = generated(client, adapter=handle_file(file), beside=False)
    stored, *_ = generated(client, weights="LoRA: kohya.safetensors", beside=False)
    assert pixels(gallery[0]["image"]) == pixels(stored[0]["image"])
    with pytest.raises(AppError, match="safetensors"):
        generated(client, adapter=handle_file(runs / "tiny" / "lora" / "checkpoint-4" / "trainer.pt"))


def test_no_file_of_this_machine_is_served(address, runs, client):
    inside = [runs / "tiny" / "config.json", runs / "tiny" / "lora" / "samples" / "step-000002" / "0-0.png"]
    outside = [Path("/etc/passwd"), REPOSITORY / "README.md", Path(__file__), Path("/tmp"), Path("/proc/self/environ")]
    for path in map(
        str, [*inside, *outside, "README.md", "app/page.py", "../../etc/passwd", "served/../../../etc/passwd"]
    ):
        for shown in (path, urllib.parse.quote(path, safe="")):
            assert status_of(f"{address}/gradio_api/file={shown}") in (400, 403, 404), path
    with pytest.raises((AppError, ValueError)):  # nor through an upload that is none
        payload = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
        generated(client, adapter=payload)


@pytest.mark.exhaustive
def test_a_password_is_asked_for(runs, tmp_path):
    """Ctrl-C ends the application, although it was started in the background, where SIGINT is ignored."""
    with serving(runs, tmp_path / "log", "--auth", "me:secret", end_by=signal.SIGINT) as address:
        assert status_of(f"{address}/config") == 401
        assert status_of(f"{address}/gradio_api/file=/etc/passwd") == 401
        assert "tiny" in client_of(address, auth=("me", "secret")).predict(api_name="/runs")


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsers.opened(tmp_path_factory.getbasetemp().parent) as browser:
        yield browser


def leaving(url: str, address: str) -> list[str]:
    """Return the address of a request to another machine, if it is one."""
    return [] if url.startswith((address, "data:", "blob:")) else [url]


def complaint(said) -> list[str]:
    """Return an error on the console. Files of runs may vanish, so a request may fail for a removed file."""
    lost = said.text.startswith("Failed to load resource")
    return [said.text] if said.type == "error" and not lost else []


TOAST, NOTES_TOLD = "[data-testid=toast-body]", "#runs .told"
TOLD = f"""
window.noted = {{ "{TOAST}": "", "{NOTES_TOLD}": "" }};
new MutationObserver(() => {{
  for (const where in noted) for (const part of document.querySelectorAll(where))
    if (!noted[where].includes(part.textContent)) noted[where] += part.textContent;
}}).observe(document, {{ subtree: true, childList: true, characterData: true }});
"""
"""Lines that go again by themselves, which a slow test would miss: all that were ever there."""


def wait_until_told(page, words: str, where: str = TOAST) -> None:
    """A page with the script `TOLD` has shown these words there, and may not any more."""
    page.wait_for_function("([where, words]) => noted[where].includes(words)", arg=[where, words])


SHOWN = """() => {
  const grid = document.querySelector('#grid table'), step = document.querySelector('#step input[type=number]');
  return grid && step && grid.dataset.step === step.value;
}"""
"""All of the run is there. Images alone may be of a look at it, before the answer that fills in the forms."""


@pytest.fixture
def page(browser, address, runs, request):
    """Open the page as a visitor, in the theme that a test may choose; runs that it starts are removed with it."""
    before = set(runs.iterdir())
    page = browser.new_page(viewport={"width": 1360, "height": 900})
    page.set_default_timeout(LIMIT * 1000)
    page.add_init_script(TOLD)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda said: page.errors.extend(complaint(said)))
    page.on("request", lambda request: page.errors.extend(leaving(request.url, address)))
    page.goto(f"{address}?__theme={getattr(request, 'param', 'light')}", wait_until="domcontentloaded")
    page.wait_for_selector("#grid img")
    page.wait_for_function(SHOWN)
    yield page
    page.close()
    for path in set(runs.iterdir()) - before:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    assert page.errors == []


def test_a_run_is_looked_at_and_taken_along(page, runs):
    """Each of the three functions asserts what the page shows."""
    move_the_slider(page)
    take_along(page, runs)
    enlarge_and_scroll(page)


def move_the_slider(page) -> None:
    """The newest run is shown at its last step without a click; slider and play button move all columns."""
    page.wait_for_selector('#grid table[data-step="4"]')
    assert page.locator("#grid th").all_inner_texts()[1].startswith("Base model")
    last = page.locator("#grid img").nth(2).get_attribute("src")
    page.locator("#step input[type=number]").fill("2")
    page.locator("#step input[type=number]").press("Enter")
    page.wait_for_selector('#grid table[data-step="2"]')
    assert page.locator("#grid img").nth(2).get_attribute("src") != last
    page.locator("#play").click()
    page.wait_for_selector('#grid table[data-step="0"]')
    page.wait_for_selector('#grid table[data-step="4"]')
    page.locator("#play").click()
    with page.expect_download() as download:
        page.locator("#download").click()
    with PIL.Image.open(download.value.path()) as image:
        assert image.format == "PNG"
    assert page.locator("#train-curve path.line").count() == 2


def take_along(page, runs: Path) -> None:
    """The first LoRA file of the last method is offered; another file has other lines, and is downloaded."""
    told = "document.querySelector('#use textarea')?.value.includes('{}')"
    page.wait_for_function(told.format("ComfyUI/models/loras"))
    page.locator("#file input").fill("ResLoRA: pytorch_lora_weights.safetensors (diffusers)")
    page.locator("#file input").press("Enter")
    page.wait_for_function(
        "document.querySelector('#place textarea, #place input')?.value.endsWith('pytorch_lora_weights.safetensors')"
    )
    page.wait_for_function(told.format("DiffusionPipeline"))
    with page.expect_download() as download:
        page.locator("#take").click()
    assert download.value.suggested_filename == "tiny-reslora-pytorch_lora_weights.safetensors"
    assert (
        Path(download.value.path()).read_bytes()
        == (runs / "tiny" / "reslora" / "pytorch_lora_weights.safetensors").read_bytes()
    )


def enlarge_and_scroll(page) -> None:
    """Keys switch between images; the slider stays in view."""
    first, shown = page.locator("#grid button.tile").nth(1), page.locator("#zoom img")
    first.focus()
    page.keyboard.press("Enter")
    assert shown.get_attribute("alt") == "red disc: LoRA"
    for key, alt in (
        ("ArrowRight", "red disc: ResLoRA"), ("ArrowUp", "blue box: ResLoRA"), ("ArrowLeft", "blue box: LoRA"),
        ("ArrowLeft", "blue box: Base model"), ("ArrowLeft", "blue box: ResLoRA merged"),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert shown.get_attribute("alt") == alt and alt in page.locator("#zoom p").inner_text()
    page.keyboard.press("Escape")
    shown.wait_for(state="hidden")
    wait_until(lambda: first.evaluate("tile => tile === document.activeElement"), "the focus to go back")
    for width in (1280, 420):
        page.set_viewport_size({"width": width, "height": 500})
        page.locator("#numbers").scroll_into_view_if_needed()
        page.mouse.wheel(0, 300)
        page.wait_for_function(
            "scrollY > 300 && Math.abs(document.querySelector('#pinned')?.getBoundingClientRect().top) < 2"
        )


@pytest.mark.exhaustive
def test_images_with_merged_weights_beside_the_base_and_cancelled(page):
    page.get_by_role("tab", name="Generate").click()
    page.wait_for_function("document.querySelector('#weights input')?.value === 'ResLoRA: merged weights'")
    page.locator("#generate").click()
    page.locator("#status").get_by_text("2 of 2 images done").wait_for()
    page.wait_for_function("document.querySelectorAll('#gallery img').length === 2")
    page.locator("#gallery").get_by_text("base model").first.wait_for()
    page.get_by_label("Also generate with the base model").uncheck()
    page.locator("#generate").click()
    page.locator("#status").get_by_text("1 of 1 image done").wait_for()
    page.wait_for_function("document.querySelectorAll('#gallery img').length === 1")
    whole = "box => box.scrollHeight <= box.clientHeight && box.clientHeight >= box.querySelector('img').clientHeight"
    wait_until(lambda: page.locator("#gallery .grid-wrap").evaluate(whole), "the image to fit")

    draw_slowly(page)
    page.locator("#images input[type=number]").fill("8")
    page.locator("#generate").click()
    page.locator("#now").get_by_text("of 8").first.wait_for()
    page.locator("#cancel").click()
    page.locator("#status").get_by_text("Cancelled after").wait_for()
    assert page.locator("#gallery img").count() < 8


def draw_slowly(page) -> None:
    """So that what is drawn cannot end before it is stopped, however slow the browser is."""
    for name, value in (("Denoising steps", "150"), ("Width", "128"), ("Height", "128")):
        page.get_by_label(f"number input for {name}").fill(value)


@pytest.mark.exhaustive
def test_a_grid_is_drawn_enlarged_stopped_and_taken_along(page):
    """Choosing a setting suggests values, but does not overwrite typed ones.

    A cell is shown as it was generated; arrow keys move from cell to cell.
    """
    page.get_by_role("tab", name="Generate").click()
    page.get_by_role("button", name="X/Y grid").click()
    values = "document.querySelector('#values-{} textarea, #values-{} input')?.value === '{}'"
    page.locator("#axis-y input").click()
    page.get_by_role("option", name="method", exact=True).click()
    page.wait_for_function(values.format("y", "y", "LoRA, ResLoRA"))
    page.locator("#values-y textarea, #values-y input").fill("ResLoRA, LoRA")
    page.locator("#axis-y input").focus()
    page.keyboard.press("Tab")
    page.locator("#axis-x input").focus()
    for key, suggested in (("ArrowDown", "0 1 2"), ("ArrowUp", "0 0.5 1")):
        page.locator("#axis-x input").focus()
        page.keyboard.press(key)
        page.keyboard.press("Enter")
        page.wait_for_function(values.format("x", "x", suggested))
    page.locator("#draw-grid").click()
    page.locator("#xy-status").get_by_text("6 of 6 cells done").wait_for()
    page.locator("#xy button.tile").nth(1).click()
    shown = page.locator("#zoom img")
    page.wait_for_function("document.querySelector('#zoom img')?.naturalWidth === 32")
    for key, alt in (("ArrowRight", "ResLoRA · strength 1"), ("ArrowDown", "LoRA · strength 1")):
        page.keyboard.press(key)
        assert shown.get_attribute("alt") == alt == page.locator("#zoom p").inner_text()
    page.keyboard.press("Escape")
    with page.expect_download() as download:
        page.locator("#grid-sheet").click()
    with PIL.Image.open(download.value.path()) as image:
        assert image.width > 3 * 128 and download.value.suggested_filename.endswith("-grid.png")
    draw_slowly(page)
    page.locator("#values-x textarea, #values-x input").fill(" ".join(str(n / 100) for n in range(30)))
    page.locator("#draw-grid").click()
    page.locator("#xy-now").get_by_text("Row 1 of 2").wait_for()
    page.locator("#stop-grid").click()
    page.locator("#xy-status").get_by_text("Stopped after").wait_for()
    # On a telephone, the buttons at the bottom of the screen cover nothing at the page's end.
    page.set_viewport_size({"width": 420, "height": 800})
    last, fixed = (f"document.querySelector('{part}').getBoundingClientRect()" for part in ("#xy-grid", "#generate"))
    page.wait_for_function(f"scrollTo(0, document.body.scrollHeight) || {last}.bottom <= {fixed}.top")


CONTRAST = """
element => {
  if (!element.isConnected) return null;
  const light = color => {
    const parts = color.match(/[\\d.]+/g).map(Number);
    const [r, g, b] = parts.slice(0, 3).map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let behind = element;
  while (behind && getComputedStyle(behind).backgroundColor.endsWith(' 0)')) behind = behind.parentElement;
  const page = location.search.includes('dark') ? 'rgb(30, 30, 30)' : 'rgb(255, 255, 255)';
  const pair = [getComputedStyle(element).color, behind ? getComputedStyle(behind).backgroundColor : page].map(light);
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}
"""


def contrast(locator) -> float:
    """Return the contrast of text and background; an update may replace the element meanwhile."""
    found = []
    wait_until(lambda: found.append(locator.evaluate(CONTRAST)) or found[-1] is not None, "an element that stays")
    return found[-1]


STEPS = "#flag-max_train_steps :is(input, textarea)"


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", ["light", "dark"], indirect=True)
def test_text_can_be_read(page):
    seen = [page.locator(name) for name in ("#summary .summary b", "#play", "#verdict *", "#use textarea")]
    assert [text for text in seen if contrast(text.first) < 4.5] == []
    page.locator("#grid button.tile").first.click()
    assert contrast(page.locator("#zoom p")) >= 4.5
    page.keyboard.press("Escape")
    page.get_by_role("tab", name="Train").click()
    page.locator("#start").wait_for()
    seen = [page.locator("#start"), page.get_by_text("A higher rank learns more detail")]
    seen.append(page.get_by_role("tab", name="Train"))
    assert [text for text in seen if contrast(text.first) < 4.5] == []
    page.get_by_role("button", name="All options").click()
    page.get_by_text("Output, checkpoints and reports").first.scroll_into_view_if_needed()
    page.wait_for_function("scrollY > 500")  # beside the form, however far it goes down
    wait_until(lambda: 0 <= page.locator("#start").bounding_box()["y"] < 240, "Start beside the form")


@pytest.mark.exhaustive
def test_a_form_survives_a_restart(page):
    """Values typed under Train return when the page is loaded again.

    Only settings that are chosen replace them.
    """
    page.get_by_role("tab", name="Train").click()
    page.locator("#start").wait_for()
    page.locator("#name input, #name textarea").fill("kept")
    page.locator(STEPS).fill("123")
    page.locator("#begin input").focus()
    page.keyboard.press("Tab")
    page.wait_for_timeout(1000)  # leaving the box fills nothing in
    page.wait_for_function("/kept .*123/.test(document.querySelector('#command textarea')?.value)")
    assert page.errors == []
    page.reload(wait_until="domcontentloaded")
    page.locator("#start").wait_for()  # the tab is kept, too
    page.errors.clear()
    page.wait_for_function("document.querySelector('#name input, #name textarea')?.value === 'kept'")
    page.wait_for_function(f"document.querySelector('{STEPS}')?.value === '123'")
    page.locator("#begin input").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_function(f"document.querySelector('{STEPS}')?.value === '50'")


@pytest.mark.exhaustive
def test_an_experiment_is_planned_and_its_report_is_read(page, runs, tmp_path):
    """The newest experiment is selected, with its report in a frame; the form shows the number of runs.

    Without an experiment, Stop says so.
    """
    page.get_by_role("tab", name="Experiment").click()
    page.locator("button#take-report:disabled").wait_for()
    page.locator("#experiment-state").get_by_text("There is no experiment yet").wait_for()
    page.locator("#experiment-stop").click()
    wait_until_told(page, "There is no experiment of that name")
    write_experiment(tmp_path / "which")
    (tmp_path / "which").rename(runs / "which")  # complete at once: what is read in part would be shown again
    try:
        report = page.frame_locator("#experiment-report iframe")
        report.get_by_role("heading", level=1).get_by_text("ResLoRA block(4) is better than").wait_for()
        page.locator("#experiment-state").get_by_text("60 of 60 runs finished").wait_for()
        page.locator("button#take-report:enabled").wait_for()
        take_the_best_along(page, runs)
        report.locator("#slider").press("ArrowRight")
        wait_until(lambda: report.locator("#slider").input_value() == "51", "the slider to move")
        page.wait_for_function("document.querySelector('#experiment-report iframe')?.clientHeight > 1000")
        assert contrast(page.locator("#experiment-state .summary")) >= 4.5
        plan_one(page)
    finally:
        shutil.rmtree(runs / "which")


def plan_one(page) -> None:
    """Several values make an experiment; the command is displayed before a button is pressed."""
    page.get_by_role("tab", name="Train").click()
    page.locator("#name input, #name textarea").fill("new")
    page.locator("#flag-seed input, #flag-seed textarea").fill("0 1")
    page.locator("#train-plan").get_by_text("4 runs: 2 methods, 1 learning rate, 2 seeds").wait_for()
    page.wait_for_function("document.querySelector('#command textarea')?.value.endsWith('--seed 0 1')")
    page.locator("#facts").get_by_text("known after the first steps").wait_for()
    page.get_by_role("button", name="All options").click()
    for words, shown in (("noise offset", "visible"), ("", "hidden")):  # without words the group closes again
        page.locator("#search input").fill(words)
        page.locator("#flag-noise_offset").wait_for(state=shown)
    page.get_by_role("button", name="More methods").click()
    page.get_by_label("LoRA x2").check()
    page.wait_for_function("document.querySelector('#command textarea')?.value.includes('lora reslora lora_x2')")
    page.locator("#model input").fill("assets/pipeline-flow")  # a box that shows a default follows it
    page.locator("#model input").press("Enter")
    page.wait_for_function("document.querySelector('#flag-learning_rate :is(input, textarea)')?.value === '0.001'")
    page.locator("#name input, #name textarea").fill("no name")  # refused: the command of the other name goes
    page.locator("#train-plan .bad").wait_for()
    page.wait_for_function("document.querySelector('#command textarea')?.value === ''")
    for part in ("#train-plan .bad", "#command textarea"):
        assert contrast(page.locator(part)) >= 4.5


def take_the_best_along(page, runs: Path) -> None:
    """Download the LoRA of the best run, by a component that is not visible."""
    with page.expect_download() as download:
        page.locator("#take-best:enabled").click()
    assert download.value.suggested_filename == "which-kohya.safetensors"
    assert Path(download.value.path()).read_bytes() == (runs / "which" / "kohya.safetensors").read_bytes()


def write_experiment(folder: Path) -> None:
    """Write a finished experiment that was not run, with samples."""
    folder.mkdir()
    (folder / "kohya.safetensors").write_bytes(b"kohya")
    content = examples.experiment(folder)
    (folder / "experiment.json").write_text(json.dumps(content))
    write_report(content, folder, IMAGES)


@pytest.mark.exhaustive
@pytest.mark.parametrize("width", [1440, 420])
def test_a_folder_of_ten_photos_is_trained_watched_compared_and_downloaded(page, tmp_path, width):
    """From one tab to the next, with what is offered there; no tab is wider than the page."""

    def open_tab(name: str) -> None:
        page.get_by_role("tab", name=name, exact=True).click()
        page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)

    page.set_viewport_size({"width": width, "height": 900})
    open_tab("Images")
    with page.expect_file_chooser() as chooser:
        page.locator("#upload-directory").click()
    chooser.value.set_files(image_folder(tmp_path / "photos", 10, layout="txt"))
    page.locator("#dataset-answer").get_by_text("10 images stored as").wait_for()
    open_tab("Train")
    page.wait_for_function("document.querySelector('#images-of-run input')?.value.startsWith('uploads/')")
    page.locator("#name textarea, #name input").fill(f"photos-{width}")
    for flag, value in {"max_train_steps": "40", "validation_steps": "20", "train_batch_size": "1"}.items():
        page.locator(f"#flag-{flag} textarea, #flag-{flag} input").fill(value)
    page.locator("#flag-validation_prompt textarea").fill("red disc")
    page.locator("#flag-resolution textarea, #flag-resolution input").fill("63")
    page.locator("#train-plan .bad").get_by_text("Resolution 63: height and width must be multiples of 8").wait_for()
    page.locator("#flag-resolution textarea, #flag-resolution input").fill("32")
    page.wait_for_function("document.querySelector('#command textarea')?.value.includes('--resolution 32')")
    page.locator("#start").click()
    page.locator('#newest-samples img[alt="red disc: LoRA"]').first.wait_for()
    page.locator("#newest-losses path.line").first.wait_for(state="attached")
    page.locator("#summary .finished").wait_for()
    open_tab("Compare")
    page.locator('#grid table[data-step="40"] img[alt="red disc: ResLoRA merged"]').wait_for()
    page.locator("#swipe img").nth(1).wait_for()
    page.locator("#difference img").wait_for()
    with page.expect_download() as download:
        page.locator("#take").click()
    assert download.value.suggested_filename.startswith(f"photos-{width}-reslora")
    open_tab("Generate")


@pytest.mark.exhaustive
def test_a_training_is_started_watched_and_stopped(page, browser, address, runs, tmp_path):
    """The first samples appear without a click; another visitor finds the run; it is stopped, saved and resumed."""
    uploads = image_folder(tmp_path / "sent", 3, layout="txt")
    page.get_by_role("tab", name="Images").click()
    page.locator("#upload-files input[type=file]").set_input_files(sorted(uploads.iterdir()))
    page.get_by_text("3 images stored as uploads/images-1").wait_for()
    page.get_by_role("tab", name="Train").click()
    page.locator("#name textarea, #name input").fill("watched")
    for flag in ("max_train_steps", "validation_steps"):  # it cannot end before it is stopped
        page.locator(f"#flag-{flag} textarea, #flag-{flag} input").fill("50000")
    page.locator("#flag-train_batch_size textarea, #flag-train_batch_size input").fill("1")
    page.locator("#flag-validation_prompt textarea").fill("red disc")
    page.wait_for_function("document.querySelector('#command textarea')?.value.includes('--max_train_steps 50000')")
    page.locator("#start").click()
    page.locator("#summary .running").wait_for()
    page.get_by_role("tab", name="Compare").click()
    page.locator('#grid table[data-step="0"] img[alt="red disc: LoRA"]').wait_for()  # no longer those of the run before
    assert (runs / "watched" / "lora" / "samples" / "step-000000" / "0-0.png").is_file()

    other = browser.new_page()
    other.set_default_timeout(LIMIT * 1000)
    other.goto(address, wait_until="domcontentloaded")
    other.locator("#summary .running").wait_for()
    other.wait_for_function("document.querySelector('#run input')?.value === 'watched'")
    other.close()

    run = Library(runs).find("watched")
    wait_until(lambda: any(row["step"] >= 2 for row in run.log("lora")) or not run.process, "the second step")
    assert run.process
    page.locator(
        "#summary .now", has_text=re.compile(r"LoRA, step \d+ of 50000 · \d.* · about .* left · .* GB in use at most")
    ).wait_for()
    assert contrast(page.locator("#summary .now")) >= 4.5
    page.get_by_role("tab", name="Train").click()
    page.locator('#newest-samples img[alt="red disc: LoRA"]').first.wait_for()
    page.locator("#newest-losses path.line").first.wait_for(state="attached")
    page.locator("#sample-prompts textarea").fill("blue blue box")
    page.locator("#sample-now").click()
    page.locator("#answer").get_by_text("watched: samples are generated after this step").wait_for()
    page.locator("#newest-samples .thumbnails img").wait_for()
    page.locator("#pause", has_text="Pause").click()
    page.locator("#summary .now", has_text="paused at step").wait_for()
    page.locator("#pause", has_text="Continue").click()
    page.locator("#pause", has_text="Pause").wait_for()
    assert page.locator("#resume").is_disabled()
    page.locator("#stop").click()
    page.locator("#summary .stopped").wait_for()
    page.locator("#stop").wait_for(state="hidden")
    assert run.process is None and len(run.checkpoints("lora")) == 2  # of the pause, and of the stop
    page.locator("#resume").click()
    page.locator("#summary .running").wait_for()
    log = run.folder / run.log_name  # whose last lines may be others by the time they are looked at
    wait_until(lambda: "resuming from" in log.read_text(errors="replace") or not run.process, "the run to go on")
    assert run.process
    line_up(page)
    put_in_order(page, runs)


def line_up(page) -> None:
    """Two runs wait while one trains; one is removed, by keyboard; then the other starts."""
    for name in ("second", "third"):
        page.locator("#start", has_text="Add to queue").wait_for()
        page.locator("#name textarea, #name input").fill(name)
        page.locator("#start").click()
        page.locator("#answer").get_by_text(f"{name} waits in the queue").wait_for()
    page.get_by_role("tab", name="Runs").click()
    rows = "[...document.querySelectorAll('#queue li')].map(row => row.dataset.name).join()"
    page.wait_for_function(f"{rows} === 'watched,second,third'")
    page.get_by_role("button", name="Remove second").focus()
    page.keyboard.press("Enter")
    page.wait_for_function(f"{rows} === 'watched,third'")
    for part in (".status", ".what-runs p", "button:enabled"):
        assert contrast(page.locator(f"#queue {part}").last) >= 4.5
    page.get_by_role("button", name="Stop watched and save").click()
    page.locator('#queue li[data-name="third"] :is(.starting, .running)').wait_for()
    page.locator('#queue li[data-name="watched"]').wait_for(state="detached")
    page.get_by_role("button", name="Stop third and save").click()
    page.locator('#queue li[data-name="third"] :is(.starting, .running)').wait_for(state="detached")


def put_in_order(page, runs: Path) -> None:
    """Notes are stored and survive an update while one types; a run is deleted, restored, renamed and opened."""
    page.get_by_role("tab", name="Runs").click()
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.post_data or ""))
    page.get_by_label("notes on watched").fill("the best so far")
    page.get_by_label("notes on watched").evaluate("""box => {  // Ctrl+Enter, and the box is left before the answer
        box.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", ctrlKey: true, bubbles: true }));
        box.dispatchEvent(new Event("change", { bubbles: true }));
    }""")
    page.get_by_label("notes on tiny").fill("half a sen")
    wait_until_told(page, "saved", NOTES_TOLD)
    assert (runs / "watched" / "notes.txt").read_text() == "the best so far"
    assert len([data for data in sent if "save_notes" in data and "the best so far" in data]) == 1
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="Move watched to the trash").click()
    page.once("dialog", lambda dialog: dialog.accept("seen"))
    page.get_by_role("button", name="Rename watched").click()
    page.locator("#runs-answer").get_by_text("watched is now seen").wait_for()
    page.once("dialog", lambda dialog: dialog.accept("watched"))
    page.get_by_role("button", name="Rename seen").click()
    page.locator("#runs-answer").get_by_text("seen is now watched").wait_for()
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Move watched to the trash").click()
    page.locator("#runs-answer").get_by_text("watched is in the trash").wait_for()
    assert not (runs / "watched").exists()
    has_notes(page, "tiny", "half a sen")
    page.get_by_role("button", name="Restore watched").press("Enter")
    page.locator("#runs-answer").get_by_text("watched is restored").wait_for()
    has_notes(page, "watched", "the best so far")
    page.set_viewport_size({"width": 420, "height": 900})
    page.wait_for_function("document.documentElement.scrollWidth <= 420")
    page.get_by_role("button", name="Open tiny under Compare").click()
    page.locator('#grid img[alt="red disc: ResLoRA merged"]').first.wait_for()
    page.wait_for_function("document.querySelector('#run input')?.value === 'tiny'")
    wait_until(lambda: (runs / "tiny" / "notes.txt").exists(), "the notes that were left unfinished")


def has_notes(page, name: str, notes: str) -> None:
    wait_until(lambda: page.get_by_label(f"notes on {name}").input_value() == notes, f"the notes on {name}")
