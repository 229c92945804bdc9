"""The schedule of an experiment, on folders that look as after training."""

import json
import math
import shutil

import pytest

from reslora.errors import InvalidArgument
from reslora.experiment.arms import Arm
from reslora.experiment.choice import choose
from reslora.experiment.schedule import ArmSchedule
from reslora.images.settings import parse_args

RATES = ("--learning_rate", "2e-4", "1e-4", "4e-4")


@pytest.fixture
def schedule(tmp_path):
    """Return a new schedule in the same folder, as a new start has it."""
    return lambda *flags: ArmSchedule(
        parse_args(["--output_dir", str(tmp_path / "out"), "--rank", "2", *RATES, *flags])
    )


def leave(schedule: ArmSchedule, arm: Arm, best: float = 2e-4, seconds: float = 3.0, wall: float = 5.0) -> None:
    """Write the files of an ended arm: the nearer its rate is to `best`, the lower are its losses.

    They are lowest at the second measurement, at step 4; training losses are lower than all.
    """
    loss, folder = abs(math.log(arm.rate / best)) + 1, schedule.folder_of(arm)
    folder.mkdir(parents=True, exist_ok=True)
    looks = {0: loss + 1, 2: loss + 1, 4: loss, 6: 99 - loss}
    found = [(step, "train", 0.1) for step in range(1, 7)]
    found = sorted([*found, *((step, "validation", look) for step, look in looks.items())])
    rows = [{"step": step, "split": split, "loss": value, "seconds": seconds} for step, split, value in found]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    schedule.end(arm, "", 100, wall)


def run(schedule: ArmSchedule, best: float = 2e-4, most: int = 1000) -> list[Arm]:
    """Run up to `most` arms, one after the other."""
    found: list[Arm] = []
    while len(found) < most and (arm := schedule.next_arm()):
        leave(schedule, arm, best)
        found.append(arm)
    return found


def test_a_new_start_goes_on_where_the_last_one_was(schedule):
    whole = [(arm.label, arm.rate, arm.seed) for arm in run(schedule("--seed", "0", "1"))]
    assert len(whole) == len(set(whole)) == 2 * (3 + 1)


def test_the_first_seed_chooses_the_rate_and_the_others_are_trained_at_it(schedule):
    one = schedule("--seed", "7", "0", "1")
    assert one.choosing == [7] and len(one.arms()) == 2 * (3 + 2)
    assert [arm.rate for arm in one.arms() if arm.seed == 0] == [2e-4, 2e-4]  # the middle one, until one is chosen
    done = run(one, best=4e-4)
    assert [(arm.label, arm.rate, arm.seed) for arm in done[6:]] == [
        (label, 4e-4, seed) for seed in (0, 1) for label in ("lora", "reslora")
    ]
    assert {arm.seed for arm in done[:6]} == {7} and set(one.arms()) == set(done)
    assert schedule("--seed", "7", "0", "1", "2", "3", "4").choosing == [7, 3]
    leave(one, Arm("lora", 1e-4, 0))  # of a version that trained every seed at every rate
    assert Arm("lora", 1e-4, 0) in one.arms() and len(one.arms()) == len(done) + 1


def test_records_say_what_has_become_of_arms(schedule):
    one = schedule()
    (arm,) = run(one, most=1)
    one.running = {one.next_arm()}
    found = {(record["label"], record["learning_rate"]): record for record in map(one.record, one.arms())}
    done = found["lora", 2e-4]
    assert (done["folder"], done["status"], done["memory_bytes"]) == ("lora/lr-0.0002/seed-0", "finished", 100)
    assert done["select_by_step"] == {"2": 2.0, "4": 1.0, "6": 98.0} and (done["steps"], done["seconds"]) == (6, 3.0)
    assert done["wall_seconds"] == 5.0 and found["reslora", 2e-4]["wall_seconds"] is None
    assert done["shortcut"] is None and done["rank"] == 2 and arm.label == "lora"
    assert found["reslora", 2e-4]["status"] == "running" and found["reslora", 2e-4]["shortcut"] == "input"
    assert found["lora", 1e-4]["status"] == "waiting"


def test_an_arm_that_diverged_does_not_keep_the_others_from_theirs(schedule):
    """However low its loss was before it diverged, and whether or not it has a loss."""
    one = schedule("--no-racing")
    arm = one.next_arm()
    one.end(arm, "the loss is not finite at step 1", 100, 5.0)
    diverged = one.next_arm()
    leave(one, diverged)
    one.end(diverged, "the loss is not finite at step 7", 100, 5.0)
    assert one.losses() == {arm: math.inf, diverged: math.inf} and len(run(schedule("--no-racing"))) == 4


@pytest.mark.parametrize("kill", [1, 9])
def test_rates_are_extended_for_all_and_found_again_after_a_kill(schedule, kill):
    """The best rate is above the grid: at most three more rates, for the other method as well."""
    own = ("--extend_rates",)
    done = run(schedule(*own), best=1.0, most=kill)
    again = schedule(*own)
    done += run(again, best=1.0)
    assert again.grids == {name: [1e-4, 2e-4, 4e-4, 8e-4, 16e-4, 32e-4] for name in ("lora", "reslora")}
    assert len(done) == 12 and set(done) == set(again.arms())
    assert schedule(*own).grids == again.grids
    assert schedule().grids == {name: [1e-4, 2e-4, 4e-4] for name in ("lora", "reslora")}


def test_after_the_time_limit_no_arm_begins_but_the_first(schedule):
    one = schedule("--experiment_minutes", "10")
    one.began -= 601
    assert one.next_arm() is not None
    one.has_trained = True
    assert one.next_arm() is None
    one.began += 2
    assert one.next_arm() is not None


def test_the_expected_time_includes_tests_and_exports(schedule):
    """Each compared arm takes 100 seconds for tests and exports."""
    one = schedule()
    assert one.minutes_left() is None
    arm = one.next_arm()
    leave(one, arm)
    one.end(arm, "", None, 5.0, to_conclude=100.0)
    conclusion = 100.0 * len(one.labels) * len(one.seeds)
    assert one.minutes_left() == pytest.approx(((len(one.arms()) - 1) * 5.0 + conclusion) / 60)


# -- averages of checkpoints -----------------------------------------------------------------------------------------


AVERAGES = ("--average_checkpoints", "ema:0.5,last:2")


def test_averages_follow_the_runs_that_they_average_at_the_learning_rate_that_is_chosen(schedule):
    """They do not take part in the choice, and a kill does not change the order."""
    flags = ("--method", "lora", "--seed", "0", "1", *AVERAGES)
    one = schedule(*flags)
    assert one.grids == {"lora": [1e-4, 2e-4, 4e-4]} and len(one.trained_arms()) == 3 + 1
    assert one.runs_in_words() == "at most 8 runs, 3 to choose learning rates, 4 averages without training"
    done = run(one, best=4e-4, most=6) + run(schedule(*flags), best=4e-4)
    averages = [(name, 4e-4, seed) for seed in (0, 1) for name in ("lora ema:0.5", "lora last:2")]
    (trained,) = (arm for arm in done if arm.seed == 1 and arm.label == "lora")
    assert [(arm.label, arm.rate, arm.seed) for arm in done[3:] if arm != trained] == averages
    assert done.index(trained) == 5 and schedule(*flags).next_arm() is None
    one = schedule(*flags)
    average, source = one.average_of(done[-1])
    assert one.source_of(done[-1]) == trained and source == one.folder_of(trained)
    assert average.weights(3) == [0, 0.5, 0.5] and one.average_of(trained) is None
    assert one.name_of(done[-1]) == "lora/average_checkpoints-last-2/lr-0.0004/seed-1"
    record = one.record(done[-1])
    assert (record["average_of"], record["seconds"], record["steps"]) == ("lora", 0.0, 6)
    assert "average_of" not in one.record(trained) and one.options_of(done[-1]) == one.options_of(trained)
    assert choose(map(one.record, one.arms()), one.choosing)["lora last:2"]["learning_rate"] == 4e-4


def test_an_average_waits_for_the_run_that_it_averages(schedule):
    """With several arms at once: the run of one seed is still running when that of the next seed has ended."""
    one = schedule("--method", "lora", "--seed", "0", "1", "2", *AVERAGES)
    run(one, most=5)
    running = one.next_arm()
    one.running = {running}
    assert [(arm.seed, arm.label) for arm in run(one)] == [(2, "lora"), (2, "lora ema:0.5"), (2, "lora last:2")]
    one.running = set()
    leave(one, running)
    assert [(arm.seed, arm.label) for arm in run(one)] == [(1, "lora ema:0.5"), (1, "lora last:2")]


# -- the race ----------------------------------------------------------------------------------------------------------


FIVE = ("--method", "lora", "lora_x2", "--learning_rate", "1e-4", "2e-4", "4e-4", "8e-4", "1.6e-3")
BEST = {"lora": 2e-4, "lora_x2": 8e-4}


def measure(schedule: ArmSchedule, arm: Arm, steps: range) -> str:
    """Log an arm's measurements at these steps, until it is stopped; losses rise with the distance of its rate."""
    folder, off = schedule.folder_of(arm), abs(math.log2(arm.rate / BEST[arm.label]))
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        with (folder / "log.jsonl").open("a") as file:
            loss = 1 + 0.1 * off + 1 / step
            file.write(json.dumps({"step": step, "split": "validation", "loss": loss, "seconds": 1.0}) + "\n")
        if reason := schedule.why_stop(arm):
            return reason
    return ""


def compete(schedule: ArmSchedule, most: int = 1000) -> list[tuple[str, float, int]]:
    """Run up to `most` arms; each ends, or is killed after half of its steps."""
    found: list[tuple[str, float, int]] = []
    while len(found) < most and (arm := schedule.next_arm()):
        reason = measure(schedule, arm, range(1, 11))
        schedule.end(arm, reason, 100, 5.0, stopped=bool(reason))
        found.append((arm.label, arm.rate, arm.seed))
    return found


def ends(schedule: ArmSchedule) -> dict[tuple, tuple]:
    """Return how every arm has ended, by label, rate and seed."""
    records = map(schedule.record, schedule.arms())
    return {(each["label"], each["learning_rate"], each["seed"]): (each["status"], each["steps"]) for each in records}


def test_a_race_trains_the_middle_rate_then_outward_and_stops_what_is_worse(schedule):
    one = schedule(*FIVE, "--seed", "0", "1")
    assert one.is_race and len(one.arms()) == 2 * (5 + 1) and one.total_in_words == "at most 12"
    assert one.runs_in_words() == "at most 12 runs, 10 to choose learning rates"
    race = [
        ("lora", 4e-4), ("lora_x2", 4e-4), ("lora", 2e-4), ("lora_x2", 2e-4),
        ("lora", 1e-4), ("lora_x2", 8e-4), ("lora_x2", 1.6e-3),
    ]  # fmt: skip
    assert compete(one) == [(*arm, 0) for arm in race] + [("lora", 2e-4, 1), ("lora_x2", 8e-4, 1)]
    stopped = {("lora", 1e-4, 0): 5, ("lora_x2", 2e-4, 0): 5, ("lora_x2", 1.6e-3, 0): 1}
    assert (
        ends(one) == {arm: ("stopped", stopped[arm]) if arm in stopped else ("finished", 10) for arm in ends(one)}
        and len(ends(one)) == 9
    )
    reason = "stopped early at step 5: selection loss 1.3000, 8.3% above that of learning rate 0.0002"
    assert one.record(Arm("lora", 1e-4, 0))["reason"] == reason and one.total_in_words == "9"
    chosen = choose(map(one.record, one.arms()), one.choosing)
    assert {label: choice["learning_rate"] for label, choice in chosen.items()} == BEST
    assert all(choice["at_end"] is None for choice in chosen.values())


@pytest.mark.parametrize("kill", [1, 4, 8])
def test_a_killed_race_ends_as_one_that_was_not(schedule, tmp_path, kill):
    """A killed arm is resumed by another process, or its last measurement stops it although it has not ended."""
    compete(schedule(*FIVE, "--seed", "0", "1"))
    whole = ends(schedule(*FIVE, "--seed", "0", "1"))
    shutil.rmtree(tmp_path / "out")
    first = schedule(*FIVE, "--seed", "0", "1")
    compete(first, most=kill)
    again = schedule(*FIVE, "--seed", "0", "1")
    if arm := first.next_arm():
        measured = measure(first, arm, range(1, 6))
        assert again.next_arm() == arm and again.why_stop(arm) == measured
        shutil.rmtree(first.folder_of(arm))
    compete(again)
    assert ends(again) == whole


def test_only_the_other_choosing_seeds_train_rates_that_are_nearly_as_good(schedule):
    one = schedule(*FIVE, "--seed", *"01234")
    done = compete(one)
    assert [arm for arm in done if arm[2] == 4] == [("lora", 2e-4, 4), ("lora_x2", 8e-4, 4)]
    assert done.index(("lora", 2e-4, 4)) < done.index(("lora", 2e-4, 1)) and len(done) == 7 + 8


def test_an_experiment_goes_on_as_it_was_begun(schedule, tmp_path):
    """An experiment of a version without racing has no entry."""
    assert not schedule("--no-racing").is_race and schedule().is_race
    assert not schedule("--learning_rate", "1e-4", "--seed", "0", "1").is_race
    many = schedule("--arms_at_once", "3")  # two methods
    assert not many.is_race and many.is_race_off and schedule("--arms_at_once", "3", "--racing").is_race
    file = tmp_path / "out" / "experiment.json"
    file.parent.mkdir(exist_ok=True)
    for identity, races in (({}, False), ({"racing": False}, False), ({"racing": True}, True)):
        file.write_text(json.dumps({"identity": identity}))
        assert schedule().is_race == races and not schedule().is_race_off
        schedule("--racing" if races else "--no-racing").check_racing()
        begun = "with racing" if races else "without racing"
        with pytest.raises(InvalidArgument, match=f"^--racing: .*out was begun {begun}; leave it out, or choose"):
            schedule("--no-racing" if races else "--racing").check_racing()
