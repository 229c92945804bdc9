"""The Images tab, used in a real browser."""

import contextlib
import shutil

import browsers
import pytest
from pipelines import image_folder
from test_page import TOLD, complaint, contrast, leaving, serving, status_of, wait_until_told
from waiting import LIMIT, wait_until

pytestmark = pytest.mark.exhaustive
COUNT = 30
"""More than a page has."""
WORDS = "#words textarea, #words input"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("dataset") / "data"


@pytest.fixture(scope="module")
def address(data, tmp_path_factory):
    data.mkdir()
    folder = tmp_path_factory.mktemp("dataset-app")
    with serving(folder / "runs", folder / "log", "--data", str(data)) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsers.opened(tmp_path_factory.getbasetemp().parent) as browser:
        yield browser


@pytest.fixture
def folder(data):
    """A new folder of images, one of them damaged and one a copy."""
    folder = image_folder(data / "set", COUNT, layout="txt")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:-30])
    shutil.copy(folder / "5.png", folder / "6.png")
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def visit(browser, address: str, width: int, theme: str):
    """Open the tab in a browser; errors on the console and requests to other machines fail the test."""
    page, errors = browser.new_page(viewport={"width": width, "height": 900}), []
    page.set_default_timeout(LIMIT * 1000)
    page.add_init_script(TOLD)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.extend(complaint(said)))
    page.on("request", lambda request: errors.extend(leaving(request.url, address)))
    page.goto(f"{address}?__theme={theme}", wait_until="domcontentloaded")
    page.wait_for_selector("#grid img")
    page.get_by_role("tab", name="Images").click()  # all tabs are in view, on a telephone too
    page.get_by_text("30 images in set").wait_for()
    yield page
    page.close()
    assert errors == []


def choose(page, dropdown: str, option: str) -> None:
    """Choose from the list: text typed into Gradio's box may be lost if the list is not there yet."""
    page.locator(f"{dropdown} input").click()
    page.get_by_role("option", name=option, exact=True).click()
    page.wait_for_function(
        "([box, option]) => document.querySelector(box)?.value === option", arg=[f"{dropdown} input", option]
    )


def wait_for_cards(page, count: int) -> None:
    page.wait_for_function("count => document.querySelectorAll('.card').length === count", arg=count)


@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (420, "dark")])
def test_captions_are_put_in_order(browser, folder, address, width, theme):
    """Captions are edited, refused, changed in bulk and undone; images are removed, restored and searched."""

    def caption(number: int) -> str:
        return (folder / f"{number}.txt").read_text()

    def card(number: int):
        return page.locator(".card", has=page.get_by_label(f"{number}.png", exact=True))

    def box(number: int):
        return card(number).locator("textarea")

    def shows_files() -> None:
        def shown() -> dict[str, str]:
            return dict(page.locator(".card").evaluate_all(
                "cards => cards.map(card => [card.innerText.split('\\n')[0], card.querySelector('textarea').value])"
            ))  # fmt: skip

        files = {name: (folder / name).with_suffix(".txt").read_text() for name in shown()}
        wait_until(lambda: shown() == files, "the boxes to show what is in the files")

    def answers(line: str) -> None:
        page.locator("#dataset-answer").get_by_text(line).wait_for()

    with visit(browser, address, width, theme) as page:
        wait_for_cards(page, 24)
        page.wait_for_function("document.querySelectorAll('.card img').length === 23")  # one is damaged
        box(0).fill("a red “disc” ")
        box(0).press("Tab")  # which saves
        answers("The caption of 0.png is saved")
        assert caption(0) == "a red “disc”"
        box(1).fill("mine")
        (folder / "1.txt").write_text("theirs")
        box(1).press("Tab")
        wait_until_told(page, "1.png was changed in the meantime")
        assert caption(1) == "theirs"
        page.locator("#undo").click()
        answers("Undone: the caption of 0.png")
        shows_files()

        page.locator("#page input[type=number]").fill("2")
        page.locator("#page input[type=number]").press("Enter")
        wait_for_cards(page, COUNT - 24)
        shows_files()
        page.locator("#change button").first.click()
        choose(page, "#operation", "Put before")
        page.locator("#text textarea, #text input").fill("sks, ")
        page.locator("#apply").click()
        answers(f"put before, {COUNT} captions")
        assert {caption(number).startswith("sks, ") for number in range(COUNT)} == {True}
        shows_files()
        choose(page, "#which", "Without caption")
        choose(page, "#which", "All images")
        wait_for_cards(page, 24)
        page.get_by_label("0.png", exact=True).check()
        page.locator("#apply").click()
        answers("put before, 1 caption")
        assert caption(0).startswith("sks, sks, ") and not caption(1).startswith("sks, sks, ")
        shows_files()
        page.get_by_label("0.png", exact=True).check()
        page.locator("#trash").click()
        answers("1 image moved to the trash")
        assert len(list(folder.glob("*.png"))) == COUNT - 1
        page.locator("#undo").click()
        answers("Undone: 1 image moved")
        assert len(list(folder.glob("*.png"))) == COUNT
        page.get_by_label("0.png", exact=True).wait_for()

        page.locator("#check").click()
        answers(f"set: {COUNT} images checked")
        choose(page, "#which", "Skipped by training")
        wait_for_cards(page, 1)
        page.locator(".card").get_by_text("damaged").wait_for()
        seen = [".card label", ".card textarea", ".told-of .bad"]
        assert [name for name in seen if contrast(page.locator(name).first) < 4.5] == []
        choose(page, "#which", "Duplicates")
        page.locator(".card").get_by_text("the same image as 5.png").wait_for()
        choose(page, "#which", "All images")
        page.locator(WORDS).fill("11.png")
        page.locator(WORDS).press("Enter")
        wait_for_cards(page, 1)
        page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)


def test_what_is_typed_during_an_update_stays_with_its_image(browser, folder, address):
    """Also when the model, or another tab, has changed the captions next to it."""
    with visit(browser, address, 1280, "light") as page:
        wait_for_cards(page, 24)
        boxes = page.locator(".card textarea")
        boxes.nth(1).click()
        page.keyboard.press("Control+A")
        page.keyboard.type("half")
        (folder / "10.txt").write_text("another")
        page.evaluate("document.querySelector('#check').click()")  # without leaving the box
        page.wait_for_function("document.querySelectorAll('.card textarea')[2].value === 'another'")
        page.keyboard.type(" and whole")
        page.keyboard.press("Tab")
        wait_until(lambda: (folder / "1.txt").read_text() == "half and whole", "the caption")


def test_images_are_uploaded_first(browser, folder, address, tmp_path):
    """Files, or a directory; a damaged one is refused, and the list of images stays."""
    sent = image_folder(tmp_path / "sent", 3, layout=None)
    (sent / "0.txt").write_text("red disc")
    with visit(browser, address, 1280, "light") as page:
        page.locator("#upload-files input[type=file]").set_input_files(folder / "3.png")
        page.get_by_text("3.png (damaged").first.wait_for()
        assert page.locator(".card").count() == 24
        assert not page.locator("#upload .error, #which-images .error, .cards .error").count()
        page.locator("#folder-name textarea, #folder-name input").fill("mine")
        with page.expect_file_chooser() as chooser:
            page.locator("#upload-directory").click()
        chooser.value.set_files(sent)
        page.locator("#dataset-status").get_by_text("2 images have no caption").wait_for()
        assert page.locator(".card label:has(input)").all_inner_texts() == ["0.png", "1.png", "2.png"]
        page.get_by_role("tab", name="Train").click()
        page.wait_for_function("document.querySelector('#images-of-run input')?.value === 'uploads/mine'")


def test_no_image_of_the_list_is_served_as_a_file(address, folder, tmp_path):
    shutil.copy(folder / "0.png", tmp_path / "0.png")
    for path in (folder / "0.png", folder / "0.txt", tmp_path / "0.png"):
        assert status_of(f"{address}/gradio_api/file={path}") in (400, 403, 404)
