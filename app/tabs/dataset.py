"""Images: upload images, view the images of a folder with their captions, and edit them before training."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr

from reslora.formatting import enumerated, pluralize
from reslora.images.data.caption_files import CAPTIONS

from .. import image_edits, views
from ..captioning import Captioning
from ..folders import BUNDLED
from ..handlers import QUIET
from ..image_edits import ImageEdits, text_of
from ..image_folders import NO_CAPTION, Image, Images
from ..uploads import store
from ..views import escape
from .base import Parts, Tab, TabHost, answer_line, open_choice
from .train import TrainTab

PER_PAGE = 24
MOST = 8
"""Number of reasons, and of messages of the trainer, in the summary."""
CHOOSE = "Select a folder of images, or upload images above."


class DatasetTab(Tab):
    """The tab that shows and edits image folders."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.edits = ImageEdits(self.jobs)
        self.captioning = Captioning(self.edits)
        self.drafts: dict[str, tuple[str, str]] = {}
        """Captions that are being typed, each after the caption that the user saw."""
        self.upload_row()
        with gr.Row(elem_id="which-images"):
            self.folder = open_choice("Folder", elem_id="folder")
            self.which = gr.Dropdown(list(image_edits.FILTERS), label="Show", elem_id="which")
            self.words = gr.Textbox(label="Search names and captions", max_lines=1, elem_id="words")
        self.changing_rows()
        self.answer = answer_line(elem_id="dataset-answer")
        self.page, self.changed = gr.State(1), gr.State(0)
        asked = [self.folder, self.which, self.words, self.page]
        changes = [self.folder.change, self.which.change, self.words.submit, self.page.change, self.changed.change]
        gr.render(asked, changes, concurrency_limit=1, show_progress="hidden")(self.show)
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
        """Make the components that change images and captions."""
        with gr.Accordion("Write captions with a model", open=False, elem_id="write-captions"):
            with gr.Row():
                self.model = open_choice(
                    "Image-text model", value="", elem_id="caption-model", min_width=220,
                    info="A Hugging Face Hub name (owner/model), or a folder in the models folder of the runs folder",
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
        with (
            gr.Accordion("Change the selected captions, or all that are shown", open=False, elem_id="change"),
            gr.Row(),
        ):
            self.operation = gr.Dropdown(
                list(image_edits.OPERATIONS), label="Change", elem_id="operation", min_width=150
            )
            self.text = gr.Textbox(label="Words or tag", max_lines=1, elem_id="text", min_width=120)
            self.other = gr.Textbox(label="Replace with", max_lines=1, elem_id="other", min_width=120)
            self.apply = gr.Button("Apply", elem_id="apply", min_width=100)
        with gr.Row(elem_classes="actions", elem_id="dataset-actions"):
            self.check = gr.Button("Check images", elem_id="check", min_width=110)
            self.trash = gr.Button("Move selected to trash", variant="stop", elem_id="trash", min_width=110)
            self.undo = gr.Button("Undo", elem_id="undo", min_width=80)

    def events(self, page: TabHost) -> None:
        """Connect the components."""
        gr.on([self.folder.change, self.which.change, self.words.change], lambda: 1, None, self.page, **QUIET)
        page.frames[self].select(self.open, self.folder, [self.folder, self.changed], **QUIET)
        self.change_by(self.undo, self.do_undo, self.folder)
        self.change_by(self.check, self.do_check, self.folder)
        of_model = [self.folder, self.model, self.instruction, self.prefix, self.overwrite]
        self.change_by(self.write, self.do_caption, of_model)
        self.stop.click(self.captioning.stopped.set, **QUIET)
        self.operation.change(
            lambda operation: gr.update(visible=operation == image_edits.REPLACE), self.operation, self.other, **QUIET
        )
        for part in (self.files, self.directory):
            stored = [self.folder, page.tab(TrainTab).folder, self.answer, self.name, part]
            upload = part.upload(self.do_upload, [self.name, part], stored, preprocess=False, **QUIET)
            upload.failure(lambda: None, None, part, **QUIET)

    def change_by(self, button: gr.Button, handler: Callable, inputs: gr.components.Component | list) -> None:
        """Call a handler, which returns an answer, when a button is clicked; then render the images again."""
        clicked = button.click(handler, inputs, self.answer, concurrency_limit=None, **QUIET)
        clicked.success(time.time_ns, None, self.changed, **QUIET)

    # -- display -------------------------------------------------------------------------------------------------------

    def arrive(self) -> dict:
        """Return the choices of the lists of folders and models. Images are only read when the tab is opened."""
        models = gr.update(choices=list(self.captioning.models()))
        return {self.folder: gr.update(choices=list(self.edits.folders.all())), self.model: models}

    def open(self, folder: str | None) -> tuple:
        """Return the folder list's update when the tab is opened; without a valid selection, select the first one."""
        names = list(self.edits.folders.all())
        folder = folder if folder in names else next(name for name in names if name != ".")
        return gr.update(choices=names, value=folder), time.time_ns()

    def show(self, folder: str, which: str, words: str, page: int) -> None:
        """Render the summary of a folder, and one page of the images that the filter and the words select."""
        if not folder:
            gr.HTML(views.notice(CHOOSE))
            return
        images = self.edits.look(folder)
        found = self.edits.shown(images, which, words)
        last = max(1, math.ceil(len(found) / PER_PAGE))
        page = min(page, last)
        part = found[(page - 1) * PER_PAGE : page * PER_PAGE]
        for _ in self.edits.looks.check(part):
            pass
        gr.HTML(self.summary(images, len(found)), elem_id="dataset-status")
        alike = self.edits.looks.alike(images)
        with gr.Row(elem_classes="cards"):
            ticks = [self.card(images, image, alike.get(image.name, ("", ""))[1]) for image in part]
        if last > 1:
            slider = gr.Slider(1, last, page, step=1, label="Page", interactive=True, elem_id="page")
            slider.change(int, slider, self.page, **QUIET)

        def picked(ticked: tuple[bool, ...]) -> list[str]:
            """Return the names of the selected images."""
            return [image.name for image, chosen in zip(part, ticked, strict=True) if chosen]

        def change(operation: str, text: str, other: str, *ticked: bool) -> str:
            """Change the captions of the selected images or, if there are none, of all that are shown."""
            names = picked(ticked) or [image.name for image in found]
            return views.notice(self.edits.change_captions(folder, names, operation, text, other))

        def throw_away(*ticked: bool) -> str:
            """Move the selected images to the trash."""
            return views.notice(self.edits.throw_away(folder, picked(ticked)))

        inputs = [self.operation, self.text, self.other, *ticks]
        self.change_by(self.apply, change, inputs)
        self.change_by(self.trash, throw_away, ticks)

    def card(self, images: Images, image: Image, alike: str) -> gr.Checkbox:
        """Render an image with its caption, and return the checkbox that selects it.

        `alike`: which image it duplicates or is similar to; empty if there is none.
        """
        folder, name, looks = images.folder, image.name, self.edits.looks
        look, problem, key = looks.of(image), looks.problem(image), f"{images.folder.path}/{image.name}"
        seen, draft = self.drafts.get(key, (text_of(image),) * 2)
        with gr.Column(min_width=190, elem_classes=["card", "bad"] if problem or alike else ["card"]):
            tick = gr.Checkbox(False, label=name, container=False, interactive=True)
            for picture in look.pictures if look else ():
                gr.Image(picture, show_label=False, interactive=False, buttons=["fullscreen"], height=200)
            size = " x ".join(map(str, image.size or ()))
            box = gr.Textbox(
                draft, label=" · ".join(filter(None, (size, problem, alike))) or "caption", lines=3, max_lines=8,
                placeholder=NO_CAPTION, interactive=not folder.bundled, key=key,
            )  # fmt: skip

        def note(text: str) -> None:
            """Note what is being typed, which an update of the page would replace."""
            if text.strip() != seen:
                self.drafts[key] = seen, text

        def save(text: str) -> object:
            """Save the caption, if it was changed."""
            nonlocal seen
            self.drafts.pop(key, None)
            if text.strip() == seen:
                return gr.skip()
            seen = self.edits.save_caption(folder.name, name, seen, text)
            return views.notice(f"The caption of {name} is saved.")

        box.input(note, box, trigger_mode="always_last", queue=False, **QUIET)
        gr.on([box.blur, box.submit], save, box, self.answer, **QUIET)
        return tick

    def summary(self, images: Images, shown: int) -> str:
        """Return a folder's summary as HTML: how many images it has, how many training skips and why.

        `shown`: number of images that the filter selects."""
        every = images.images.values()
        problems = Counter(filter(None, map(self.edits.looks.problem, every)))
        lines = [f"<b>{pluralize(len(every), 'image')}</b> in {escape(images.folder.name)}, {shown:,} shown"]
        if without := problems.pop(NO_CAPTION, 0):
            have, them = ("has", "it") if without == 1 else ("have", "them")
            line = f"{pluralize(without, 'image')} {have} no caption:"
            lines.append(f'<b class="bad">{line}</b> write {them} below, or let a model write {them}')
        if problems:
            reasons = ", ".join(f"{number:,} {escape(reason)}" for reason, number in problems.most_common(MOST))
            lines.append(f'<b class="bad">Training skips {pluralize(problems.total(), "image")}:</b> {reasons}')
        if images.refused and not without:
            lines.append(f'<b class="bad">Training cannot use this folder:</b> {escape(images.refused)}')
        if every and not (without or problems or images.refused):
            lines.append("Training uses all of them")
        if alike := len(self.edits.looks.alike(images)):
            lines.append(f"{pluralize(alike, 'image')} with duplicates: see the filter Duplicates")
        elif any(image.size and self.edits.looks.of(image) is None for image in every):
            lines.append("<i>Check images</i> opens every image to find damaged images and duplicates")
        lines += [f"Message of the trainer: {escape(note)}" for note in images.notes[:MOST]]
        return f'<ul class="told-of">{"".join(f"<li>{line}</li>" for line in lines)}</ul>'

    # -- changes -------------------------------------------------------------------------------------------------------

    def do_undo(self, folder: str) -> str:
        """Undo the last change of the folder, and return a notice."""
        return views.notice(self.edits.undo(folder))

    def do_check(self, folder: str) -> Iterator[str]:
        """Open all images to find damaged images and duplicates, and yield the progress as HTML."""
        images = list(self.edits.look(folder).images.values())
        for done in self.edits.looks.check(images):
            yield views.progress(f"{folder}: {done:,} of {pluralize(len(images), 'image')} checked", done / len(images))
        yield views.notice(f"{folder}: {pluralize(len(images), 'image')} checked.")

    def do_caption(self, *inputs: object) -> Iterator[str]:
        """Write captions with a model, and yield the progress as HTML."""
        for line, share in self.captioning.write(*inputs):
            yield views.progress(line, share) if share < 1 else views.notice(line)

    def do_upload(self, name: str, files) -> tuple:
        """Store uploaded files as a new folder, and select it here and under Train.

        Returns updates of both folder lists, a notice, and empty inputs."""
        named = [(file.get("orig_name") or file["path"], Path(file["path"])) for file in files or []]
        folder, others = store(self.edits.folders, name, named)
        count = pluralize(len(self.edits.look(folder.name).images), "image")
        left = f" Not stored: {enumerated(others[:5])}{' ...' if len(others) > 5 else ''}." if others else ""
        here = gr.update(choices=list(self.edits.folders.all()), value=folder.name)
        train = gr.update(choices=[BUNDLED, *self.jobs.folders()], value=folder.name)
        line = f"{count} stored as {folder.name}, which is now selected under Train.{left}"
        return here, train, views.notice(line), "", None
