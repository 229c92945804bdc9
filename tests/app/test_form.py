"""The trainer's flags as a form: what a page may set, what stands in the boxes, and what a form begins with."""

import pytest
from app_runs import WRONG, write_run

from app import form, launcher
from app.jobs import Jobs
from app.library import Library
from app.runs import RunError
from app.tabs.experiment import ExperimentTab
from app.tabs.train import TrainTab
from reslora.images.settings import build_parser, parse_args
from reslora.options.images import Options
from reslora.options.option import Option


def test_no_flag_that_names_a_file_a_model_or_code_is_in_the_form():
    paths = {
        *("config", "output_dir", "logging_dir", "cache_dir", "train_data_dir", "class_data_dir", "init_lora"),
        *("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "metric_model", "dataset_name"),
        *("resume_from_checkpoint", "hub_token", "hub_model_id", "push_to_hub", "report_to", "optimizer_args"),
    }
    known = Options.table().keys() | {"config"}
    assert paths <= known and not paths & set(form.known())
    assert "package.Class" not in form.choices(form.known()["optimizer"])


def test_every_safe_flag_is_in_the_form_once():
    for tab in (TrainTab, ExperimentTab):
        names = tab.all_names()
        assert len(set(names)) == len(names) and {*names, *tab.left_out} == set(form.known())
    assert tab.names[0] == "method"


def test_a_flag_that_is_added_to_the_trainer_has_to_be_harmless():
    """What takes free words stays out until somebody has thought about it."""
    free = Option("anything", "anything", "output", str, None, "free words")
    path = Option("where", "where", "output", list[str], None, "paths")
    number = Option("number", "number", "output", int, 0, "a number", parse=int)
    assert [form.is_safe(option) for option in (free, path, number)] == [False, False, True]


def test_an_untouched_form_is_the_trainers_defaults():
    for tab in (TrainTab, ExperimentTab):
        names = tab.all_names()
        settings = dict(zip(names, form.values_of({}, names), strict=True))
        assert launcher.arguments(settings) == ["--method", "lora", "reslora"]


@pytest.mark.parametrize("name", list(form.PRESETS))
def test_a_preset_is_what_the_trainer_takes(name):
    settings = form.settings_of(name, {})
    names = TrainTab.all_names()
    values = dict(zip(names, form.values_of(settings, names), strict=True))
    words = launcher.arguments(values)
    parsed = vars(build_parser().parse_args(words))
    for flag, value in settings.items():
        assert parsed[flag] == value, flag
    parse_args(words)  # which refuses what nothing would read


def test_the_settings_of_a_run_make_its_command_again(tmp_path):
    """As its config.json has them, whatever type that is."""
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
    names = TrainTab.all_names()
    settings = form.settings_of("run", Library(tmp_path).runs())
    words = launcher.arguments(dict(zip(names, form.values_of(settings, names), strict=True)))
    parsed = vars(build_parser().parse_args(words))
    expected = {"shortcut": ["middle"], "pre_num": [2], "random_flip": True, "snr_gamma": 5.0, "max_train_steps": 4}
    assert {name: parsed[name] for name in expected} == expected and parsed["target_modules"] == ["to_q"]
    assert parsed["validation_prompt"] == settings["validation_prompt"]
    parse_args(words)  # which refuses what nothing would read
    with pytest.raises(RunError, match="no run of that name"):  # not an empty form
        form.settings_of("gone", Library(tmp_path).runs())
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"run: its config\.json cannot be read; begin with another one"):
        form.settings_of("run", Library(tmp_path).runs())


def test_every_schedule_can_be_trained(tmp_path):
    """Of one whose rates are given step by step the form has these."""
    for name in form.choices(form.known()["lr_scheduler"]):
        rules = {"lr_step_rules": "1:100,0.1:200,0.01"} if name == "piecewise_constant" else {}
        Jobs(Library(tmp_path)).command("new", {"lr_scheduler": name, **rules})


@pytest.mark.parametrize("wrong", WRONG)
def test_a_damaged_config_fills_in_what_a_form_can_have(wrong):
    for name, option in form.known().items():
        value = form.widget_value(option, wrong)
        assert isinstance(value, bool) if option.is_switch else isinstance(value, str | list | None), name


def test_the_boxes_show_the_defaults_and_the_help_names_the_flag():
    known = form.known()
    assert form.default(known["learning_rate"]) == "0.00025 (another model: 0.0001)"
    assert form.default(known["snr_gamma"]) == "1.0 (another model: none)"
    assert form.default(known["rank"]) == "16" and form.default(known["train_batch_size"]) == "16"
    assert form.default(known["validation_prompt"]) == "cat face, tulip, guitar, red apple (another model: none)"
    of_flow = {flag: form.default(known[flag], "assets/pipeline-flow") for flag in form.OF_BUNDLED}
    assert of_flow["learning_rate"] == "0.001 (another model: 0.0001)" and of_flow["guidance_scale"] == "3.0"
    assert form.default(known["learning_rate"], "owner/model") == form.default(known["learning_rate"])
    for name, option in known.items():
        assert form.info(option).endswith(f"--{name}") and form.label(option)[0].isupper()
    assert "a bucket keeps at least 93% always" in form.info(known["center_crop"])


def test_options_of_shortcuts_are_read_by_methods_with_shortcuts_alone():
    assert form.wires(["lora", "reslora"]) and form.wires(["lora_matched"]) and form.wires(["ms_placebo"])
    assert not form.wires(["lora", "lora_x2", "adalora"]) and not form.wires([])
