"""Average the adapters of a run's checkpoints after training (--average_checkpoints); nothing is trained further.

An average is a candidate of --save_best: its validation loss is measured like that of a single step, and the average is
stored in `<method>/best`, in the format of a checkpoint. The mean is that of the trained tensors, A and B of each
block. It is not the mean of the products B A.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import first_line
from ..formatting import pluralize
from ..io import Damaged, check_checksums
from ..methods.adapters import load_adapter, trained_state
from ..options.averages import Average, averages_of
from ..options.shared import SharedOutputOptions
from ..runtime.checkpoint_folders import checkpoints_of, step_of
from ..runtime.processes import broadcast_from_main, on_all
from .best import FOLDER, Best, averages_at, best_of, keep_adapter, to_export
from .checkpoints import to_average
from .state import Learner
from .stopping import stopped_at
from .study import Study
from .trained import Trained


def offer_averages(learner: Learner, study: Study) -> None:
    """Average the retained checkpoints, measure the loss of each average, and store it next to the best adapter.

    The learner's weights are unchanged afterwards. An average that an earlier process stored is not computed again.
    Every process must call this. Raises `Stopped` if a stop is requested meanwhile.
    """
    context, folder = study.context, study.context.folder_of(learner.method)
    validation, say = context.options.validation, context.accelerator.print
    stored = broadcast_from_main(lambda: [best.average for best in averages_at(folder, learner.step)])
    missing = [one for one in averages_of(validation.average_checkpoints or "") if str(one) not in stored]
    checkpoints = broadcast_from_main(lambda: checkpoints_to_average(folder, context.options.output)) if missing else []
    if missing and len(checkpoints) < 2:
        retained = pluralize(len(checkpoints), "checkpoint")
        say(f"{learner.name}: --average_checkpoints: {retained} retained, so that there is no average")
    elif missing:
        context.status.say("averaging checkpoints", learner.name)
        before = [{name: value.clone() for name, value in state.items()} for state in states_of(learner.trained)]
        for average in missing:
            offer(average, checkpoints, learner, study)
        put(states_of(learner.trained), before)
    best, exported = broadcast_from_main(lambda: (best_of(folder), to_export(folder, learner.step)))
    if exported and exported.average:
        compared = f"; that of the best step, {best.step}, is {best.loss:.5f}" if best else ""
        say(f"{learner.name}: exporting {exported}: its validation loss is {exported.loss:.5f}{compared}")


def offer(average: Average, checkpoints: Sequence[Path], learner: Learner, study: Study) -> None:
    """Set the learner's adapters to an average of checkpoints, measure and print its loss, and store both.

    `checkpoints`: oldest first. Raises `Stopped` if a stop is requested during the measurement.
    """
    weights, folder = average.weights(len(checkpoints)), study.context.folder_of(learner.method)
    used = [(path, weight) for path, weight in zip(checkpoints, weights, strict=True) if weight]
    on_all(lambda: put_average(learner.trained, *zip(*used, strict=True)))
    loss = study.validation_loss(learner)
    if loss is None:
        raise stopped_at(learner)
    path = folder / FOLDER / str(average).replace(":", "-")
    best = Best(path, learner.step, loss, str(average), tuple(step_of(path) for path, _ in used))
    broadcast_from_main(lambda: keep_adapter(learner, path, best.to_dict()))
    study.context.accelerator.print(f"{learner.name}: validation loss {loss:.5f} with {best}")


def checkpoints_to_average(folder: Path, output: SharedOutputOptions) -> list[Path]:
    """Return the complete checkpoints that are averaged, oldest first; print a warning for each damaged one."""
    complete = []
    for checkpoint in reversed(to_average(checkpoints_of(folder), output)):
        try:
            check_checksums(checkpoint)
        except Damaged as error:
            print(f"warning: {checkpoint} is damaged ({first_line(error)}), and is not averaged", flush=True)
        else:
            complete.append(checkpoint)
    return complete


def put_average(trained: Trained, checkpoints: Sequence[Path], weights: Sequence[float]) -> None:
    """Set the adapters of all models to a weighted mean of those in checkpoints, oldest first, computed in float64.

    Tensors of integers, and what ResLoRA records for its merges, are copied from the newest checkpoint.
    """
    means: list[dict[str, torch.Tensor]] = [{} for _ in trained.parts]
    for checkpoint, weight in zip(checkpoints, weights, strict=True):
        for mean, (place, part) in zip(means, trained.places(checkpoint), strict=True):
            load_adapter(part, place)
            for name, value in trained_state(part).items():
                if value.is_floating_point():
                    mean[name] = mean.get(name, 0) + weight * value.cpu().double()
    put(states_of(trained), means)


def states_of(trained: Trained) -> list[dict[str, torch.Tensor]]:
    """Return the adapter's tensors of each model, by name; these tensors share their storage with the models."""
    return [trained_state(part) for part in trained.parts.values()]


@torch.no_grad()
def put(states: Sequence[dict[str, torch.Tensor]], values: Sequence[dict[str, torch.Tensor]]) -> None:
    """Copy values by name into the tensors of the models' states."""
    for state, named in zip(states, values, strict=True):
        for name, value in named.items():
            state[name].copy_(value)
