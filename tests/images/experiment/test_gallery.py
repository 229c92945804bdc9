"""The gallery of an experiment's report, whose prompts may differ after a resume."""

from pathlib import Path

from PIL import Image

from reslora.images.experiment.gallery import gallery
from reslora.images.output.reports import save_images


def draw(folder: Path, steps: dict[int, list[str]]) -> None:
    for step, prompts in steps.items():
        save_images(folder / "samples" / f"step-{step:06d}", [Image.new("RGB", (8, 8))] * len(prompts), prompts)


def experiment(prompts: list[str], *folders: str) -> dict:
    """LoRA at one rate, chosen at step 4, with a folder for each seed."""
    arms = [
        {"label": "lora", "status": "finished", "learning_rate": 1e-4, "seed": seed, "folder": name}
        for seed, name in enumerate(folders)
    ]
    chosen = {"lora": {"learning_rate": 1e-4, "step": 4, "loss": 0.1}}
    return {"settings": {"validation_prompt": prompts}, "arms": arms, "chosen": chosen}


def test_no_image_is_shown_under_a_prompt_that_it_was_not_drawn_of(tmp_path):
    """Samples of the current prompts are shown if any arm has them, of the first seed if possible."""
    draw(tmp_path / "one", {0: ["a cat", "a dog"], 4: ["a cat", "a dog"]})
    draw(tmp_path / "two", {0: ["a cat", "a fox"], 2: ["a cat", "a fox"], 4: ["a bird", "a bird"]})
    both = gallery(experiment(["a cat", "a fox"], "one", "two"), tmp_path)
    assert "seed 0, step 4" in both and both.count("<img src=") == 2 and both.count("no image") == 2
    other = gallery(experiment(["a fish", "a fox"], "one", "two"), tmp_path)
    assert "seed 1, step 2" in other and 'alt="a fox: LoRA"' in other and 'alt="a fox: before training"' in other
    assert other.count("<img src=") == 2 and other.count("no image") == 2
    assert gallery(experiment(["a fish"], "one", "two"), tmp_path) == ""


def test_the_first_column_is_named_by_what_training_starts_from(tmp_path):
    draw(tmp_path / "one", {0: ["a cat"], 4: ["a cat"]})
    found = experiment(["a cat"], "one")
    assert "before training<br>base model" in gallery(found, tmp_path)
    found["settings"]["init_lora"] = "start.safetensors"
    shown = gallery(found, tmp_path)
    assert "before training<br>initial LoRA" in shown and "base model" not in shown
