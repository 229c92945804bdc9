"""Images: upload images, view the images of a folder with their captions, and edit them before training."""

from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from reslora.formatting import enumerated, pluralize
from reslora.images.data.caption_files import CAPTIONS

from .. import image_cards, image_edits, views
from ..captioning import Captioning
from ..folders import BUNDLED
from ..generation_request import bounded
from ..handlers import NO_PROGRESS, QUIET, server_function
from ..image_edits import ImageEdits
from ..uploads import store
from .base import Parts, Tab, TabHost, answer_line, open_choice
from .train import TrainTab

SCRIPT = Path(__file__).resolve().parents[1] / "dataset.js"
CHOOSE = "Select a folder of images, or upload images above."
HOST = "document.getElementById('dataset-images')"
# Only the browser knows which images are ticked; this script sends them as the last input of an event.
WITH_TICKED = f"(...values) => [...values.slice(0, -1), {HOST}.picked()]"
UNDO = "Undo"


class DatasetTab(Tab):
    """The tab that shows and edits image folders."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.edits = ImageEdits(self.jobs)
        self.captioning = Captioning(self.edits)
        self.upload_row()
        with gr.Row(elem_id="which-images"):
            self.folder = open_choice("Folder", elem_id="folder")
            self.which = gr.Dropdown(
                list(image_edits.FILTERS), value=image_edits.EVERYTHING, label="Show", elem_id="which"
            )
            self.words = gr.Textbox(label="Search names and captions", max_lines=1, elem_id="words")
            self.check = gr.Button("Check images", elem_id="check", min_width=120)
        self.status = gr.HTML(views.notice(CHOOSE), elem_id="dataset-status")
        self.changing_rows()
        self.answer = answer_line(elem_id="dataset-answer")
        self.images = gr.HTML(
            elem_id="dataset-images", js_on_load=SCRIPT.read_text(encoding="utf-8"),
            server_functions=[server_function(self.save_caption), server_function(self.enlarge)],
        )  # fmt: skip
        with gr.Row(elem_id="pages"):
            self.back = gr.Button("Back", min_width=80, elem_id="back")
            self.page = gr.Number(1, label="Page", precision=0, minimum=1, min_width=100, elem_id="page")
            self.next = gr.Button("Next", min_width=80, elem_id="next")
        self.on_arrival = [self.folder, self.model]

    def upload_row(self) -> None:
        """Make the components that upload images as a new folder."""
        with gr.Row(elem_id="upload"):
            self.files = gr.File(
                label="Upload images, with .txt captions if you have them", file_count="multiple",
                file_types=["image", *CAPTIONS, ".jsonl", ".csv"], height=150, min_width=280,
                elem_id="upload-files", elem_classes="uploads",
            )  # fmt: skip
            with gr.Column(min_width=280):
                self.directory = gr.UploadButton(
                    "Upload a directory of images", file_count="directory", elem_id="upload-directory"
                )
                self.name = gr.Textbox(
                    label="Name of the new folder", placeholder="images-1, images-2 ...", max_lines=1,
                    elem_id="folder-name",
                )  # fmt: skip

    def changing_rows(self) -> None:
        """Make the components that change the ticked (selected) images."""
        with gr.Accordion("Edit the captions of selected images", open=False, elem_id="change"), gr.Row():
            self.operation = gr.Dropdown(
                list(image_edits.OPERATIONS), value=image_edits.REPLACE, label="Change", elem_id="operation",
                min_width=150,
            )  # fmt: skip
            self.text = gr.Textbox(label="Words or tag", max_lines=1, elem_id="text", min_width=120)
            self.other = gr.Textbox(label="Replace with", max_lines=1, elem_id="other", min_width=120)
            self.apply = gr.Button("Apply", elem_id="apply", min_width=100)
        with gr.Accordion("Write captions with a model", open=False, elem_id="write-captions"):
            with gr.Row():
                self.model = open_choice(
                    "Image-text model", value="", elem_id="caption-model", min_width=220,
                    info="A name on the Hugging Face Hub, owner/model, or a folder in models of the runs folder",
                )  # fmt: skip
                self.instruction = gr.Textbox(
                    label="Instruction", max_lines=1, min_width=220, elem_id="caption-prompt",
                    info="Empty: one sentence about the image; some models read none",
                )  # fmt: skip
                self.prefix = gr.Textbox(
                    label="Text before each caption", max_lines=1, min_width=160, elem_id="caption-prefix",
                    info="For example a trigger word",
                )  # fmt: skip
            self.overwrite = gr.Checkbox(False, label="Replace existing captions", elem_id="caption-overwrite")
            with gr.Row(elem_classes="quiet"):
                self.write = gr.Button("Caption", elem_id="caption", min_width=100)
                self.stop = gr.Button("Stop", elem_id="caption-stop", min_width=80)
        with gr.Row(elem_classes="actions", elem_id="dataset-actions"):
            gr.HTML('<p id="picked-count" role="status">0 selected</p>', min_height=0)
            self.tick_page = gr.Button("Select page", elem_id="tick-page", min_width=80)
            self.tick_all = gr.Button("Select all", elem_id="tick-all", min_width=80)
            self.untick = gr.Button("Clear", elem_id="untick", min_width=80)
            self.trash = gr.Button("Move to trash", variant="stop", elem_id="trash", min_width=80)
            self.undo = gr.Button(UNDO, elem_id="undo", min_width=80, interactive=False)
        self.ticked = gr.JSON({}, visible="hidden")

    def events(self, page: TabHost) -> None:
        """Connect the components."""
        asked = [self.folder, self.which, self.words, self.page]
        shown = [self.status, self.images, self.page, self.undo]
        # One queue for all updates, so that their results arrive in order.
        common = {"concurrency_id": "images", "concurrency_limit": 1, **QUIET}
        gr.on([self.folder.change, self.which.change, self.words.submit], self.show, asked[:3], shown, **common)
        self.page.submit(self.show, asked, shown, **common)
        for button, do in ((self.back, self.show_previous), (self.next, self.show_next)):
            button.click(do, asked, shown, js=f"(...values) => {HOST}.top(...values)", **common)
        for button, which in ((self.tick_page, "page"), (self.tick_all, "all"), (self.untick, "none")):
            button.click(None, js=f"() => {HOST}.pick('{which}')")
        of_model = [self.model, self.instruction, self.prefix, self.overwrite]
        ticked = {"outputs": self.answer, "js": WITH_TICKED, **QUIET}
        apply = self.apply.click(self.do_change, [self.operation, self.text, self.other, self.ticked], **ticked)
        trash = self.trash.click(self.do_trash, self.ticked, **ticked)
        undo = self.undo.click(self.do_undo, self.ticked, **ticked)
        check = self.check.click(self.do_check, self.folder, self.answer, api_name="check_images", **NO_PROGRESS)
        write = self.write.click(
            self.do_caption,
            [self.folder, *of_model],
            self.answer,
            api_name="caption_images",
            concurrency_limit=None,
            **NO_PROGRESS,
        )
        trash.success(None, js=f"() => {HOST}.pick('none')")
        opened = page.frames[self].select(self.open, self.folder, self.folder, **QUIET)
        for event in (apply, trash, undo, check, write, opened):
            for outcome in (event.success, event.failure):  # `then` does not run after a failure
                outcome(self.show, asked, shown, **common)
        self.stop.click(lambda: views.notice(self.captioning.stop()), None, self.answer, api_name="stop_captions",
                        concurrency_limit=None, **NO_PROGRESS)  # fmt: skip
        self.operation.change(
            lambda operation: gr.update(visible=operation == image_edits.REPLACE), self.operation, self.other, **QUIET
        )
        self.images.saved(self.after_save, self.folder, self.undo, **QUIET)
        self.images.refused(self.report_refused, None, self.answer, **QUIET)
        for part, options in ((self.files, {"api_name": "upload_images", **NO_PROGRESS}), (self.directory, QUIET)):
            stored = [self.folder, page.tab(TrainTab).folder, self.answer, self.name, part]
            upload = part.upload(self.do_upload, [self.name, part], stored, preprocess=False, **options)
            upload.failure(lambda: None, None, part, **QUIET)
        self.api()

    # -- display -------------------------------------------------------------------------------------------------------

    def arrive(self) -> dict:
        """Return the choices of the lists of folders and models. Images are only read when the tab is opened."""
        models = gr.update(choices=list(self.captioning.models()))
        return {self.folder: gr.update(choices=self.list_folders()), self.model: models}

    def open(self, folder: str | None) -> dict:
        """Return the folder list's update when the tab is opened; without a valid selection, select the first one."""
        names = self.list_folders()
        folder = folder if folder in names else next(name for name in names if name != ".")
        return gr.update(choices=names, value=folder)

    def show(self, folder: str, which: str, words: str, page: float = 1) -> list:
        """Return the summary, one page of a folder's image cards, the page's number, and the Undo button."""
        if not folder:
            return [views.notice(CHOOSE), "", 1, gr.update()]
        images = self.edits.look(folder)
        shown = self.edits.shown(images, which, words)
        last = image_cards.pages(len(shown))
        page = bounded(page, 1, last, 1)
        html = image_cards.cards(self.edits, images, shown, page)
        number = gr.update(value=page, label=f"Page (1 to {last:,})")
        return [image_cards.summary(self.edits, images, len(shown)), html, number, self.after_save(folder)]

    def show_previous(self, folder: str, which: str, words: str, page: float) -> list:
        """Return what `show` returns, for the page before."""
        return self.show(folder, which, words, page - 1)

    def show_next(self, folder: str, which: str, words: str, page: float) -> list:
        """Return what `show` returns, for the next page."""
        return self.show(folder, which, words, page + 1)

    def after_save(self, folder: str) -> dict:
        """Return the update of the Undo button, which describes the folder's last change."""
        line = self.edits.last(self.edits.folders.find(folder))
        return gr.update(interactive=bool(line), value=f"{UNDO}: {line}" if line else UNDO)

    def enlarge(self, asked: dict) -> dict:
        """Return an image and its reference image, if it has one, each with a title and a data URI.

        `asked`: keys folder and name."""
        (image,) = self.edits.look(asked.get("folder")).find([asked.get("name")])
        return {"images": self.edits.looks.enlarged(image)}

    # -- changes -------------------------------------------------------------------------------------------------------

    def save_caption(self, edit: dict) -> dict:
        """Save one caption, and return it as stored. `edit`: keys folder, name, was and text."""
        return {"text": self.edits.save_caption(edit["folder"], edit["name"], edit["was"], edit["text"])}

    def report_refused(self, event: gr.EventData) -> str:
        """Return an error about a caption whose image card is no longer on the page."""
        return views.bad(str(event.line))

    def do_change(self, operation: str, text: str, other: str, ticked: dict) -> str:
        """Change the captions of the ticked images, and return a notice.

        `ticked`: the folder whose images are shown, and the names of the ticked ones."""
        return views.notice(self.edits.change_captions(ticked["folder"], ticked["names"], operation, text, other))

    def do_trash(self, ticked: dict) -> str:
        """Move the ticked images to the trash, and return a notice."""
        return views.notice(self.edits.throw_away(ticked["folder"], ticked["names"]))

    def do_undo(self, ticked: dict) -> str:
        """Undo the last change of the folder whose images are shown, and return a notice."""
        return views.notice(self.edits.undo(ticked["folder"]))

    def do_check(self, folder: str) -> Iterator[str]:
        """Open all images to find damaged images and duplicates, and yield the progress as HTML."""
        images = self.edits.look(folder)
        total = len(images.images)
        for done in self.edits.check(images):
            yield views.progress(f"{folder}: {done:,} of {pluralize(total, 'image')} checked", done / max(1, total))
        yield views.notice(f"{folder}: {pluralize(total, 'image')} checked.")

    def do_caption(self, folder: str, model: str, instruction: str, prefix: str, overwrite: bool) -> Iterator[str]:
        """Write captions with a model, and yield the progress as HTML."""
        job = self.captioning.start(folder, model, instruction, prefix, overwrite)
        total = len(job.images)
        for done in self.captioning.follow(job):
            progress = f"{done:,} of {pluralize(total, 'caption')}" if done else "loading the model"
            yield views.progress(f"{job.folder}: {progress}", done / total)
        yield views.notice(job.line)

    def do_upload(self, name: str, files) -> tuple:
        """Store uploaded files as a new folder, and select it here and under Train.

        Returns updates of both folder lists, a notice, and empty inputs."""
        named = [(file.get("orig_name") or file["path"], Path(file["path"])) for file in files or []]
        folder, others = store(self.edits.folders, name, named)
        count = pluralize(len(self.edits.look(folder.name).images), "image")
        left = f" Not stored: {enumerated(others[:5])}{' ...' if len(others) > 5 else ''}." if others else ""
        here = gr.update(choices=self.list_folders(), value=folder.name)
        train = gr.update(choices=[BUNDLED, *self.jobs.folders()], value=folder.name)
        line = f"{count} stored as {folder.name}, which is now selected under Train.{left}"
        return here, train, views.notice(line), "", None

    # -- for programs --------------------------------------------------------------------------------------------------

    def api(self) -> None:
        """Register API endpoints for what the page does with inputs that only its JavaScript has."""
        gr.api(self.list_folders, api_name="image_folders")
        gr.api(self.list_images, api_name="images")
        gr.api(self.edits.save_caption, api_name="set_caption")
        gr.api(self.edits.change_captions, api_name="change_captions")
        gr.api(self.edits.throw_away, api_name="trash_images")
        gr.api(self.edits.undo, api_name="undo_images")

    def list_folders(self) -> list[str]:
        """Return the names of the image folders."""
        return list(self.edits.folders.all())

    def list_images(self, folder: str, which: str = image_edits.EVERYTHING, words: str = "") -> list[dict]:
        """Return a folder's images: names, sizes in pixels, captions, reference images, and why training skips them.

        `which`: a filter of `image_edits.FILTERS`. `words`: text that the name or caption must contain."""
        images = self.edits.look(folder)
        alike = self.edits.looks.alike(images)
        return [
            {
                "name": image.name,
                "size": image.size,
                "captions": image.captions,
                "reference": image.reference and images.folder.without_path(str(image.reference)),
                "left_out": self.edits.looks.problem(image),
                "alike": alike.get(image.name, ("", ""))[1],
            }
            for image in self.edits.shown(images, which, words)
        ]
