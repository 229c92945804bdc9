"""The arguments of a method's optimizer, and the known optimizers."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from images.runs import RESUME, assert_same, final_weights, killed_after, losses, main, parts, refused, training_state
from reslora.config import ResLoraConfig
from reslora.images.settings import parse_args
from reslora.options.images import Options
from reslora.options.optimizers import OPTIMIZERS, Named, options_of
from reslora.training.state import Learner, new_optimizer

ACCELERATOR = SimpleNamespace(num_processes=1, device=torch.device("cpu"), scaler=None)

FLAGS = Options.of(
    learning_rate=1e-3, scale_lr=False, train_batch_size=2, gradient_accumulation_steps=3, adam_beta1=0.8,
    adam_beta2=0.95, adam_weight_decay=0.1, adam_epsilon=1e-6, use_8bit_adam=False,
    optimizer="adamw", optimizer_args=[],
)  # fmt: skip


@pytest.mark.parametrize(("scaled", "rate"), [(False, 1e-3), (True, 2 * 3 * 4 * 1e-3)])
def test_a_scaled_rate_is_times_the_samples_of_a_step_in_all_processes(scaled, rate):
    accelerator = SimpleNamespace(num_processes=4, device=torch.device("cpu"), scaler=None)
    optimizer = new_optimizer(
        [nn.Parameter(torch.ones(2))],
        *parts(FLAGS.replace(scale_lr=scaled), "training", "optimizer"),
        accelerator,
    )
    (group,) = optimizer.param_groups
    assert group["lr"] == pytest.approx(rate)
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.8, 0.95), 0.1, 1e-6)


def test_shortcuts_are_those_of_the_flags():
    flags = FLAGS.replace(shortcut="middle", pre_num=3, head="none")
    assert flags.adapter.reslora_config == ResLoraConfig("middle", pre_num=3, head="none")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "optimizer",
    ["prodigy", "schedulefree"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_with_any_optimizer(base_flags, tmp_path, optimizer):
    flags = [*base_flags, "--method", "reslora", "--optimizer", optimizer, "--optimizer_args", "weight_decay=0.1"]
    flags += ["--num_validation_images", "0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(*flags, "--output_dir", whole) == 0
    killed_after(2, whole, parts)
    assert main(*flags, "--output_dir", parts, *RESUME) == 0
    assert (
        losses(whole, "reslora") == losses(parts, "reslora")
        and len({loss for *_, loss in losses(whole, "reslora")}) > 2
    )
    assert_same(final_weights(whole), final_weights(parts))
    (group,) = training_state(whole, 4)["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.1 and group.get("train_mode", True)


def test_a_schedule_free_optimizer_draws_with_its_average_and_trains_on_as_it_was():
    parameter = nn.Parameter(torch.ones(3))
    flags = FLAGS.replace(optimizer="schedulefree", learning_rate=0.1)
    optimizer = new_optimizer([parameter], flags.training, flags.optimizer, ACCELERATOR)
    for step in range(3):
        parameter.grad = torch.tensor([1.0, -2.0, step])
        optimizer.step()
    learner = Learner("lora", nn.Module(), optimizer, None, None, nn.Module())
    trained, z = parameter.detach().clone(), optimizer.state[parameter]["z"]
    with learner.averaged():
        torch.testing.assert_close(0.1 * z + 0.9 * parameter, trained)  # y = (1 - beta) z + beta x
        assert not torch.equal(parameter, trained)
    assert torch.equal(parameter, trained) and optimizer.param_groups[0]["train_mode"]


def test_a_row_says_what_its_authors_do_not():
    for name in ("prodigy", "adafactor", "lion", "schedulefree"):
        optimizer = new_optimizer(
            [nn.Parameter(torch.ones(2))],
            *parts(FLAGS.replace(optimizer=name), "training", "optimizer"),
            ACCELERATOR,
        )
        assert type(optimizer).__name__ == OPTIMIZERS[name].path.rpartition(".")[2]
        assert optimizer.param_groups[0]["lr"] == 1e-3 and optimizer.param_groups[0].get("weight_decay", 0) == 0


def test_values_of_arguments_are_read_as_python_reads_them():
    read = options_of(["a=1", "b=(0.9, 0.99)", "c=True", "d=text=more"])
    assert read == {"a": 1, "b": (0.9, 0.99), "c": True, "d": "text=more"}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--optimizer sgdd", ["--optimizer sgdd", "prodigy"]),
        ("--optimizer absent.Class", ["absent is not installed"]),
        ("--optimizer torch.optim.Absent", ["--optimizer torch.optim.Absent"]),
        ("--optimizer torch.nn.Linear", ["no class of torch's optimizers"]),
        ("--optimizer lion --optimizer_args beta7=1", ["--optimizer lion beta7=1"]),
        ("--optimizer_args weight_decay", ["--optimizer_args weight_decay"]),
        ("--optimizer_args lr=None", ["--optimizer_args lr=None: --learning_rate sets it; leave it out"]),
        ("--optimizer adafactor --optimizer_args relative_step=True", ["lr", "another optimizer"]),
        ("--optimizer torch.optim.LBFGS", ["--optimizer torch.optim.LBFGS", "closure", "another optimizer"]),
        ("--optimizer lion --use_8bit_adam", ["--use_8bit_adam"]),
    ],
)
def test_optimizers_that_are_none_are_refused_before_long_work(base_flags, capsys, tmp_path, flags, words):
    line = refused(capsys, *base_flags, "--output_dir", tmp_path / "out", *flags.split(), quiet=False)
    assert all(word in line for word in words)


def test_a_package_that_is_missing_is_told_by_the_flag_that_was_given(base_flags, capsys, monkeypatch):
    flags = ["--use_8bit_adam"]
    monkeypatch.setitem(OPTIMIZERS, "adamw8bit", Named("absent.AdamW8bit", "bitsandbytes"))
    line = refused(capsys, *base_flags, *flags)
    assert (
        f"error: {' '.join(flags)}: bitsandbytes is not installed; pip install bitsandbytes, or leave the option out"
        in line
    )


def test_prodigy_has_a_rate_of_its_own(base_flags):
    without = list(map(str, base_flags))
    if "--learning_rate" in without:
        place = without.index("--learning_rate")
        del without[place : place + 2]
    assert parse_args([*without, "--optimizer", "prodigy"]).optimizer.learning_rate == 1.0
    assert parse_args([*without, "--optimizer", "prodigy", "--learning_rate", "0.5"]).optimizer.learning_rate == 0.5
