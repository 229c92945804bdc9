"""train_sd.py with DeepSpeed, on the CPU."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin
from launching import forked, needs_deepspeed, told_by

from images.runs import RESUME, SCRIPT, assert_same, final_weights, losses, main, parts, refused, training_state
from reslora.errors import InvalidArgument
from reslora.images.settings import parse_args
from reslora.training.zero import configure

pytestmark = [pytest.mark.exhaustive, needs_deepspeed]
ZERO = {"environment": told_by("deepspeed_zero2.yaml"), "processes": 1}


@pytest.fixture(scope="module")
def flags(few_flags) -> list[str]:
    """Flags of four steps with two forward passes each, clipped gradients, and a changing learning rate."""
    return [
        *few_flags,
        *("--max_train_steps", "4", "--checkpointing_steps", "2"),
        *("--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--max_grad_norm", "1e-3"),
        *("--adam_epsilon", "1e-4", "--lr_scheduler", "cosine", "--lr_warmup_steps", "1", "--lora_dropout", "0.2"),
        *("--num_validation_images", "0", "--num_inference_steps", "1", "--merge_calibration_samples", "2"),
    ]


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory) -> Path:
    """An uninterrupted run with DeepSpeed in one process: accelerate does not connect two on a CPU."""
    folder = tmp_path_factory.mktemp("zero")
    forked(SCRIPT, *flags, "--output_dir", str(folder / "out"), folder=folder, **ZERO)
    return folder / "out"


def test_a_run_goes_on_as_if_it_never_stopped(run, flags, tmp_path):
    shutil.copytree(run, tmp_path / "out")
    for name in ("checkpoint-4", "exports.json"):
        path = tmp_path / "out" / "reslora" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    words = [*flags, *RESUME, "--output_dir", str(tmp_path / "out")]
    printed = forked(SCRIPT, *words, folder=tmp_path, **ZERO)
    assert "resuming from" in printed and "checkpoint-2" in printed
    assert losses(tmp_path / "out") == losses(run)
    assert_same(final_weights(tmp_path / "out"), final_weights(run))
    resumed, whole = (training_state(output, 4)["optimizer"] for output in (tmp_path / "out", run))
    assert resumed["lr"] == whole["lr"]
    assert_same(values_of(resumed), values_of(whole))


def test_a_checkpoint_has_the_whole_state_by_name(run):
    state, adapter = training_state(run, 2)["optimizer"], final_weights(run, step=2)
    parameters = state["parameters"]
    names = {name for name in adapter if ".lora_" in name}
    assert {name.replace(".default", "") for name in parameters} == names and len(names) == 64
    for name, values in parameters.items():
        saved = adapter[name.replace(".default", "")]
        assert values["step"] == 2 and values["exp_avg"].shape == values["exp_avg_sq"].shape == saved.shape
        assert values["weight"].dtype == torch.float32 and torch.equal(values["weight"].to(saved.dtype), saved)
    assert any((values["exp_avg_sq"] > 0).any() for values in parameters.values())


def test_steps_are_those_of_the_flags_whatever_the_configuration_says(run, flags, tmp_path):
    """DeepSpeed's configuration gives 1.0 for the norm, and one forward pass per step."""
    assert main(*flags, "--mixed_precision", "no", "--output_dir", tmp_path / "out") == 0
    alone = [loss for _, _, loss in losses(tmp_path / "out")]
    assert [loss for _, _, loss in losses(run)] == pytest.approx(alone, rel=1e-5)
    torch.testing.assert_close(final_weights(run), final_weights(tmp_path / "out"), rtol=0, atol=1e-5, equal_nan=True)


def test_a_run_goes_on_with_deepspeed_only_where_it_began_with_it(run, flags, capsys, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    line = refused(capsys, *flags, "--mixed_precision", "no", *RESUME, "--output_dir", run)
    assert "DeepSpeed: False" in line and "was trained with True" in line


def test_two_processes_save_the_whole_state_and_any_number_goes_on(tmp_path):
    """Weights are trained in bf16; their float32 originals are part of the state."""
    states = start(2, 2, tmp_path / "states.pt")
    shapes = [tuple(values["exp_avg"].shape) for values in states["middle"]["parameters"].values()]
    assert shapes == [(5,), (3, 5), (11, 3)]
    for one, other in (("taken over", "middle"), ("resumed end", "end")):
        assert_same(values_of(states[one]), values_of(states[other]))
        assert_same(states[one]["weights"], states[other]["weights"])
        assert states[one]["lr"] == states[other]["lr"]
    states = start(1, 1, tmp_path / "states.pt")
    assert_same(values_of(states["taken over"]), values_of(states["middle"]))
    torch.testing.assert_close(values_of(states["resumed end"]), values_of(states["end"]), rtol=0.02, atol=1e-3)


def start(processes: int, stage: int, file: Path) -> dict:
    """Run zero_steps.py, and return what it writes."""
    script = Path(__file__).with_name("zero_steps.py")
    forked(script, str(stage), str(file), folder=file.parent, processes=processes)
    return torch.load(file, weights_only=True)


def values_of(state: dict) -> dict[str, torch.Tensor]:
    """Return the complete state of each parameter, flattened."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, values in state["parameters"].items()
        for key, value in values.items()
    }


# -- settings ----------------------------------------------------------------------------------------------------------


def configured(stage: int = 2, settings: dict | None = None, **flags) -> SimpleNamespace:
    """Return an accelerator of two processes whose DeepSpeed is configured by these flags."""
    plugin = DeepSpeedPlugin(zero_stage=stage, gradient_accumulation_steps=1, gradient_clipping=1.0)
    plugin.deepspeed_config |= settings or {}
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator = SimpleNamespace(state=state, num_processes=2, gradient_accumulation_steps=1)
    configure(
        *parts(parse_args([]).replace(**flags), "adapter", "training", "optimizer"),
        accelerator,
    )
    return accelerator


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"stage": 3}, ["ZeRO-3", "zero_stage 2"]),
        ({"stage": 0}, ["ZeRO-0"]),
        ({"settings": {"scheduler": {"type": "WarmupLR"}}}, ["its own scheduler"]),
        ({"settings": {"optimizer": {"type": "Adam"}}}, ["its own optimizer"]),
        ({"method": ["lora", "adalora"]}, ["--method adalora"]),
        ({"optimizer": "adamw8bit", "use_8bit_adam": True}, ["--use_8bit_adam"]),
        ({"optimizer": "lion"}, ["--optimizer lion"]),
    ],
)
def test_what_deepspeed_cannot_do_here_is_refused(wrong, words):
    with pytest.raises(InvalidArgument) as error:
        configured(**wrong)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
