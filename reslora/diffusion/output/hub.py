"""What a finished run uploads to the hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

import huggingface_hub
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import CommitOperationAdd

from ...common.errors import InvalidArgument, RunFailed, first_line
from ...export import COMFYUI_FILE, DIFFUSERS_FILE, KOHYA_FILE
from ...files import read_object
from ..arguments import Flags, listed
from ..training.checkpoints import EXPORTS
from .summary import write_comparison

# Nothing else is: there may be settings, latents of the training images, their names, notes, the images themselves.
UPLOADED_OF_METHOD = (
    *(DIFFUSERS_FILE, KOHYA_FILE, COMFYUI_FILE, "peft/**/*"),
    *("chains.json", "merge.json", "log.jsonl", "samples/step-*/*", "merged/*"),
)


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
    files = files_of(flags)
    if "comparison.png" in files:
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
        files["README.md"] = output / "README.md"
        added = [CommitOperationAdd(place, content) for place, content in files.items()]
        huggingface_hub.create_commit(name, added, commit_message="End of training", token=flags.hub_token)
    except Exception as error:
        problem = f"{name} could not be uploaded ({first_line(error)})"
        raise RunFailed(f"{problem}; the run is complete, the same command tries again") from None
    print(f"uploaded to {name}")


def files_of(flags: Flags) -> dict[str, Path | bytes]:
    """What is uploaded beside the card, by its place in the repository: a single method's weights at its root, too."""
    output, files = Path(flags.output_dir), dict[str, Path | bytes]()
    for pattern in ("loss.png", *(f"{method}/{file}" for method in flags.method for file in UPLOADED_OF_METHOD)):
        for path in output.glob(pattern):
            place = path.relative_to(output).as_posix()
            if path.is_file() and "/." not in place:
                files[place] = path
    weights = f"{flags.method[0]}/{DIFFUSERS_FILE}"
    if len(flags.method) == 1 and weights in files:
        files[DIFFUSERS_FILE] = files[weights]
    if picture := comparison_of(flags):
        files["comparison.png"] = picture
    return files


def comparison_of(flags: Flags) -> bytes:
    """The comparison of what the run has drawn, if anything, whatever prompts are given now.

    It is not the run's file, which may show images that were trained on: nobody asked that those be uploaded.
    """
    shown = read_object(Path(flags.output_dir) / flags.method[-1] / EXPORTS).get("shown", {})
    prompts = shown.get("validation_prompt", flags.validation_prompt)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "comparison.png"
        write_comparison(flags.replace(validation_prompt=prompts), path)
        return path.read_bytes() if path.is_file() else b""
