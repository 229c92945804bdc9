"""Measure how much of the bundled model a LoRA leaves as it was, with and without --output_preservation_weight.

    python benchmarks/output_preservation.py --steps 50 --weight 1

Both runs learn "sks face" from the bundled images of faces; the second one preserves the predictions for "face". The
merged model and the base then generate the same images, from the same seeds: of the class, and of the unrelated prompts
from which an experiment's report computes "Base kept". Their similarity here is the cosine of their pixels, each image
less its mean, since DINOv2 does not come with the project.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from measured import ROOT, keep

sys.path.insert(0, str(ROOT))
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch.nn.functional import cosine_similarity

import train_sd
from reslora.bundled import ASSETS
from reslora.images.prompts import UNRELATED
from reslora.runtime.log import of_split, read_log

CLASS, LEARNT, IMAGES = "face", "sks face", 4


def faces(folder: Path) -> Path:
    """Copy the bundled images of faces into a folder, all with one caption."""
    rows = map(json.loads, (ASSETS / "openmoji" / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    folder.mkdir()
    for name in (row["file_name"] for row in rows if CLASS in row["text"].split()):
        shutil.copy(ASSETS / "openmoji" / name, folder)
        (folder / name).with_suffix(".txt").write_text(LEARNT, encoding="utf-8")
    return folder


def trained(output: Path, images: Path, steps: int, more: Sequence[str]) -> dict:
    """Train a LoRA; return its validation losses before and after, and the seconds of the fastest step."""
    words = ["--train_data_dir", str(images), "--output_dir", str(output), "--max_train_steps", str(steps)]
    words += ["--method", "lora", "--learning_rate", "1e-3", "--train_batch_size", "4", "--validation_split", "0.25"]
    words += ["--validation_steps", str(steps), "--num_validation_images", "0", "--num_inference_steps", "10"]
    assert train_sd.main([*words, "--report_to", "none", *more]) == 0
    rows = read_log(output / "lora" / "log.jsonl")
    before, *_, after = (row["loss"] for row in of_split(rows, "validation"))
    seconds = [row["seconds"] for row in of_split(rows, "train")]
    fastest = min(later - earlier for earlier, later in itertools.pairwise(seconds))  # least disturbed by others
    return {"validation_before": before, "validation": after, "fastest_step": round(fastest, 3)}


def drawn(pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> torch.Tensor:
    """Return images x pixels, each less its mean: IMAGES of each prompt."""
    found = []
    for prompt in prompts:
        seeds = [torch.Generator().manual_seed(seed) for seed in range(IMAGES)]
        images = pipeline([prompt] * IMAGES, generator=seeds, num_inference_steps=10, output_type="pt").images
        found.append(images.flatten(1).float())
    pixels = torch.cat(found)
    return pixels - pixels.mean(1, keepdim=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Train without and with output preservation, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--weight", type=float, default=1.0)
    given = parser.parse_args(argv)
    preserving = ["--output_preservation_weight", str(given.weight), "--output_preservation_prompt", CLASS]
    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "pipeline", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    groups = {"class": [CLASS], "unrelated": list(UNRELATED)}
    base = {name: drawn(pipeline, prompts) for name, prompts in groups.items()}
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        images, started = faces(Path(folder) / "images"), time.monotonic()
        for name, more in (("without", []), ("with", preserving)):
            output = Path(folder) / name
            rows[name] = trained(output, images, given.steps, more)
            pipeline.unet = UNet2DConditionModel.from_pretrained(output / "lora" / "unet")
            for group, prompts in groups.items():
                rows[name][group] = float(cosine_similarity(drawn(pipeline, prompts), base[group]).mean())
            print(name, rows[name], flush=True)
        seconds = time.monotonic() - started
    keep("losses/output_preservation", vars(given) | {"seconds": seconds, "runs": rows})


if __name__ == "__main__":
    main()
