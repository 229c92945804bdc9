"""What both studies share: images to learn from, and a judge of drawings that was trained on real images."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from augment import SETS, load_pixels, move
from PIL import Image
from torch import nn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

JUDGED = (*SETS, "openmoji", "twemoji", "fluent")


def write_images(captions: list[str], data: str, output: str) -> Path:
    """The imagefolder to learn from: these captions in OpenMoji's style."""
    folder, source = Path(output) / "openmoji", Path(data) / "openmoji"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in load_pixels(source)[1] if row["text"] in captions]
    for row in rows:
        Image.open(source / row["file_name"]).save(folder / row["file_name"])
    lines = [json.dumps({key: row[key] for key in ("file_name", "text")}) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def new_judge(subjects: int) -> nn.Sequential:
    """Pictures (N, 3, 64, 64) to logits of the subjects, and one, above 0 for OpenMoji."""
    layers, width = [], 3
    for wider in (24, 48, 96, 128):
        layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]
        width = wider
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(width * 16, subjects + 1))


def judged_pictures(captions: list[str], data: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Real pictures (N, 3, 128, 128; bytes) of the captions in all sets, the number of each one's caption, and whether
    it is OpenMoji's."""
    pictures, subjects, learnt = [], [], []
    for name in JUDGED:
        found, rows = load_pixels(f"{data}/{name}-128")
        chosen = [i for i, row in enumerate(rows) if row["text"] in captions]
        pictures.append(found[chosen])
        subjects += [captions.index(rows[i]["text"]) for i in chosen]
        learnt += [float(name == "openmoji")] * len(chosen)
    return torch.cat(pictures), torch.tensor(subjects), torch.tensor(learnt)


def train_judge(captions: list[str], data: str, steps: int = 500, batch: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    pictures, subjects, learnt = judged_pictures(captions, data)
    # As many of OpenMoji as of all others would be too many; a quarter.
    weights = 1 + 1.5 * learnt
    judge = new_judge(len(captions))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in tqdm(range(steps), desc="judge", mininterval=10):
        which = torch.multinomial(weights, batch, replacement=True, generator=generator)
        drawn = move(pictures[which] / 127.5 - 1, generator, mirror=False)
        # Drawings are a little blurred and off-colour next to real pictures; that must not decide.
        for part, sigma in enumerate((0.1, 0.4, 0.7, 1.0)):
            drawn[part::4] = gaussian_blur(drawn[part::4], 5, sigma)
        logits = judge(drawn + 0.1 * torch.randn(drawn.shape, generator=generator))
        loss = F.cross_entropy(logits[:, :-1], subjects[which])
        loss = loss + F.binary_cross_entropy_with_logits(logits[:, -1], learnt[which])
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return judge.eval()


@torch.no_grad()
def verdict(judge: nn.Sequential, pictures: torch.Tensor, subjects: torch.Tensor) -> dict[str, float]:
    """Shares of the pictures in which the judge sees their subject, and OpenMoji's style."""
    logits = judge(pictures)
    right = (logits[:, :-1].argmax(1) == subjects).float().mean().item()
    return {"subject": round(right, 4), "openmoji": round((logits[:, -1] > 0).float().mean().item(), 4)}
