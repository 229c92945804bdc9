"""The model card of an upload: base model, training data, and Python code that loads the weights."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import ModelCard

from ...export import DIFFUSERS_FILE
from ...methods.registry import METHODS
from ...options.values import listed
from ..context import ImageContext
from ..model.lora_files.writing import peft_folder

BEGIN = "<!-- From here to the next mark this is written anew with each upload; the rest stays. -->"
END = "<!-- To here. -->"
TAGS = ("text-to-image", "diffusers", "diffusers-training", "lora", "reslora")


def card_of(repository: str, pictured: bool, context: ImageContext) -> str:
    """Return the repository's model card with a new description of this upload.

    An existing card keeps all text outside of the description. `pictured`: whether the comparison figure is uploaded.
    """
    options = context.options
    if huggingface_hub.file_exists(repository, "README.md", token=options.output.hub_token):
        card = ModelCard.load(repository, token=options.output.hub_token)
    else:
        card = ModelCard(f"---\nlibrary_name: diffusers\n---\n\n# {repository.rpartition('/')[2]}\n")
    base = options.model.pretrained_model_name_or_path
    if not Path(base).exists():  # the Hub rejects a base model that is a local path
        card.data.base_model = base
    elif BEGIN in card.text:
        card.data.base_model = None
    card.data.tags = list(dict.fromkeys((*listed(card.data.tags), *TAGS)))
    part = "\n\n".join([BEGIN, *description(repository, pictured, context), END])
    marked = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    text, found = marked.subn(lambda _: part, card.text, count=1)
    card.text = text if found else f"{text.rstrip()}\n\n{part}\n"
    return str(card)


def description(repository: str, pictured: bool, context: ImageContext) -> list[str]:
    """Return paragraphs about the weights, with code for each method."""
    options = context.options
    data = ", ".join(map(name_of, listed(options.data.dataset_name or options.data.train_data_dir)))
    found = [f"Weights for {name_of(options.model.pretrained_model_name_or_path)}, trained on {data}."]
    if options.data.caption_prefix:
        found.append(f"Captions began with `{options.data.caption_prefix}`: begin prompts with it, too.")
    if pictured:
        found.append("![samples](comparison.png)")
    for method in options.adapter.method:
        code = "\n".join(example(method, repository, context))
        found += [f"{METHODS[method].title}, in `{method}/`:", f"```python\n{code}\n```"]
    return found


def name_of(place: str) -> str:
    """Return the last component of a local path; return a Hub name unchanged."""
    return Path(place).resolve().name if Path(place).exists() else place


def example(method: str, repository: str, context: ImageContext) -> list[str]:
    """Return lines of Python that load a method's weights from the repository."""
    options, family = context.options, context.model.family
    lines = loading_base(context)
    if predicted := options.model.prediction_type:
        lines.append(f'pipeline.scheduler.register_to_config(prediction_type="{predicted}")')
    if (context.folder_of(method) / DIFFUSERS_FILE).is_file():
        # Name the file, because diffusers would otherwise load the first one in the repository.
        place = "" if len(options.adapter.method) == 1 else f'subfolder="{method}", '
        return [*lines, f'pipeline.load_lora_weights("{repository}", {place}weight_name="{DIFFUSERS_FILE}")']
    for part in (family.denoiser, *(encoder.name for encoder in context.encoders)):
        place = f'"{repository}", subfolder="{peft_folder(Path(method, "peft"), part, family).as_posix()}"'
        lines.append(f"pipeline.{part} = PeftModel.from_pretrained(pipeline.{part}, {place})")
    return ["from peft import PeftModel", *lines]


def loading_base(context: ImageContext) -> list[str]:
    """Return the lines of Python code that load the base model."""
    model = context.options.model
    base, file = model.pretrained_model_name_or_path, model.pretrained_transformer_file
    pipeline, load = "DiffusionPipeline", "from_pretrained"
    given = {"revision": model.revision, "variant": model.variant}
    more = "".join(f', {name}="{value}"' for name, value in given.items() if value)
    if file:
        kind, name = context.model.family.denoiser_class.__name__, name_of(base)
        place = f'"{name_of(file)}", config="{name}", subfolder="transformer"'
        return [
            f"from diffusers import {kind}, {pipeline}",
            "",
            f"transformer = {kind}.from_single_file({place})",
            f'pipeline = {pipeline}.{load}("{name}", transformer=transformer{more})',
        ]
    if Path(base).is_file():
        pipeline, load, more = context.model.family.pipeline.__name__, "from_single_file", ""
    return [f"from diffusers import {pipeline}", "", f'pipeline = {pipeline}.{load}("{name_of(base)}"{more})']
