"""Write captions with an image-text model of transformers into text files next to the images."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..errors import InvalidArgument, refused_as
from ..formatting import pluralize
from ..io import all_below, replacing
from .data.caption_files import caption_files
from .data.dataset import METADATA
from .data.images import damage, is_image, open_image, passes

ASK = "Describe this image in one sentence."  # models with a chat template need an instruction


def caption_folder(args: argparse.Namespace) -> None:
    """Write a `.txt` file next to each image, and skip images with a caption unless `overwrite` is set.

    Raises `InvalidArgument` for a folder without images or with a table of captions, and for a model that cannot be
    loaded.
    """
    images = images_in(Path(args.folder))
    waiting = [image for image in images if args.overwrite or not caption_files(image)]
    if len(waiting) < len(images):
        skipped = pluralize(len(images) - len(waiting), "image")
        print(f"skipped {skipped} with a caption; --overwrite replaces captions")
    if not waiting:
        return
    captioner = Captioner(args.model, args.prompt, args.max_new_tokens)
    written = 0
    for batch in tqdm([waiting[at : at + args.batch_size] for at in range(0, len(waiting), args.batch_size)]):
        opened = dict(readable(batch))
        for image, text in zip(opened, captioner.describe(list(opened.values())), strict=True):
            if not text:
                tqdm.write(f"warning: {image}: left out, because the model wrote no text")
                continue
            with replacing(image.with_suffix(".txt")) as temporary:
                temporary.write_text(f"{args.prefix} {text}".strip() + "\n", encoding="utf-8")
            written += 1
    left_out = f"; left out {pluralize(len(waiting) - written, 'image')}" if written < len(waiting) else ""
    print(f"wrote {pluralize(written, 'caption')} in {args.folder}{left_out}")


def images_in(folder: Path) -> list[Path]:
    """Return the images of a folder and its subfolders, without hidden ones.

    If several images share a caption file, only the first is returned, and a warning names the others. Raises
    `InvalidArgument` if there are no images, or if the trainer would read captions from a table.
    """
    files = [path for path in sorted(all_below(folder)) if path.is_file() and not path.name.startswith(".")]
    for table in (path for path in files if path.name in METADATA):
        fix = "edit the captions there, or move this file out of the folder"
        raise InvalidArgument(f"FOLDER {folder}", f"the trainer reads {table}, not text files", fix)
    found: dict[Path, Path] = {}
    for image in filter(is_image, files):
        first = found.setdefault(image.with_suffix(".txt"), image)
        if first != image:
            print(f"warning: {image}: shares its caption file with {first.name}, which the caption will describe")
    if not found:
        raise InvalidArgument(f"FOLDER {folder}", "no images", "give a folder with images")
    return list(found.values())


def readable(paths: Sequence[Path]) -> Iterator[tuple[Path, PIL.Image.Image]]:
    """Yield each path with its image; print the names of damaged files, and raise temporary errors."""
    for path in paths:
        try:
            yield path, open_image(path)
        except Exception as error:  # each format's reader raises its own types
            if passes(error):
                raise
            tqdm.write(f"warning: {path}: left out, because it is {damage(error)}")


class Captioner:
    """An image-text model with its processor, on the accelerator if there is one.

    Raises `InvalidArgument` for a model that needs custom code, has no safetensors file, or lacks weights.
    """

    def __init__(self, name: str, prompt: str | None, max_new_tokens: int) -> None:
        self.name, self.prompt, self.max_new_tokens = name, prompt, max_new_tokens
        device = PartialState().device
        dtype = torch.float32 if device.type == "cpu" else "auto"
        with refused_as(f"--model {name}", "give an image-text model of transformers with safetensors weights"):
            self.processor: Any = AutoProcessor.from_pretrained(name, trust_remote_code=False)
            model, info = AutoModelForImageTextToText.from_pretrained(
                name, trust_remote_code=False, use_safetensors=True, dtype=dtype, output_loading_info=True
            )
            if info["missing_keys"]:  # transformers would initialize them randomly
                raise ValueError(f"the file lacks weights, such as {min(info['missing_keys'])}")
            tokenizer = self.processor.tokenizer
        self.model: Any = model.eval().to(device)
        tokenizer.padding_side = "left"  # generated tokens are appended at the right end
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @torch.inference_mode()
    def describe(self, images: Sequence[PIL.Image.Image]) -> list[str]:
        """Return the caption of each image, in one line and without the prompt, generated without sampling.

        Raises `InvalidArgument` if the model cannot read the prompt.
        """
        if not images:
            return []
        read = self.processor.tokenizer.batch_decode
        with refused_as(f"--model {self.name}", "give a --prompt in the form that this model reads, or another model"):
            inputs = self.inputs(images).to(self.model.device, self.model.dtype)
            ids = inputs.get("input_ids", [[]] * len(images))
            prompts = read(ids, skip_special_tokens=True)
            tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        # The generated tokens include the prompt, with some models with other special tokens. Therefore compare texts
        # instead of tokens, as transformers' pipeline does.
        texts = [" ".join(text.split()) for text in read(tokens, skip_special_tokens=True)]
        return [
            text.removeprefix(" ".join(prompt.split())).strip() for text, prompt in zip(texts, prompts, strict=True)
        ]

    def inputs(self, images: Sequence[PIL.Image.Image]) -> Any:
        """Return the model's inputs for a batch of images."""
        text, options = self.prompt, {}
        if chat := self.processor.chat_template is not None:
            content = [{"type": "image"}, {"type": "text", "text": self.prompt or ASK}]
            message = {"role": "user", "content": content}
            text = self.processor.apply_chat_template([message], add_generation_prompt=True)
            bos = self.processor.tokenizer.bos_token
            options = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        inputs = self.processor(
            images=[[image] for image in images] if chat else list(images),
            text=None if text is None else [text] * len(images),
            padding=True, return_tensors="pt", **options,
        )  # fmt: skip
        if self.model.config.model_type == "git" and text is not None:  # the tokenizer adds an end token
            for name in ("input_ids", "attention_mask"):
                inputs[name] = inputs[name][:, :-1]
        return inputs
