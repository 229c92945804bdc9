"""An experiment's arms, trained one after the other."""

import json
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from app.library import Experiment
from reslora.errors import Diverged, InvalidArgument, Stopped
from reslora.experiment import runner as run
from reslora.experiment.arms import Arm
from reslora.experiment.hashed_split import too_few
from reslora.experiment.schedule import ArmSchedule
from reslora.experiment.study import COMPARING
from reslora.images.experiment.report_sections import IMAGES
from reslora.images.settings import parse_args

from .documented import unlike


class Untrained:
    """Arms that write losses, lowest at the middle rate, and are not trained.

    `stopped`: the methods of the study in which a stop is requested; `diverging`: labels and seeds of arms that
    diverge.
    """

    about, device, test_ids = IMAGES, torch.device("cpu"), list("abcd")

    def __init__(self, schedule: ArmSchedule, stopped: str = "", diverging: Collection[tuple[str, int]] = ()) -> None:
        self.schedule, self.stopped, self.diverging = schedule, stopped, diverging
        self.begun: list[str] = []

    def facts(self) -> dict:
        parts = {"train": 9, "select": 2, "test": 4, "duplicates": 0}
        return {"versions": {}, "split": parts, "timesteps": [0.5], "identity": {}}

    def too_few(self) -> list[str]:
        return too_few(4, "image")

    def train(self, arm: Arm) -> None:
        if self.stopped == "train":
            raise Stopped("stopped after step 1; go on")
        if (arm.label, arm.seed) in self.diverging:
            raise Diverged(f"{arm.label} diverged", "start in another --output_dir")
        folder, loss = self.schedule.folder_of(arm), 1 + abs(math.log(arm.rate / 2e-4)) + 0.01 * arm.seed
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {"step": at, "split": "validation", "loss": found, "seconds": 1.0} for at, found in enumerate((2, loss))
        ]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def is_tested(self, arm: Arm, step: int) -> bool:
        return (self.schedule.folder_of(arm) / "tested").exists()

    def start_phase(self, phase: str, arm: Arm) -> None:
        if self.stopped == "start_phase" and self.begun:
            raise Stopped(COMPARING)
        self.begun.append(f"{self.schedule.name_of(arm)}: {phase}")

    def evaluate(self, arm: Arm, step: int, test: bool, export: bool) -> str:
        if test and self.stopped == "tested":
            raise Stopped(COMPARING)
        if test:
            (self.schedule.folder_of(arm) / "tested").touch()
        if export and (arm.label, -1) in self.diverging:
            return f"{arm.label}: it draws NaN; start again"
        if export:
            (self.schedule.folder_of(arm) / "exported").touch()
        return ""

    def test_losses(self, arm: Arm) -> dict:
        luck = np.random.default_rng([arm.seed, len(arm.label)]).normal(size=4)
        losses = 1 + 0.1 * (arm.label != "lora") + 0.001 * luck
        return {"images": list("abcd"), "losses": losses.tolist(), "by_timestep": [1.0]}

    def base(self) -> dict:
        return {"images": self.test_ids, "losses": [2.0, 2.1, 1.9, 2.0], "by_timestep": [2.0]}

    def seconds_to_conclude(self) -> float:
        return 2.0

    def is_exported(self, arm: Arm, step: int) -> bool:
        return (self.schedule.folder_of(arm) / "exported").exists()

    def export(self, arm: Arm, step: int) -> list[str]:
        if self.stopped == "export":
            raise Stopped(COMPARING)
        return ["kohya.safetensors", "peft"]


def go(
    folder: Path,
    *flags: str,
    stopped: str = "",
    methods: str = "lora lora_x2 rslora",
    diverging: Collection[tuple[str, int]] = (),
    grid: Sequence[str] | None = None,
) -> tuple[dict, str]:
    """Train and conclude, or be stopped; return the record and the report's headline. `grid`: instead of `methods`."""
    grid = ["--method", *methods.split(), "--learning_rate", "1e-4", "2e-4", "4e-4"] if grid is None else list(grid)
    grid += ["--rank", "8", *flags]
    grid += [] if "--seed" in flags else ["--seed", "0", "1"]
    schedule = ArmSchedule(parse_args(["--output_dir", str(folder), *grid]))
    folder.mkdir(exist_ok=True)
    if stopped:
        with pytest.raises(Stopped):
            run.train_and_conclude(Untrained(schedule, stopped))
    else:
        run.train_and_conclude(Untrained(schedule, diverging=diverging))
    report = (folder / "report.html").read_text(encoding="utf-8")
    found = json.loads((folder / "experiment.json").read_text())
    assert unlike(found) == []
    return found, re.search("<h1>(.*?)</h1>", report)[1]


def exported(folder: Path) -> list[str]:
    return sorted(path.parent.relative_to(folder).as_posix() for path in folder.rglob("exported"))


def test_only_what_is_compared_is_exported_and_once(tmp_path, capsys):
    record, _ = go(tmp_path / "out", methods="lora lora_x2")
    chosen = [f"{label}/lr-0.0002/seed-{seed}" for label in ("lora", "lora_x2") for seed in (0, 1)]
    assert exported(tmp_path / "out") == chosen and len(record["arms"]) == 8
    assert "lora/lr-0.0002/seed-0: testing and exporting (1 of 4)" in capsys.readouterr().out
    go(tmp_path / "out", "--seed", "0", "1", "2", methods="lora lora_x2")
    assert len(exported(tmp_path / "out")) == 6 and "exporting (1 of 2)" in capsys.readouterr().out


def test_an_arm_that_cannot_be_exported_is_a_note(tmp_path):
    """The best of the others is exported."""
    for label, other in (("lora", "lora_x2"), ("lora_x2", "lora")):
        record, _ = go(tmp_path / label, methods="lora lora_x2", diverging=[(label, -1)])
        assert f"{label}: it draws NaN; start again" in " ".join(record["notes"]) and record["verdicts"]
        assert record["best"]["label"] == other
    record, _ = go(tmp_path / "both", methods="lora lora_x2", diverging=[("lora", -1), ("lora_x2", -1)])
    assert record["verdicts"] and record["best"] is None


def test_every_run_is_told_with_the_time_that_is_left(tmp_path, capsys):
    go(tmp_path / "out", methods="lora lora_x2")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run ")]
    assert lines[0] == "run 1 of at most 8: lora/lr-0.0002/seed-0"
    assert re.fullmatch(r"run 2 of at most 8, about \d+ min left: lora_x2/lr-0\.0002/seed-0", lines[1])
    assert re.fullmatch(r"run 8 of 8, about \d+ min left: lora_x2/lr-0\.0002/seed-1", lines[-1]) and len(lines) == 8


def test_the_best_run_names_its_learning_rate_because_optimizers_have_their_own(tmp_path, monkeypatch):
    """Its command also gives config.json, whose learning rate is ignored with another optimizer than the first one."""
    monkeypatch.setattr("reslora.images.refusals.check_installed", lambda *_: None)
    words = "--method lora --learning_rate 3e-4 --train_text_encoder --text_encoder_lr 1e-5"
    record, _ = go(tmp_path / "out", grid=f"{words} --vary optimizer=lion,adamw".split())
    own = {"method": "lora", "learning_rate": 3e-4, "optimizer": "lion", "seed": 0, "text_encoder_lr": 1e-5}
    assert record["best"]["options"] == own


def test_a_damaged_record_is_named_and_the_count_of_test_readings_survives_it(tmp_path):
    folder = tmp_path / "out"
    before, _ = go(folder)
    assert before["readings"] == 1
    path = folder / "experiment.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(InvalidArgument, match=rf"^--output_dir {folder}: experiment.json is damaged; .* remove it"):
        go(folder, "--seed", "0", "1", "2")
    path.unlink()
    after, _ = go(folder, "--seed", "0", "1", "2")
    assert after["readings"] == 2 and any("the test split was evaluated 2 times" in note for note in after["notes"])
    assert go(folder, "--seed", "0", "1", "2")[0]["readings"] == 2  # nothing is left to test


def read_of(record: dict) -> list[tuple]:
    return [(arm["label"], arm["learning_rate"], arm["seed"]) for arm in record["arms"] if arm["test"]]


def test_what_was_concluded_stays_until_it_is_concluded_anew(tmp_path):
    """A seed is added; a stop in its first arm, or in the comparison, loses no earlier conclusion."""
    folder = tmp_path / "out"
    before, headline = go(folder)
    assert len(before["verdicts"]) == 2 and headline.startswith("LoRA is better than rsLoRA")
    (folder / "config.json").write_text('{"seed": [0, 1]}')
    for stopped, ended in (("train", 12), ("tested", 15)):
        kept, told = go(folder, "--seed", "0", "1", "2", stopped=stopped)
        for name in ("chosen", "verdicts", "ranking", "base", "best", "notes"):
            assert kept[name] == before[name]
        assert read_of(kept) == read_of(before) and kept["as_of"] == 12
        assert told == f"As of 12 runs, with {ended} of 15 ended: {headline}"
        assert Experiment("out", folder).status == "stopped"
    after, headline = go(folder, "--seed", "0", "1", "2")
    assert after["verdicts"][0]["seeds"] == 3 and "as_of" not in after and headline.startswith("LoRA is better than ")
    assert Experiment("out", folder).status == "finished"


@pytest.mark.exhaustive
def test_a_reading_of_the_test_images_counts_once_wherever_it_is_cut_off(tmp_path):
    go(tmp_path / "out", stopped="tested")
    for _ in range(2):
        record, _ = go(tmp_path / "out")
        assert all(arm["wall_seconds"] >= 0 for arm in record["arms"])
        assert record["readings"] == 1 and not any("was evaluated" in note for note in record["notes"])
    record, _ = go(tmp_path / "out", "--seed", "0", "1", "2")
    assert record["readings"] == 2 and any("was evaluated 2 times" in note for note in record["notes"])


def test_with_one_seed_the_test_images_are_not_read(tmp_path):
    """They could not show anything, and a later start evaluates them for the first time."""
    record, headline = go(tmp_path / "out", "--seed", "0")
    assert (record["readings"], record["verdicts"], record["base"], read_of(record)) == (0, [], None, [])
    assert not list((tmp_path / "out").glob("**/tested")) and headline == "There is nothing to compare"
    assert record["best"]["label"] and len(record["chosen"]) == 3
    record, _ = go(tmp_path / "out")
    assert record["readings"] == 1 and len(record["verdicts"]) == 2


def test_the_base_model_is_measured_once_and_says_what_training_gains(tmp_path):
    record, _ = go(tmp_path / "out")
    assert np.mean(record["base"]["losses"]) == pytest.approx(2.0) and record["base_select"] == 2
    assert record["verdicts"][0]["of_gain"] == pytest.approx(10, abs=0.1)
    (tmp_path / "out" / "experiment.json").write_text(
        json.dumps(record | {"base": record["base"] | {"losses": [9.0] * 4}})
    )
    assert go(tmp_path / "out", "--seed", "0", "1", "2")[0]["base"]["losses"] == [9.0] * 4


def test_the_best_run_is_one_of_the_best_methods_and_says_what_it_was_trained_with(tmp_path):
    """On the selection split all methods are equal and lora_x2 comes first; on the test split it is worse than LoRA."""
    record, _ = go(tmp_path / "out", methods="lora_x2 lora rslora")
    assert record["ranking"]["best"] == ["lora"] and record["best"]["label"] == "lora"
    assert record["best"]["options"] == {"method": "lora", "learning_rate": 2e-4, "seed": 0}


def test_an_average_is_compared_with_the_method_whose_checkpoints_it_averages(tmp_path, capsys):
    record, _ = go(tmp_path / "out", "--average_checkpoints", "ema:0.5", methods="lora reslora")
    pairs = [(verdict["label"], verdict["reference"]) for verdict in record["verdicts"]]
    assert pairs == [("reslora", "lora"), ("lora ema:0.5", "lora"), ("reslora ema:0.5", "reslora")]
    assert record["references"] == ["lora"]
    ranked = {*record["ranking"]["best"], *(each["label"] for each in record["ranking"]["worse"])}
    assert ranked == {"lora", "reslora"} and len(record["chosen"]) == 4
    note = "ema:0.5: averages of a run's evaluated checkpoints, at the learning rate that is chosen without them"
    assert f"{note}; their step is chosen like that of any method" in capsys.readouterr().out.splitlines()
    record, _ = go(tmp_path / "out", methods="lora reslora")
    assert any("left out: 4 runs" in note for note in record["notes"]) and len(record["verdicts"]) == 1


def test_an_average_is_exported_with_its_name(tmp_path):
    own = ("--average_checkpoints", "ema:0.5")
    schedule = ArmSchedule(parse_args(["--output_dir", str(tmp_path), "--method", "lora", "--seed", "0", "1", *own]))
    results = run.Results(schedule, Untrained(schedule))
    run.train_and_conclude(results.study)
    results.conclude()
    assert [(verdict["label"], verdict["reference"]) for verdict in results.verdicts] == [("lora ema:0.5", "lora")]
    best = results.export(schedule.averages())
    assert best["average"] == "ema:0.5" and best["label"] == "lora ema:0.5" and "average" not in results.best


def test_a_stop_is_heeded_between_two_arms_that_are_tested(tmp_path, capsys):
    """Tested arms are not tested again, and each tested arm has a printed line."""
    folder = tmp_path / "out"
    go(folder, stopped="start_phase")
    (tested,) = folder.glob("**/tested")
    first, *_ = (line for line in capsys.readouterr().out.splitlines() if "testing and" in line)
    assert first == f"{tested.parent.relative_to(folder).as_posix()}: testing and exporting (1 of 6)"
    assert Experiment("out", folder).progress == (12, 12)
    go(folder)
    said = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines() if "testing and" in line]
    assert said == [f"testing and exporting ({number} of 5)" for number in range(1, 6)]


@pytest.mark.exhaustive
def test_extended_rates_are_advised_where_none_were_tried(tmp_path):
    """The best rate is the lowest one: three more rates are tried, and no more."""
    rates = ("--learning_rate", "8e-4", "16e-4")
    (advised,) = (note for note in go(tmp_path / "out", *rates)[0]["notes"] if "was tried" in note)
    assert advised.startswith("lora, lora_x2, rslora: ")
    assert "0.0008, and a lower one may do better; --extend_rates, or --learning_rate 0.0004 " in advised
    rates = ("--learning_rate", "6.4e-3", "12.8e-3")
    record, _ = go(tmp_path / "other", *rates, "--extend_rates")
    (advised,) = (note for note in record["notes"] if "was tried" in note)
    assert len(record["arms"]) == 3 * (5 + 1)
    tried = ["0.0004", "0.0008", "0.0016", "0.0032", "0.0064", "0.0128"]
    assert advised.endswith(f", 0.0008, and a lower one may do better; --learning_rate {' '.join(tried)}")
    record, _ = go(tmp_path / "other", "--learning_rate", *tried, "--extend_rates")
    assert not [note for note in record["notes"] if "left out" in note]
    more = "lora, lora_x2, rslora: the selection loss is lowest at the last step, 1; with more steps it may be lower"
    assert more in record["notes"]
    assert {choice["learning_rate"] for choice in record["chosen"].values()} == {2e-4}


FEW = "only 4 images compare: so few seldom show that a difference is real; begin anew with more images"
ONE = "one seed cannot tell methods apart: add two or more, as --seed 0 1 2, now or by a later start"


@pytest.mark.parametrize(
    ("methods", "seeds", "lines"),
    [
        ("lora lora_x2", "0 1", [FEW]),
        ("lora", "0", [FEW]),
        ("lora lora_x2", "0", [FEW, ONE]),
        ("lora lora_x2", "42", [FEW, ONE.replace("0 1 2", "42 0 1")]),  # what is trained stays of use
        ("lora_x2 rslora", "0 1", [FEW, "nothing to compare with: verdicts need --method lora"]),
    ],
)  # fmt: skip
def test_what_no_arm_can_mend_is_said_before_the_first_one_and_in_the_report(tmp_path, capsys, methods, seeds, lines):
    """Before the first arm the user can still change it."""
    own = ("--seed", *seeds.split())
    kept, _ = go(tmp_path / "out", *own, stopped="train", methods=methods)
    assert kept["notes"] == lines == capsys.readouterr().out.splitlines()[:-1]  # the last one names the run that begins
    assert all(line in (tmp_path / "out" / "report.html").read_text() for line in lines)
    notes = go(tmp_path / "out", *own, methods=methods)[0]["notes"]
    assert notes[: len(lines)] == lines and len(set(notes)) == len(notes)


def test_methods_at_a_single_learning_rate_are_compared_with_a_warning(tmp_path):
    """The report's first lines have it, too; with a second rate it is gone."""
    record, _ = go(tmp_path / "out", "--learning_rate", "2e-4")
    assert any(note.startswith("only one learning rate for all methods: ") for note in record["notes"])
    first = (tmp_path / "out" / "report.html").read_text().split("</header>")[0]
    assert "best rates they may compare otherwise" in first
    record, _ = go(tmp_path / "out", "--learning_rate", "2e-4", "4e-4")
    assert not any("only one learning rate" in note for note in record["notes"])
    assert "compare otherwise" not in (tmp_path / "out" / "report.html").read_text()
    record, _ = go(tmp_path / "one", "--learning_rate", "2e-4", methods="lora")
    assert not any("only one" in note for note in record["notes"])


def test_a_method_of_which_nothing_is_chosen_is_told_with_the_reason(tmp_path):
    """A single seed that diverges excludes a rate."""
    reason = "at each learning rate, a seed failed or was stopped, so none is chosen; add a lower --learning_rate"
    record, _ = go(tmp_path / "lora", diverging=[("lora", 1)])
    assert f"lora: {reason}" in record["notes"] and "lora" not in record["chosen"]
    assert "lora diverged" in record["notes"]  # without what only a plain run can do
    assert "nothing to compare with: no learning rate of lora is chosen" in record["notes"]
    record, _ = go(tmp_path / "other", diverging=[("lora_x2", 0)])
    assert f"lora_x2: {reason}" in record["notes"] and not any("to compare with" in note for note in record["notes"])
    record, _ = go(tmp_path / "without", methods="lora_x2 rslora")
    assert "nothing to compare with: verdicts need --method lora" in record["notes"]
    record, _ = go(tmp_path / "unfinished", "--experiment_minutes", "1e-9", diverging=[("lora", 0)])
    assert not any(reason in note for note in record["notes"])  # other rates are still to be tried
