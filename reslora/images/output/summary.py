"""Write the figures and print the summary of a finished run."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from ...export import COMFYUI_FILE, DIFFUSERS_FILE, KOHYA_FILE, LYCORIS_FILE
from ...io import read_object, replacing
from ...methods.own import CONVERSION, conversion_in_words
from ...methods.registry import METHODS
from ...options.images import MethodOptions, OutputOptions, ValidationOptions
from ...plots.figures import comparison, loss_curves
from ...runtime.log import read_log
from ...runtime.sample_folders import by_step, shows
from ...training.best import Best
from ..model.new_tokens import FOLDER as EMBEDDINGS
from .reading_back import ROUNDING
from .reports import FINISHED

COLUMNS = 9  # largest number of steps that the comparison figure shows


def write_figures(
    adapter: MethodOptions,
    validation: ValidationOptions,
    output_options: OutputOptions,
    held_out: int,
    training_images: Callable[[int], list[Image.Image]] = lambda _: [],
) -> None:
    """Write `comparison.png` and `loss.png`; for a single method, copy its LoRA file to the output directory.

    diffusers' training script writes its LoRA file there, too. With several methods, an earlier copy is removed with a
    message, because the copied method may have been trained further. `loss.png` is written last, because it marks the
    run as finished. `training_images(count)` returns up to `count` of the training images.
    """
    output, measured = Path(output_options.output_dir), min(held_out, validation.max_validation_images)
    if validation.validation_prompt and validation.num_validation_images:
        write_comparison(adapter, validation, output_options, output / "comparison.png", training_images(COLUMNS + 3))
    if len(adapter.method) == 1 and (output / adapter.method[0] / DIFFUSERS_FILE).is_file():
        with replacing(output / DIFFUSERS_FILE) as temporary:
            shutil.copyfile(output / adapter.method[0] / DIFFUSERS_FILE, temporary)
    elif (output / DIFFUSERS_FILE).exists():
        (output / DIFFUSERS_FILE).unlink()
        print(f"removed {output / DIFFUSERS_FILE} of an earlier run; this run's files are in the methods' folders")
    logs = {METHODS[method].title: read_log(output / method / "log.jsonl") for method in adapter.method}
    loss_curves(output / FINISHED, logs, measured)


def write_comparison(
    adapter: MethodOptions,
    validation: ValidationOptions,
    output_options: OutputOptions,
    path: Path,
    training_images: Sequence[Image.Image] = (),
) -> None:
    """Write the comparison figure, like the paper's Figure 3.

    The columns of the figure are steps, its rows are prompts and methods; training images are on top. Without samples
    of these prompts, no figure is written, so that an existing figure of other prompts remains.
    """
    output, prompts = Path(output_options.output_dir), list(enumerate(validation.validation_prompt))
    folders = [found for samples in output.glob("*/samples") for found in by_step(samples).items()]
    found = sorted({step for step, folder in folders if any(shows(folder, *prompt) for prompt in prompts)})
    chosen = sorted({found[round(i * (len(found) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)}) if found else []
    places = [f"samples/step-{step:06d}" for step in chosen] + ["merged"]
    rows = []
    for number, prompt in prompts:
        drawn = [
            (METHODS[name].title, [_image(output / name / place, number, prompt) for place in places])
            for name in adapter.method
        ]
        rows.append((f"prompt: {prompt}", drawn))
    columns = [f"step {step}" if step else "before\ntraining" for step in chosen] + ["merged into\nthe model"]
    if any(image for _, methods in rows for _, images in methods for image in images):
        comparison(path, columns, rows, above=("some of the training images", training_images))


def _image(samples: Path, number: int, prompt: str) -> Path | None:
    """Return the path of a prompt's first sample; None if the image cannot be read or shows another
    prompt.
    """
    path = samples / f"{number}-0.png"
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return path if shows(samples, number, prompt) else None


def print_summary(adapter: MethodOptions, output_options: OutputOptions) -> None:
    """Print the written files and the code that loads them."""
    output = Path(output_options.output_dir)
    lines = ["", f"{output}/"]
    if (output / "comparison.png").is_file():
        lines.append("  comparison.png   training images, and samples by step (columns), prompt and method (rows)")
    lines += ["  loss.png         training and validation loss", "  config.json      every setting of this run"]
    uses = {
        DIFFUSERS_FILE: "diffusers: pipeline.load_lora_weights(folder)",
        KOHYA_FILE: "ComfyUI, A1111/Forge, kohya",
        COMFYUI_FILE: "ComfyUI",
        LYCORIS_FILE: "ComfyUI, Forge, kohya with LyCORIS",
        EMBEDDINGS: "new tokens: load_textual_inversion; ComfyUI, A1111, kohya",
        "peft": "PeftModel.from_pretrained(denoiser, folder)",
        "unet": "merged weights: UNet2DConditionModel.from_pretrained(folder)",
        "text_encoder": "merged weights: the text encoder's from_pretrained(folder)",
        "text_encoder_2": "merged weights: the text encoder's from_pretrained(folder)",
        "transformer": "merged weights: the transformer's from_pretrained(folder)",
    }
    for method in adapter.method:
        record = read_object(output / method / "exports.json")
        best = record.get("best")
        of = f"{Best(output, **best)}, which has the lowest validation loss, {best['loss']:.5f}" if best else ""
        lines.append(f"  {method + '/':<36}{of}".rstrip())
        if conversion := read_object(output / method / CONVERSION):
            lines.append(f"    {conversion_in_words(conversion)}")
        for name, difference in record["read_back"].items():
            found = f"differs by {difference:.0e}" if difference else "equal"
            lines.append(f"    {name:<34}{uses.get(name, ''):<62}read back: {found}")
    lines.append("Each was read back by diffusers, PEFT or safetensors and compared with the merged model's tensors;")
    lines.append(f"a relative difference below {ROUNDING:.0e} is the rounding of float32.")
    lines.append("Look at the run: python -m app")
    print("\n".join(lines))
