"""Images: view the images of a folder with their captions, and edit them before training."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import gradio as gr

from reslora.formatting import pluralize
from reslora.images.data.caption_files import CAPTIONS

from .. import image_cards, image_edits, views
from ..captioning import Captioning
from ..folders import BUNDLED
from ..generation_request import bounded
from ..handlers import NO_PROGRESS, QUIET, paths_of, server_function
from ..image_edits import ImageEdits
from ..image_folders import Images, add
from ..runs import RunError
from .base import Parts, Tab, TabHost, answer_line, open_choice
from .train import TrainTab

SCRIPT = Path(__file__).resolve().parents[1] / "dataset.js"
CHOOSE = "Select a folder of images, or upload images below."
HOST = "document.getElementById('dataset-images')"
# Only the browser knows which images are ticked; this script sends their names as the last input of an event.
WITH_TICKED = f"(...values) => [...values.slice(0, -1), {HOST}.picked()]"
UNDO = "Undo"


class DatasetTab(Tab):
    """The tab that shows and edits image folders."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.folders = self.jobs.images
        self.edits = ImageEdits(self.jobs)
        self.captioning = Captioning(self.edits)
        self.choosing_rows()
        self.status = gr.HTML(views.notice(CHOOSE), elem_id="dataset-status")
        self.changing_rows()
        self.last_change = gr.State(None)
        self.answer = answer_line(elem_id="dataset-answer")
        script = SCRIPT.read_text(encoding="utf-8")
        self.images = gr.HTML(
            elem_id="dataset-images", js_on_load=script,
            server_functions=[server_function(self.save_caption), server_function(self.enlarge)],
        )  # fmt: skip
        with gr.Row(elem_id="pages"):
            self.back = gr.Button("Back", min_width=80, elem_id="back")
            self.page = gr.Number(1, label="Page", precision=0, minimum=1, min_width=100, elem_id="page")
            self.next = gr.Button("Next", min_width=80, elem_id="next")
        self.more_rows()
        self.on_arrival = [self.folder, self.model]
        self.of_model = [self.model, self.instruction, self.prefix, self.overwrite]
        self.settings = [self.resolution, self.buckets, self.column]
        self.asked = [self.folder, self.which, self.words, *self.settings, self.page]
        self.shown_parts = [self.status, self.images, self.page, self.undo, self.last_change]

    def choosing_rows(self) -> None:
        """Make the components that select a folder and filter the folder's images."""
        with gr.Row(elem_id="which-images"):
            self.folder = open_choice("Folder", elem_id="folder")
            self.which = gr.Dropdown(
                list(image_edits.FILTERS), value=image_edits.EVERYTHING, label="Show", elem_id="which"
            )
            self.words = gr.Textbox(label="Search names and captions", max_lines=1, elem_id="words")
            self.check = gr.Button("Check images", elem_id="check", min_width=120)

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
            self.undo = gr.Button(UNDO, elem_id="undo", min_width=80)
        self.ticked = gr.JSON([], visible="hidden")

    def more_rows(self) -> None:
        """Make the components for uploads and for the resolution settings."""
        with gr.Accordion("Upload a folder", open=False, elem_id="upload"):
            self.name = gr.Textbox(label="Name of the folder", max_lines=1, elem_id="folder-name")
            self.uploads = gr.File(
                label="Images, optionally with .txt captions", file_count="multiple", file_types=["image", *CAPTIONS],
                height=150, elem_id="folder-uploads",
            )  # fmt: skip
            self.caption = gr.Textbox(label="Caption of images without a .txt file (empty: their file name)")
            self.upload = gr.Button("Upload", variant="primary", elem_id="folder-upload")
        with gr.Accordion("Resolution and buckets for the preview", open=False):
            self.resolution = gr.Textbox(label="Resolution (empty: the trainer's default)", max_lines=1)
            self.buckets = gr.Checkbox(label="Aspect ratio buckets")
            self.column = gr.Textbox(label="Caption column of the metadata table (empty: text)", max_lines=1)

    def events(self, page: TabHost) -> None:
        """Connect the components."""
        chosen = [self.folder, *self.settings]
        # First, because Gradio handles the events of a component in order.
        choose = f"(...values) => {{ {HOST}.chosen = values; return values; }}"
        gr.on([part.change for part in chosen], None, chosen, None, js=choose, **QUIET)
        # One event for all triggers: the answers of several events could arrive in another order.
        gr.on(
            [*(part.change for part in (*chosen, self.which)), self.words.submit, self.images.submit],
            self.show, self.asked, self.shown_parts, js=f"(...values) => {HOST}.asks(values)",
            trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        self.page.submit(None, self.page, None, js=f"page => {HOST}.turn(page)", **QUIET)
        for button, by in ((self.back, -1), (self.next, 1)):
            button.click(None, js=f"() => {HOST}.next({by})")
        for button, which in ((self.tick_page, "page"), (self.tick_all, "all"), (self.untick, "none")):
            button.click(None, js=f"() => {HOST}.pick('{which}')")
        done = [
            button.click(partial(self.change_ticked, change), [*self.asked, *given, self.ticked], self.answer,
                         js=WITH_TICKED, **QUIET)
            for button, change, given in (
                (self.apply, self.edits.change_captions, [self.operation, self.text, self.other]),
                (self.trash, self.edits.throw_away, []), (self.undo, self.undo_shown, [self.last_change]),
            )
        ]  # fmt: skip
        done += [
            self.check.click(self.do_check, self.asked, self.answer, concurrency_limit=1, **QUIET),
            self.write.click(
                self.do_caption, [*self.asked, *self.of_model], self.answer, concurrency_limit=None, **QUIET
            ),
            page.frames[self].select(self.open, self.folder, self.folder, **QUIET),
        ]
        self.stop.click(lambda: views.notice(self.captioning.stop()), None, self.answer, api_name="stop_captions",
                        concurrency_limit=None, **NO_PROGRESS)  # fmt: skip
        done[1].success(None, js=f"() => {HOST}.pick('none')")
        for event in done:  # `then` does not run after a failure
            for outcome in (event.success, event.failure):
                outcome(None, js=f"() => {HOST}.renew()")
        self.operation.change(
            lambda operation: gr.update(visible=operation == image_edits.REPLACE), self.operation, self.other, **QUIET
        )
        self.images.refused(
            self.report_refused_caption,
            None,
            self.answer,
            queue=False,
            trigger_mode="always_last",
            **QUIET,
        )
        self.upload.click(
            self.do_upload, [self.name, self.uploads, self.caption],
            [self.folder, page.tab(TrainTab).folder, self.answer], api_name="upload_images", preprocess=False,
        )  # fmt: skip
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

    def show(self, folder, which, words, *rest) -> list:
        """Return the summary, one page of a folder's image cards, the page's number, the Undo button, and its change.

        `which`: a filter. `words`: text in names or captions. `rest`: the settings, and the requested page's number.
        """
        *settings, page = rest
        if not folder:
            return [views.notice(CHOOSE), "", 1, gr.update(), None]
        images = self.edits.look(folder, settings)
        shown = self.edits.shown(images, which, words)
        last = image_cards.pages(len(shown))
        page = bounded(page, 1, last, 1)
        number = gr.update(value=page, label=f"Page (1 to {last:,})")
        html = image_cards.cards(self.edits, images, shown, page)
        change = self.edits.last(images.folder)
        undo = gr.update(interactive=change is not None, value=f"{UNDO}: {change.line}" if change else UNDO)
        name = change and change.place.name
        return [image_cards.summary(self.edits, images, len(shown)), html, number, undo, name]

    def enlarge(self, asked: dict) -> dict:
        """Return an image and its reference image, if it has one, each with a title and a data URI.

        `asked`: keys folder, chosen (the selected folder), settings and name."""
        refuse_other(asked.get("folder"), asked.get("chosen"))
        images = self.edits.look(asked.get("folder"), tuple(asked.get("settings") or ()))
        (image,) = images.find([asked.get("name")])
        return {"images": self.edits.looks.enlarged(image, images.folder)}

    # -- changes -------------------------------------------------------------------------------------------------------

    def save_caption(self, edit: dict) -> dict:
        """Save one caption, and return it as stored. The page is not updated: the user may be typing another caption.

        `edit`: keys folder, chosen (the selected folder), settings, name, was and text."""
        refuse_other(edit.get("folder"), edit.get("chosen"))
        images = self.edits.look(edit.get("folder"), tuple(edit.get("settings") or ()))
        return {"text": self.edits.save_caption(images, edit["name"], edit["was"], edit["text"])}

    def report_refused_caption(self, event: gr.EventData) -> str:
        """Return a notice with the error of a caption whose image card is no longer on the page."""
        return views.notice(str(event.line))

    def look(self, folder, _which, _words, *settings):
        """Return the images of a folder.

        `settings`: resolution, whether buckets are used, caption column, page number (which is ignored)."""
        return self.edits.look(folder, settings[:3])

    def change_ticked(self, change: Callable[..., str], *inputs) -> str:
        """Apply a change to the shown folder, and return a notice.

        `change`: a function of the folder's images, the names of the ticked ones, and further arguments. `inputs`: the
        values of `asked`, the further arguments, and what the page has ticked."""
        *values, ticked = inputs
        asked, given = values[: len(self.asked)], values[len(self.asked) :]
        refuse_other(ticked["folder"], asked[0])
        return views.notice(change(self.look(*asked), ticked["names"], *given))

    def undo_shown(self, images: Images, _names: list[str], name: str | None) -> str:
        """Undo the folder's last change, which must be the change `name`, which the Undo button describes."""
        return self.edits.undo(images, str(name))

    def do_check(self, *asked) -> Iterator[str]:
        """Open all images to find damaged images and duplicates, and yield the progress as HTML."""
        images = self.look(*asked)
        total, name = len(images.images), images.folder.name
        for done in self.edits.check(images):
            yield views.progress(f"{name}: {done:,} of {pluralize(total, 'image')} checked", done / max(1, total))
        yield views.notice(f"{name}: {pluralize(total, 'image')} checked.")

    def do_caption(self, *inputs) -> Iterator[str]:
        """Write captions with a model, and yield the progress."""
        *asked, model, instruction, prefix, overwrite = inputs
        job = self.captioning.start(self.look(*asked), model, instruction, prefix, overwrite)
        for done in self.captioning.follow(job):
            told = f"{done:,} of {pluralize(job.total, 'caption')}" if done else "loading the model"
            yield views.progress(f"{job.folder}: {told}", done / job.total)
        yield views.notice(job.line)

    def do_upload(self, name, uploads, caption) -> tuple:
        """Store uploaded images as a new folder.

        Returns a notice, and updates of the folder lists under Images (which selects the folder) and Train."""
        folder = add(self.folders, name, paths_of(uploads), str(caption or ""))
        choices = gr.update(choices=[BUNDLED, *self.jobs.folders()])
        shown = gr.update(choices=self.list_folders(), value=folder.name)
        return shown, choices, views.notice(f"{folder.name} is stored; select it as the image folder under Train.")

    # -- for programs --------------------------------------------------------------------------------------------------

    def api(self) -> None:
        """Register API endpoints for the actions that the page triggers with inputs that only its JavaScript has."""
        for name, handler in (
            ("image_folders", self.list_folders), ("images", self.list_images), ("set_caption", self.set_caption),
            ("change_captions", self.change_captions), ("trash_images", self.trash_images),
            ("undo_images", self.undo_images), ("check_images", self.check_images),
            ("caption_images", self.caption_images),
        ):  # fmt: skip
            gr.api(handler, api_name=name)

    def list_folders(self) -> list[str]:
        """Return the names of the image folders."""
        return list(self.folders.all())

    def list_images(self, folder: str, which: str = image_edits.EVERYTHING, words: str = "") -> list[dict]:
        """Return a folder's images: names, sizes in pixels, buckets, captions, reference images, and why training
        skips them.

        `which`: a filter of `image_edits.FILTERS`. `words`: text that the name or caption must contain."""
        images = self.edits.look(folder)
        return [
            {
                "name": image.name,
                "size": image.size,
                "buckets": [(size.width, size.height) for size in image.buckets],
                "captions": image.captions,
                "reference": image.reference and self.folders.find(folder).without_path(str(image.reference)),
                "left_out": self.edits.looks.problem(image),
                "alike": self.edits.looks.alike(images).get(image.name, ("", ""))[1],
            }
            for image in self.edits.shown(images, which, words)
        ]

    def set_caption(self, folder: str, name: str, was: str, text: str) -> str:
        """Write `text` as the caption of one image, and return the caption as stored.

        Raises `RunError` if the current caption is not `was`."""
        return self.edits.save_caption(self.edits.look(folder), name, was, text)

    def change_captions(self, folder: str, names: list[str], operation: str, text: str, other: str = "") -> str:
        """Change the captions of the named images, and return a sentence that reports it.

        `operation`: Replace (`text` by `other`), Put before, Put after, Add tag or Remove tag."""
        return self.edits.change_captions(self.edits.look(folder), names, operation, text, other)

    def trash_images(self, folder: str, names: list[str]) -> str:
        """Move the named images and their captions to the folder's trash, and return a sentence that reports it."""
        return self.edits.throw_away(self.edits.look(folder), names)

    def undo_images(self, folder: str) -> str:
        """Undo the last change of a folder, and return a sentence that reports it."""
        return self.edits.undo(self.edits.look(folder))

    def check_images(self, folder: str) -> str:
        """Open all images of a folder to find damaged images and duplicates; return how many were opened."""
        images = self.edits.look(folder)
        for _ in self.edits.check(images):
            pass
        return f"{pluralize(len(images.images), 'image')} checked."

    def caption_images(
        self, folder: str, model: str, prompt: str = "", prefix: str = "", overwrite: bool = False
    ) -> str:
        """Write captions with an image-text model, as `reslora-caption` does, and return a line about them."""
        job = self.captioning.start(self.edits.look(folder), model, prompt, prefix, overwrite)
        for _ in self.captioning.follow(job):
            pass
        return job.line


def refuse_other(shown: object, chosen: object) -> None:
    """Raise `RunError` if the selected folder is not the folder whose images are shown."""
    if shown not in (None, chosen):
        raise RunError(f"Nothing was changed: the page shows images of {shown}, but another folder is selected.")
