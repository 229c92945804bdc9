"""A made-up experiment with samples, to show its report. Nothing was trained."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from reslora.experiment.choice import choose
from reslora.experiment.verdicts import compare

LABELS = {"lora": (0, 2e-4), "lora_x2": (0.1, 1e-4), "reslora block(4)": (-1.5, 1e-4), "loha": (1.6, 8e-4)}
"""What each does to the loss, in percent, and where its best rate is."""
RATES, SEEDS, STEPS = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4), (0, 1, 2), (50, 100, 150, 200)
PROMPTS = ["a red fox on a rock", "</script><script>alert('caught')</script> & a \"quoted\" house"]
TIMESTEPS = [(place + 0.5) / 8 for place in range(8)]
IMAGES = 12


def experiment(folder: Path | None) -> dict:
    """Return a finished experiment; its samples are written to `folder`, if given."""
    arms = [arm(label, rate, seed) for seed in SEEDS for rate in RATES for label in LABELS]
    arms[-1] |= {"status": "failed", "reason": "the loss is not finite at step 61", "steps": 61, "test": None}
    arms[-1]["select_by_step"] = {"50": 0.31, "55": 0.4, "60": None}
    chosen = choose(arms)
    for each in arms:
        if each["learning_rate"] != chosen[each["label"]]["learning_rate"]:
            each["test"] = None
        elif folder and each["seed"] == SEEDS[0]:
            draw(folder / each["folder"] / "samples", list(LABELS).index(each["label"]))
    images = [f"{image:08x}" for image in range(IMAGES)]
    base = {"images": images, "by_timestep": [0.4 - 0.25 * timestep**2 for timestep in TIMESTEPS]}
    base["losses"] = (0.34 * np.linspace(0.7, 1.3, IMAGES)).tolist()
    verdicts, ranking = compare(arms, chosen, base=base)[:2]
    return {
        "format": 1,
        "settings": {"method": ["lora", "<b>reslora</b>"], "learning_rate": list(RATES), "validation_prompt": PROMPTS},
        "versions": {"reslora-sd": "1.0", "torch": "2.9"},
        "split": {"train": 60, "select": 12, "test": IMAGES, "duplicates": 3},
        "timesteps": TIMESTEPS,
        "arms": arms,
        "chosen": chosen,
        "verdicts": verdicts,
        "ranking": ranking,
        "base": base,
        "base_select": 0.34,
        "best": {
            "label": "reslora block(4)", "learning_rate": 1e-4, "seed": 1, "folder": "reslora/lr-0.0001/seed-1",
            "step": 200, "files": ["kohya.safetensors", "pytorch_lora_weights.safetensors", "peft"],
            "options": {"method": "reslora", "learning_rate": 1e-4, "seed": 1},
        },
        "notes": [],
    }  # fmt: skip


def arm(label: str, rate: float, seed: int) -> dict:
    shift, best = LABELS[label]
    luck = np.random.default_rng([list(LABELS).index(label), RATES.index(rate), seed])
    off = np.log2(rate / best) ** 2
    base = 0.30 * (1 + shift / 100 + 0.01 * off) + 0.002 * np.random.default_rng(seed).standard_normal()
    steps = {str(step): float(base + 0.02 * np.exp(-step / 60) + 0.0006 * luck.standard_normal()) for step in STEPS}
    hard = np.linspace(0.7, 1.3, IMAGES)
    by_timestep = (base + 0.05 - 0.25 * np.array(TIMESTEPS) ** 2) * (1 + 0.002 * luck.standard_normal(8))
    test = {"images": [f"{image:08x}" for image in range(IMAGES)], "by_timestep": by_timestep.tolist()}
    return {
        "label": label, "method": label.split()[0], "learning_rate": rate, "seed": seed, "rank": 8,
        "shortcut": "block(4)" if "block" in label else None, "folder": f"{label.split()[0]}/lr-{rate:g}/seed-{seed}",
        "status": "finished", "reason": "", "steps": 200, "seconds": 340.0 + 40 * seed, "memory_bytes": 5 * 2**30,
        "select_by_step": steps, "test": test | {"losses": (base * hard + 0.0008 * luck.standard_normal(12)).tolist()},
    }  # fmt: skip


def draw(samples: Path, place: int) -> None:
    """Write pictures of a hill and a sun, which moves with the step; they are larger than the page shows them."""
    for step in (100, 200) if place else (0, 100, 200):
        folder = samples / f"step-{step:06d}"
        folder.mkdir(parents=True)
        for prompt in range(len(PROMPTS)):
            sky = np.linspace([90, 140, 220 - 60 * prompt], [250, 210 - 20 * place, 160], 640)[:, None].repeat(640, 1)
            image = Image.fromarray(sky.astype(np.uint8))
            pen = ImageDraw.Draw(image)
            pen.ellipse([80 + step + 60 * place, 60, 220 + step + 60 * place, 200], fill=(255, 236 - 30 * place, 140))
            pen.polygon(
                [(0, 640), (0, 470), (250, 330 - step // 2), (640, 520), (640, 640)], fill=(40, 90, 60 + 9 * place)
            )
            image.save(folder / f"{prompt}-0.png", compress_level=1)


def unfinished() -> dict:
    """Return the experiment after a few arms: nothing is compared, one arm runs, and one label has a single seed."""
    found = experiment(None)
    for number, each in enumerate(found["arms"]):
        if number > 6:
            each |= {"status": "waiting" if number > 7 else "running", "test": None, "steps": 0, "seconds": 0.0}
            each |= {"select_by_step": {}, "memory_bytes": None, "reason": ""}
        each["test"] = None
    return found | {
        "verdicts": [],
        "ranking": None,
        "base": None,
        "best": None,
        "chosen": choose(found["arms"]),
        "notes": ["--experiment_minutes 5 are over"],
    }
