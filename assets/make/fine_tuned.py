"""Measure how sharp the samples of a run's LoRAs are, and write sheets of them: the sixteen validation prompts.

    python assets/make/fine_tuned.py runs/sd-model-finetuned-lora --data assets/build/twemoji

Adds the run to benchmarks/results/bundled/fine_tuned.json: its losses on held-out images, and the sharpness of its
samples compared with the images of the same prompts in --data, and with what the autoencoder makes of these, as in
sharpness.py. --sheets writes the samples, one sheet for each method and seed, in random order and without names, and
key.txt, which has the prompts.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from augment import load_pictures
from captions import VALIDATION_PROMPTS
from diffusers import DiffusionPipeline
from evaluate import as_tensor, contact_sheet, draw
from sharpness import compared, reconstruct

from reslora.runtime.log import of_split, read_log


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="output folder of train_sd.py")
    parser.add_argument("--data", required=True, help="imagefolder of the style, with images of the sixteen prompts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 100, 200], help="one sheet each")
    parser.add_argument("--inference_steps", type=int, default=25)
    parser.add_argument("--sheets", help="folder for the sheets and key.txt")
    parser.add_argument("--output", default="benchmarks/results/bundled/fine_tuned.json")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    config = json.loads((Path(args.run) / "config.json").read_text(encoding="utf-8"))
    pipeline = DiffusionPipeline.from_pretrained(config["pretrained_model_name_or_path"], torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pictures, rows = load_pictures(args.data)
    places = {row["text"]: i for i, row in enumerate(rows)}
    real = pictures[[places[prompt] for prompt in VALIDATION_PROMPTS]]
    made = reconstruct(pipeline.vae, real)
    names = ("learning_rate", "snr_gamma", "max_train_steps", "guidance_scale")
    result = {"set": Path(args.data).name, "seeds": args.seeds, **{name: config[name] for name in names}}
    result |= {"images": len(real) * len(args.seeds), "reconstructions over real": compared(made, real), "methods": {}}
    keys = []
    for method in config["method"]:
        pipeline.load_lora_weights(Path(args.run) / method)
        samples = []
        for seed in args.seeds:
            drawn = draw(pipeline, list(VALIDATION_PROMPTS), seed, args.inference_steps, config["guidance_scale"])
            samples.append(as_tensor(drawn))
            if args.sheets:
                order = np.random.default_rng([seed, *method.encode()]).permutation(len(drawn))
                Path(args.sheets).mkdir(parents=True, exist_ok=True)
                contact_sheet([drawn[i] for i in order], 4, 3).save(Path(args.sheets) / f"{method}-{seed}.png")
                keys.append(f"{method}-{seed}: {', '.join(VALIDATION_PROMPTS[i] for i in order)}\n")
        pipeline.unload_lora_weights()
        many, times = torch.cat(samples), len(samples)
        losses = {
            row["step"]: row["loss"] for row in of_split(read_log(Path(args.run) / method / "log.jsonl"), "validation")
        }
        result["methods"][method] = {
            "validation loss by step": losses,
            "samples over real": compared(many, real.repeat(times, 1, 1, 1)),
            "samples over reconstructions": compared(many, made.repeat(times, 1, 1, 1)),
        }
    if args.sheets:
        (Path(args.sheets) / "key.txt").write_text("".join(keys), encoding="utf-8")
    output = Path(args.output)
    results = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    results[f"{Path(config['pretrained_model_name_or_path']).name}, {result['set']}, {config['learning_rate']:g}"] = (
        result
    )
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
