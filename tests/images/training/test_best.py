"""The best adapter so far: which one is saved, what a resumed run has of it, and early stopping."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reslora.io import check_checksums
from reslora.training import best
from reslora.training.best import all_best, best_of, forget_beaten, go_on_from, is_over, keep_if_best


@pytest.fixture(autouse=True)
def adapters(monkeypatch):
    """An adapter that is one number in a file."""

    def save(part: torch.Tensor, folder: Path) -> None:
        (folder / "adapter").write_text(str(float(part)))

    monkeypatch.setattr(best, "save_adapter", save)


def validate(folder: Path, step: int, loss: float) -> None:
    """Validate at a step, at which the adapter is ten times the step."""
    part = torch.tensor(10.0 * step)
    learner = SimpleNamespace(step=step, trained=SimpleNamespace(places=lambda path: [(path, part)], embeddings={}))
    keep_if_best(learner, folder, loss)
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": step, "split": "validation", "loss": loss}) + "\n")


def steps(folder: Path) -> list[int]:
    assert sorted(path.name for path in (folder / "best").iterdir()) == sorted(
        f"step-{found.step:06d}" for found in all_best(folder)
    )
    return [found.step for found in all_best(folder)]


def test_what_is_lower_is_kept_with_its_loss(tmp_path):
    assert best_of(tmp_path) is None
    for step, loss in ((1, 0.5), (2, 0.6), (3, 0.4), (4, 0.4), (5, float("nan"))):
        validate(tmp_path, step, loss)
    assert steps(tmp_path) == [3, 1] and best_of(tmp_path).loss == 0.4
    assert (best_of(tmp_path).path / "adapter").read_text() == "30.0"
    check_checksums(best_of(tmp_path).path)
    forget_beaten(tmp_path)
    assert steps(tmp_path) == [3]


def test_a_resumed_run_has_the_best_up_to_its_checkpoint(tmp_path, capsys):
    """Saved after steps 2 and 4, killed after 5: it resumes from 4 or, if that checkpoint is damaged, from 2."""
    validate(tmp_path, 1, 0.5)
    validate(tmp_path, 2, 0.4)
    forget_beaten(tmp_path)
    validate(tmp_path, 3, 0.3)
    validate(tmp_path, 5, 0.2)
    go_on_from(tmp_path, 4)
    assert steps(tmp_path) == [3, 2] and not capsys.readouterr().out
    validate(tmp_path, 5, 0.2)
    assert steps(tmp_path) == [5, 3, 2]
    go_on_from(tmp_path, 2)
    assert steps(tmp_path) == [2] and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("losses", "over"),
    [([3.0, 4.0, 5.0], True), ([3.0, 4.0, 2.9], False), ([5.0, 4.0, 3.0, 3.5, 3.4], True), ([3.0, 2.0, 2.5], False)],
)  # fmt: skip
def test_patience_of_two(losses, over):
    assert is_over(losses, 2) is over and is_over(losses, None) is False
