"""Training of one method: the same seed gives the same bytes, schedules, and early ends of a run."""

import itertools
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from launching import forked
from pipelines import FAMILIES
from safetensors.torch import load_file
from suites import quick
from torch import nn
from waiting import ended, is_running, wait_until

from images import exact_steps
from images.runs import (
    RESUME,
    assert_same,
    digests,
    failed,
    final_weights,
    losses,
    main,
    refused,
    without,
)
from reslora.images.context import ImageContext
from reslora.images.data.batch import collate
from reslora.images.data.plan import Plan
from reslora.images.data.samples import TrainingSamples, training_loader
from reslora.images.initial_lora import add_adapters
from reslora.images.schedule import schedule_of
from reslora.options.images import Options
from reslora.runtime.log import of_split, read_log
from reslora.training import loop
from reslora.training.loop import take_step
from reslora.training.state import Learner, new_learner
from reslora.training.trained import Trained


@pytest.mark.exhaustive
def test_memory_that_runs_out_leaves_the_checkpoints_and_says_which(brief_flags, capsys, tmp_path, monkeypatch):
    def take_too_much(learner: Learner, *rest) -> torch.Tensor:
        return torch.empty(2**60) if learner.step == 2 else take_step(learner, *rest)

    monkeypatch.setattr(loop, "take_step", take_too_much)
    output, steps = tmp_path / "out", ["--max_train_steps", "3", "--checkpointing_steps", "1"]
    line = failed(capsys, *without(brief_flags, "--max_train_steps"), *steps, "--output_dir", output)
    assert "memory ran out (" in line and f"{output}/lora/checkpoint-2: resume with --resume_from_checkpoint" in line
    monkeypatch.undo()
    assert main(*without(brief_flags, "--max_train_steps"), *steps, "--output_dir", output, *RESUME) == 0


@pytest.mark.exhaustive
def test_same_seed_gives_the_same_bytes(run, base_flags, tmp_path):
    output = tmp_path / "again"
    assert main(*base_flags, "--method", "reslora", "--output_dir", output) == 0
    for pattern in ("checkpoint-4/*.safetensors", "unet/*", "samples/**/*.png", "merge.json", "chains.json", "peft/*"):
        assert digests(output / "reslora", pattern) == digests(run / "reslora", pattern)
    for name in ("kohya.safetensors", "pytorch_lora_weights.safetensors"):
        assert_same(load_file(output / "reslora" / name), load_file(run / "reslora" / name))
    other = tmp_path / "other"
    flags = [*base_flags, "--method", "reslora", "--num_validation_images", "0", "--seed", "1"]
    assert main(*flags, "--output_dir", other) == 0
    assert digests(other / "reslora", "kohya.safetensors") != digests(run / "reslora", "kohya.safetensors")


# -- batches, accumulation and processes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_batch(model) -> dict[str, torch.Tensor]:
    """Four steps of four samples in float64: the adapter after each."""
    found = exact_steps.trained(model, batch=4, accumulation=1)
    moved = [found[name] for name in found if name.endswith(f" {exact_steps.STEPS - 1}") and "lora_A" in name]
    assert all(value.dtype == torch.float64 for value in moved)
    return found


def assert_equal_but_for_rounding(found: dict, expected: dict) -> None:
    """Compare in float64; losses are computed in float32."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name not in ("processes", "base"):
            relative = 1e-12 if value.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(found[name], value, rtol=relative, atol=relative * value.abs().max().item())


@pytest.mark.exhaustive
def test_accumulated_steps_are_those_of_one_batch(model, one_batch):
    assert_equal_but_for_rounding(exact_steps.trained(model, 2, 2), one_batch)


def script_of_steps(folder: Path) -> Path:
    """Return a script whose arguments are those of `exact_steps.main`."""
    script, paths = folder / "script.py", [str(Path(__file__).resolve().parents[level]) for level in (2, 3)]
    script.write_text(
        f"import sys\nsys.path[:0] = {paths}\nfrom images import exact_steps\nexact_steps.main(*sys.argv[1:])\n"
    )
    return script


def steps_of_two(folder: Path, model: Path, batch: int, accumulation: int, *more: str) -> dict[str, torch.Tensor]:
    """The steps of two processes."""
    forked(
        script_of_steps(folder), str(model), str(batch), str(accumulation), str(folder / "found"), *more, folder=folder
    )
    found = load_file(folder / "found")
    assert found["processes"] == 2
    return found


@pytest.mark.parametrize(("batch", "accumulation"), quick([(2, 1), (1, 2)], (1, 2)))
def test_steps_of_two_processes_are_those_of_one_batch(model, one_batch, tmp_path, batch, accumulation):
    assert_equal_but_for_rounding(steps_of_two(tmp_path, model, batch, accumulation), one_batch)


@pytest.mark.exhaustive
def test_steps_of_two_processes_are_those_of_one_batch_with_flows(tmp_path):
    """Blocks and their shortcuts are recomputed in the backward pass. Chroma masks the shorter captions."""
    model, more = FAMILIES["flux"](tmp_path / "model"), "--gradient_checkpointing"
    one, last = exact_steps.trained(model, 4, 1, more), f" {exact_steps.STEPS - 1}"
    assert_equal_but_for_rounding(steps_of_two(tmp_path, model, 2, 1, more), one)
    moved = [value - one[name.removesuffix(last) + " 0"] for name, value in one.items() if name.endswith(last)]
    assert len(moved) > 60 and all(value.any() for value in moved)


def test_a_step_is_that_of_plain_gradient_descent(model, one_batch):
    """By hand: the mean loss of samples 0 to 3, its gradient clipped to norm 0.05, and learning rate 1."""
    accelerator = Accelerator(cpu=True)
    training_data, loss, denoiser = exact_steps.setting(model, accelerator)
    learner = exact_steps.learner_of(denoiser, loss, accelerator)
    samples, plan = TrainingSamples(training_data), Plan(training_data.sources, 1, 0)
    value = torch.stack([loss(denoiser, collate([samples[plan.forward(n)[0]]]))[0] for n in range(4)]).mean()
    value.backward()
    names = {parameter: name for name, parameter in denoiser.named_parameters()}
    norm = sum(parameter.grad.square().sum() for parameter in learner.parameters).sqrt()
    assert norm > 0.05
    assert one_batch["loss 0"].item() == pytest.approx(value.item(), rel=1e-6)
    for parameter in learner.parameters:
        moved = parameter.detach() - 0.05 / (norm + 1e-6) * parameter.grad  # torch's formula
        torch.testing.assert_close(one_batch[f"{names[parameter]} 0"], moved, rtol=1e-5, atol=1e-9)


class Ranks:
    """A stand-in for AdaLoRA's allocator that records the steps of its calls, and how often its gradient was added."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.gradients = 0

    def add_gradient(self, accelerator: Accelerator) -> None:
        self.gradients += accelerator.sync_gradients

    def step(self, step: int) -> None:
        self.steps.append(step)


@pytest.mark.exhaustive
@pytest.mark.parametrize("skipped", [False, True])
def test_rates_and_ranks_move_once_a_step_and_not_where_it_was_skipped(model, monkeypatch, skipped):
    """The fp16 scaler skips a step with non-finite gradients."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    words = ("--gradient_accumulation_steps", "2", "--train_batch_size", "1")
    training_data, loss, denoiser = exact_steps.setting(model, accelerator, *words)
    learner = exact_steps.learner_of(denoiser, loss, accelerator)
    learner.allocator = Ranks()
    before = learner.lr_scheduler.last_epoch
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", skipped)
    batches = iter(training_loader(training_data, range(2), 1, 0, pin=False))
    for _ in range(2):
        take_step(learner, batches, exact_steps.study_of(loss.context))
    assert learner.allocator.steps == ([] if skipped else [1, 2]) and learner.allocator.gradients == 2
    assert learner.lr_scheduler.last_epoch - before == (0 if skipped else 2)


def test_every_forward_of_a_run_has_dropout_masks_of_its_own(monkeypatch):
    """Masks depend on torch's random state: no two forward passes start with the same state, in any process."""
    states, layer = [], nn.Linear(1, 1)
    layer.register_forward_pre_hook(lambda *_: states.append(tuple(torch.get_rng_state().tolist())))
    optimizer = torch.optim.SGD(layer.parameters())
    flags = Options.of(seed=0, gradient_accumulation_steps=2, max_grad_norm=1.0)
    context = ImageContext(flags, None, Accelerator(cpu=True, gradient_accumulation_steps=2), None)
    for process in range(2):
        monkeypatch.setattr(Accelerator, "process_index", process)
        learner = Learner("lora", layer, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), None, layer)
        for _ in range(2):
            take_step(learner, itertools.repeat(torch.ones(1, 1)), exact_steps.study_of(context))
    assert len(states) == len(set(states)) == 8


@pytest.mark.parametrize(("longest", "moved"), [(0.5, 0.5), (0, 1)])
def test_gradients_are_clipped_to_a_norm_and_with_0_not_at_all(longest, moved):
    layer = nn.Linear(1, 1, bias=False)
    before = layer.weight.item()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    learner = Learner("lora", layer, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1), None, layer)
    flags = Options.of(seed=0, gradient_accumulation_steps=1, max_grad_norm=longest)
    context = ImageContext(flags, None, Accelerator(cpu=True), None)
    take_step(learner, itertools.repeat(torch.ones(1, 1)), exact_steps.study_of(context))
    assert before - layer.weight.item() == pytest.approx(moved, abs=1e-5)


# -- compiled and checkpointed ---------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_compiled_steps_are_the_same_steps(run, base_flags, tmp_path, monkeypatch):
    """The complete graph is captured as for any backend, but runs without code generation, which would take minutes."""
    captured, compile_ = [], torch.compile

    def capture(graph, inputs):
        captured.append(any("conv2d" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, options: compile_(model, backend=capture, fullgraph=True))
    flags = [*base_flags, "--compile", "--method", "reslora"]
    assert main(*flags, "--output_dir", tmp_path / "out") == 0
    # The U-Net, once, although samples are drawn between steps; the rest puts the norms of a forward away.
    assert sum(captured) == 1
    assert_same(final_weights(tmp_path / "out"), final_weights(run), 1e-3, 1e-5)


def test_compiling_a_checkpointed_shortcut_is_refused_before_anything_is_encoded(base_flags, capsys, tmp_path):
    """torch.compile does not support the context from which the recomputation gets its state."""
    flags = [*base_flags, "--compile", "--gradient_checkpointing", "--method", "reslora", "--shortcut", "middle"]
    line = refused(capsys, *flags, "--output_dir", tmp_path / "out")
    assert "--compile" in line and "--gradient_checkpointing" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
def test_checkpointed_steps_are_the_same_steps(brief_flags, tmp_path):
    flags = [*brief_flags, "--method", "reslora", "--shortcut", "middle", "--max_train_steps", "2"]
    for name, more in (("plain", []), ("checkpointed", ["--gradient_checkpointing"])):
        assert main(*flags, *more, "--output_dir", tmp_path / name) == 0
    assert_same(*(final_weights(tmp_path / name, step=2) for name in ("plain", "checkpointed")), 1e-3, 1e-5)


# -- the schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_rates_rise_for_a_tenth_of_the_run_and_reach_their_end_with_it(model):
    def factor(step: int) -> float:
        return (1 + math.cos(math.pi * (step - 2) / 18)) / 2

    words = ("--max_train_steps", "20", "--learning_rate", "1e-3", "--lr_scheduler", "cosine")
    training_data, loss, denoiser = exact_steps.setting(model, None, *words)
    planned, made = schedule_of(training_data.updates(1), loss.context), Trained({"unet": denoiser}, loss)
    add_adapters(made, "reslora", 20, loss.context)
    learner = new_learner("reslora", made, planned, loss.context)
    for step in range(20):
        assert learner.lr_scheduler.get_last_lr() == pytest.approx([1e-3 * (step / 2 if step < 2 else factor(step))])
        learner.optimizer.step()
        learner.lr_scheduler.step()
    assert learner.lr_scheduler.get_last_lr() == pytest.approx([1e-3 * factor(20)])


# -- losses that are not finite --------------------------------------------------------------------------------------


def test_not_a_number_stops_the_run(base_flags, tmp_path, capsys):
    flags = [*base_flags, "--method", "lora", "--learning_rate", "1e30", "--checkpointing_steps", "1"]
    assert "lower --learning_rate" in failed(
        capsys, *flags, "--output_dir", tmp_path / "out", "--max_grad_norm", "1e30"
    )
    for checkpoint in (tmp_path / "out" / "lora").glob("checkpoint-*"):
        assert all(torch.isfinite(value).all() for value in load_file(checkpoint / "adapter.safetensors").values())


EXPORTED = ("pytorch_lora_weights.safetensors", "kohya.safetensors", "peft", "unet", "merged", "exports.json")


@pytest.mark.exhaustive
def test_divergence_in_the_last_step_exports_nothing(brief_flags, capsys, tmp_path):
    """The weights are finite, but the outputs are not, and no later loss could show it."""
    method = "reslora"
    flags = [*brief_flags, "--method", method, "--learning_rate", "1e30", "--output_dir", tmp_path / "out"]
    line = failed(capsys, *flags)
    assert method in line and "--learning_rate" in line
    assert not [name for name in EXPORTED if (tmp_path / "out" / method / name).exists()]
    assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


# -- signals ---------------------------------------------------------------------------------------------------------


def wait_for_step(log: Path, process) -> None:
    """Wait until the run has trained a step or has ended; `process` is a Popen or a multiprocessing.Process."""
    wait_until(lambda: (log.is_file() and '"train"' in log.read_text()) or not is_running(process), "a step")


@pytest.mark.exhaustive
def test_sigterm_saves_and_the_resumed_run_is_the_uninterrupted_one(runs, whole, tmp_path):
    output = tmp_path / "out"
    process = runs.start(output)
    wait_for_step(output / "reslora" / "log.jsonl", process)
    process.terminate()
    assert ended(process) in (128 + signal.SIGTERM, 0)  # 0 where it was done before the signal came
    assert not (output / ".lock").exists()
    assert runs.finish(output, *RESUME) == 0
    assert_same(final_weights(output, step=5), final_weights(whole, step=5))


LONG = ("--max_train_steps", "100000", "--checkpointing_steps", "100000")  # it is stopped before, however late that is


def test_sigterm_to_the_whole_group_saves_too(runs, tmp_path):
    """As systemd and Slurm send it: the loader's workers ignore it."""
    process = runs.start(tmp_path, *LONG, "--dataloader_num_workers", "2", first=os.setsid)
    wait_for_step(tmp_path / "reslora" / "log.jsonl", process)
    os.killpg(process.pid, signal.SIGTERM)
    assert ended(process) == 128 + signal.SIGTERM
    assert "Traceback" not in runs.messages.read_text()
    assert len(list((tmp_path / "reslora").glob("checkpoint-*"))) == 1


@pytest.mark.exhaustive
def test_a_stop_in_a_validation_saves_and_the_rest_follows(run, base_flags, tmp_path, monkeypatch):
    """A stop in the validation of step 2 interrupts it.

    The step is saved, and the resumed run repeats the validation.
    """
    output, before = tmp_path / "out", StableDiffusionPipeline.__call__
    flags = [*base_flags, "--method", "reslora", "--output_dir", output, "--checkpointing_steps", "100"]

    def interrupted(self, *args, **more):
        if (output / "reslora" / "samples" / "step-000000").is_dir():
            signal.raise_signal(signal.SIGTERM)
        return before(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusionPipeline, "__call__", interrupted)
        assert main(*flags) == 128 + signal.SIGTERM
    method = output / "reslora"
    assert {path.name for path in method.glob("checkpoint-*")} == {"checkpoint-2"}
    assert not (method / "samples" / "step-000002").exists()
    validated = [row["step"] for row in of_split(read_log(method / "log.jsonl"), "validation")]
    assert validated == [0, 2]
    assert main(*flags, *RESUME) == 0
    assert_same(final_weights(output), final_weights(run))
    assert losses(output) == losses(run)
    names = [sorted(p.name for p in (o / "reslora" / "samples").iterdir()) for o in (output, run)]
    assert names[0] == names[1]


@pytest.mark.exhaustive
def test_a_stop_in_the_last_step_or_its_samples_leaves_them_to_the_next_start(run, base_flags, tmp_path, monkeypatch):
    """An exported method is not validated again, so nothing is exported before the last validation."""
    output, draw = tmp_path / "out", StableDiffusionPipeline.__call__
    flags, asked = [*base_flags, "--method", "lora", "--output_dir", output], []

    def stopped_in_samples(pipeline, *args, **more):
        if (output / "lora" / "checkpoint-4").is_dir() and not asked:
            asked.append("once")  # twice would end this process
            signal.raise_signal(signal.SIGTERM)
        return draw(pipeline, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusionPipeline, "__call__", stopped_in_samples)
        assert main(*flags) == 128 + signal.SIGTERM
    assert (output / "lora" / "checkpoint-4").is_dir() and not (output / "lora" / "exports.json").exists()
    assert main(*flags, *RESUME) == 0
    assert losses(output, "lora") == losses(run, "lora")
    assert digests(output / "lora", "samples/*/*") == digests(run / "lora", "samples/*/*")
