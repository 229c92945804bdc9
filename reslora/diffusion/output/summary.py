"""What a finished run shows: figures, a summary, and an upload."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import huggingface_hub
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from PIL import Image

from ...common.drawn import PROMPTS, is_of
from ...common.errors import InvalidArgument, RunFailed, first_line
from ...common.figures import comparison, loss_curves
from ...common.log import read_log
from ...common.methods import METHODS
from ...export import COMFYUI_FILE, DIFFUSERS_FILE, KOHYA_FILE
from ...files import read_object, replacing
from ..arguments import Flags, listed
from .reports import FINISHED

COLUMNS = 9  # at most so many steps are shown beside each other
# Nothing else is: there may be settings, latents of the training images, their names, notes, the images themselves.
UPLOADED = ("README.md", "comparison.png", "loss.png", DIFFUSERS_FILE)
UPLOADED_OF_METHOD = (
    *(DIFFUSERS_FILE, KOHYA_FILE, COMFYUI_FILE, "peft/*"),
    *("chains.json", "merge.json", "log.jsonl", "samples/step-*", "merged/*"),
)


def write_figures(flags: Flags, held_out: int, learnt: Callable[[int], list[Image.Image]] = lambda _: []) -> None:
    """`comparison.png`, a single method's weights where diffusers' script leaves them, and `loss.png`.

    That comes last: where it is, a run is finished. `learnt`: gives some of the images that were trained on.
    """
    output, measured = Path(flags.output_dir), min(held_out, flags.max_validation_images)
    if flags.validation_prompt and flags.num_validation_images:
        write_comparison(flags, output, learnt(COLUMNS + 3))
    if len(flags.method) == 1 and METHODS[flags.method[0]].plain_lora:
        with replacing(output / DIFFUSERS_FILE) as temporary:
            shutil.copyfile(output / flags.method[0] / DIFFUSERS_FILE, temporary)
    logs = {method: read_log(output / method / "log.jsonl") for method in flags.method}
    loss_curves(output / FINISHED, logs, measured)


def write_comparison(flags: Flags, output: Path, learnt: Sequence[Image.Image] = ()) -> None:
    """The paper's Figure 3: steps across; prompts down, and the methods under each; what was trained on above it."""
    prompts = list(enumerate(flags.validation_prompt))
    folders = (
        path
        for path in output.glob("*/samples/step-*")
        if any(is_of(read_object(path / PROMPTS), *prompt) for prompt in prompts)
    )
    found = sorted({int(path.name[5:]) for path in folders if path.name[5:].isdigit()})
    chosen = sorted({found[round(i * (len(found) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)}) if found else []
    places = [f"samples/step-{step:06d}" for step in chosen] + ["merged"]
    rows = []
    for number, prompt in prompts:
        drawn = [[_image(output / name / place, number, prompt) for place in places] for name in flags.method]
        titles = [METHODS[name].title for name in flags.method]
        rows.append((f"prompt: {prompt}", list(zip(titles, drawn, strict=True))))
    columns = [f"step {step}" if step else "before\ntraining" for step in chosen] + ["merged into\nthe model"]
    comparison(output / "comparison.png", columns, rows, above=("some of the training images", learnt))


def _image(samples: Path, number: int, prompt: str) -> Path | None:
    """The first sample of a prompt; None where there is none, or no image that can be read."""
    path = samples / f"{number}-0.png"
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return path if is_of(read_object(samples / PROMPTS), number, prompt) else None


def print_summary(flags: Flags) -> None:
    """What was written, and how to look at it."""
    output = Path(flags.output_dir)
    lines = ["", f"{output}/"]
    if (output / "comparison.png").is_file():
        lines.append("  comparison.png   images to learn from; steps across; prompts and methods down")
    lines += ["  loss.png         training and validation loss", "  config.json      every setting of this run"]
    uses = {
        DIFFUSERS_FILE: "diffusers: pipeline.load_lora_weights(folder)",
        KOHYA_FILE: "ComfyUI, A1111/Forge, kohya",
        COMFYUI_FILE: "ComfyUI",
        "peft": "PeftModel.from_pretrained(denoiser, folder)",
        "unet": "merged weights: UNet2DConditionModel.from_pretrained(folder)",
        "text_encoder": "merged weights: the text encoder's from_pretrained(folder)",
        "text_encoder_2": "merged weights: the text encoder's from_pretrained(folder)",
        "transformer": "merged weights: the transformer's from_pretrained(folder)",
    }
    for method in flags.method:
        record = read_object(output / method / "exports.json")
        best = record.get("best")
        of = f"of step {best['step']}, which has the lowest validation loss, {best['loss']:.5f}" if best else ""
        lines.append(f"  {method + '/':<36}{of}".rstrip())
        for name, difference in record["difference_of_255"].items():
            lines.append(f"    {name:<34}{uses.get(name, ''):<62}read back: {difference}/255")
    lines.append(
        "Each was read back by stock diffusers or PEFT; its image may differ from the merged model's by 2/255 (fp32)."
    )
    lines.append("Look at the run: python -m app")
    print("\n".join(lines))


def hub_repository(flags: Flags) -> str:
    """The repository to upload to, which is made if need be."""
    name = flags.hub_model_id or Path(flags.output_dir).resolve().name
    try:
        return huggingface_hub.create_repo(name, exist_ok=True, token=flags.hub_token).repo_id
    except Exception as error:  # requests' or httpx's, by the version of the hub's library
        problem = f"cannot make or reach the repository {name} ({first_line(error)})"
        raise InvalidArgument("--push_to_hub", problem, "log in with `hf auth login`, or leave it out") from None


def publish(flags: Flags) -> None:
    """Upload a model card with what the methods left: LoRA files, samples, losses and figures."""
    output, name = Path(flags.output_dir), hub_repository(flags)
    base = flags.pretrained_model_name_or_path
    local = Path(base).exists()
    description = (
        f"# {name}\n\n{', '.join(flags.method)} weights for {Path(base).name if local else base}, "
        f"trained on {', '.join(Path(name).name for name in listed(flags.dataset_name or flags.train_data_dir))}.\n"
    )
    if (output / "comparison.png").is_file():
        write_comparison(flags, output)  # nobody asked that images to learn from be uploaded
        description += "\n![samples](comparison.png)\n"
    try:
        card = load_or_create_model_card(
            repo_id_or_path=name,
            token=flags.hub_token,
            from_training=True,
            base_model=None if local else base,  # the hub refuses what is no name of its own
            model_description=description,
            inference=True,
        )
        tags = ["text-to-image", "diffusers", "diffusers-training", "lora", "reslora"]
        populate_model_card(card, tags=tags).save(output / "README.md")
        huggingface_hub.upload_folder(
            repo_id=name,
            folder_path=output,
            commit_message="End of training",
            allow_patterns=[*UPLOADED, *(f"{name}/{file}" for name in flags.method for file in UPLOADED_OF_METHOD)],
            ignore_patterns=["*/.*"],
            token=flags.hub_token,
        )
    except Exception as error:
        problem = f"{name} could not be uploaded ({first_line(error)})"
        raise RunFailed(f"{problem}; the run is complete, the same command tries again") from None
    print(f"uploaded to {name}")
