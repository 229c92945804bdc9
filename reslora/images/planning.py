"""Print the plan of a run or an experiment (--plan): its memory and, for an experiment, its runs and time."""

from ..experiment.schedule import ArmSchedule
from ..formatting import pluralize
from ..options.grid import Grid
from ..options.images import Options
from ..runtime.processes import broadcast_from_main, on_all, say
from ..runtime.signals import StopRequest
from .accelerator import start_accelerator
from .data.folders import load_folders
from .experiment.first_steps import time_first_steps
from .run import check_before_loading, resolve_context


def show_plan(asked: Options | Grid[Options], stop: StopRequest) -> None:
    """Print an estimate of the run's memory; write no files. Raise an error if the run does not fit into memory.

    For an experiment, this is the estimate for its highest rank and its largest batch size, after a line with the
    number of runs. After the memory, the experiment's first steps are timed, to print how long the experiment takes.
    """
    if isinstance(asked, Grid):
        training = asked.base.training
        steps = training.max_train_steps or pluralize(training.num_train_epochs, "epoch")
        each = pluralize(steps, "step") if isinstance(steps, int) else steps
        runs = ArmSchedule(asked).runs_in_words()
        say(f"{runs}; {each} each")
    most = ("rank", "train_batch_size")
    options = asked.run(**{name: max(asked.values(name)) for name in most}) if isinstance(asked, Grid) else asked
    with stop.at_once():
        accelerator = start_accelerator(options)
    images = on_all(lambda: load_folders(options.model, options.data, options.training, options.output))
    context = resolve_context(options, accelerator, stop)
    broadcast_from_main(lambda: check_before_loading(images, context))
    if isinstance(asked, Grid):
        with stop.at_once():
            time_first_steps(asked, images, context)
