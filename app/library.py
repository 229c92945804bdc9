"""List the runs and experiments in a folder, and the example run.

Names from a browser are only compared with the names of the listed folders, never used as paths.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from reslora.experiment.record import ENDED_AS, EXPERIMENT, UNFINISHED
from reslora.export import COMFYUI_FILE, DIFFUSERS_FILE, KOHYA_FILE, LYCORIS_FILE
from reslora.images.experiment.gallery import chosen_samples
from reslora.options.images import Options

from .folders import children
from .runs import EXPERIMENT_LOG, LOG_NAME, Run, cached_by_stamp, number, pick, stamp_of

VARYING = tuple(name for name, option in Options.table().items() if option.can_vary)
REPORT = "report.html"
NONE = "There is no %s of that name; choose one from the list."


@dataclass(frozen=True)
class Experiment(Run):
    """The output folder of an experiment: several arms (trained runs), and a report that compares them."""

    log_name: ClassVar[str] = EXPERIMENT_LOG

    @property
    def arms(self) -> list[dict]:
        """The records of the experiment's arms in the experiment's file; their contents are not validated."""
        arms = self.read_json(EXPERIMENT).get("arms")
        return [arm for arm in arms if isinstance(arm, dict)] if isinstance(arms, list) else []

    @property
    def status(self) -> str:
        """`running`, `finished`, `stopped` (it can be resumed by the same command) or `failed` (all arms failed, or
        training never began)."""
        if self.process:
            return "running"
        if self.arms and all(arm.get("status") == "failed" for arm in self.arms):
            return "failed"
        ended, total = self.progress
        content = self.read_json(EXPERIMENT)
        concluded = bool(content.get("chosen")) and "as_of" not in content
        return "finished" if total and ended == total and concluded else "stopped" if self.config else "failed"

    @property
    def progress(self) -> tuple[int, int]:
        """Number of arms that have ended, and total number of arms."""
        arms = self.arms
        return sum(arm.get("status") in ENDED_AS for arm in arms), len(arms)

    @property
    def time_is_over(self) -> str:
        """A phrase about the time limit if the time limit stopped the experiment before all arms had ended; otherwise
        empty.
        """
        content, minutes = self.read_json(EXPERIMENT), number(self.config.get("experiment_minutes"))
        notes = content.get("notes") if "as_of" not in content else None
        told = isinstance(notes, list) and any(str(note).startswith(UNFINISHED) for note in notes)
        return f"the time limit of {minutes:g} minutes is over" if told and minutes else ""

    @property
    def seconds_an_arm(self) -> float | None:
        """Mean duration of the finished arms in seconds.

        An arm's duration is the larger of training time and wall time, because the wall time of a resumed arm only
        starts when it is resumed.
        """
        ended = [arm for arm in self.arms if arm.get("status") == "finished"]
        known = [[number(arm.get("seconds")) or 0.0, number(arm.get("wall_seconds")) or 0.0] for arm in ended]
        found = [seconds for seconds in map(max, known) if seconds > 0]
        return sum(found) / len(found) if found else None

    @property
    def seconds_in_all(self) -> float | None:
        """Mean duration of the finished arms in seconds, with each arm's part of the tests and exports."""
        count = sum(arm.get("status") == "finished" for arm in self.arms)
        tests = number(self.read_json(EXPERIMENT).get("test_seconds")) or 0.0
        return self.seconds_an_arm and self.seconds_an_arm + tests / count

    def report(self) -> str:
        """Return the report as an HTML document; empty until it exists."""
        return self.text(REPORT)

    def lora(self) -> Path | None:
        """Return the best arm's LoRA file, in the format that most tools can load; None until the file exists.

        LoRA files that were exported from an earlier best arm are ignored.
        """
        content = self.read_json(EXPERIMENT)
        names = [KOHYA_FILE, COMFYUI_FILE, LYCORIS_FILE, DIFFUSERS_FILE]
        if "best" in content:
            best = content["best"]
            files = best.get("files") if isinstance(best, dict) else None
            names = [name for name in names if isinstance(files, list) and name in files]
        found = map(self.inside, names)
        return next((path for path in found if path and path.is_file()), None)

    def chosen_samples(self) -> list[Path]:
        """Return the first sample of each method's chosen run, at its chosen step; empty without a verdict."""
        content, found = self.read_json(EXPERIMENT), []
        with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):  # a damaged file
            prompts = [str(prompt) for prompt in content["settings"].get("validation_prompt") or ()]
            for label in content["chosen"]:
                for _, _, place in chosen_samples(content, self.folder, label, prompts):
                    if path := self.inside(str(place / "0-0.png")):
                        found.append(path)
                        break
        return found

    def fingerprint(self) -> tuple:
        """Return a value that changes if the page has to show the experiment again."""
        return self.status, stamp_of(self.inside(REPORT))


class Library:
    """The runs and experiments in `folder`.

    `extra`: the folders of further runs, such as the example.
    """

    def __init__(self, folder: Path, extra: tuple[Path, ...] = ()) -> None:
        self.folder = folder.resolve()
        self.extra = tuple(path.resolve() for path in extra)

    def runs(self) -> dict[str, Run]:
        """Return the runs of `train_sd.py` by name, newest first; the extra runs are last."""
        return {run.name: run for run in self.everything() if type(run) is Run}

    def experiments(self) -> dict[str, Experiment]:
        """Return the experiments by name, newest first."""
        return {run.name: run for run in self.everything() if isinstance(run, Experiment)}

    def everything(self) -> list[Run]:
        """Return the runs and experiments in the folder, newest first, then the extra runs."""
        folders = sorted(children(self.folder), key=last_change, reverse=True)
        found = [kind(path.name, path) for path in folders if (kind := kind_of(path))]
        own = {run.name for run in found}
        return found + [Run(path.name, path) for path in self.extra if path.name not in own and kind_of(path) is Run]

    def owns(self, run: Run) -> bool:
        """Return whether the parent folder of a run is the library's folder."""
        return run.folder.parent == self.folder

    def find_any(self, name: object) -> Run:
        """Return the run or experiment with this name. Raises `RunError` if none has it."""
        return pick({run.name: run for run in self.everything()}, name, NONE % "run")

    def find(self, name: object, kind: type[Run] = Run) -> Run:
        """Return the run with this name, or the experiment if `kind` is `Experiment`. Raises `RunError` for others."""
        known = self.experiments() if kind is Experiment else self.runs()
        return pick(known, name, NONE % kind.__name__.lower())


def kind_of(folder: Path) -> type[Run] | None:
    """Return the class of a folder, `Run` or `Experiment`, or None if `train_sd.py` has not written to the folder.

    An experiment without arms yet is detected by its settings: an option has several values that a run has only one of.
    """
    config, kind = folder / "config.json", Run if (folder / LOG_NAME).is_file() else None
    if config.exists():  # also a folder of that name; the page reports it as unreadable
        kind = kind_by_settings(config)
        if kind is None:
            return None
    is_experiment = (folder / EXPERIMENT_LOG).is_file() or (folder / EXPERIMENT).is_file()
    return Experiment if is_experiment else kind


@cached_by_stamp(256)
def kind_by_settings(path: Path) -> type[Run] | None:
    """Return the class of a run, detected from the settings file `path`; None for the run of a language model."""
    run = Run(path.parent.name, path.parent)
    if "model_name_or_path" in run.config:
        return None
    options = (Options.table()[name] for name in VARYING)
    several = [value for option in options if len(value := option.several(run.config.get(option.name)) or ()) > 1]
    if any(all(isinstance(one, int | float | str | list) for one in value) for value in several):
        return Experiment
    return Run


def last_change(folder: Path) -> float:
    """Return the time of the last change of a run's files, in seconds since the epoch."""
    times = [0.0]
    files = [folder / name for name in ("config.json", LOG_NAME, EXPERIMENT_LOG, EXPERIMENT)]
    with contextlib.suppress(OSError):  # the folder has just been moved or removed
        files += folder.glob("*/log.jsonl")
    for path in files:
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)
