"""Experiments from the command line: arms equal single runs, are trained once, and survive a kill."""

import dataclasses
import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from launching import forked
from pipelines import image_folder, tiny_dino
from safetensors import safe_open
from safetensors.torch import load_file

from app.activity import activity
from images.runs import (
    FAMILY,
    SCRIPT,
    Watcher,
    assert_same,
    load_images,
    main,
    only,
    printed,
    read_by,
    refused,
    without,
)
from reslora.errors import InvalidArgument, Stopped
from reslora.experiment.arms import Arm
from reslora.experiment.schedule import ArmSchedule
from reslora.images.context import ImageContext
from reslora.images.data.encoding import Texts
from reslora.images.data.samples import TrainingData, losses_of
from reslora.images.data.size import Size
from reslora.images.data.sources import Source
from reslora.images.denoising import DenoisingLoss
from reslora.images.experiment import arm_study as judging
from reslora.images.experiment import run
from reslora.images.experiment.gallery import samples_of
from reslora.images.experiment.split import content_of, parts_of
from reslora.images.output.reports import ImageReports
from reslora.images.settings import parse_args
from reslora.images.study import ImageStudy
from reslora.io import read_object
from reslora.options.images import TrainingOptions
from reslora.runtime.log import read_log
from reslora.runtime.sample_folders import by_step
from reslora.runtime.signals import StopRequest
from reslora.runtime.status import FILE as STATUS
from reslora.runtime.status import Status
from reslora.training.checkpoints import Identity
from reslora.training.schedule import Schedule

SMALL = ("--method", "lora", "--learning_rate", "1e-2", "3e-2", "--no-racing")
MODEL = "reslora_model.safetensors"
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
    assert files["exported_step"] == chosen["step"] and files["difference_of_255"]
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
    return json.loads((output / "experiment.json").read_text())


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
def test_where_the_best_is_no_plain_lora_no_file_of_an_earlier_choice_stays(flags, small, tmp_path):
    """The PEFT folder is always there."""
    output = shutil.copytree(small, tmp_path / "out", copy_function=shutil.copy2)
    assert (output / "kohya.safetensors").is_file()
    lines = printed(*flags, "--method", "loha", "--learning_rate", "1e-2", "3e-2", "--output_dir", output)
    best = experiment(output)["best"]
    assert (best["label"], best["files"]) == ("loha", ["peft"]) and not list(output.glob("*.safetensors"))
    only(lines, f"peft/ is that of {best['folder']} at step {best['step']}, which does best")
    assert json.loads((output / "peft" / "adapter_config.json").read_text())["peft_type"] == "LOHA"


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


def test_an_arm_is_merged_once_for_its_test_its_samples_and_its_exports(whole):
    """The files in the experiment's folder are copies of the best arm's."""
    output, _ = whole
    assert sorted(MERGES) == ["lora", "lora", "reslora", "reslora"]
    best = experiment(output)["best"]
    for name in best["files"]:
        for path in [output / name] if (output / name).is_file() else (output / name).iterdir():
            copied = output / best["folder"] / path.relative_to(output)
            assert path.read_bytes() == copied.read_bytes()


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


@pytest.mark.exhaustive
def test_a_finished_experiment_trains_nothing_and_says_the_same(flags, whole):
    output, lines = whole
    arms = re.compile("(lora|reslora)/")  # beside what is written anew of the best
    before = {name: time for name, time in files(output).items() if arms.match(name)}
    again = printed(*flags, *WHOLE, "--output_dir", output)
    assert {name: time for name, time in files(output).items() if arms.match(name)} == before
    assert again[-2:] == lines[-2:]


@pytest.mark.exhaustive
def test_an_arm_whose_adapter_is_damaged_is_named_and_trained_anew_once_it_is_removed(flags, whole, tmp_path, capsys):
    output = shutil.copytree(whole[0], tmp_path / "out", copy_function=shutil.copy2)
    folder, own = arm(output, "reslora", seed=1), [*flags, *WHOLE, "--output_dir", output]
    (folder / "test.json").unlink()
    for file in folder.glob("adapters/*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-4])
    assert main(*own) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {folder}: " in line and line.endswith(f"; remove {folder}, then the run is trained again")
    shutil.rmtree(folder)
    assert sum("testing and exporting (" in line for line in printed(*own)) == 1
    (anew,), (before,) = (
        place.glob("adapters/step-000002/*.safetensors") for place in (folder, arm(whole[0], "reslora", seed=1))
    )
    assert_same(load_file(anew), load_file(before))
    assert [a["test"] for a in experiment(output)["arms"]] == [a["test"] for a in experiment(whole[0])["arms"]]


@pytest.mark.exhaustive
@pytest.mark.parametrize("moment", ["test", "export"])
def test_an_experiment_whose_folder_is_moved_while_it_compares_does_not_make_it_anew(
    flags, whole, tmp_path, monkeypatch, capsys, moment
):
    output = shutil.copytree(whole[0], tmp_path / "out", copy_function=shutil.copy2)
    (arm(output, "reslora", seed=1) / ("test.json" if moment == "test" else "exports.json")).unlink()

    def moved(*given):
        output.rename(tmp_path / "moved")
        return plain(*given)

    plain = judging.as_plain_lora
    monkeypatch.setattr(judging, "as_plain_lora", moved)
    assert main(*flags, *WHOLE, "--output_dir", output) == 1
    assert f"--output_dir {output} was moved or removed" in capsys.readouterr().err
    assert not output.exists()


# -- arms are plain runs -----------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize(("method", "seed"), [("reslora", 0), ("lora", 1)])
def test_an_arm_is_a_plain_run_on_the_images_to_train_on(flags, whole, images, tmp_path, method, seed):
    """Bit for bit, also if a seed has its own random crops."""
    output, _ = whole
    plain = of_a_plain_run(flags)
    folder = train_images(output, images, tmp_path / "images")
    plain[plain.index("--train_data_dir") + 1] = str(folder)
    own = ("--method", method, "--shortcut", "block", "--learning_rate", "1e-2", "--seed", seed)
    assert main(*plain, *own, "--output_dir", tmp_path / "out") == 0
    mine = arm(output, method, seed=seed)
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


@pytest.mark.exhaustive
def test_what_is_true_of_several_ranks_and_shortcuts_is_said_once(flags, tmp_path, monkeypatch, capsys):
    def enough(*_):
        raise InvalidArgument("--rank", "is checked", "look at what was said")

    monkeypatch.setattr("reslora.images.run.start_trackers", enough)
    several = ["--method", "reslora", "--rank", "1", "2", "--shortcut", "block", "middle", "--pre_num", "50"]
    assert main(*without(flags, "--rank"), *several, "--output_dir", tmp_path / "out") == 2
    assert capsys.readouterr().out.count("--pre_num 50: ") == 1


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


def test_an_image_that_is_damaged_for_one_seed_alone_is_named(images, tmp_path, monkeypatch):
    settled = parse_args(["--train_data_dir", str(images), "--output_dir", str(tmp_path)])
    source = Source(load_images(settled), object(), tuple(range(8)), (), (Size(32, 32),) * 8)
    training_data = TrainingData((source,), Texts(None, {}), None, {}, FAMILY, **read_by(settled))
    monkeypatch.setattr(run, "latents_of", lambda *_: (object(), {3: "damaged (truncated)"}))
    with pytest.raises(InvalidArgument, match=r"--seed 7, .*/3\.png: damaged"):
        context = ImageContext(settled, None, None, StopRequest())
        run.data_of_variant(training_data, settled.replace(seed=7), None, context)


def test_a_plain_run_does_not_become_an_experiment(flags, capsys, tmp_path):
    (tmp_path / "out" / "lora").mkdir(parents=True)
    (tmp_path / "out" / "lora" / "exports.json").write_text("{}")
    assert "not an experiment" in refused(capsys, *flags, *SMALL, "--output_dir", tmp_path / "out")


def test_what_is_tested_is_said_and_a_stop_is_heeded_before_it(tmp_path):
    schedule = ArmSchedule(parse_args([*SMALL, "--output_dir", str(tmp_path)]))
    context = SimpleNamespace(stop=StopRequest(), status=Status(tmp_path))
    study = SimpleNamespace(context=context)
    experiment = run.ImageExperiment(schedule, study, {}, SimpleNamespace(), "")
    experiment.start_phase("testing (1 of 2)", schedule.arms()[0])
    assert activity(read_object(tmp_path / STATUS)) == "lora/lr-0.01/seed-0, testing (1 of 2)"
    context.stop.signal = signal.SIGTERM
    with pytest.raises(Stopped, match="run the same command to resume"):
        experiment.start_phase("testing (2 of 2)", schedule.arms()[1])


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
def test_averages_are_means_of_the_runs_adapters_and_outlive_a_kill(flags, tmp_path, monkeypatch, capsys):
    """By the formula; killed when an adapter is saved but its loss is not in the log, and resumed: the same bytes."""
    own = [*flags, "--method", "reslora", "--learning_rate", "1e-2", "--seed", "0", "1", "--max_train_steps", "3"]
    own += ["--average_checkpoints", "ema:0.5,last:2"]
    output, killed = tmp_path / "out", tmp_path / "killed"
    lines = printed(*own, "--output_dir", output)
    only(lines, "6 runs, 4 averages without training; 3 steps, measured every 1 step; ")
    found = experiment(output)
    names = ("reslora", "reslora ema:0.5", "reslora last:2")
    assert {(a["label"], a["status"]) for a in found["arms"]} == {(name, "finished") for name in names}
    assert {(v["label"], v["reference"]) for v in found["verdicts"]} == {(name, "reslora") for name in names[1:]}
    means = {"ema-0.5": {2: {1: 1 / 3, 2: 2 / 3}, 3: {1: 1 / 7, 2: 2 / 7, 3: 4 / 7}}}
    means["last-2"] = {2: {1: 0.5, 2: 0.5}, 3: {2: 0.5, 3: 0.5}}
    for name, at_steps in means.items():
        for seed in (0, 1):
            source = arm(output, "reslora", seed=seed)
            average = arm(output, f"reslora/average_checkpoints-{name}", seed=seed)
            assert sorted(path.name for path in (average / "adapters").iterdir()) == ["step-000002", "step-000003"]
            times = {row["step"]: row["seconds"] for row in read_log(source / "log.jsonl") if row["split"] != "train"}
            assert all(row["seconds"] == times[row["step"]] for row in read_log(average / "log.jsonl"))
            label = names[1 if name == "ema-0.5" else 2]
            assert read_object(average / "exports.json")["exported_step"] == found["chosen"][label]["step"]
            for step, weights in at_steps.items():
                mean = load_file(average / "adapters" / f"step-{step:06d}" / "reslora_model.safetensors")
                saved = {
                    at: load_file(source / "adapters" / f"step-{at:06d}" / "reslora_model.safetensors")
                    for at in weights
                }
                for key in [key for key in mean if "lora_" in key]:
                    by_hand = sum(weight * saved[at][key].double() for at, weight in weights.items())
                    assert torch.equal(mean[key], by_hand.float())

    class Killed(Exception):
        pass

    flush = ImageReports.flush

    def die(self):
        if "average" in self.learner.name and self.learner.step == 3:
            raise Killed
        return flush(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ImageReports, "flush", die)
        main(*own, "--output_dir", killed)
    assert len(list(killed.rglob("average*/**/step-000003"))) == 1 and not list(killed.rglob("average*/**/arm.json"))
    printed(*own, "--output_dir", killed)
    assert same_results(killed) == same_results(output)
    written = [path.relative_to(output) for path in output.rglob("average*/**/*.safetensors")]
    assert len(written) > 2 * 2 * 2
    for path in written:
        assert (output / path).read_bytes() == (killed / path).read_bytes(), path
    few = refused(capsys, *own, "--average_checkpoints", "last:4", "--output_dir", tmp_path / "few")
    assert "last:4: averages 4 or more evaluated checkpoints, and a run of 3 steps is evaluated 3 times" in few


@pytest.mark.exhaustive
def test_averages_of_two_processes_and_of_two_runs_at_once_are_those_of_one(flags, tmp_path):
    """Two processes with half the batch each: but for rounding. Two runs at once: to the last bit."""
    own = [*flags, "--method", "reslora", "--learning_rate", "1e-2", "--seed", "0", "1"]
    own += ["--average_checkpoints", "last:2"]
    printed(*own, "--output_dir", tmp_path / "one")
    printed(*own, "--arms_at_once", "2", "--output_dir", tmp_path / "at_once")
    half = [*without(own, "--train_batch_size"), "--train_batch_size", "1", "--output_dir", str(tmp_path / "two")]
    told = forked(SCRIPT, *half, folder=tmp_path)
    assert told.count("4 runs, 2 averages without training") == 1, told
    one, two = experiment(tmp_path / "one"), experiment(tmp_path / "two")
    assert same_results(tmp_path / "at_once") == same_results(tmp_path / "one")
    for mine, other in zip(one["arms"], two["arms"], strict=True):
        assert mine["select_by_step"] == pytest.approx(other["select_by_step"], rel=1e-4)
        assert mine["test"]["losses"] == pytest.approx(other["test"]["losses"], rel=1e-4)
    for seed in (0, 1):
        place = arm(Path(), "reslora/average_checkpoints-last-2", seed=seed) / "adapters/step-000002"
        weights = {name: load_file(tmp_path / name / place / MODEL) for name in ("one", "at_once", "two")}
        assert_same(weights["one"], weights["at_once"])
        saved = [
            load_file(arm(tmp_path / "two", "reslora", seed=seed) / f"adapters/step-00000{step}" / MODEL)
            for step in (1, 2)
        ]
        for name in [name for name in weights["two"] if "lora_" in name]:
            mean = sum(0.5 * state[name].double() for state in saved)
            assert torch.equal(weights["two"][name], mean.float())


@pytest.mark.exhaustive
def test_an_arm_that_diverges_has_ended_and_the_others_go_on(flags, tmp_path):
    own = [*flags, "--method", "lora", "--learning_rate", "1e-2", "1e30", "--output_dir", tmp_path / "out"]
    lines = printed(*own)
    found = experiment(tmp_path / "out")
    assert [(a["status"], bool(a["reason"])) for a in found["arms"]] == [("finished", False), ("failed", True)]
    assert found["chosen"]["lora"]["learning_rate"] == 0.01
    assert "--output_dir" not in only(lines, "loss", "at step", "lr-1e+30")
    assert not any("lr-1e+30" in line for line in printed(*own) if "exporting" in line)


@pytest.mark.exhaustive
def test_switches_and_lists_vary(flags, tmp_path):
    """Each arm equals a single run, also if text encoders are trained and images are mirrored."""
    own = [*flags, "--method", "lora", "--learning_rate", "1e-2", "--seed", "0", "1"]
    vary = ("train_text_encoder=false,true", "random_flip=true,false", "target_modules=to_q,to_q+to_k")
    printed(*own, "--vary", *vary, "--output_dir", tmp_path / "varied")
    found = experiment(tmp_path / "varied")
    assert len(found["arms"]) == 16 and {arm["status"] for arm in found["arms"]} == {"finished"}
    assert len(found["verdicts"]) == 7 and found["arms"][0]["label"].startswith("lora target_modules=to_q train_text_e")
    assert found["settings"]["random_flip"] == [True, False]
    assert found["settings"]["target_modules"] == [["to_q"], ["to_q", "to_k"]]
    words = ("--train_text_encoder", "--no-random_flip", "--target_modules", "to_q", "to_k")
    printed(*own, *words, "--output_dir", tmp_path / "plain")
    place = "seed-1/adapters/step-000002"
    parts = sorted(path.name for path in (tmp_path / "plain" / "lora" / "lr-0.01" / place).rglob("*.safetensors"))
    for encoder, flip, same in (("true", "false", True), ("true", "true", False)):
        folder = f"target_modules-to_q+to_k/train_text_encoder-{encoder}/random_flip-{flip}"
        varied = tmp_path / "varied" / "lora" / folder / "lr-0.01" / place
        assert sorted(path.name for path in varied.rglob("*.safetensors")) == parts and len(parts) == 2
        for path in varied.rglob("*.safetensors"):
            plain = load_file(tmp_path / "plain" / "lora" / "lr-0.01" / place / path.relative_to(varied))
            assert all(plain[name].equal(value) for name, value in load_file(path).items()) == same
    config = ("--config", str(tmp_path / "varied" / "config.json"))
    again = parse_args([*config, "--output_dir", str(tmp_path / "again")])
    assert again.varied["target_modules"] == [["to_q"], ["to_q", "to_k"]] and again.varied["random_flip"] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("steps", "batch", "racing", "before", "every"),
    [
        (200, 16, True, None, 40),  # 1200 samples in five measurements
        (20, 16, True, None, 5),  # not fewer than four
        (2000, 16, True, None, 200),  # not more than ten
        (2000, 16, False, None, 500),  # an epoch
        (100, 16, False, None, 100),  # a part of an epoch
        (200, 16, True, 20, 20),  # as the experiment was begun
    ],
)
def test_measuring_takes_a_part_of_the_time_of_training(steps, batch, racing, before, every):
    schedule = Schedule(steps, 1 if racing else 500, 0, by_epochs=False)
    options = TrainingOptions(train_batch_size=batch)
    assert run.with_default_evaluations(schedule, options, racing, 240, before).validation_steps == every


def test_samples_are_generated_at_the_ends_of_an_arm():
    schedule = Schedule(8, 2, 0, by_epochs=False, sampled=(0, 8))
    assert [step for step in range(9) if schedule.is_sampled(step)] == [0, 8]
    every = dataclasses.replace(schedule, sampled=None)
    assert [step for step in range(9) if every.is_sampled(step)] == [0, 2, 4, 6, 8]


def test_the_base_model_is_sampled_by_the_first_arm_alone(flags, tmp_path):
    """In the gallery, the columns of other methods show the merged model of the chosen step."""
    own = [*flags, *SMALL, "--num_validation_images", "1", "--seed", "0", "1", "--max_train_steps", "3"]
    printed(*own, "--output_dir", tmp_path)
    found = {arm.parent.relative_to(tmp_path).as_posix(): by_step(arm) for arm in tmp_path.rglob("samples")}
    assert len(found) == 3 and sorted(map(sorted, found.values())) == [[0, 3], [3], [3]]
    chosen = experiment(tmp_path)["chosen"]["lora"]
    arms = [arm for arm in experiment(tmp_path)["arms"] if arm["learning_rate"] == chosen["learning_rate"]]
    assert all(samples_of(arm, tmp_path, ["a disc"])[chosen["step"]].name == "merged" for arm in arms)


RACE = ("--method", "lora", "--learning_rate", "1e-4", "0.3", "--max_train_steps", "8", "--validation_steps", "2")
"""The model is not trained yet, and so the higher rate is better from the first step on."""


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
def test_a_plan_encodes_the_captions_of_its_steps_and_passes_over_damaged_images(flags, images, tmp_path):
    """More steps are timed than the runs have, each with another order of the tags."""
    folder = tmp_path / "tags"
    shutil.copytree(images, folder)
    for path in folder.glob("*.txt"):
        path.write_text("a, b, c, d, e, f, g")
    first = min(folder.glob("*.png"))
    first.write_bytes(first.read_bytes()[:-20])
    own = [*flags, *SMALL, "--shuffle_caption", "--train_batch_size", "1", "--output_dir", tmp_path / "out", "--plan"]
    own[own.index(str(images))] = str(folder)
    only(printed(*own), "estimate: ")


@pytest.mark.exhaustive
def test_two_processes_stop_an_arm_together(flags, tmp_path):
    told = forked(SCRIPT, *flags, *RACE, "--output_dir", str(tmp_path / "out"), folder=tmp_path)
    assert told.count("lora/lr-0.0001/seed-0: stopped early at step 4: ") == 1 and told.count("estimate: ") == 1, told
    assert [arm["status"] for arm in experiment(tmp_path / "out")["arms"]] == ["stopped", "finished"]


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
    assert {verdict["reference"] for verdict in found["verdicts"]} == {names[0]} and len(found["verdicts"]) == 3
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
def test_pissa_is_an_arm_next_to_lora(flags, tmp_path):
    """PiSSA starts from the base model that the arms share, and leaves it unchanged for the next arm."""
    words = ["--learning_rate", "1e-2", "--seed", "0", "1", "--no-racing"]
    together, alone = tmp_path / "together", tmp_path / "alone"
    methods = ["--method", "pissa", "lora"]
    assert main(*flags, *words, *methods, "--output_dir", together) == 0
    assert main(*flags, *words, "--method", "lora", "--output_dir", alone) == 0
    found = experiment(together)
    assert {entry["status"] for entry in found["arms"]} == {"finished"} and len(found["arms"]) == 4
    assert {entry["label"] for entry in found["arms"]} == {"pissa", "lora"}
    for seed in (0, 1):
        rows = {folder: read_log(folder / f"lora/lr-0.01/seed-{seed}/log.jsonl") for folder in (together, alone)}
        losses = [[(row["step"], row["split"], row["loss"]) for row in log] for log in rows.values()]
        assert losses[0] == losses[1]
