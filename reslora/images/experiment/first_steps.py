"""Time the first steps of an experiment for --plan: with a few images, in a folder that is removed afterwards."""

import contextlib
import dataclasses
import io
import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Sequence

import torch

from ...experiment.power import print_power
from ...experiment.schedule import ArmSchedule
from ...experiment.study import TIMED_STEPS, print_estimate, time_steps
from ...options.grid import Grid
from ...options.images import Options
from ...runtime.processes import broadcast_from_main, is_main, wait
from ...runtime.status import Status
from ...tracing import evaluating
from ...training.checkpoints import Identity
from ...training.preparing import attention_of, prepare
from ...training.schedule import Schedule
from ..context import ImageContext
from ..data.dataset import ImageDataset
from ..data.encoding import opened
from ..data.samples import TIMESTEPS, losses_of
from ..data.training_data import load_training_data
from ..run import load_and_check
from ..study import ImageStudy
from .run import SELECT_NOISES, expected_times, there_of, with_default_evaluations
from .split import names_of


def time_first_steps(grid: Grid[Options], kinds: Sequence[ImageDataset], context: ImageContext) -> None:
    """Train the first steps of the first method, and print how long the experiment takes; leave no files.

    `kinds`: all images of the experiment, of which one batch is encoded. The context's options are those of the arm
    with the highest rank and the largest batch.
    """
    options, arms = context.options, ArmSchedule(grid)
    count = sum(len(images) for images in kinds)
    select, test = (
        math.ceil(count * (part or 0)) for part in (grid.base.experiment.select_split, grid.base.experiment.test_split)
    )
    own = {number: images for number, images in enumerate(kinds) if not images.of_class}
    flat = [(number, image) for number, images in own.items() for image in range(len(images))]
    names = set(names_of(own, flat, grid.base.experiment.test_groups))
    units = math.ceil(len(names or flat) * (grid.base.experiment.test_split or 0))
    model = options.model.pretrained_model_name_or_path
    print_power(arms, model, units, "image", bool(names))
    select = min(select, options.validation.max_validation_images)
    batch = options.training.train_batch_size * options.training.gradient_accumulation_steps
    per_step = batch * context.accelerator.num_processes
    trained = sum(len(images) * images.repeats for images in kinds) * len(options.data.resolution)
    epoch = max(1, math.ceil(trained * (1 - (select + test) / count) / per_step))
    steps = options.training.max_train_steps or options.training.num_train_epochs * epoch
    schedule = Schedule(steps, options.validation.validation_steps or epoch, 0, by_epochs=False)
    if not options.validation.validation_steps:
        before = there_of(arms.folder).get("validation_steps")
        samples = select * TIMESTEPS * SELECT_NOISES
        schedule = with_default_evaluations(schedule, options.training, arms.is_race, samples, before)
    found, masked = kinds[0], options.training.masked_loss
    usable = (number for number in range(len(found)) if not isinstance(opened(found, number, masked), str))
    images = found.select(list(itertools.islice(usable, options.training.train_batch_size)))
    folder = broadcast_from_main(tempfile.mkdtemp)
    few = options.replace(
        output_dir=folder, cache_dir=None, metric_model=None, method=options.adapter.method[:1],
        max_train_steps=2 + TIMED_STEPS,  # the number of steps whose captions are encoded
    )  # fmt: skip
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            start, step, a_sample = timed(images, schedule, dataclasses.replace(context, options=few, status=Status()))
        wait()
    finally:
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)
    if is_main():
        calibration = options.adapter.merge_calibration_samples
        measuring, test_time = expected_times(options.validation, calibration, schedule, select, test, a_sample)
        print_estimate(arms, context.accelerator.device, steps, step, start, measuring, start + test_time)


def timed(images: ImageDataset, schedule: Schedule, context: ImageContext) -> tuple[float, float, float]:
    """Train a few steps of the schedule on these images, and return three times in seconds.

    The three times are the time to load the model, the median time of a step (without the first one, which may
    compile), and the time to measure the loss of a sample.
    """
    (method,), accelerator = context.options.adapter.method, context.accelerator
    pipeline, objective = load_and_check(context)
    training_data = load_training_data([images], pipeline, objective, context)
    study = ImageStudy(schedule, Identity("", "", "", ""), context, pipeline, training_data)
    began = time.monotonic()
    learner = study.learner(method)
    prepare(learner, study)
    start = time.monotonic() - began
    with attention_of(accelerator, training_data.shapes.values()):
        step = time_steps(learner, study)
        began, measured = time.monotonic(), [(0, number) for number in range(min(4, len(images)))]
        with evaluating(learner.denoiser, *learner.trained.loss.encoders), torch.no_grad(), accelerator.autocast():
            most = 2 * context.options.training.train_batch_size
            losses_of(
                lambda batch: learner.trained.loss(learner.denoiser, batch, weighted=False),
                training_data,
                measured,
                SELECT_NOISES,
                most,
            )
        a_sample = (time.monotonic() - began) / (len(measured) * TIMESTEPS * SELECT_NOISES)
    accelerator.free_memory()
    return start, step, a_sample
