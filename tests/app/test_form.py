"""The form of the trainer's options: which options the page may set, their values, and presets."""

from types import SimpleNamespace

import pytest
from app_runs import write_run

from app import form, launcher
from app.bases import is_hub_name
from app.jobs import Jobs
from app.library import Library
from app.runs import RunError
from app.tabs.train import TrainTab
from reslora.images.settings import build_parser, parse_args
from reslora.options.grid import Grid
from reslora.options.images import Options


def test_no_flag_that_names_a_file_a_model_or_code_is_in_the_form():
    paths = {
        *("config", "output_dir", "logging_dir", "cache_dir", "train_data_dir", "class_data_dir", "init_lora"),
        *("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "metric_model", "dataset_name"),
        *("pretrained_transformer_file", "assistant_lora"),
        *("resume_from_checkpoint", "hub_token", "hub_model_id", "push_to_hub", "report_to", "optimizer_args"),
    }
    known = Options.table().keys() | {"config"}
    assert paths <= known and not paths & set(form.known())
    assert "package.Class" not in form.choices(form.known()["optimizer"])


def test_every_safe_flag_is_in_the_form_once():
    names = TrainTab.all_names()
    assert len(set(names)) == len(names) and set(names) == set(form.known())
    assert TrainTab.names[0] == "method" and set(TrainTab.names) == set(form.HELP)


def test_an_untouched_form_is_the_trainers_defaults():
    assert arguments_of({}) == ["--method", "lora", "reslora"]
    assert arguments_of({"method": ["lora", "lora_x2"]}) == ["--method", "lora", "lora_x2"]
    of_flow = {form.MODEL: "assets/pipeline-flow"}
    assert arguments_of(of_flow | {"learning_rate": 0.001}) == arguments_of(of_flow) == arguments_of({})
    assert arguments_of(of_flow | {"learning_rate": 0.0005})[-2:] == ["--learning_rate", "0.0005"]


def arguments_of(settings: dict) -> list[str]:
    """Return the arguments for a form that was filled in with these settings and not changed."""
    tab = SimpleNamespace(jobs=SimpleNamespace(begun=lambda *_: None), all_names=TrainTab.all_names)
    return launcher.arguments(TrainTab.settings(tab, "new", "", TrainTab.values_of(tab, settings)))


def test_a_size_that_the_model_does_not_have_is_refused_in_the_form(tmp_path):
    jobs = Jobs(Library(tmp_path))
    assert jobs.command("new", {"method": ["lora"], "resolution": "32"})[0][-1] == "32"
    with pytest.raises(RunError, match="--resolution 63: height and width must be multiples of 8; give 56"):
        jobs.command("new", {"method": ["lora"], "resolution": "63"})


@pytest.mark.parametrize("name", list(form.PRESETS))
def test_a_preset_is_what_the_trainer_takes(name):
    settings = dict(form.settings_of(name, {}))
    model = settings.pop(form.MODEL, None)
    assert model is None or is_hub_name(model)
    asked = parse_args(arguments_of(settings))  # which refuses what nothing would read
    values = asked.base.flat() | asked.varied if isinstance(asked, Grid) else asked.flat()
    assert {flag: values[flag] for flag in settings} == settings


def test_the_settings_of_a_run_make_its_command_again(tmp_path):
    """As stored in its config.json, whatever the type of the values."""
    write_run(
        tmp_path / "run",
        shortcut="middle",
        pre_num=2,
        random_flip=True,
        snr_gamma=5.0,
        target_modules=["to_q"],
        class_data_dir="class",
        class_prompt="a disc",
        num_class_images=7,
        prior_loss_weight=0.5,
    )
    settings = form.settings_of("run", Library(tmp_path).runs())
    words = arguments_of(settings)
    parsed = vars(build_parser().parse_args(words))
    expected = {"shortcut": ["middle"], "pre_num": [2], "random_flip": True, "snr_gamma": 5.0, "max_train_steps": 4}
    assert {name: parsed[name] for name in expected} == expected and parsed["target_modules"] == ["to_q"]
    assert parsed["validation_prompt"] == settings["validation_prompt"]
    parse_args(words)  # which refuses what nothing would read
    with pytest.raises(RunError, match="random_flip has several values"):
        form.values_of(settings | {"random_flip": [True, False]})
    with pytest.raises(RunError, match="no run or preset of that name"):  # not an empty form
        form.settings_of("gone", Library(tmp_path).runs())
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"run: its config\.json cannot be read; choose another run"):
        form.settings_of("run", Library(tmp_path).runs())


def test_the_boxes_show_the_defaults_and_the_help_names_no_flag():
    """They depend on the model, the optimizer and the number of runs; a default that is only known later is a hint."""
    known, shown = form.known(), form.defaults({})
    assert {**shown, "learning_rate": "0.0005", "rank": "16", "max_train_steps": "200", "seed": "0"} == shown
    assert shown["validation_prompt"].splitlines() == ["cat face", "tulip", "guitar", "red apple"]
    assert shown["lora_alpha"] == "" and form.placeholder(known["lora_alpha"]) == "twice the rank"
    of_flow = form.defaults({form.MODEL: "assets/pipeline-flow"})
    assert (of_flow["learning_rate"], of_flow["guidance_scale"]) == ("0.001", "3.0")
    several = form.defaults({"seed": [0, 1]})
    assert several["test_split"] == "0.1" and several["validation_split"] == "0.0"
    changed = {name for one in (of_flow, several) for name in shown if one[name] != shown[name]}
    assert changed - {"method"} <= set(form.FOLLOWING)
    for option in known.values():
        assert "--" not in form.info(option) and form.label(option)[0].isupper()
    assert "a bucket keeps at least 93% always" in form.info(known["center_crop"])
