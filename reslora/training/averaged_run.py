"""Average the adapters that a run of an experiment has saved (--average_checkpoints); nothing is trained.

In an experiment, an average is compared like a method. An average saves its adapter at each evaluation, as a run does:
at a step, this adapter is the average of the adapters that the run has saved up to this step.
"""

from pathlib import Path

from ..errors import refused_as
from ..options.averages import Average
from ..runtime.checkpoint_folders import adapter_folder, memory_reported
from ..runtime.folder_lock import check_held, make_folder
from ..runtime.log import of_split, read_log
from ..runtime.processes import broadcast_from_main, on_all, stop_requested
from .averaging import put_average
from .preparing import prepare
from .reports import Reports
from .state import Learner
from .stopping import stopped_at
from .study import Study


def average_run(method: str, average: Average, source: Path, study: Study) -> None:
    """Average the adapters of another run at each of its evaluations, from the first one with enough adapters on.

    Each average is measured and saved as if it were trained, in the directory of the study's context; its training time
    is that of the other run. `source`: directory of that run. Evaluations of an earlier process are not repeated. Every
    process must call this. Raises `Stopped`, `Diverged`, and `InvalidArgument` for a damaged adapter.
    """
    context, folder = study.context, study.context.folder_of(method)
    with memory_reported(folder):
        broadcast_from_main(lambda: make_folder(folder))
        context.status.say("averaging checkpoints", context.name_of(method))
        seconds, done = broadcast_from_main(lambda: (evaluated(source), evaluated(folder)))
        learner = study.learner(method)
        learner.step = max(done, default=0)
        prepare(learner, study)
        with study.reports(learner) as reports:
            for number, step in enumerate(seconds, 1):
                if number >= average.least and step not in done:
                    learner.step, learner.seconds = step, seconds[step]
                    saved = [adapter_folder(source, earlier) for earlier in list(seconds)[:number]]
                    measure(average, saved, learner, study, reports)


def evaluated(folder: Path) -> dict[int, float]:
    """Return the training time of a run at each of its evaluations, by step; without that of the base model."""
    rows = of_split(read_log(folder / "log.jsonl"), "validation")
    return {row["step"]: row["seconds"] for row in rows if row["step"]}


def measure(average: Average, saved: list[Path], learner: Learner, study: Study, reports: Reports) -> None:
    """Set the learner's adapters to the average of saved ones, oldest first, and measure and save it at its step."""
    used = [(path, weight) for path, weight in zip(saved, average.weights(len(saved)), strict=True) if weight]
    broadcast_from_main(check_held)
    source = saved[0].parents[1]
    with refused_as(str(source), f"remove {source}, then the run is trained again", (ValueError,)):
        on_all(lambda: put_average(learner.trained, *zip(*used, strict=True)))
    study.validate(learner, reports, ["loss"])
    if stop_requested(study.context.stop):
        raise stopped_at(learner)
