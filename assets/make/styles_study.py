"""Does a denoiser that has seen several styles of the same subjects keep the subject when it learns another style?

    for sets in "noto" "noto blob firefox emojione"; do
        python assets/make/train_flow.py --vae assets/pipeline/vae --subjects 40 --sets $sets --dim 128 --layers 6 \\
            --steps 2500 --batch 48 --cooldown 1000 --warm_up_steps 500 --variants 8 --ema 0.99 --no_compile \\
            --output "assets/build/study/${sets// /-}"
    done
    python assets/make/styles_study.py --bases assets/build/study/noto assets/build/study/noto-blob-firefox-emojione

Each base learns OpenMoji from every other one of its subjects by LoRA, with captions that name no style, from three
seeds, with the project's trainer. A classifier of subjects and of OpenMoji, trained on the real images of all eight
sets, then judges drawings of the other subjects, before and after. All takes half an hour of one core; with 350 steps
a base draws coloured blobs, of which nothing can be told.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from augment import load_pictures
from diffusers import DiffusionPipeline
from evaluate import as_tensor, contact_sheet, draw
from study import train_judge, verdict, write_images
from training import load_sets


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bases", nargs="+", required=True, help="output folders of train_flow.py, all of one --subjects"
    )
    parser.add_argument("--data", default="assets/build")
    parser.add_argument("--subjects", type=int, default=40)
    parser.add_argument("--steps", type=int, default=80, help="of the fine-tuning")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2, help="drawings of each subject")
    parser.add_argument("--output", default="assets/build/study", help="folder of the fine-tunings, sheets, study.json")
    return parser.parse_args()


def fine_tune(base: str, images: Path, seed: int, args: argparse.Namespace) -> Path:
    """The folder of a LoRA, trained unless an earlier call has."""
    folder = Path(args.output) / f"{Path(base).name}-lr{args.lr}-seed{seed}"
    if not (folder / "pytorch_lora_weights.safetensors").is_file():
        flags = {
            "pretrained_model_name_or_path": f"{base}/pipeline", "train_data_dir": images, "resolution": 64,
            "method": "lora", "max_train_steps": args.steps, "learning_rate": args.lr, "train_batch_size": 16,
            "rank": 16, "mixed_precision": "bf16", "seed": seed, "output_dir": folder, "num_validation_images": 0,
        }  # fmt: skip
        command = [f"--{name}={value}" for name, value in flags.items()]
        subprocess.run([sys.executable, "train_sd.py", *command], check=True)
    return folder


def main() -> None:
    args = parse_args()
    learnt = argparse.Namespace(data=args.data, sets=["noto"], subjects=args.subjects, captions_of=None)
    captions = list(dict.fromkeys(row["text"] for row in load_sets(learnt)[1]))[: args.subjects]
    seen, others = captions[0::2], captions[1::2]
    images = write_images(seen, args.data, args.output)
    judge = train_judge(captions, args.data)
    real, rows = load_pictures(f"{args.data}/openmoji")
    chosen = [i for i, row in enumerate(rows) if row["text"] in others]
    numbers = torch.tensor([captions.index(rows[i]["text"]) for i in chosen])
    result = {"real openmoji": verdict(judge, real[chosen], numbers), "settings": vars(args), "bases": {}}
    prompts = others * args.images
    numbers = torch.tensor([captions.index(prompt) for prompt in prompts])
    for base in args.bases:
        loras = [fine_tune(base, images, seed, args) for seed in range(args.seeds)]
        pipeline = DiffusionPipeline.from_pretrained(f"{base}/pipeline", torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        verdicts = {}
        for name, lora in {"before": None, **{f"seed {seed}": lora for seed, lora in enumerate(loras)}}.items():
            if lora:
                pipeline.load_lora_weights(lora)
            drawn = draw(pipeline, prompts, seed=100, steps=15, guidance=3.0)
            if lora:
                pipeline.unload_lora_weights()
            contact_sheet(drawn, columns=len(others)).save(Path(args.output) / f"{Path(base).name}-{name}.png")
            verdicts[name] = verdict(judge, as_tensor(drawn), numbers)
            print(Path(base).name, name, verdicts[name], flush=True)
        result["bases"][Path(base).name] = verdicts
    (Path(args.output) / "study.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
