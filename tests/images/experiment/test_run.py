"""Experiments from the command line: arms equal single runs, are trained once, and survive a kill."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from experiment.documented import unlike
from launching import forked
from pipelines import image_folder, tiny_dino
from safetensors import safe_open
from safetensors.torch import load_file

from images.runs import (
    SCRIPT,
    Watcher,
    assert_same,
    load_images,
    main,
    only,
    printed,
    refused,
    without,
)
from reslora.errors import InvalidArgument
from reslora.experiment.arms import Arm
from reslora.images.data.samples import losses_of
from reslora.images.denoising import DenoisingLoss
from reslora.images.experiment import arm_study as judging
from reslora.images.experiment import run
from reslora.images.experiment.split import content_of, parts_of
from reslora.images.settings import parse_args
from reslora.images.study import ImageStudy
from reslora.io import read_object
from reslora.options.images import TrainingOptions
from reslora.runtime.log import read_log
from reslora.runtime.status import Status
from reslora.training.checkpoints import Identity
from reslora.training.schedule import Schedule

SMALL = ("--method", "lora", "--learning_rate", "1e-2", "3e-2", "--no-racing")
WHOLE = ("--method", "lora", "reslora", "--learning_rate", "1e-2", "--seed", "0", "1", "--shortcut", "block")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images") / "images", count=8)


@pytest.fixture(scope="module")
def flags(model, images, tmp_path_factory) -> list[str]:
    """Flags of two steps, each with a checkpoint that may be chosen; the cache is shared."""
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(images), "--resolution", "32"),
        *("--max_train_steps", "2", "--validation_steps", "1", "--train_batch_size", "2", "--rank", "2"),
        *("--num_validation_images", "0", "--num_inference_steps", "1", "--merge_calibration_samples", "2"),
        *("--report_to", "none", "--select_split", "0.2", "--test_split", "0.2"),
        *("--caption_prefix", "sks", "--validation_prompt", "a disc"),  # no image's caption is known as it stands
        *("--cache_dir", str(tmp_path_factory.mktemp("cache"))),
        *("--metric_model", str(tiny_dino(tmp_path_factory.mktemp("dino") / "model"))),
    ]


@pytest.fixture(scope="module")
def small(flags, tmp_path_factory) -> Path:
    """Plain LoRA at two rates; the time limit was reached after the first, and the same command resumed."""
    output = tmp_path_factory.mktemp("small") / "out"
    lines = printed(*flags, *SMALL, "--output_dir", output, "--experiment_minutes", "0.0001")
    line = "not finished: 1 of 2 runs is still to be trained after --experiment_minutes 0.0001"
    only(lines, f"{line}; run the same command to resume for as long again")
    assert [a["status"] for a in experiment(output)["arms"]] == ["waiting", "finished"]
    printed(*flags, *SMALL, "--output_dir", output)  # without a limit this time
    chosen = experiment(output)["chosen"]["lora"]
    files = json.loads((arm(output, rate=f"{chosen['learning_rate']:g}") / "exports.json").read_text())
    assert files["exported_step"] == chosen["step"] and files["read_back"]
    return output


EXPORTED: list[tuple[int, ImageStudy]] = []
"""The step and the study of the arm that `whole` has exported."""
MERGES: list[str] = []
"""The methods of the arms that `whole` has merged, one for each merge."""


@pytest.fixture(scope="module")
def whole(flags, small, tmp_path_factory) -> tuple[Path, list[str]]:
    """The experiment `small`, extended by a method and a seed at one of its rates; and the printed lines."""

    def export(experiment: run.ImageExperiment, arm: Arm, step: int) -> list[str]:
        EXPORTED.append((step, experiment.study_of(arm)))
        return plain_export(experiment, arm, step)

    def merge(parts, method, *given):
        MERGES.append(method)
        return plain(parts, method, *given)

    plain, plain_export = judging.as_plain_lora, run.ImageExperiment.export
    output = shutil.copytree(small, tmp_path_factory.mktemp("whole") / "out", copy_function=shutil.copy2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.ImageExperiment, "export", export)
        patch.setattr(judging, "as_plain_lora", merge)
        return output, printed(*flags, *WHOLE, "--output_dir", output)


def experiment(output: Path) -> dict:
    """Return the record, whose keys and types are those of the documents."""
    found = json.loads((output / "experiment.json").read_text())
    assert unlike(found) == []
    return found


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def of_a_plain_run(flags: list[str]) -> list[str]:
    """Return the flags without those that only experiments use; the run generates no samples."""
    return without([flag for flag in flags if flag not in ("--select_split", "--test_split", "0.2")], "--metric_model")


def arm(output: Path, method: str = "lora", rate: str = "0.01", seed: int = 0) -> Path:
    return output / method / f"lr-{rate}" / f"seed-{seed}"


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_what_an_experiment_leaves(whole):
    output, lines = whole
    found = experiment(output)
    assert [(a["label"], a["learning_rate"], a["seed"], a["status"]) for a in found["arms"]] == [
        (label, 0.01, seed, "finished") for label in ("lora", "reslora") for seed in (0, 1)
    ]
    assert len(found["timesteps"]) == 8 and found["settings"]["seed"] == [0, 1]
    split = found["split"]
    assert split["train"] + split["select"] + split["test"] == 8 and split["duplicates"] == 0
    only(lines, "4 runs", f"{split['train']} for training", f"{split['test']} in the test split")
    for one in found["arms"]:
        assert sorted(one["select_by_step"]) == ["1", "2"] and one["memory_bytes"] > 0 and one["seconds"] > 0
        assert len(one["test"]["losses"]) == split["test"] and len(one["test"]["by_timestep"]) == 8
        drawn = one["test"]["similarities"]
        assert set(drawn) == {"image_similarity", "nearest_training", "unrelated_similarity", "diversity"}
        assert all(0 < drawn[name] < 1 + 1e-5 for name in ("nearest_training", "unrelated_similarity", "diversity"))
        folder = output / one["folder"]
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
        assert sorted(path.name for path in (folder / "adapters").iterdir()) == ["step-000001", "step-000002"]
        assert (folder / "kohya.safetensors").is_file() and not (folder / "unet").exists()
        assert one["file_bytes"] > 0 and list(one["seconds_by_step"]) == ["1", "2"] and one["values"] == {}
    assert {path.stem for path in (output / "test_images").iterdir()} == set(found["base"]["images"])
    report = (output / "report.html").read_text()
    assert report.count('alt="test image ') == split["test"]
    assert (
        all(0 < one["measuring_seconds"] < one["wall_seconds"] for one in found["arms"]) and found["test_seconds"] > 0
    )
    assert re.search(r"<p>Time: training \d+ s, measuring \d+ s, tests and exports \d+ s\.</p>", report)
    assert [verdict["label"] for verdict in found["verdicts"]] == ["reslora"]
    only(lines, found["verdicts"][0]["sentence"])
    assert lines[-1] == str(output / "report.html") and (output / "report.html").is_file()


def test_the_file_on_top_is_of_the_arm_that_the_select_images_choose(whole):
    output, lines = whole
    found = experiment(output)
    label, choice = min(found["chosen"].items(), key=lambda item: item[1]["loss"])
    arms = [a for a in found["arms"] if a["label"] == label]
    best = min(arms, key=lambda a: a["select_by_step"][str(choice["step"])])
    only(lines, f"and peft/ are those of {best['folder']}", f"step {choice['step']}")
    assert found["best"] == {
        "label": label, "learning_rate": best["learning_rate"], "seed": best["seed"], "folder": best["folder"],
        "step": choice["step"], "files": ["kohya.safetensors", "pytorch_lora_weights.safetensors", "peft"],
        "options": {"method": label, "learning_rate": 0.01, "seed": best["seed"]},
    }  # fmt: skip
    for name in ("kohya.safetensors", "pytorch_lora_weights.safetensors"):
        with safe_open(output / name, "pt") as file:
            metadata = file.metadata()
        assert (metadata["ss_seed"], metadata["ss_steps"]) == (str(best["seed"]), str(choice["step"]))


@pytest.mark.exhaustive
def test_the_test_losses_are_those_of_the_file_in_stock_diffusers(whole, model):
    output, _ = whole
    ((_, study),) = EXPORTED
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    loss = DenoisingLoss(study.context, study.training_data.objective, study.pipeline, pipeline.unet.config)
    (folder,) = (study.context.folder_of(method) for method in study.context.options.adapter.method)
    record, marks = read_object(folder / "test.json"), list(study.training_data.sources[0].images.marks)
    images = [(0, marks.index(mark)) for mark in record["images"]]

    def measured() -> torch.Tensor:
        return losses_of(
            lambda batch: loss(pipeline.unet, batch, weighted=False), study.training_data, images, run.TEST_NOISES
        )

    base = measured()
    assert base.mean(1).tolist() == pytest.approx(experiment(output)["base"]["losses"], rel=1e-4)
    pipeline.load_lora_weights(output)
    found = measured()
    assert found.mean(1).tolist() == pytest.approx(record["losses"], rel=1e-4)
    assert found.mean(0).tolist() == pytest.approx(record["by_timestep"], rel=1e-4)
    assert base.mean(0).tolist() != pytest.approx(record["by_timestep"], rel=1e-4)


def test_added_methods_and_seeds_train_the_new_arms_alone(small, whole):
    output, lines = whole
    for rate in ("0.01", "0.03"):
        before, there = (files(arm(folder, rate=rate)) for folder in (small, output))
        trained = [name for name in before if name.startswith(("adapters", "checkpoint", "log", "arm"))]
        assert len(trained) > 4 and all(there[name] == before[name] for name in trained)
    assert sum(line.startswith("run ") for line in lines) == 3
    compared = [arm["folder"] for arm in experiment(output)["arms"] if (output / arm["folder"] / "peft").exists()]
    assert len(compared) == 4 and all("0.01" in folder for folder in compared)
    only(lines, "left out: 1 run of other methods")
    assert experiment(output)["readings"] == 1 and not any("were read" in line for line in lines)  # one seed reads none


def test_an_experiment_of_lora_accepts_any_shortcut_of_an_added_method(flags, small, whole, tmp_path):
    """LoRA uses neither --shortcut nor --merge, so their defaults in the record do not count."""
    added = (*SMALL, "--method", "lora", "reslora", "--shortcut", "block", "--merge", "none")
    run.check_folder(parse_args([*flags, *added, "--output_dir", str(small)]))
    for there, value in ((whole[0], "--shortcut input"), (small, "--rank 4")):
        with pytest.raises(InvalidArgument, match=value):
            run.check_folder(parse_args([*flags, *added, "--output_dir", str(there), *value.split()]))


# -- arms are plain runs -----------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_an_arm_is_a_plain_run_on_the_images_to_train_on(flags, whole, images, tmp_path):
    """Bit for bit, also if a seed has its own random crops."""
    method = "reslora"
    output, _ = whole
    plain = of_a_plain_run(flags)
    folder = train_images(output, images, tmp_path / "images")
    plain[plain.index("--train_data_dir") + 1] = str(folder)
    own = ("--method", method, "--shortcut", "block", "--learning_rate", "1e-2", "--seed", 0)
    assert main(*plain, *own, "--output_dir", tmp_path / "out") == 0
    mine = arm(output, method, seed=0)
    assert_same(weights(mine), weights(tmp_path / "out" / method))
    one, other = (
        [(row["step"], row["loss"]) for row in read_log(place / "log.jsonl") if row["split"] == "train"]
        for place in (mine, tmp_path / "out" / method)
    )
    assert one == other
    for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        assert (mine / name).read_bytes() == (tmp_path / "out" / method / name).read_bytes()


def weights(folder: Path) -> dict:
    """Return what a method or an arm has trained."""
    (path,) = (path for path in (folder / "checkpoint-2").glob("*.safetensors"))
    return load_file(path)


def train_images(output: Path, images: Path, folder: Path) -> Path:
    """Return a folder with only the images that an experiment trains on."""
    held_out = held_out_of(output, images)
    folder.mkdir()
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["file_name"] not in held_out]
    for row in rows:
        shutil.copyfile(images / row["file_name"], folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(rows) == experiment(output)["split"]["train"]
    return folder


def held_out_of(output: Path, images: Path) -> set[str]:
    """Return the files that an experiment does not train on, computed by the split itself."""
    splits = ("--select_split", "0.2", "--test_split", "0.2")
    flags = parse_args(["--train_data_dir", str(images), "--seed", "0", "1", *splits]).base
    found = load_images(flags)
    parts = parts_of({0: found}, flags.data, flags.validation, flags.experiment)
    return {Path(found.rows[number]["image"]["path"]).name for _, number in (*parts.select, *parts.test)}


# -- going on ----------------------------------------------------------------------------------------------------------


def test_nothing_but_methods_rates_and_seeds_may_change(flags, whole, capsys):
    output, _ = whole
    own = [*flags, *WHOLE, "--output_dir", output]
    for other in (
        ("--rank", "4"),
        ("--lora_alpha", "3"),
        ("--test_split", "0.3"),
        ("--max_train_steps", "3"),
        ("--validation_steps", "2"),
        ("--train_batch_size", "1"),
        ("--merge", "weights"),
        ("--shortcut", "input", "block"),
        ("--no-cache_latents",),
    ):
        line = refused(capsys, *own, *other)
        assert "another --output_dir" in line and (other[0] in line or "batch" in line or "cache_latents" in line)
    begun = flags[flags.index("--metric_model") + 1]
    line = refused(capsys, *without(flags, "--metric_model"), *WHOLE, "--output_dir", output)
    assert f"--metric_model none: {output} was started with {begun}; use that" in line
    plain = of_a_plain_run(flags)
    assert "contains an experiment" in refused(capsys, *plain, "--method", "lora", "--output_dir", output)


@pytest.mark.exhaustive
def test_other_images_are_refused(flags, whole, capsys, tmp_path):
    output, _ = whole
    own = [*flags, *WHOLE, "--output_dir", output]
    own[own.index("--train_data_dir") + 1] = str(image_folder(tmp_path / "more", count=9))
    assert "9 images" in refused(capsys, *own, quiet=False)
    noted = output / "images.json"  # what was used of the same ones
    content = noted.read_text()
    noted.write_text(content.replace("8 images", "7 images"))
    assert "trained on 7 images" in refused(capsys, *flags, *WHOLE, "--output_dir", output, quiet=False)
    noted.write_text(content)


def test_another_split_of_the_images_is_refused(images, tmp_path):
    grid = parse_args(["--train_data_dir", str(images), "--output_dir", str(tmp_path), "--seed", "0", "1"])
    flags = grid.base
    found = {0: load_images(flags)}
    parts = parts_of(found, flags.data, flags.validation, flags.experiment)
    fewer, other = dataclasses.replace(parts, train=parts.train[1:]), dataclasses.replace(parts, test=parts.train[:1])
    run.check_same(grid, None, content_of(parts, found))  # there is nothing yet
    identity = run.identity_record(grid, Identity("model", "images", "--model", "--images"))
    record = {"identity": identity | {"parts": content_of(parts, found)}, "arms": []}
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    run.check_same(grid, None, content_of(parts, found))
    for wrong in (fewer, other):
        with pytest.raises(InvalidArgument, match=r"started with another split of these images.*; choose another$"):
            run.check_same(grid, None, content_of(wrong, found))


def test_a_plain_run_does_not_become_an_experiment(flags, capsys, tmp_path):
    (tmp_path / "out" / "lora").mkdir(parents=True)
    (tmp_path / "out" / "lora" / "exports.json").write_text("{}")
    assert "not an experiment" in refused(capsys, *flags, *SMALL, "--output_dir", tmp_path / "out")


@pytest.mark.exhaustive
def test_killed_at_bad_moments(runs, images, tmp_path):
    """Within an arm, before it is recorded as ended, between two arms, and while test losses are written.

    The same command resumes.
    """
    words = "--learning_rate 1e-2 3e-2 --seed 0 1 --method lora --max_train_steps 2 --validation_steps 1"
    own = [*words.split(), "--num_validation_images", "0", "--train_data_dir", str(images)]
    own += ["--cache_dir", str(tmp_path / "cache")]
    output, snapshots = tmp_path / "out", tmp_path / "snapshots"
    snapshots.mkdir()
    assert runs.finish(output, *own, watcher=Watcher(output, snapshots)) == 0
    found = sorted(snapshots.iterdir())
    for moment, last in (("step-000001", False), ("os.rename-arm.json", False), ("os.rename-test.json", True)):
        snapshot = [path for path in found if moment in path.name][-1 if last else 0]
        ended = {path: path.stat().st_mtime_ns for path in snapshot.glob("*/*/*/arm.json")}
        assert runs.finish(snapshot, *own) == 0
        assert {path: path.stat().st_mtime_ns for path in ended} == ended
        assert same_results(snapshot) == same_results(output)
        assert not [path for path in snapshot.rglob(".*") if path.name != ".gitignore"]


def same_results(output: Path) -> dict:
    """Compare experiment.json without times."""
    found = experiment(output)
    times = ("seconds", "wall_seconds", "measuring_seconds", "seconds_by_step", "memory_bytes")
    arms = [{key: value for key, value in arm.items() if key not in times} for arm in found["arms"]]
    return {name: found[name] for name in ("split", "chosen", "verdicts", "readings")} | {"arms": arms}


@pytest.mark.exhaustive
def test_an_arm_that_diverges_has_ended_and_the_others_go_on(flags, tmp_path):
    own = [*flags, "--method", "lora", "--learning_rate", "1e-2", "1e30", "--output_dir", tmp_path / "out"]
    lines = printed(*own)
    found = experiment(tmp_path / "out")
    assert [(a["status"], bool(a["reason"])) for a in found["arms"]] == [("finished", False), ("failed", True)]
    assert found["chosen"]["lora"]["learning_rate"] == 0.01
    assert "--output_dir" not in only(lines, "loss", "at step", "lr-1e+30")
    assert not any("lr-1e+30" in line for line in printed(*own) if "exporting" in line)


@pytest.mark.parametrize(
    ("steps", "batch", "racing", "before", "every"),
    [(200, 16, True, None, 40), (20, 16, True, None, 5), (2000, 16, False, None, 500)],
)
def test_measuring_takes_a_part_of_the_time_of_training(steps, batch, racing, before, every):
    schedule = Schedule(steps, 1 if racing else 500, 0, by_epochs=False)
    options = TrainingOptions(train_batch_size=batch)
    assert run.with_default_evaluations(schedule, options, racing, 240, before).validation_steps == every


RACE = ("--method", "lora", "--learning_rate", "1e-4", "0.3", "--max_train_steps", "8", "--validation_steps", "2")
"""The model is not trained yet, and so the higher rate is better from the first step on."""


@pytest.mark.exhaustive
def test_a_race_stops_a_run_early_and_says_so(flags, tmp_path, capsys):
    """The same command trains nothing again; the estimate is printed after six steps."""
    own = [*flags, *RACE, "--output_dir", tmp_path / "out"]
    lines = printed(*own)
    only(lines, "2 runs, 2 to choose learning rates; 8 steps, measured every 2 steps")
    only(lines, "estimate: at most ", " for 2 runs (", " of training, ", " of tests and exports)", "GiB")
    only(lines, "run 2 of 2, about ", " min left: lora/lr-0.0001/seed-0")
    line = only(lines, "lora/lr-0.0001/seed-0: stopped early at step 4: selection", "% above that of learning rate 0.3")
    low, _ = experiment(tmp_path / "out")["arms"]
    assert (low["status"], low["steps"]) == ("stopped", 4) and line.endswith(low["reason"])
    report = (tmp_path / "out" / "report.html").read_text()
    assert low["reason"] in report and "A dot off the line is a run that was stopped early" in report
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("log.jsonl")}
    printed(*own)
    assert {path: path.stat().st_mtime_ns for path in logs} == logs
    refusal = refused(capsys, *own, "--no-racing")
    assert "--racing" in refusal and "was begun with racing" in refusal


@pytest.mark.exhaustive
def test_arms_at_once_are_those_of_one_after_the_other(flags, small, whole, tmp_path, monkeypatch, capfd):
    """To the last bit, with tests and exports: each process has as many threads as the tests."""
    told, threads = [], torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2 * threads)  # of which each process has half
    monkeypatch.setattr(Status, "say", lambda self, what, name="": told.append(what))
    monkeypatch.setattr(judging, "saved_parts", None)  # the main process loads no arm
    output = shutil.copytree(small, tmp_path / "out", copy_function=shutil.copy2)
    assert main(*flags, *WHOLE, "--arms_at_once", "2", "--output_dir", output) == 0
    ended = [f"training, {number} of 4 runs ended" for number in range(1, 4)]
    assert [what for what in told if what.startswith("training,")] == ended
    phases = [f"testing and exporting ({number} of 4)" for number in range(1, 5)]
    assert [what for what in told if what.startswith("testing")] == phases
    out = capfd.readouterr().out
    assert "base model: testing" in out and out.count(" of 4)\n") == 4
    assert same_results(whole[0]) == same_results(output)
    assert experiment(whole[0])["best"] == experiment(output)["best"]
    written = [path.relative_to(output) for path in output.rglob("*.safetensors") if "checkpoint" not in str(path)]
    written += [path.relative_to(output) for name in ("test.json", "merge.json") for path in output.rglob(name)]
    assert len(written) > 4 * 4
    for path in written:
        if "cache" not in path.parts:
            assert (output / path).read_bytes() == (whole[0] / path).read_bytes(), path


@pytest.mark.exhaustive
def test_a_plan_times_the_first_steps_and_leaves_no_files(flags, tmp_path, monkeypatch):
    """It prints the same lines as the experiment itself, by the same function."""
    places = tmp_path / "temporary"
    places.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(places))
    cache = Path(flags[flags.index("--cache_dir") + 1])
    before = files(cache)
    lines = printed(*flags, *SMALL, "--output_dir", tmp_path / "out", "--plan")
    only(lines, "2 runs, 2 to choose learning rates; 2 steps each") and only(lines, "planned memory in ")
    line = only(lines, "estimate: ", " for 2 runs (", " of training, ", " of measurements, ", " of tests and exports)")
    assert line == lines[-1]
    assert files(cache) == before and list(tmp_path.iterdir()) == [places] and not list(places.iterdir())


@pytest.mark.exhaustive
def test_two_processes_train_what_one_does(flags, small, tmp_path):
    """With half of the batch each; equal up to rounding."""
    own = [*flags, *SMALL, "--output_dir", str(tmp_path / "out")]
    own[own.index("--train_batch_size") + 1] = "1"
    forked(SCRIPT, *own, folder=tmp_path)
    one, two = experiment(small), experiment(tmp_path / "out")
    assert one["split"] == two["split"] and len(two["arms"]) == 2
    for mine, other in zip(one["arms"], two["arms"], strict=True):
        assert mine["select_by_step"] == pytest.approx(other["select_by_step"], rel=1e-4)
        assert (mine["test"] is None) == (other["test"] is None)
        if mine["test"]:
            assert mine["test"]["losses"] == pytest.approx(other["test"]["losses"], rel=1e-4)


def test_a_damaged_record_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "experiment.json").write_text('{"format": 1, "readings"')
    with pytest.raises(InvalidArgument, match=rf"^--output_dir {tmp_path}: experiment.json is damaged; "):
        run.check_same(parse_args(["--output_dir", str(tmp_path), "--seed", "0", "1"]))


@pytest.mark.exhaustive
def test_arms_that_vary_are_trained_with_their_own_values(flags, tmp_path):
    """Loss weights, batches and optimizer state equal those of the same run without --vary."""
    own = [*without(flags, "--train_batch_size"), "--method", "lora", "--learning_rate", "1e-2"]
    words = ("--vary", "train_batch_size=2,1", "snr_gamma=0,5")
    lines = printed(*own, *words, "--seed", "0", "1", "--output_dir", tmp_path / "varied")
    found = experiment(tmp_path / "varied")
    note = "train_batch_size varies: runs with the same seed do not share the images of a step and their noise"
    assert sum(note in line for line in found["notes"]) == 1 and any(note in line for line in lines)
    names = [f"lora train_batch_size={size} snr_gamma={gamma}" for size in (2, 1) for gamma in (0, 5)]
    assert list(found["chosen"]) == names and found["references"] == names
    effects = {"train_batch_size=2", "snr_gamma=0", "the sum of both effects"}
    assert {verdict["reference"] for verdict in found["verdicts"]} == effects and len(found["verdicts"]) == 3
    words = ("--train_batch_size", "1", "--snr_gamma", "5", "--seed", "0", "1")
    printed(*own, *words, "--output_dir", tmp_path / "plain")
    place = "seed-1/adapters/step-000002/adapter.safetensors"
    plain = load_file(tmp_path / "plain" / "lora" / "lr-0.01" / place)
    for size, gamma in ((2, 5), (1, 0), (1, 5)):
        folder = tmp_path / "varied" / "lora" / f"train_batch_size-{size}" / f"snr_gamma-{gamma}" / "lr-0.01"
        varied = load_file(folder / place)
        assert all(plain[name].equal(varied[name]) for name in plain) == ((size, gamma) == (1, 5))
    words = ("--vary", "train_batch_size=2,1", "snr_gamma=0,4", "--seed", "0", "1")
    assert main(*own, *words, "--output_dir", tmp_path / "varied") == 2


@pytest.mark.exhaustive
def test_pissa_leaves_the_base_model_to_the_next_arm(flags, tmp_path):
    words = ["--learning_rate", "1e-2", "--seed", "0", "1", "--no-racing"]
    together, alone = tmp_path / "together", tmp_path / "alone"
    varied = ["--method", "lora", "reslora", "--vary", "init_lora_weights=pissa,gaussian"]
    assert main(*flags, *words, *varied, "--output_dir", together) == 0
    assert main(*flags, *words, "--method", "lora", "--output_dir", alone) == 0
    found = experiment(together)
    assert {entry["status"] for entry in found["arms"]} == {"finished"} and len(found["arms"]) == 6
    names = ["lora init_lora_weights=pissa", "lora init_lora_weights=gaussian", "reslora"]
    assert {entry["label"] for entry in found["arms"]} == {*names}
    for seed in (0, 1):
        folders = together / "lora/init_lora_weights-gaussian", alone / "lora"
        rows = [read_log(folder / f"lr-0.01/seed-{seed}/log.jsonl") for folder in folders]
        losses = [[(row["step"], row["split"], row["loss"]) for row in log] for log in rows]
        # The base model is measured once, here with PiSSA's factors, whose sum is the base weight but for rounding.
        (*_, measured), (*_, before) = losses[0].pop(0), losses[1].pop(0)
        assert measured == pytest.approx(before, rel=1e-5) and losses[0] == losses[1]
