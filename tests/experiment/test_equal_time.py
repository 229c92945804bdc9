"""Comparing at equal training time: the step of each method, and the result of an experiment."""

import json

import pytest

from experiment.test_run import Untrained
from reslora.experiment import runner
from reslora.experiment.arms import Arm
from reslora.experiment.equal_time import TOLERANCE, at_time, seconds_by_step
from reslora.experiment.schedule import ArmSchedule
from reslora.images.settings import parse_args


def arm(label: str, seed: int, each: float, status: str = "finished") -> dict:
    """Return an arm of four measurements, ten steps apart, that takes `each` seconds for ten steps."""
    steps = [10, 20, 30, 40]
    times = {str(step): each * step / 10 for step in steps}
    losses = {str(step): 1 / step for step in steps}
    return {"label": label, "seed": seed, "status": status, "select_by_step": losses, "seconds_by_step": times}


def test_a_label_is_compared_at_its_last_step_within_the_time_of_the_reference():
    arms = [arm("lora", 0, 1.0), arm("lora", 1, 1.2), arm("slow", 0, 1.5), arm("slow", 1, 1.3), arm("fast", 0, 0.5)]
    arms += [arm("slower", 0, 9.0), arm("slow", 2, 0.1, "failed"), arm("slow", 7, 0.1)]
    assert seconds_by_step(arms, "lora", [0, 1]) == pytest.approx({"10": 1.1, "20": 2.2, "30": 3.3, "40": 4.4})
    found = {(each["label"], each["seed"]): list(each["select_by_step"]) for each in at_time(arms, 4.4, [0, 1])}
    assert found["lora", 0] == found["lora", 1] == found["fast", 0] == ["40"]
    assert found["slow", 0] == found["slow", 1] == found["slow", 7] == ["30"]  # 1.4 s for ten steps
    assert found["slower", 0] == [] and found["slow", 2] == ["10", "20", "30", "40"]  # a failed arm is not chosen
    near = [arm("lora", 0, 1.0), arm("equal", 0, 1 + 0.9 * TOLERANCE), arm("more", 0, 1 + 1.1 * TOLERANCE)]
    assert [list(each["select_by_step"]) for each in at_time(near, 4.0, [0])] == [["40"], ["40"], ["30"]]


class Timed(Untrained):
    """Arms of three measured steps; lora_x2 takes 1.6 times as long. Averages have those with enough checkpoints."""

    def train(self, arm: Arm) -> None:
        label = self.schedule.labels[arm.label]
        folder, each = self.schedule.folder_of(arm), 1.6 if label.method == "lora_x2" else 1.0
        measured = range(label.average.least if label.average else 0, 4)
        (folder / "peft").mkdir(parents=True)
        (folder / "peft" / "adapter_model.safetensors").write_bytes(bytes(2**21))
        rows = [{"step": n, "split": "validation", "loss": 2 / (n + 1), "seconds": n * each} for n in measured]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_experiment_chooses_at_equal_time_and_reports_what_each_label_costs(tmp_path):
    words = "--method lora lora_x2 --learning_rate 1e-4 2e-4 --seed 0 1 --compare_at"
    chosen = {}
    for at in ("steps", "time"):
        schedule = ArmSchedule(parse_args([*words.split(), at, "--output_dir", str(tmp_path / at)]))
        (tmp_path / at).mkdir()
        runner.train_and_conclude(Timed(schedule))
        found = json.loads((tmp_path / at / "experiment.json").read_text())
        chosen[at] = {label: choice["step"] for label, choice in found["chosen"].items()}
        note = "compared at equal training time, that of lora, 3 s: lora at step 3, lora_x2 at step 1"
        assert (note in found["notes"]) == (at == "time")
    assert chosen == {"steps": {"lora": 3, "lora_x2": 3}, "time": {"lora": 3, "lora_x2": 1}}
    report = (tmp_path / "time" / "report.html").read_text()
    assert '<th scope="col">File</th>' in report and "<td>2 MiB</td>" in report and "<td>2 s</td>" in report


def test_a_long_time_is_in_hours_and_minutes(tmp_path):
    class Long(Timed):
        def train(self, arm: Arm) -> None:
            super().train(arm)
            log = self.schedule.folder_of(arm) / "log.jsonl"
            rows = [json.loads(line) for line in log.read_text().splitlines()]
            log.write_text("".join(json.dumps(row | {"seconds": 2000 * row["seconds"]}) + "\n" for row in rows))

    words = "--method lora lora_x2 --learning_rate 1e-4 --seed 0 1 --compare_at time --output_dir"
    runner.train_and_conclude(Long(ArmSchedule(parse_args([*words.split(), str(tmp_path)]))))
    (note, *_) = [note for note in json.loads((tmp_path / "experiment.json").read_text())["notes"] if "equal" in note]
    assert note.startswith("compared at equal training time, that of lora, 1 h 40 min: lora at step 3")


class Late(Timed):
    """lora_x2 is measured only once, later than LoRA ends."""

    def train(self, arm: Arm) -> None:
        super().train(arm)
        if arm.label == "lora_x2":
            (self.schedule.folder_of(arm) / "log.jsonl").write_text(
                json.dumps({"step": 3, "split": "validation", "loss": 0.1, "seconds": 9.0}) + "\n"
            )


def test_a_method_that_was_measured_too_late_is_named_also_while_runs_wait(tmp_path):
    words = ["--method", "lora", "lora_x2", "--learning_rate", "1e-4", "--compare_at", "time"]
    words += ["--output_dir", str(tmp_path), "--seed", "0", "1"]
    for more in ([], ["2", "--experiment_minutes", "1e-9"]):
        runner.train_and_conclude(Late(ArmSchedule(parse_args([*words, *more]))))
    found = json.loads((tmp_path / "experiment.json").read_text())
    assert any(arm["status"] == "waiting" for arm in found["arms"])
    assert "lora_x2: left out, because it was not measured within 3 s; measure more often" in found["notes"]


def test_an_average_takes_as_long_as_the_training_of_its_checkpoints(tmp_path):
    """It may be the reference; one that has no measurement within the time is left out, with a note."""
    words = "--method lora lora_x2 --learning_rate 1e-4 --seed 0 1 --compare_at time --average_checkpoints"
    flags = [*words.split(), "last:2,last:3", "--reference", "lora last:2", "--output_dir", str(tmp_path)]
    runner.train_and_conclude(Timed(ArmSchedule(parse_args(flags))))
    found = json.loads((tmp_path / "experiment.json").read_text())
    times = {"lora": 3, "lora last:2": 3, "lora last:3": 3, "lora_x2": 1}
    assert {label: choice["step"] for label, choice in found["chosen"].items()} == times
    note = "compared at equal training time, that of lora last:2, 3 s: lora at step 3, lora_x2 at step 1, "
    assert any(each.startswith(note) for each in found["notes"])
    for name in ("lora_x2 last:2", "lora_x2 last:3"):
        assert f"{name}: left out, because it was not measured within 3 s; measure more often" in found["notes"]
    assert {(verdict["label"], verdict["reference"]) for verdict in found["verdicts"]} == {
        ("lora", "lora last:2"), ("lora_x2", "lora last:2"), ("lora last:3", "lora"),
    }  # fmt: skip
