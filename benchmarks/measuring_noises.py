"""How many noises per image and timestep an experiment needs.

    python benchmarks/measuring_noises.py EXPERIMENT

The kept adapters of a finished experiment (images; two methods, several learning rates and seeds) are measured with
NOISES noises at each timestep: all of them on the selection split, and those at the chosen learning rate on the test
split. Then everything is repeated with random subsets of the noises, the same subset for all arms, as in an experiment:
which learning rate and step each seed would choose, and how wide the interval of the difference is. The losses are kept
beside the experiment, so that an interrupted start goes on; the result is
`benchmarks/results/experiment/noises.json`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from measured import keep

from reslora.experiment.arms import Arm
from reslora.experiment.statistics import Judged, half_width, judge
from reslora.images.data.samples import TIMESTEPS, FixedSamples
from reslora.images.experiment.arm_study import exact_loss
from reslora.images.experiment.run import ImageExperiment, open_study
from reslora.images.experiment.split import Image
from reslora.images.settings import parse_args
from reslora.io import read_object
from reslora.runtime.signals import StopRequest
from reslora.tracing import evaluating

NOISES, SUBSETS, COUNTS = 8, 200, (1, 2, 4)


@torch.no_grad()
def losses(experiment: ImageExperiment, arm: Arm, step: int, images: Sequence[Image]) -> np.ndarray:
    """Return the losses of an arm's checkpoint, of shape (images, timesteps, noises)."""
    study = experiment.study_of(arm)
    samples = FixedSamples(study.training_data, NOISES)
    with study.merged(step) as (parts, _, loss), evaluating(*parts.values()):
        denoiser = next(iter(parts.values()))
        found = [
            torch.cat([exact_loss(loss, denoiser, batch) for batch in samples.batches([image], TIMESTEPS * NOISES)])
            for image in images
        ]
    return torch.stack(found).view(len(images), TIMESTEPS, NOISES).double().numpy()


def kept(file: Path, experiment: ImageExperiment, arm: Arm, step: int, images: Sequence[Image]) -> np.ndarray:
    """Return the losses in a file, which is written if it does not exist."""
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        np.save(file, losses(experiment, arm, step, images))
        print(file.stem, flush=True)
    return np.load(file)


def measured(folder: Path) -> tuple[dict[tuple, np.ndarray], dict[str, np.ndarray]]:
    """Return the losses on the selection split by (label, seed, learning rate, step), and those on the test split.

    The latter are of shape (seeds, images, timesteps, noises), by label.
    """
    grid = parse_args(["--config", str(folder / "config.json"), "--output_dir", str(folder)], __doc__)
    select, test, chosen = {}, {}, read_object(folder / "experiment.json")["chosen"]
    with open_study(grid, StopRequest()) as experiment:
        for arm in experiment.schedule.arms():
            for step in experiment.schedule.select_losses(arm):
                file = folder / "noises" / f"select {arm.label} {arm.rate:g} {arm.seed} {step}.npy"
                select[arm.label, arm.seed, arm.rate, step] = kept(file, experiment, arm, step, experiment.parts.select)
            if arm.rate == chosen[arm.label]["learning_rate"]:
                file = folder / "noises" / f"test {arm.label} {arm.seed}.npy"
                found = kept(file, experiment, arm, chosen[arm.label]["step"], experiment.parts.test)
                test.setdefault(arm.label, []).append(found)
    return select, {label: np.stack(found) for label, found in test.items()}


def interval(test: dict[str, np.ndarray], subset: Sequence[int]) -> tuple[float, float]:
    """Return the difference of the first two labels and half the width of its interval, in percent of the loss."""
    arrays = {label: found[..., subset].mean((2, 3)) for label, found in test.items()}
    one, other = list(arrays)[:2]
    (judged,) = judge(arrays, [(other, one)])
    assert isinstance(judged, Judged)
    percent = 100 / judged.pair.base
    return percent * judged.pair.mean, percent * float(half_width(judged.spread, judged.reading_level))


def choices(select: dict[tuple, np.ndarray], subset: Sequence[int]) -> list[tuple]:
    """Return the learning rate and step that each label and seed chooses, and by how much it is worse in truth.

    The truth is the loss with all noises; worse is in percent.
    """
    found = []
    for label, seed in dict.fromkeys(key[:2] for key in select):
        own = {key[2:]: value for key, value in select.items() if key[:2] == (label, seed)}
        chosen = min(own, key=lambda key: own[key][..., subset].mean())
        truth = {key: value.mean() for key, value in own.items()}
        found.append((chosen, 100 * (truth[chosen] / min(truth.values()) - 1)))
    return found


def main() -> None:
    """Measure, repeat with subsets of the noises, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="folder of the experiment")
    select, test = measured(parser.parse_args().experiment)
    random, rows = np.random.default_rng(0), []
    difference, width = interval(test, range(NOISES))
    for count in COUNTS:
        subsets = [random.choice(NOISES, count, replace=False) for _ in range(SUBSETS)]
        worse = np.array([loss for subset in subsets for _, loss in choices(select, subset)])
        found = np.array([interval(test, subset) for subset in subsets])
        rows.append({
            "noises": count,
            "other_choice": float((worse > 0).mean()),
            "worse_percent_95": float(np.quantile(worse, 0.95)),
            "worse_percent_most": float(worse.max()),
            "interval_ratio": float((found[:, 1] / width).mean()),
            "difference_off_percent_95": float(np.quantile(abs(found[:, 0] - difference), 0.95)),
        })  # fmt: skip
        print(rows[-1], flush=True)
    keep("experiment/noises", {"noises_measured": NOISES, "half_width_percent": width, "rows": rows})


if __name__ == "__main__":
    main()
