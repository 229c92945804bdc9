"""The number of training steps and of warmup steps of a run."""

from types import SimpleNamespace

import pytest

from images.runs import FAMILY, read_by
from reslora.images.context import ImageContext
from reslora.images.data.samples import TrainingData
from reslora.images.data.size import Size
from reslora.images.data.sources import Source
from reslora.images.schedule import schedule_of
from reslora.options.images import Options
from reslora.training.schedule import Schedule


def scheduled(processes: int = 1, images: int = 10, **flags) -> Schedule:
    """Return the schedule of a run with this many images, batches of 2, and two batches per step."""
    defaults = {
        "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": None, "num_train_epochs": 4,
        "validation_steps": None, "validation_epochs": 1, "lr_warmup_steps": None, "method": ["lora"],
    }  # fmt: skip
    made = Options.of(**defaults | flags, seed=0)
    source = Source(None, None, tuple(range(images)), (), (Size(8, 8),) * images)
    training_data = TrainingData((source,), None, None, {}, FAMILY, **read_by(made))
    return schedule_of(training_data.updates(processes), ImageContext(made, None, SimpleNamespace(print=print), None))


def test_an_epoch_is_as_many_steps_as_its_images_need():
    """10 images are 5 batches and 3 steps; with two processes, each has 3 batches in 2 steps."""
    assert (scheduled().steps, scheduled().validation_steps, scheduled().by_epochs) == (12, 3, True)
    assert (scheduled(processes=2).steps, scheduled(processes=2).validation_steps) == (8, 2)
    assert scheduled(images=1).steps == 4
    assert (scheduled(max_train_steps=7).steps, scheduled(max_train_steps=7).by_epochs) == (7, False)
    assert scheduled(validation_steps=5).validation_steps == 5
    assert scheduled(validation_epochs=3).validation_steps == 9


@pytest.mark.parametrize(
    ("steps", "given", "warmup"),
    [(39, None, 3), (5_000, None, 500), (20_000, None, 500), (20_000, 900, 900), (9, 0, 0)],
)
def test_warm_up_is_a_tenth_and_at_most_500_steps_unless_it_is_given(steps, given, warmup):
    assert scheduled(max_train_steps=steps, lr_warmup_steps=given).warmup_steps == warmup


@pytest.mark.parametrize(
    ("steps", "scheduler", "warned"),
    [(900, "cosine", True), (8, "linear", True), (901, "cosine", False), (8, "constant", False)],
)
def test_a_warm_up_to_the_end_is_warned_of(capsys, steps, scheduler, warned):
    scheduled(max_train_steps=steps, lr_warmup_steps=900, lr_scheduler=scheduler)
    line = f"warning: --lr_warmup_steps 900: the run has {steps} steps, and the learning rate only rises\n"
    assert capsys.readouterr().out == (line if warned else "")
