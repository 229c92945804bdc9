"""Averages of checkpoints: the mean by hand, which one is exported, resumed runs, two processes, and refusals."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from images.runs import RESUME, digests, final_weights, main, only, printed, refused
from reslora import ResLoraConfig
from reslora.images.output.reports import Validation
from reslora.io import read_object
from reslora.methods.adapters import attach, save_adapter, trained_state
from reslora.methods.registry import AdapterSettings, adapter_config
from reslora.training.averaging import put_average
from reslora.training.best import averages_at, best_of, to_export
from reslora.training.stopping import Asked, Requests
from reslora.training.trained import Trained

AVERAGES = ("--average_checkpoints", "ema:0.5,last:2")
WEIGHTS = [1 / 7, 2 / 7, 4 / 7]


# -- the mean ----------------------------------------------------------------------------------------------------------


def adapted(model: Path, method: str) -> Trained:
    """The tiny U-Net in float64 with an adapter, and its unused loss."""
    unet = UNet2DConditionModel.from_pretrained(model / "unet").double()
    settings = AdapterSettings(r=2, alpha=4, dropout=0.0, targets=["to_q", "to_v"], total_steps=10)
    config = ResLoraConfig("input") if method == "reslora" else None
    part = attach(unet, adapter_config(method, settings), config)
    return Trained({"unet": part}, lambda *_: None)


@pytest.mark.parametrize("method", ["reslora", "lora"])
def test_factors_are_averaged(model, tmp_path, method):
    trained = adapted(model, method)
    (part,), saved = trained.parts.values(), []
    for step in range(3):
        with torch.no_grad():
            for value in trained_state(part).values():
                value.normal_(generator=torch.Generator().manual_seed(step))
        saved.append({name: value.clone() for name, value in trained_state(part).items()})
        save_adapter(part, tmp_path / f"checkpoint-{step}")
    put_average(trained, [tmp_path / f"checkpoint-{step}" for step in range(3)], WEIGHTS)
    found = trained_state(part)
    assert found.keys() == saved[0].keys() and any("lora_A" in name for name in found)
    for name, value in found.items():
        by_hand = sum(weight * each[name] for weight, each in zip(WEIGHTS, saved, strict=True))
        torch.testing.assert_close(value, by_hand, rtol=1e-14, atol=1e-15)


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def steps_lose():
    """Double the losses of single steps in this process, so that an average has the lowest loss."""
    losses_of = Validation._losses_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "_losses_of", lambda *args: 2 * losses_of(*args))
        yield


@pytest.fixture(scope="module")
def flags(model, data) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data), "--resolution", "32"),
        *("--max_train_steps", "5", "--checkpointing_steps", "2", "--train_batch_size", "2", "--rank", "4"),
        *("--learning_rate", "0.05", "--lr_scheduler", "constant", "--validation_split", "0.3", "--save_best"),
        *("--validation_steps", "5", "--validation_noises", "1", "--num_inference_steps", "1", "--report_to", "none"),
        *("--num_validation_images", "0", "--merge_calibration_samples", "2", *AVERAGES),
    ]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> tuple[Path, list[str]]:
    output = tmp_path_factory.mktemp("whole") / "out"
    return output, printed(*flags, "--method", "reslora", "--output_dir", output)


@pytest.mark.exhaustive
def test_a_run_exports_its_best_average(whole):
    output, lines = whole
    found = {best.average: best for best in averages_at(output / "reslora", 5)}
    assert {name: best.checkpoints for name, best in found.items()} == {"ema:0.5": [2, 4, 5], "last:2": [4, 5]}
    steps = [final_weights(output, step=step) for step in (2, 4, 5)]
    for name, weights in (("ema:0.5", WEIGHTS), ("last:2", [0, 0.5, 0.5])):
        kept = load_file(found[name].path / "reslora_model.safetensors")
        for key in [key for key in kept if "lora_" in key]:
            by_hand = sum(weight * step[key].double() for weight, step in zip(weights, steps, strict=True))
            assert torch.equal(kept[key], by_hand.float())
        only(lines, f"reslora: validation loss {found[name].loss:.5f} with {found[name]}")
    lowest = min(found.values(), key=lambda best: best.loss)
    best = best_of(output / "reslora")
    assert lowest.loss < best.loss and best.step == 5
    record = read_object(output / "reslora" / "exports.json")["best"]
    assert record == lowest.to_dict() and record["average"] == lowest.average
    exported = load_file(lowest.path / "reslora_model.safetensors")
    assert set(load_file(output / "reslora" / "peft" / "adapter_model.safetensors")) <= {
        f"base_model.model.{name}" for name in exported
    }
    only(lines, f"exporting {lowest}", f"that of the best step, 5, is {best.loss:.5f}")
    only(lines, f"{lowest}, which has the lowest validation loss")


@pytest.mark.exhaustive
def test_a_resumed_run_averages_the_same(flags, whole, tmp_path, monkeypatch):
    """Stopped after step 3, whose checkpoint would push an older one out of --checkpoints_total_limit."""
    output, limit = tmp_path / "out", ("--checkpoints_total_limit", "3")
    after_step, steps = Requests.after_step, []

    def stop_at_the_third(self: Requests) -> Asked:
        steps.append(len(steps) + 1)
        return after_step(self)._replace(stop=len(steps) == 3)

    words = [*flags, *limit, "--method", "reslora", "--output_dir", output]
    with monkeypatch.context() as patch:
        patch.setattr(Requests, "after_step", stop_at_the_third)
        assert main(*words) > 128
    assert (output / "reslora" / "checkpoint-3").is_dir()
    assert main(*words, *RESUME) == 0
    for pattern in ("best/*/*", "pytorch_lora_weights.safetensors"):
        assert digests(output / "reslora", pattern) == digests(whole[0] / "reslora", pattern)
    # Merged anew, from the averages that are stored
    (output / "reslora" / "checkpoint-2" / "trainer.json").unlink()
    lines = printed(*words, *RESUME, "--merge", "weights")
    assert not [line for line in lines if ": validation loss" in line]
    only(lines, f"exporting {to_export(whole[0] / 'reslora', 5)}")


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_averages_nothing_is_refused(capsys, model, data):
    words = ["--pretrained_model_name_or_path", model, "--train_data_dir", data, "--average_checkpoints", "last:5"]
    begin = "--average_checkpoints last:5: "
    assert begin + "it has no effect; add --save_best" in refused(capsys, *words)
    words += ["--save_best", "--validation_split", "0.3", "--max_train_steps", "20"]
    few = "averages 5 or more checkpoints, and --checkpointing_steps 500 saves 1 in 20 steps"
    assert f"{begin}{few}; give --checkpointing_steps 4" in refused(capsys, *words)
    words += ["--checkpointing_steps", "4"]
    limit = "and --checkpoints_total_limit 4 retains fewer; give --checkpoints_total_limit 5"
    assert limit in refused(capsys, *words, "--checkpoints_total_limit", "4")
    assert "this is an experiment" in refused(capsys, *words, "--learning_rate", "1e-3", "2e-3")
    epochs = [word for word in words if word not in ("--max_train_steps", "20")]
    short = refused(capsys, *epochs, "--num_train_epochs", "1", "--resolution", "32", quiet=False)
    assert begin in short and "saves 1 in" in short
