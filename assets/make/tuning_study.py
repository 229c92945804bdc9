"""Which fine-tuning teaches the style and keeps the subjects? The table that the trainer's defaults are chosen by.

    python assets/make/tuning_study.py --pipeline assets/pipeline --settings "200 3e-4 constant" "200 1e-3 cosine"

Each setting (steps, learning rate, schedule) is trained as `train_sd.py` does by default, LoRA and ResLoRA, on four
fifths of `assets/openmoji`. A judge trained on real images then tells the subject and the style of drawings of the
other fifth, which the pipeline knows in its own styles. The sixteen validation prompts, which readers name, play no
part. A setting that has been measured is not trained again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from augment import load_pictures
from captions import VALIDATION_PROMPTS
from diffusers import DiffusionPipeline
from evaluate import as_tensor, contact_sheet, draw
from study import train_judge, verdict, write_images

METHODS = ("lora", "reslora")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="assets/pipeline")
    parser.add_argument(
        "--settings", nargs="+", required=True, metavar="SETTING", help='"steps rate schedule", and more flags if any'
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=2, help="drawings of each caption")
    parser.add_argument("--inference_steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--data", default="assets/build")
    parser.add_argument("--output", default="assets/build/tuning", help="folder of runs, sheets and NAME.json")
    return parser.parse_args()


def split() -> tuple[list[str], list[str]]:
    """The fine-tuning set's captions: those to learn from, and every fifth."""
    captions = sorted({row["text"] for row in load_pictures("assets/openmoji")[1]})
    chosen = captions[2::5]
    return [caption for caption in captions if caption not in chosen], chosen


def fine_tune(setting: str, images: Path, args: argparse.Namespace) -> Path:
    steps, rate, schedule, *more = setting.split()
    folder = Path(args.output) / Path(args.pipeline).name / f"{'-'.join(setting.split())}-seed{args.seed}"
    flags = {
        "pretrained_model_name_or_path": args.pipeline, "train_data_dir": images, "max_train_steps": steps,
        "learning_rate": rate, "lr_scheduler": schedule, "seed": args.seed, "output_dir": folder,
        "num_validation_images": 0, "report_to": "none",
    }  # fmt: skip
    command = [f"--{name}={value}" for name, value in flags.items()]
    subprocess.run([sys.executable, "train_sd.py", *command, *more, "--method", *METHODS], check=True)
    return folder


def main() -> None:
    args = parse_args()
    seen, chosen = split()
    images = write_images(seen, args.data, args.output)
    captions = [*seen, *chosen, *VALIDATION_PROMPTS]
    judge = train_judge(captions, args.data, steps=1500)
    pipeline = DiffusionPipeline.from_pretrained(args.pipeline, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = chosen * args.images
    numbers = torch.tensor([captions.index(prompt) for prompt in prompts])

    def judged(name: str, weights: Path | None) -> dict[str, float]:
        if weights:
            pipeline.load_lora_weights(weights)
        drawn = draw(pipeline, prompts, seed=100, steps=args.inference_steps, guidance=args.guidance)
        if weights:
            pipeline.unload_lora_weights()
        contact_sheet(drawn, columns=13).save(Path(args.output) / f"{Path(args.pipeline).name}-{name}.png")
        return verdict(judge, as_tensor(drawn), numbers)

    path = Path(args.output) / f"{Path(args.pipeline).name}-seed{args.seed}.json"
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"before": judged("before", None)}
    print("before", table["before"], flush=True)
    for setting in args.settings:
        if setting not in table:
            folder = fine_tune(setting, images, args)
            name = "-".join(setting.split())
            table[setting] = {method: judged(f"{name}-{method}", folder / method) for method in METHODS}
            path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        print(setting, table[setting], flush=True)


if __name__ == "__main__":
    main()
