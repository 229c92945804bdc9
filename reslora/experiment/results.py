"""Write `experiment.json` and the report after every arm; at the end choose, test, compare and export."""

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import Stopped
from ..formatting import is_or_are, pluralize
from ..io import read_object, this_process, write_json
from ..json_lines import json_lines
from ..methods.own import CONVERSION, LARGE_ERROR, conversion_in_words
from ..methods.registry import METHODS
from ..runtime.folder_lock import check_held
from . import record
from .arms import Arm, Losses, rates_of
from .choice import choose
from .executors import Executor, Job, wait_for_file
from .record import EXPERIMENT, READINGS, read_experiment
from .report import best_in_words, start_in_words, write_report
from .schedule import ENDED, ArmSchedule
from .statistics import level_of
from .study import COMPARING, TESTED, ExperimentStudy
from .verdicts import LEAST_GROUPS, compare

REPORT = "report.html"


@dataclass
class Results:
    """Results of an experiment, for its files and the terminal."""

    schedule: ArmSchedule
    study: ExperimentStudy
    tests: dict[Arm, record.TestLosses] = field(default_factory=dict)
    chosen: dict[str, record.Choice] = field(default_factory=dict)
    verdicts: list[record.Verdict] = field(default_factory=list)
    ranking: record.Ranking | None = None
    base: record.TestLosses | None = None
    notes: list[str] = field(default_factory=list)
    best: record.Best | None = None

    as_of: int | None = None
    """Number of arms that had ended when an earlier start drew the conclusions; None if this start drew them."""

    def __post_init__(self) -> None:
        there = read_experiment(self.schedule.folder)
        self.notes = self.beforehand()
        path = self.schedule.folder / READINGS
        rows = [row for _, row in json_lines(path)] if path.is_file() else []
        noted = [row for row in rows if isinstance(row, dict)]
        self.readings: int = max(there.get("readings", 0), len(rows), *(row.get("readings", 0) for row in noted))
        self.read: list[list] = there.get("read") or (noted[-1].get("read") if noted else None) or []
        self.seen: list[list] = [row["read"] for row in noted if row.get("read")]
        # without the record, all pairs of methods that were read together count as compared
        pairs = (itertools.combinations(sorted(_by_label(rows)), 2) for rows in self.seen)
        self.family: dict[str, list] = there.get("family") or {"methods": [*set(itertools.chain(*pairs))]}
        self.alike = False
        self.base = there.get("base")
        self.test_seconds: float = there.get("test_seconds", 0.0)
        arms, chosen = set(self.schedule.arms()), there.get("chosen", {})
        judged = {arm for arm in arms if arm.label in chosen and chosen[arm.label]["learning_rate"] == arm.rate}
        if judged:
            self.keep(there, judged)

    def keep(self, there: dict, judged: set[Arm]) -> None:
        """Load an earlier start's conclusions about the arms `judged`, which remain until this start concludes.

        `there`: content of `experiment.json`.
        """
        labels = {arm.label for arm in judged}
        self.chosen = {label: choice for label, choice in there["chosen"].items() if label in labels}
        if labels == set(there["chosen"]):  # verdicts about effects of options are about all of them
            self.verdicts = there["verdicts"]
        else:
            self.verdicts = [each for each in there["verdicts"] if {each["label"], each["reference"]} <= labels]
        ranked = there.get("ranking")
        if ranked and {*ranked["best"], *(each["label"] for each in ranked["worse"])} <= labels:
            self.ranking = ranked
        tests = {Arm(arm["label"], arm["learning_rate"], arm["seed"]): arm["test"] for arm in there["arms"]}
        self.tests = {arm: test for arm, test in tests.items() if test and arm in judged}
        self.notes += there["notes"][there.get("beforehand", 0) :]
        self.best = there.get("best")
        ended = sum(arm["status"] in record.ENDED_AS for arm in there["arms"])
        self.as_of = there.get("as_of", ended)

    def write(self) -> None:
        """Write the present state to `experiment.json` and the report."""
        check_held()
        # an average that an earlier start has tested is no longer an arm if no learning rate of its method remains
        arms = dict.fromkeys([*self.schedule.arms(), *self.tests])
        content: record.Experiment = {
            "format": record.FORMAT,
            "settings": read_object(self.schedule.folder / "config.json"),
            **self.study.facts(),
            "arms": [self.schedule.record(arm, self.tests.get(arm)) for arm in arms],
            "chosen": self.chosen,
            "verdicts": self.verdicts,
            "ranking": self.ranking,
            "base": self.base,
            "base_select": self.schedule.base_select(),
            "references": self.schedule.references,
            "choosing": self.schedule.choosing,
            "best": self.best,
            "notes": self.notes,
            "beforehand": len(self.beforehand()),
            "readings": self.readings,
            "read": self.read,
            "family": self.family,
            "test_seconds": round(self.test_seconds, 3),
            "process": this_process(),
        }
        if self.as_of is not None:
            content["as_of"] = self.as_of
        write_json(self.schedule.folder / EXPERIMENT, content)
        write_report(content, self.schedule.folder, self.study.about)

    def conclude(self, executor: Executor | None = None) -> None:
        """Choose on the selection split, evaluate on the test split, compare, export, and print the conclusions.

        The test split is evaluated only if `can_compare` allows it. Test results that are already on disk are reported
        in any case. With `executor`, other processes test and export.
        """
        schedule, self.as_of = self.schedule, None
        losses = schedule.losses()
        self.chosen = choose(map(schedule.record, schedule.arms()), schedule.choosing)
        trained = [arm for arm in losses if self.is_chosen(arm)]
        to_read = trained
        several = {label for label, count in Counter(arm.label for arm in trained).items() if count > 1}
        can_compare = len(several) > 1 and not several.isdisjoint(self.references())
        if len(losses) == len(schedule.arms()):  # no other arm can add a second label
            can_compare = bool(several)
        if not can_compare:
            to_read = [arm for arm in trained if self.study.is_tested(arm, self.step_of(arm))]
        self.count_reading(to_read)
        diverged = self.evaluate(to_read, trained, executor)
        self.tests = {arm: self.study.test_losses(arm) for arm in to_read}
        records = [schedule.record(arm, test) for arm, test in self.tests.items()]
        unit = self.study.about.unit
        reading, reference = max(1, self.readings), schedule.reference
        found = compare(records, self.chosen, unit, reading, self.base, reference, schedule.against, self.family)
        self.verdicts, self.ranking, self.family, self.alike = found
        self.notes = [*self.beforehand(), *self.afterwards(losses, trained), *diverged]
        exported = [arm for arm in trained if self.study.is_exported(arm, self.step_of(arm))]  # the others diverged
        self.best = self.export(exported) if exported else None
        self.write()
        taken = [best_in_words(self.best)] if self.best else []
        ranked = [self.ranking["sentence"]] if self.ranking else []
        sentences = [verdict["sentence"] for verdict in self.verdicts]
        for line in (*self.notes, *taken, *sentences, *ranked):
            print(line)
        print(f"{schedule.folder / REPORT}")

    def references(self) -> set[str]:
        """Return the methods with which others are compared."""
        return set(self.schedule.references)

    def count_reading(self, to_read: Sequence[Arm]) -> None:
        """Count an evaluation of these arms on the test split, and write the count to disk before the evaluation.

        If the process is killed during the evaluation, the next start resumes the evaluation and does not count it
        again. An evaluation whose results are all on disk is not counted either.
        """
        read = [[arm.label, arm.rate, arm.seed, self.step_of(arm)] for arm in to_read]
        untested = any(not self.study.is_tested(arm, self.step_of(arm)) for arm in to_read)
        if read != self.read and (untested or self.is_new(read)):
            self.readings, self.read = self.readings + 1, read
            check_held()
            facts = {"readings": self.readings, "read": self.read}
            with (self.schedule.folder / READINGS).open("a", encoding="utf-8") as file:
                # starts with a newline, because a killed process may have left an incomplete line
                file.write(f"\n{json.dumps(facts)}\n")
            self.amend(**facts)

    def is_new(self, read: Sequence[Sequence]) -> bool:
        """Return whether a method is read with other seeds, or another rate or step, than in every earlier evaluation.

        Fewer methods are no new evaluation, because all pairs that were ever compared stay in the family. Fewer
        seeds are a new evaluation, because they may have been chosen by their results.
        """
        earlier = [_by_label(rows) for rows in self.seen]
        return bool(earlier) and any(
            all(rows != found.get(label) for found in earlier) for label, rows in _by_label(read).items()
        )

    def amend(self, **facts: object) -> None:
        """Change only the keys `facts` of `experiment.json`, and retain the conclusions of an earlier start."""
        check_held()
        path = self.schedule.folder / EXPERIMENT
        content = read_experiment(self.schedule.folder) | facts
        write_json(path, content)
        write_report(content, self.schedule.folder, self.study.about)  # type: ignore[arg-type] # as `write` wrote it

    def evaluate(self, to_read: Sequence[Arm], trained: Sequence[Arm], executor: Executor | None = None) -> list[str]:
        """Test the model before training and the arms `to_read`, and export the arms `trained`; skip what is on disk.

        Returns a note for each arm whose export has diverged. Raises `Stopped` if a stop was requested; the next start
        evaluates the remaining arms.
        """
        study, todo = self.study, []
        for arm in trained:
            step = self.step_of(arm)
            work = arm in to_read and not study.is_tested(arm, step), not study.is_exported(arm, step)
            todo += [Job("evaluate", (arm, step, *work))] if any(work) else []
        is_base_new = bool(to_read) and (self.base is None or self.base["images"] != study.test_ids)
        jobs, notes = [Job("base")] * is_base_new + todo, []
        began: dict[Job, float] = {}

        def on_start(job: Job) -> None:
            """Store the start time of a job, and report the start."""
            began[job] = time.monotonic()
            if job.name == "base":
                print(f"{start_in_words(self.schedule.grid.flat())}: testing", flush=True)
                return
            arm, _, test, export = job.arguments
            phase = " and ".join(["testing"] * test + ["exporting"] * export)
            self.start_phase(f"{phase} ({todo.index(job) + 1} of {len(todo)})", arm)

        try:
            grids = self.schedule.grids
            for job, found in executor.each(jobs, grids, on_start) if executor else self.each(jobs, on_start):
                self.test_seconds += time.monotonic() - began[job]
                if job.name == "base":
                    self.base = found
                    self.amend(base=found)
                else:
                    notes += [found] if found else []
                    arm, _, test, _ = job.arguments
                    if executor and test:
                        wait_for_file(self.schedule.folder_of(arm) / TESTED)
        except Stopped:
            self.amend(test_seconds=round(self.test_seconds, 3))
            raise Stopped(COMPARING) from None
        return notes

    def each(self, jobs: Sequence[Job], on_start: Callable[[Job], object]) -> Iterator[tuple[Job, Any]]:
        """Do the jobs in this process, one after the other, as `Executor.each` does in others."""
        for job in jobs:
            on_start(job)
            yield job, getattr(self.study, job.name)(*job.arguments)

    def start_phase(self, phase: str, arm: Arm) -> None:
        """Report the next phase of an arm, which may take minutes; raises `Stopped` if a stop was requested."""
        self.study.start_phase(phase, arm)
        print(f"{self.schedule.name_of(arm)}: {phase}", flush=True)

    def is_chosen(self, arm: Arm) -> bool:
        """Return whether an arm has finished, without diverging, at its method's chosen learning rate."""
        choice = self.chosen.get(arm.label)
        finished = self.schedule.ended(arm).get("status") == "finished"
        return finished and choice is not None and choice["learning_rate"] == arm.rate

    def step_of(self, arm: Arm) -> int:
        """Return the step of the chosen checkpoint of an arm's method."""
        return self.chosen[arm.label]["step"]

    def beforehand(self) -> list[str]:
        """Return notes that are known before training.

        The notes are about too few seeds, learning rates or test items, a missing reference, and differences between
        runs.
        """
        schedule, found = self.schedule, self.study.too_few()
        if len(schedule.labels) > 1 and len(schedule.seeds) == 1:
            # the given seeds come first, because their arms may be trained already
            seeds = list(dict.fromkeys([*schedule.seeds, 0, 1, 2]))[:3]
            more = f"add two or more, as --seed {' '.join(map(str, seeds))}, now or by a later start"
            found.append(f"one seed cannot tell methods apart: {more}")
        is_fixed = not schedule.grid.base.experiment.extend_rates
        if len(schedule.labels) > 1 and is_fixed and all(len(rates) == 1 for rates in schedule.grids.values()):
            more = "at their own best rates they may compare otherwise; add others, now or by a later start"
            found.append(f"{record.ONE_RATE} for all methods: {more}")
        if not self.references():
            found.append(f"nothing to compare with: verdicts need --method {schedule.reference}")
        return [*found, *self.differences()]

    def differences(self) -> Iterator[str]:
        """Yield notes about what differs between runs in addition to the values that vary."""
        grid = self.schedule.grid
        for name in grid.varied:
            if unshared := grid.base.option(name).unshared:
                yield (
                    f"{grid.base.option(name).name} varies: runs with the same seed do not share {unshared}. Test "
                    "losses are comparable; differences need more seeds to be significant"
                )
        for name in self.schedule.grids:
            if (own := rates_of(grid, self.schedule.labels[name])) != self.schedule.given:
                yield f"{name}: trained at the optimizer's own learning rate, {own[0]:g}, not at --learning_rate"
        if averages := grid.base["average_checkpoints"]:
            yield (
                f"{averages.replace(',', ', ')}: averages of a run's evaluated checkpoints, at the learning rate that "
                "is chosen without them; their step is chosen like that of any method"
            )

    def afterwards(self, losses: Losses, trained: Sequence[Arm]) -> Iterator[str]:
        """Yield notes for the reader of the results; `trained`: the arms at the chosen learning rates."""
        schedule, arms, experiment = self.schedule, self.schedule.arms(), self.schedule.grid.base.experiment
        left = len(arms) - len(losses)
        if left:
            line = f"{record.UNFINISHED}{left} of {len(arms)} runs {is_or_are(left)} still to be trained after"
            minutes = f"--experiment_minutes {experiment.experiment_minutes:g}"
            yield f"{line} {minutes}; run the same command to resume for as long again"
        folder = schedule.folder
        kinds = METHODS.folders_in(folder)
        there = {path.parent for method in kinds for path in (folder / method).glob(f"**/seed-*/{ENDED}")}
        if more := len(there - {schedule.folder_of(arm) for arm in arms}):
            others = "other methods, learning rates or seeds, which the folder contains too"
            yield f"left out: {pluralize(more, 'run')} of {others}"
        endings = map(schedule.ended, arms)
        yield from (ended["reason"] for ended in endings if ended.get("status") == "failed" and ended["reason"])
        conversions = {arm.label: read_object(schedule.folder_of(arm) / CONVERSION) for arm in trained}
        for label, found in conversions.items():
            if found and max(found["error"], found["delta_error"]) > LARGE_ERROR:
                yield f"{label}: {conversion_in_words(found)}"
        waiting = {arm.label for arm in arms if arm not in losses}
        for label in schedule.grids:
            if label not in {*waiting, *self.chosen}:
                problem = "at each learning rate, a seed failed or was stopped, so none is chosen"
                yield f"{label}: {problem}; add a lower --learning_rate"
        advised: dict[str, list[str]] = {}
        for label in self.chosen:
            for advice in self.advice(label):
                advised.setdefault(advice, []).append(label)
        yield from (f"{', '.join(labels)}: {advice}" for advice, labels in advised.items())
        references = self.references()
        if references and references.isdisjoint(arm.label for arm in trained):
            yield f"nothing to compare with: no learning rate of {schedule.reference} is chosen"
        yield from self.grouped()
        if self.readings > 1:  # the user may have seen earlier results before extending the experiment
            read = f"the test split was evaluated {self.readings} times, as runs were added"
            level = f"{100 * level_of(self.readings):.2g}%"
            total = "the levels of all evaluations add up to at most 5%"
            yield f"{read}: this time at a significance level of {level}; {total}"

    def grouped(self) -> Iterator[str]:
        """Yield notes about groups of test items."""
        test = next(iter(self.tests.values()), None)
        unit, groups = self.study.about.unit, Counter(test.get("groups", ()) if test else ())
        if groups and len(groups) < LEAST_GROUPS:
            few = f"only {pluralize(len(groups), 'group')} of {unit}s in the test split"
            yield f"{few}: verdicts need at least {LEAST_GROUPS}; begin anew with a larger --test_split or more groups"
        if single := [name for name, number in groups.items() if number == 1]:
            yield f"groups with one test {unit} each, which count like any other group: {', '.join(single)}"
        if self.alike:
            yield (
                f"the test split looks grouped: methods differ alike on {unit}s that were taken one after another "
                "(by time or file name). Give their groups by a column `group` of the metadata or by "
                "--test_groups folder, in a new experiment; without groups, too many differences are significant"
            )

    def advice(self, label: str) -> Iterator[str]:
        """Yield what may lower a method's loss: learning rates beyond those that were tried, and more steps."""
        schedule, choice = self.schedule, self.chosen[label]
        if choice["at_end"] and choice["next"]:
            end, other = {"low": ("lowest", "lower"), "high": ("highest", "higher")}[choice["at_end"]]
            line = f"the best learning rate is the {end} that was tried, {choice['learning_rate']:g}, "
            line += f"and a {other} one may do better"
            further = f"--extend_rates, or --learning_rate {choice['next']:g} in addition to the others"
            # --extend_rates has already tried all its extensions, and starts from the given values
            if schedule.grid.base.experiment.extend_rates:
                rates = sorted({*schedule.grids[label], choice["next"]})
                further = f"--learning_rate {' '.join(f'{rate:g}' for rate in rates)}"
            yield f"{line}; {further}"
        trained = (arm for arm in schedule.arms() if arm.label == label and self.is_chosen(arm))
        last = max((step for arm in trained for step in schedule.select_losses(arm)), default=None)
        if choice["step"] == last:
            yield f"the selection loss is lowest at the last step, {last}; with more steps it may be lower"

    def export(self, exported: Sequence[Arm]) -> record.Best:
        """Export the best of these arms, whose own files are written, and return its record.

        Of the best methods in the ranking (without a ranking, of all methods), the one with the lowest mean loss on the
        selection split is exported: its arm with the lowest loss on the selection split.
        """
        labels = list(dict.fromkeys(arm.label for arm in exported))  # of equal ones, the first
        best_labels = [label for label in labels if self.ranking and label in self.ranking["best"]]
        label = min(best_labels or labels, key=lambda name: self.chosen[name]["loss"])
        arms = [arm for arm in exported if arm.label == label]
        best = min(arms, key=lambda arm: self.schedule.select_losses(arm)[self.step_of(arm)])
        self.start_phase("exporting", best)
        self.amend(best=None)  # a stop during the export would leave a record of removed files
        files = self.study.export(best, self.step_of(best))
        options, varied = self.schedule.options_of(best), self.schedule.grid.varied
        names = [name for name, option in options.table().items() if option.attribute in varied]
        own = {"method": self.schedule.labels[label].method, "learning_rate": best.rate}
        if "optimizer" in varied and options.flat().get("text_encoder_lr"):
            names.append("text_encoder_lr")  # config.json's rates are ignored with another optimizer than the first one
        own |= {name: options[name] for name in names}
        found = record.Best(
            label=label, learning_rate=best.rate, seed=best.seed, folder=self.schedule.name_of(best),
            step=self.step_of(best), files=files, options=own,
        )  # fmt: skip
        if average := self.schedule.labels[label].average:
            found["average"] = str(average)
        return found


def _by_label(read: Sequence[Sequence]) -> dict[str, list]:
    """Return the learning rate, seed and step of each arm of an evaluation, by label."""
    found: dict[str, list] = {}
    for label, *rest in read:
        found.setdefault(label, []).append(rest)
    return {label: sorted(rows) for label, rows in found.items()}
