"""The Images tab, used in a real browser and by its named endpoints."""

import contextlib
import shutil

import browsers
import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from pipelines import image_folder
from test_page import TOLD, answers, client_of, complaint, contrast, leaving, serving, status_of, wait_until_told
from waiting import LIMIT, wait_until

pytestmark = pytest.mark.exhaustive
COUNT = 30
"""More than a page has."""
ASKED = 7
"""How many values say which images are shown."""
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
def folder(data, request):
    """A new folder of images, one of them damaged and one a copy."""
    layout = request.param if hasattr(request, "param") else "txt"
    folder = image_folder(data / "set", COUNT, layout=layout)
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


def tab_to(page, selector: str) -> None:
    """Press the Tab key until the element has the focus."""
    for _ in range(40):
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{selector} is not reached by the keyboard")


def choose(page, dropdown: str, option: str) -> None:
    """Choose from the list: text typed into Gradio's box may be lost if the list is not there yet."""
    page.locator(f"{dropdown} input").click()
    page.get_by_role("option", name=option, exact=True).click()
    page.wait_for_function(
        "([box, option]) => document.querySelector(box)?.value === option", arg=[f"{dropdown} input", option]
    )


@pytest.mark.parametrize(
    ("folder", "width", "theme"), [("jsonl", 1280, "light"), ("txt", 420, "dark")], indirect=["folder"]
)
def test_captions_are_put_in_order_by_the_keyboard(browser, folder, address, width, theme):
    """Captions are edited, refused, changed in bulk and undone; images are removed, restored, enlarged and searched."""

    def caption(number: int) -> str:
        if (folder / f"{number}.txt").is_file():
            return (folder / f"{number}.txt").read_text()
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        return next(line for line in lines if f'"{number}.png"' in line).split('"text": ')[1].strip('"}')

    with visit(browser, address, width, theme) as page:
        shown = {"'.card'": 24, "'.card img'": 23}  # the damaged one
        for part, count in shown.items():
            page.wait_for_function(f"document.querySelectorAll({part}).length === {count}")
        page.locator(WORDS).focus()
        tab_to(page, '.card[data-name="0.png"] input')
        page.keyboard.press("Space")
        page.get_by_text("1 selected").wait_for()
        tab_to(page, '.card[data-name="0.png"] textarea')
        page.keyboard.press("Control+A")
        page.keyboard.type("a red “disc”")
        page.keyboard.press("Tab")  # which saves
        wait_until(lambda: caption(0) == "a red “disc”", "the caption to be saved")
        page.locator('.card[data-name="0.png"] .told').get_by_text("saved").wait_for()

        theirs = folder / ("1.txt" if (folder / "1.txt").is_file() else "metadata.jsonl")
        tab_to(page, '.card[data-name="1.png"] textarea')
        page.keyboard.type("mine")  # before theirs: the page may still be about to show what the folder holds now
        theirs.write_text(theirs.read_text().replace("blue box", "green box"))
        page.keyboard.press("Control+Enter")
        page.locator('.card[data-name="1.png"] .told').get_by_text("changed in the meantime").wait_for()
        assert caption(1) == "green box"
        page.keyboard.press("Escape")

        page.locator("#change button").first.press("Enter")
        choose(page, "#operation", "Put before")
        page.locator("#text textarea, #text input").fill("sks, ")
        page.locator("#tick-all").press("Enter")
        page.get_by_text(f"{COUNT} selected").wait_for()
        page.locator("#apply").press("Enter")
        page.locator("#dataset-answer [role=status]").get_by_text(f"put before, {COUNT} captions").wait_for()  # said
        assert {caption(number).startswith("sks, ") for number in range(COUNT)} == {True}
        page.locator("#next").press("Enter")
        page.wait_for_function(f"document.querySelectorAll('.card').length === {COUNT - 24}")
        checked = "document.querySelectorAll('.card input:checked').length"
        page.wait_for_function(f"{checked} === {COUNT - 24}")  # ticks outlive a change of page
        page.locator("#undo", has_text="put before").press("Enter")
        page.locator("#dataset-answer").get_by_text("Undone: put before").wait_for()
        assert caption(0) == "a red “disc”" and caption(1) == "green box"

        page.locator("#untick").press("Enter")
        page.locator(".card input").first.press("Space")
        page.locator("#trash").press("Enter")
        page.locator("#dataset-answer").get_by_text("1 image moved to the trash").wait_for()
        page.get_by_text("0 selected").wait_for()
        assert len(list(folder.glob("*.png"))) == COUNT - 1
        page.locator("#undo", has_text="1 image moved").press("Enter")  # once it names what has been done
        page.locator("#dataset-answer").get_by_text("Undone: 1 image moved").wait_for()
        assert len(list(folder.glob("*.png"))) == COUNT

        page.locator("#check").press("Enter")
        page.locator("#dataset-answer").get_by_text(f"set: {COUNT} images checked").wait_for()
        choose(page, "#which", "Skipped by training")
        page.wait_for_function("document.querySelectorAll('.card').length === 1")
        page.locator(".card .out").get_by_text("damaged").wait_for()
        choose(page, "#which", "All images")
        page.get_by_role("button", name="enlarge the image 0.png").press("Enter")
        page.locator("dialog.enlarged img").wait_for()
        assert page.locator("dialog.enlarged img").get_attribute("src").startswith("data:image/webp")
        thumbnail = page.locator('.card[data-name="0.png"] img').bounding_box()["width"]
        assert page.locator("dialog.enlarged img").bounding_box()["width"] >= thumbnail  # also if the file is small
        page.keyboard.press("Escape")
        page.locator("dialog.enlarged").wait_for(state="hidden")
        choose(page, "#which", "Skipped by training")
        page.wait_for_function("document.querySelectorAll('.card').length === 1")
        seen = [".card .name", ".card .sizes", ".card .out", ".card textarea", ".told-of .bad", "#picked-count"]
        assert [name for name in seen if contrast(page.locator(name).first) < 4.5] == []
        assert not page.locator("#pages").is_visible()  # one page is enough
        choose(page, "#which", "Duplicates")
        page.locator(".card .alike").get_by_text("the same image as 5.png").wait_for()
        assert contrast(page.locator(".card .alike").first) >= 4.5
        page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)


@contextlib.contextmanager
def locked_file(page, value: str, by: str | None = None):
    """Delay the first request for images of a folder or with some words, or of a button, until the context ends."""
    kept = []
    who = by and page.evaluate("by => gradio_config.components.find(part => part.props.elem_id === by).id", by)

    def keep(route):
        asked = route.request.post_data_json or {}
        data = asked.get("data", ())
        if len(data) == ASKED and value in data and who in (None, asked.get("trigger_id")) and not kept:
            kept.append(route)
        else:
            route.continue_()

    page.route("**/queue/join*", keep)
    yield
    wait_until(lambda: page.evaluate("1") and kept, "the request, which may wait for the answer to another")
    kept[0].continue_()


def test_boxes_show_the_captions_of_their_images_after_every_update(browser, folder, address):
    """After Next, Back, a filter and Undo; text typed during an update stays with its image."""
    with visit(browser, address, 1280, "light") as page:

        def card(number: int):
            return page.locator(f'.card[data-name="{number}.png"]')

        def write(number: int, text: str) -> None:
            card(number).locator("textarea").fill(text)
            card(number).locator("textarea").press("Control+Enter")
            card(number).locator(".told").get_by_text("saved", exact=True).wait_for()
            assert (folder / f"{number}.txt").read_text() == text.strip()

        def shown() -> dict[str, str]:
            return dict(page.locator(".card").evaluate_all(
                "cards => cards.map(card => [card.dataset.name, card.querySelector('textarea').value])"
            ))  # fmt: skip

        def shows_files() -> None:
            files = {name: (folder / name).with_suffix(".txt").read_text() for name in shown()}
            wait_until(lambda: shown() == files, "the boxes to show what is in the files")

        write(0, "typed ")
        write(0, "typed again")  # over what has been saved without its space
        page.set_viewport_size({"width": 1280, "height": 300})  # the buttons are below the images
        page.locator("#next").click()
        card(4).wait_for()  # in the place of 0.png
        page.wait_for_function("document.getElementById('dataset-images')?.getBoundingClientRect().top > -1")
        shows_files()
        write(4, "second page")
        page.locator("#undo").get_by_text("the caption of 4.png").wait_for()
        page.locator("#undo").click()
        page.locator("#dataset-answer").get_by_text("Undone: the caption of 4.png").wait_for()
        page.locator("#undo").get_by_text("the caption of 0.png").wait_for()
        shows_files()  # though what is shown is what it was before
        page.locator("#back").click()
        card(0).wait_for()
        shows_files()

        def meanwhile(words: str, text: str, first: str) -> None:
            """Type in the box of 1.png during an update, and wait for the first of the new images."""
            page.locator(WORDS).fill(words)
            with locked_file(page, words):
                page.locator(WORDS).press("Enter")
                card(1).locator("textarea").focus()
                page.keyboard.press("Control+A")
                page.keyboard.type(text)
            page.wait_for_function(f"document.querySelector('.card')?.dataset.name === '{first}'")

        meanwhile("1.png", "half", "1.png")  # one place before
        page.keyboard.type(" and whole")
        page.keyboard.press("Tab")
        card(1).locator(".told").get_by_text("saved", exact=True).wait_for()
        assert (folder / "1.txt").read_text() == "half and whole"
        shows_files()
        meanwhile("2.png", "lost?", "12.png")  # where 1.png is not
        page.keyboard.type("for nobody")
        shows_files()
        page.locator(WORDS).fill("1.png")
        page.locator(WORDS).press("Enter")
        card(1).locator(".told").get_by_text("not saved yet").wait_for()
        wait_until(lambda: card(1).locator("textarea").input_value() == "lost?", "what was typed")
        assert (folder / "1.txt").read_text() == "half and whole"
        card(1).locator("textarea").press("Control+Enter")
        card(1).locator(".told").get_by_text("saved", exact=True).wait_for()
        assert (folder / "1.txt").read_text() == "lost?"
        shows_files()


@pytest.fixture
def other(data):
    """Another folder with images of the same names, as uploads have."""
    folder = image_folder(data / "two", 2, layout="txt")
    yield folder
    shutil.rmtree(folder)


def test_what_is_shown_of_one_folder_changes_nothing_in_another(browser, folder, other, address):
    """Another folder is selected while the earlier one is still shown or checked."""

    def shows(name: str) -> None:
        page.wait_for_selector(f'.cards[data-folder="{name}"] .card')

    def state() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for place in (folder, other) for path in place.rglob("*.*")}

    before, refused = state(), "Nothing was changed: the page shows images of set, but another folder is selected."
    with visit(browser, address, 1280, "light") as page:
        box, told = page.locator('.card[data-name="0.png"] textarea'), page.locator('.card[data-name="0.png"] .told')
        with locked_file(page, "two"):
            choose(page, "#folder", "two")
            box.fill("of set")
            box.press("Control+Enter")
            told.get_by_text(refused).wait_for()
            page.locator(".card input").first.check()
            page.locator("#trash").click()
            wait_until_told(page, refused)
        shows("two")
        wait_until(lambda: box.input_value() == "red disc", "the caption of two")
        page.locator("#picked-count").get_by_text("0 selected", exact=True).wait_for()
        with locked_file(page, "set"):
            choose(page, "#folder", "set")
            page.locator("#change button").first.click()
            page.locator("#text textarea, #text input").fill("red")
            page.locator("#tick-all").click()
            page.locator("#apply").click()
            wait_until_told(page, "images of two")
        shows("set")
        wait_until(lambda: box.input_value() == "of set", "what was typed in set")
        assert state() == before
        told.get_by_text(refused).wait_for()
        box.press("Control+Enter")
        told.get_by_text("saved", exact=True).wait_for()
        assert (folder / "0.txt").read_text() == "of set" and (other / "0.txt").read_text() == "red disc"

        with locked_file(
            page, "set", by="check"
        ):  # and not an update after the caption, for which that of two would wait
            page.locator("#check").click()
            choose(page, "#folder", "two")
            shows("two")
        page.locator("#dataset-answer").get_by_text(f"set: {COUNT} images checked").wait_for()
        shows("two")
        box.fill("of two")
        box.press("Control+Enter")
        told.get_by_text("saved", exact=True).wait_for()
        for words, count in (("neither", 0), (".png", 2)):  # no update is on its way then that names another change
            page.locator(WORDS).fill(words)
            page.locator(WORDS).press("Enter")
            page.wait_for_function("count => document.querySelectorAll('.card').length === count", arg=count)
        page.locator("#undo").get_by_text("the caption of 0.png").wait_for()
        answers(address, "set_caption", "two", "1.png", "blue box", "theirs")  # which the button does not say
        page.locator("#undo").click()
        wait_until_told(page, "Nothing was undone")
        page.locator("#undo").get_by_text("the caption of 1.png").wait_for()
        shown = lambda: [page.locator(".card textarea").nth(n).input_value() for n in range(2)]  # noqa: E731
        wait_until(lambda: shown() == ["of two", "theirs"], "both captions")
        assert [(other / f"{number}.txt").read_text() for number in range(2)] == ["of two", "theirs"]
        assert (folder / "0.txt").read_text() == "of set"


def test_a_program_puts_a_folder_in_order(address, folder):
    client = client_of(address)
    assert client.predict(api_name="/image_folders") == [".", "set", "bundled images"]
    assert client.predict("set", api_name="/check_images") == "30 images checked."
    (damaged,) = client.predict("set", "Skipped by training", "", api_name="/images")
    assert damaged["name"] == "3.png" and damaged["left_out"].startswith("damaged (")
    assert (damaged["captions"], damaged["size"], damaged["buckets"]) == (["blue box"], [32, 32], [[64, 64]])
    client.predict("set", "0.png", "red disc", "one", api_name="/set_caption")
    with pytest.raises(AppError, match=r"0\.png was changed in the meantime"):
        client.predict("set", "0.png", "red disc", "two", api_name="/set_caption")
    client.predict("set", ["0.png", "1.png"], "Replace", "o", "0", api_name="/change_captions")
    assert [(folder / f"{number}.txt").read_text() for number in range(2)] == ["0ne", "blue b0x"]
    client.predict("set", ["0.png"], api_name="/trash_images")
    assert not (folder / "0.txt").exists()
    client.predict("set", api_name="/undo_images")
    client.predict("set", api_name="/undo_images")
    assert [(folder / f"{number}.txt").read_text() for number in range(2)] == ["one", "blue box"]
    client.predict("mine", [handle_file(folder / "0.png")], "words", api_name="/upload_images")
    (image,) = client.predict("uploads/mine", "All images", "", api_name="/images")
    assert image["captions"] == ["words"]


def test_no_image_of_the_list_is_served_as_a_file_nor_any_other_shown(address, folder, tmp_path):
    shutil.copy(folder / "0.png", tmp_path / "0.png")
    for path in (folder / "0.png", folder / "0.txt", tmp_path / "0.png"):
        assert status_of(f"{address}/gradio_api/file={path}") in (400, 403, 404)
    for name in ("..", "set/..", "/etc", str(tmp_path), "set\0", "", None):
        answer = answers(address, "images", name, "All images", "")
        assert "event: error" in answer and "no such folder" in answer, name
