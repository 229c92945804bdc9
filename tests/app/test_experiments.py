"""Experiments on the page: in the list, started and extended by the form, and their report."""

import json
import os
from pathlib import Path

import gradio as gr
import pytest
from app_runs import HOSTILE, write_run
from experiment import examples

from app import experiments, form, launcher
from app.jobs import Entry, Jobs
from app.library import Experiment, Library
from app.runs import EXPERIMENT_LOG, RunError
from app.studio import Studio
from app.tabs.base import Parts
from app.tabs.report import ReportTab
from app.tabs.train import TrainTab
from reslora.experiment.report import write_report
from reslora.experiment.schedule import ArmSchedule
from reslora.images.experiment.report_sections import IMAGES
from reslora.images.settings import parse_args


@pytest.fixture
def library(tmp_path) -> Library:
    """A library with a run and a finished experiment."""
    write_run(tmp_path / "runs" / "run")
    folder = tmp_path / "runs" / "which"
    folder.mkdir()
    write_experiment(folder, examples.experiment(None))
    (folder / "config.json").write_text(json.dumps({"learning_rate": [1e-4, 2e-4], "seed": 0}))
    return Library(tmp_path / "runs")


def write_experiment(folder, content: dict) -> None:
    (folder / "experiment.json").write_text(json.dumps(content))
    write_report(content, folder, IMAGES)


def test_experiments_and_runs_are_listed_apart(library):
    assert list(library.runs()) == ["run"] and list(library.experiments()) == ["which"]
    found = library.find_experiment("which")
    assert found.status == "finished" and found.progress == (60, 60)
    for name in ("run", *HOSTILE):
        with pytest.raises(RunError, match="no experiment"):
            library.find_experiment(name)
    alone = Library(found.folder)
    assert list(alone.experiments()) == ["which"] and alone.runs() == {} and alone.is_single


def test_what_was_started_here_is_an_experiment_at_once(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / EXPERIMENT_LOG).write_text("train_sd.py: error: something\n")
    found = Library(tmp_path).find_experiment("new")
    assert found.status == "failed" and "something" in found.log_tail() and found.report() == ""
    assert "first run" in experiments.report(found)


@pytest.mark.parametrize("content", [None, {"arms": [None, 7, {"status": []}]}])
def test_a_damaged_record_is_no_error(library, content):
    found = library.find_experiment("which")
    (found.folder / "experiment.json").write_text(json.dumps(content))
    assert found.status == "stopped" and experiments.summary(found, found.status)


def test_how_far_it_is(library):
    found, content = library.find_experiment("which"), examples.unfinished()
    write_experiment(found.folder, content)
    (found.folder / ".lock").write_text(str(os.getpid()))  # which may be any process: it is stopped
    assert found.status == "stopped" and found.progress == (7, 60)
    told = experiments.summary(found, "running")
    each = sum(arm["seconds"] for arm in content["arms"][:7]) / 7
    assert "7 of 60 runs finished" in told and f"about {each * 53 / 3600:.1f} h left" in told
    assert "Resume trains the rest" in experiments.summary(found, "stopped")


def test_one_whose_arms_have_all_diverged_has_nothing_to_go_on_with(library):
    found, content = library.find_experiment("which"), examples.experiment(None)
    for arm in content["arms"]:
        arm |= {"status": "failed", "reason": "the loss is not finite at step 3", "test": None}
    write_experiment(found.folder, content | {"chosen": {}, "verdicts": []})
    told = experiments.summary(found, found.status)
    assert found.status == "failed" and "60 of 60 runs finished" in told and "all of them failed" in told
    assert "Resume" not in told and "not finite at step 3" in found.report()


def test_the_report_can_do_nothing_to_the_page(library):
    found = library.find_experiment("which")
    (found.folder / "report.html").write_text('"><script>parent.hacked = 1</script> ${1} {{2}}')
    frame = experiments.report(found)
    assert 'sandbox="allow-scripts"' in frame and "<script>" not in frame and "${" not in frame and "{{" not in frame
    outside = found.folder.parent / "outside.html"
    outside.write_text("secret")
    (found.folder / "report.html").unlink()
    (found.folder / "report.html").symlink_to(outside)
    assert found.report() == ""


def test_a_plan_is_counted_by_the_trainers_own_parser(library):
    form = {"method": ["lora", "reslora"], "learning_rate": "1e-4, 3e-4", "seed": "0 1 2"}
    assert "8 runs: 2 methods, 2 learning rates, 3 seeds." in plan(library, form)
    assert "Fewer than three seeds" in plan(library, form | {"seed": "0"})
    wired = form | {"shortcut": ["input", "middle"], "pre_num": "1 4"}
    assert "16 runs: 4 methods" in plan(library, wired)
    assert "12 runs" in plan(library, form | {"learning_rate": "1e-4", "seed": "0", "rank": "2 4 8 16 32 64"})
    both = form | {"vary": "lora_dropout=0,0.1\n\noptimizer=adamw,lion", "seed": "0", "learning_rate": ""}
    assert "8 runs: 8 variants, 1 learning rate, 1 seed." in plan(library, both)
    assert "--lora_dropout is given twice" in plan(library, both | {"lora_dropout": "0.2"})
    assert "A model from the hub needs training images" in plan(library, form | {"model": "owner/model"})
    for wrong in ({"seed": "x"}, {"learning_rate": "-1"}, {"method": ["none"]}, {"blocks_to_swap": "0.5"}):
        assert "argument" in plan(library, form | wrong)


def test_a_plan_warns_of_what_keeps_differences_from_being_shown(library, tmp_path):
    """As the trainer does, but before it starts; images in subfolders are counted too."""
    form = {"method": ["lora", "reslora"], "learning_rate": "1e-4, 3e-4", "seed": "0 1 2"}
    inside = tmp_path / "data" / "mine" / "10_cat"
    inside.mkdir(parents=True)
    (inside.parent / "metadata.jsonl").touch()

    def warned(folder: object = "mine", **settings) -> str:
        trainings = Jobs(library, tmp_path / "data")
        return told(trainings, "new", form | settings, folder)

    assert all(word not in warned() for word in ("images", "test split"))  # they may be in tables
    for number in range(55):
        (inside / f"{number}.png").touch()
    assert "test split" not in warned()  # of 55 about 6
    (inside / "0.png").unlink()
    assert "3 to 8 of 54 images are the test split:" in warned() and "test split" not in warned(test_split="0.2")
    assert "test split" not in warned("") and "choose one from the list" in warned("other")
    assert "verdicts need LoRA among the methods" in warned("", method=["lora_x2", "reslora"])
    goes_on = told(Jobs(library, tmp_path / "data"), "which", {"seed": "0 1 2"}, "mine")
    assert "runs" in goes_on and "test split" not in goes_on  # it has images of its own


def plan(library: Library, form: dict) -> str:
    return told(Jobs(library), "new", form)


def told(*asked) -> str:
    """Return the text next to the button: the number of runs, or what is wrong."""
    try:
        return experiments.plan(*asked)[0]
    except RunError as error:
        return str(error)


def test_a_new_experiment_has_all_flags_and_one_that_is_there_what_is_added(library):
    trainings = Jobs(library)
    form = {"method": ["lora", "loha"], "learning_rate": "1e-4 3e-4", "seed": "0 1", "extend_rates": True, "model": ""}
    words = trainings.command("new", form, kind=Experiment)
    assert words[1:3] == ["--output_dir", str(library.folder / "new")]
    assert words[3:] == [
        *("--method", "lora", "loha", "--seed", "0", "1", "--learning_rate", "1e-4", "3e-4", "--extend_rates")
    ]
    more = trainings.command("which", form | {"extend_rates": False, "seed": "0"}, kind=Experiment)
    folder = library.folder / "which"
    assert more[1:5] == ["--output_dir", str(folder), "--config", str(folder / "config.json")]
    rates = ["--learning_rate", "0.0001", "0.0002", "0.0003"]
    assert more[5:] == ["--method", "lora", "loha", "--seed", "0", *rates]
    with pytest.raises(RunError, match="already"):
        trainings.command("which", form)  # a run of that name
    with pytest.raises(RunError, match="finished"):
        trainings.start(Entry("which", "experiment", resume=True))


@pytest.mark.parametrize("given", [{"seed": "3"}, {"rank": "4,"}])
def test_methods_alone_are_a_run_and_no_experiment(library, given):
    """As on the command line; a queue entry with the other kind is refused."""
    settings, queue = {"method": ["lora", "reslora"], "shortcut": ["input"], **given}, Jobs(library)
    assert "1 run: LoRA and ResLoRA, 200 steps each." in plan(library, settings)
    with pytest.raises(RunError, match=launcher.ALONE):
        queue.add(Entry("new", "experiment", settings))
    assert queue.entries() == [] and not (library.folder / "new").exists()
    assert queue.command_of(Entry("new", "run", settings))


OF_SEVERAL = {"learning_rate": "1e-4 1e-3", "seed": "0 1 2"}
REFUSED = {
    "--extend_rates": {"extend_rates": True, "learning_rate": "1e-3"},
    "--max_train_steps 2: AdaLoRA needs": {"method": ["lora", "adalora"], "max_train_steps": "2"},
    "--keep_tokens 2: it has no effect": {"keep_tokens": "2"},
    "--train_data_repeats": {"train_data_repeats": "2 3"},
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_the_trainer_refuses_at_once_is_told_beforehand(library, why):
    """By the plan, by Show command and by Start; otherwise the run would fail hours later in the queue."""
    form = {"method": ["lora", "reslora"], **OF_SEVERAL, **REFUSED[why]}
    assert why in plan(library, form) and "runs" not in plan(library, form)
    with pytest.raises(RunError, match=why.partition(":")[0]):
        Jobs(library).add(Entry("new", "experiment", form))
    assert "12 runs" in plan(library, {"method": ["lora", "lora_x2", "reslora"], **OF_SEVERAL})


def test_what_a_form_adds_to_an_experiment_is_beside_what_is_there(library):
    """The new experiment has both: no method, rate or seed that was trained is dropped."""
    begun = {"method": ["lora", "reslora"], "learning_rate": [1e-4, 2e-4], "seed": [0, 1]}
    begun["shortcut"] = ["input", "block"]
    (library.folder / "which" / "config.json").write_text(json.dumps(begun))
    trainings = Jobs(library)
    for added, arms, of_each in (
        ({"method": ["dora"], "learning_rate": "4e-4", "seed": "3"}, 20, "4 methods, 3 learning rates, 3 seeds"),
        ({"method": ["lora"], "learning_rate": "0.0001", "seed": ""}, 9, "3 methods, 2 learning rates, 2 seeds"),
        ({"experiment_minutes": "5"}, 9, "3 methods, 2 learning rates, 2 seeds"),
    ):
        form = dict.fromkeys(TrainTab.names, "") | added
        assert f"{arms} runs: {of_each}." in told(trainings, "which", form)
        flags = parse_args(trainings.command("which", form, kind=Experiment)[1:])
        assert len(ArmSchedule(flags).arms()) == arms


def test_an_experiment_goes_on_with_its_own_images_and_settings_or_not_at_all(library, tmp_path):
    """The form shows the settings of the experiment.

    Empty options keep their values. Another model, folder or length is refused, because it belongs to another
    experiment.
    """
    images = tmp_path / "data" / "cats"
    images.mkdir(parents=True)
    (tmp_path / "data" / "dogs").mkdir()
    begun = library.folder / "which" / "config.json"
    config = {
        "learning_rate": [1e-4, 2e-4], "seed": 0, "method": ["lora"], "max_train_steps": 400, "resolution": 64,
        "shortcut": "input", "random_flip": True, "train_data_dir": str(images), "snr_gamma": 5.0, "rank": 16,
        "optimizer": "torch.optim.SGD", "validation_prompt": ["a cat", "a dog"], "lora_dropout": None,
        "pretrained_model_name_or_path": "owner/model",
    }  # fmt: skip
    begun.write_text(json.dumps(config))
    trainings = Jobs(library, tmp_path / "data")
    queue = trainings
    queue.advance = lambda: None
    untouched = form.widget_value(form.known()["optimizer"], None)  # which has no word for torch.optim.SGD
    same = {
        "method": ["lora", "loha"], "learning_rate": "3e-4", "max_train_steps": "400", "resolution": "64", "rank": "",
        "shortcut": ["input"], "random_flip": True, "snr_gamma": "5", "optimizer": untouched, "merge": "",
        "validation_prompt": "a cat\n a dog", "model": "owner/model",
    }  # fmt: skip
    for settings in (same, {"method": ["loha"]}):
        words = queue.command_of(Entry("which", "experiment", settings, "cats"))
        assert words[3:5] == ["--config", str(begun)] and "--max_train_steps" not in words
    others = {"max_train_steps": "200", "model": "owner/other", "lora_dropout": "0.5"}
    for flag, value in others.items():
        with pytest.raises(
            RunError, match=f"which was started with .*{flag.replace('model', 'owner/model')}"
        ) as refusal:
            queue.add(Entry("which", "experiment", same | {flag: value}))
        assert "another name" in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(RunError, match="which was started with other images"):
        queue.add(Entry("which", "experiment", same, "dogs"))
    assert queue.entries() == []


def test_the_best_arms_lora_is_handed_out(library):
    """In the format that most tools read; for methods without such a file, the reason is given."""
    folder = library.folder / "which"
    with gr.Blocks():
        tab = ReportTab(Parts(library, Jobs(library), Studio()))
    assert tab.look("which")[tab.take_best] == gr.update(interactive=False)
    with pytest.raises(RunError, match="There is no LoRA file: "):
        tab.copy_of_best("which")
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"diffusers")
    assert Path(tab.copy_of_best("which")).read_bytes() == b"diffusers"
    (folder / "kohya.safetensors").write_bytes(b"kohya")
    assert tab.look("which")[tab.take_best] == gr.update(interactive=True)
    copy = Path(tab.copy_of_best("which"))
    assert copy.name == "which-kohya.safetensors" and copy.read_bytes() == b"kohya"
