"""The Images tab, used in a real browser and by its named endpoints."""

import contextlib
import shutil

import browsers
import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from pipelines import image_folder
from test_page import TOLD, answers, client_of, complaint, contrast, leaving, serving, status_of
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
    page.wait_for_selector('#dataset-images .cards[data-folder="set"] .card')
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
    """Captions are edited, refused, changed in bulk and undone; images are removed, restored, enlarged and searched."""

    def caption(number: int) -> str:
        return (folder / f"{number}.txt").read_text()

    def box(number: int):
        return page.locator(f'.card[data-name="{number}.png"] textarea')

    def wait_for_line(number: int, line: str) -> None:
        page.locator(f'.card[data-name="{number}.png"] .told').get_by_text(line).wait_for()

    def shows_files() -> None:
        def shown() -> dict[str, str]:
            return dict(page.locator(".card").evaluate_all(
                "cards => cards.map(card => [card.dataset.name, card.querySelector('textarea').value])"
            ))  # fmt: skip

        files = {name: (folder / name).with_suffix(".txt").read_text() for name in shown()}
        wait_until(lambda: shown() == files, "the boxes to show what is in the files")

    with visit(browser, address, width, theme) as page:
        wait_for_cards(page, 24)
        assert page.locator(".card img").count() == 23  # the damaged one
        box(0).fill("a red “disc” ")
        box(0).press("Tab")  # which saves
        wait_for_line(0, "saved")
        box(0).fill("again")  # over what was saved without its space
        box(0).press("Control+Enter")
        wait_until(lambda: caption(0) == "again", "the caption to be saved")
        box(1).fill("mine")
        (folder / "1.txt").write_text("theirs")
        box(1).press("Control+Enter")
        wait_for_line(1, "changed in the meantime")
        assert caption(1) == "theirs"
        page.locator("#undo").get_by_text("the caption of 0.png").click()
        page.locator("#dataset-answer").get_by_text("Undone: the caption of 0.png").wait_for()
        shows_files()

        page.locator("#next").click()
        wait_for_cards(page, COUNT - 24)
        shows_files()
        page.locator("#back").click()
        wait_for_cards(page, 24)
        shows_files()
        page.locator("#change button").first.click()
        choose(page, "#operation", "Put before")
        page.locator("#text textarea, #text input").fill("sks, ")
        page.locator("#tick-all").click()
        page.get_by_text(f"{COUNT} selected").wait_for()
        page.locator("#apply").click()
        page.locator("#dataset-answer [role=status]").get_by_text(f"put before, {COUNT} captions").wait_for()
        assert {caption(number).startswith("sks, ") for number in range(COUNT)} == {True}
        shows_files()
        page.locator("#untick").click()
        page.locator(".card input").first.click()
        page.locator("#trash").click()
        page.locator("#dataset-answer").get_by_text("1 image moved to the trash").wait_for()
        page.get_by_text("0 selected").wait_for()
        assert len(list(folder.glob("*.png"))) == COUNT - 1
        page.locator("#undo", has_text="1 image moved").click()
        page.locator("#dataset-answer").get_by_text("Undone: 1 image moved").wait_for()
        assert len(list(folder.glob("*.png"))) == COUNT

        page.locator("#check").click()
        page.locator("#dataset-answer").get_by_text(f"set: {COUNT} images checked").wait_for()
        page.get_by_role("button", name="enlarge the image 0.png").click()
        page.locator("dialog.enlarged img").wait_for()
        thumbnail = page.locator('.card[data-name="0.png"] img').bounding_box()["width"]
        assert page.locator("dialog.enlarged img").bounding_box()["width"] >= thumbnail  # also if the file is small
        page.keyboard.press("Escape")
        choose(page, "#which", "Skipped by training")
        wait_for_cards(page, 1)
        page.locator(".card .out").get_by_text("damaged").wait_for()
        seen = [".card .name", ".card .sizes", ".card .out", ".card textarea", ".told-of .bad", "#picked-count"]
        assert [name for name in seen if contrast(page.locator(name).first) < 4.5] == []
        assert not page.locator("#pages").is_visible()  # one page is enough
        choose(page, "#which", "Duplicates")
        page.locator(".card .alike").get_by_text("the same image as 5.png").wait_for()
        choose(page, "#which", "All images")
        page.locator(WORDS).fill("11.png")
        page.locator(WORDS).press("Enter")
        wait_for_cards(page, 1)
        page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)


def test_what_is_typed_during_an_update_stays_with_its_image(browser, folder, address):
    """Also when the model, or another tab, has changed the captions next to it."""
    with visit(browser, address, 1280, "light") as page:
        wait_for_cards(page, 24)
        box = page.locator('.card[data-name="1.png"] textarea')
        held = []
        page.route("**/queue/join*", lambda route: held.append(route) if not held else route.continue_())
        page.locator("#check").click()
        wait_until(lambda: page.evaluate("1") and held, "the request")
        (folder / "2.txt").write_text("another")
        box.fill("half")
        held[0].continue_()
        page.wait_for_function("document.querySelector('.card[data-name=\"2.png\"] textarea')?.value === 'another'")
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
        assert page.locator('.cards[data-folder="set"] .card').count() == 24
        assert not page.locator("#upload .error, #which-images .error, #dataset-images .error").count()
        page.locator("#folder-name textarea, #folder-name input").fill("mine")
        with page.expect_file_chooser() as chooser:
            page.locator("#upload-directory").click()
        chooser.value.set_files(sent)
        page.wait_for_selector('.cards[data-folder="uploads/mine"] .card')
        page.locator("#dataset-status").get_by_text("2 images have no caption").wait_for()
        assert page.locator(".card .name").all_inner_texts() == ["0.png", "1.png", "2.png"]
        page.get_by_role("tab", name="Train").click()
        page.wait_for_function("document.querySelector('#images-of-run input')?.value === 'uploads/mine'")


def test_a_program_puts_a_folder_in_order(address, folder):
    client = client_of(address)
    assert "set: 30 images checked." in client.predict("set", api_name="/check_images")
    (damaged,) = client.predict("set", "Skipped by training", "", api_name="/images")
    assert damaged["name"] == "3.png" and damaged["left_out"].startswith("damaged (")
    assert (damaged["captions"], damaged["size"]) == (["blue box"], [32, 32])
    client.predict("set", "0.png", "red disc", "one", api_name="/set_caption")
    with pytest.raises(AppError, match=r"0\.png was changed in the meantime"):
        client.predict("set", "0.png", "red disc", "two", api_name="/set_caption")
    client.predict("sent", [handle_file(folder / "0.png")], api_name="/upload_images")
    (image,) = client.predict("uploads/sent", "All images", "", api_name="/images")
    assert (image["name"], image["captions"]) == ("0.png", [])


def test_no_image_of_the_list_is_served_as_a_file_nor_any_other_shown(address, folder, tmp_path):
    shutil.copy(folder / "0.png", tmp_path / "0.png")
    for path in (folder / "0.png", folder / "0.txt", tmp_path / "0.png"):
        assert status_of(f"{address}/gradio_api/file={path}") in (400, 403, 404)
    for name in ("..", "set/..", "/etc", str(tmp_path), "", None):
        answer = answers(address, "images", name, "All images", "")
        assert "event: error" in answer and "no such folder" in answer, name
