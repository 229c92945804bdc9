"""Upload a finished run to the Hub."""

import dataclasses
import tempfile
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd

from ...errors import InvalidArgument, RunFailed, first_line
from ...export import COMFYUI_FILE, DIFFUSERS_FILE, KOHYA_FILE, LYCORIS_FILE
from ...io import read_object
from ...options.images import MethodOptions, OutputOptions, ValidationOptions
from ...runtime.checkpoint_folders import EXPORTS
from ..context import ImageContext
from ..refusals import repository_of
from .card import card_of
from .summary import write_comparison

# Besides these files, only the figures and the model card are uploaded: the folder may contain settings, latents, names
# of training images, notes, or the images themselves.
UPLOADED_OF_METHOD = (
    *(DIFFUSERS_FILE, KOHYA_FILE, COMFYUI_FILE, LYCORIS_FILE, "peft/**/*"),
    *("chains.json", "merge.json", "log.jsonl", "samples/step-*/*", "merged/*"),
)


def hub_repository(options: OutputOptions) -> str:
    """Return the name of the repository to upload to; create the repository if it does not exist.

    Raises `InvalidArgument` if the repository cannot be created.
    """
    name = repository_of(options)
    try:
        return huggingface_hub.create_repo(name, exist_ok=True, token=options.hub_token).repo_id
    except Exception as error:  # requests' or httpx's, depending on the version of huggingface_hub
        problem = f"cannot make or reach the repository {name} ({first_line(error)})"
        raise InvalidArgument("--push_to_hub", problem, "log in with `hf auth login`, or leave it out") from None


def own_card(folder: Path) -> Path | None:
    """Return the README.md that a user has put into the run's folder, if any."""
    path = folder / "README.md"
    return path if path.is_file() else None


def check_upload(options: OutputOptions) -> None:
    """Create the repository if necessary, and print whether the user's own model card will be uploaded.

    Raises `InvalidArgument` if the repository cannot be created.
    """
    hub_repository(options)
    if (own := own_card(Path(options.output_dir))) is not None:
        print(f"--push_to_hub: {own} will be uploaded unchanged; remove it to upload a generated card", flush=True)


def publish(context: ImageContext) -> None:
    """Upload a model card and the methods' output: LoRA files, samples, losses and figures."""
    options = context.options
    name, files, own = (
        hub_repository(options.output),
        files_of(options.adapter, options.validation, options.output),
        own_card(context.folder),
    )
    try:
        if own is not None:
            print(f"{own} is uploaded unchanged; remove the file to upload a generated model card")
            files["README.md"] = own
        else:
            files["README.md"] = card_of(name, "comparison.png" in files, context).encode()
        added = [CommitOperationAdd(place, content) for place, content in files.items()]
        huggingface_hub.create_commit(name, added, commit_message="End of training", token=options.output.hub_token)
    except Exception as error:
        problem = f"{name} could not be uploaded ({first_line(error)})"
        raise RunFailed(f"{problem}; the run is complete; run the same command again to retry the upload") from None
    print(f"uploaded to {name}")


def files_of(
    adapter: MethodOptions, validation: ValidationOptions, output_options: OutputOptions
) -> dict[str, Path | bytes]:
    """Return the files to upload, except the model card, by their path in the repository.

    If the run has only one method, its LoRA file is at the root of the repository as well.
    """
    output, files = Path(output_options.output_dir), dict[str, Path | bytes]()
    for pattern in (
        "loss.png",
        *(f"{method}/{file}" for method in adapter.method for file in UPLOADED_OF_METHOD),
    ):
        for path in output.glob(pattern):
            place = path.relative_to(output).as_posix()
            if path.is_file() and "/." not in place:
                files[place] = path
    weights = f"{adapter.method[0]}/{DIFFUSERS_FILE}"
    if len(adapter.method) == 1 and weights in files:
        files[DIFFUSERS_FILE] = files[weights]
    if picture := comparison_of(adapter, validation, output_options):
        files["comparison.png"] = picture
    return files


def comparison_of(adapter: MethodOptions, validation: ValidationOptions, output: OutputOptions) -> bytes:
    """Return the comparison figure of the run's samples as PNG; empty if there are no samples.

    The figure shows the prompts of the finished run, even if the options have other prompts now. The run's own
    `comparison.png` is not uploaded, because it may show training images.
    """
    shown = read_object(Path(output.output_dir) / adapter.method[-1] / EXPORTS).get("shown", {})
    prompts = shown.get("validation_prompt", validation.validation_prompt)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "comparison.png"
        write_comparison(adapter, dataclasses.replace(validation, validation_prompt=prompts), output, path)
        return path.read_bytes() if path.is_file() else b""
