"""Training of one method: the same seed gives the same bytes, schedules, and early ends of a run."""

import gc
import itertools
import math
import os
import shutil
import signal
import subprocess
import weakref
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from launching import forked, start
from pipelines import FAMILIES
from safetensors.torch import load_file
from suites import quick
from torch import nn
from waiting import ended, ignore_sigint, is_running, wait_until

from images import exact_steps
from images.runs import (
    RESUME,
    SCRIPT,
    assert_same,
    digests,
    failed,
    final_weights,
    losses,
    main,
    refused,
    training_state,
    without,
)
from reslora.images import run as running
from reslora.images.context import ImageContext
from reslora.images.data.batch import collate
from reslora.images.data.plan import Plan
from reslora.images.data.samples import TrainingSamples, ValidationSamples, training_loader
from reslora.images.initial_lora import add_adapters
from reslora.images.model.loading import Model
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
def test_a_method_is_not_in_memory_with_the_one_before(brief_flags, tmp_path, monkeypatch):
    loaded, alive, load = [], [], Model.load_denoiser

    def noted(*given) -> nn.Module:
        alive.append(sum(model() is not None for model in loaded))
        denoiser = load(*given)
        loaded.append(weakref.ref(denoiser))
        return denoiser

    monkeypatch.setattr(Model, "load_denoiser", noted)
    methods = ["--method", "lora", "reslora", "--mixed_precision", "bf16", "--output_dir", tmp_path / "out"]
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate takes one precision in a process
    gc.disable()  # it could collect the model before by chance
    try:
        assert main(*without(brief_flags, "--method"), *methods) == 0
    finally:
        gc.enable()
        AcceleratorState._reset_state(reset_partial_state=True)
    assert alive == [0, 0]


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
@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (1, 4)])
def test_accumulated_steps_are_those_of_one_batch(model, one_batch, batch, accumulation):
    assert_equal_but_for_rounding(exact_steps.trained(model, batch, accumulation), one_batch)


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
@pytest.mark.parametrize("family", ["flux", "chroma"])
def test_steps_of_two_processes_are_those_of_one_batch_with_flows(tmp_path, family):
    """Blocks and their shortcuts are recomputed in the backward pass. Chroma masks the shorter captions."""
    model, more = FAMILIES[family](tmp_path / "model"), "--gradient_checkpointing"
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


@pytest.mark.parametrize(("longest", "moved"), [(0.5, 0.5), (2, 1), (0, 1)])
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


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_compiling_a_checkpointed_shortcut_is_refused_before_anything_is_encoded(
    base_flags, capsys, tmp_path, shortcut
):
    """torch.compile does not support the context from which the recomputation gets its state."""
    flags = [*base_flags, "--compile", "--gradient_checkpointing", "--method", "reslora", "--shortcut", shortcut]
    line = refused(capsys, *flags, "--output_dir", tmp_path / "out")
    assert "--compile" in line and "--gradient_checkpointing" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_checkpointed_steps_are_the_same_steps(brief_flags, tmp_path, shortcut):
    flags = [*brief_flags, "--method", "reslora", "--shortcut", shortcut, "--max_train_steps", "2"]
    for name, more in (("plain", []), ("checkpointed", ["--gradient_checkpointing"])):
        assert main(*flags, *more, "--output_dir", tmp_path / name) == 0
    assert_same(*(final_weights(tmp_path / name, step=2) for name in ("plain", "checkpointed")), 1e-3, 1e-5)


# -- the schedule ----------------------------------------------------------------------------------------------------


def learning_rates(output: Path) -> list[float]:
    """Return the learning rate that each step used."""
    return [row["lr"] for row in of_split(read_log(output / "lora" / "log.jsonl"), "train")]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("cosine", lambda step: (1 + math.cos(math.pi * (step - 2) / 18)) / 2),
        ("linear", lambda step: (20 - step) / 18),
        ("constant_with_warmup", lambda step: 1),
    ],
    ids=["cosine", "linear", "constant"],
)
def test_rates_rise_for_a_tenth_of_the_run_and_reach_their_end_with_it(model, schedule, factor):
    words = ("--max_train_steps", "20", "--learning_rate", "1e-3", "--lr_scheduler", schedule)
    training_data, loss, denoiser = exact_steps.setting(model, None, *words)
    planned, made = schedule_of(training_data.updates(1), loss.context), Trained({"unet": denoiser}, loss)
    add_adapters(made, "reslora", 20, loss.context)
    learner = new_learner("reslora", made, planned, loss.context)
    for step in range(20):
        assert learner.lr_scheduler.get_last_lr() == pytest.approx([1e-3 * (step / 2 if step < 2 else factor(step))])
        learner.optimizer.step()
        learner.lr_scheduler.step()
    assert learner.lr_scheduler.get_last_lr() == pytest.approx([1e-3 * factor(20)])


@pytest.mark.exhaustive
def test_warm_up_steps_that_are_given_are_taken(brief_flags, tmp_path):
    flags = [*brief_flags, "--max_train_steps", "4", "--lr_scheduler", "cosine", "--lr_warmup_steps", "8"]
    assert main(*flags, "--output_dir", tmp_path / "out") == 0
    assert learning_rates(tmp_path / "out") == pytest.approx([1e-2 * step / 8 for step in (0, 1, 2, 3)])


@pytest.mark.exhaustive
def test_piecewise_constant_rates(brief_flags, tmp_path):
    """Factors of the learning rate with the steps at which they end, and the last factor: diffusers' notation."""
    flags = [*brief_flags, "--max_train_steps", "5", "--lr_scheduler", "piecewise_constant"]
    assert main(*flags, "--lr_step_rules", "1:2,0.1:4,0.01", "--output_dir", tmp_path / "out") == 0
    assert learning_rates(tmp_path / "out") == pytest.approx([1e-2 * factor for factor in (1, 1, 0.1, 0.1, 0.01)])


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
@pytest.mark.parametrize("method", ["lora", "reslora"])
def test_divergence_in_the_last_step_exports_nothing(brief_flags, capsys, tmp_path, method):
    """The weights are finite, but the outputs are not, and no later loss could show it."""
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
def test_signals_are_heard_even_where_they_were_ignored_at_the_start(runs, tmp_path):
    """`nohup python train_sd.py &` and many build services start their children with SIGINT ignored."""
    process = runs.start(tmp_path, *LONG, first=ignore_sigint)
    wait_for_step(tmp_path / "reslora" / "log.jsonl", process)
    os.kill(process.pid, signal.SIGINT)
    assert ended(process) == 128 + signal.SIGINT
    assert "Traceback" not in runs.messages.read_text()


@pytest.mark.exhaustive
@pytest.mark.parametrize("moment", ["loss", "samples"])
def test_a_stop_in_a_validation_saves_and_the_rest_follows(run, base_flags, tmp_path, monkeypatch, moment):
    """A stop in the validation of step 2 interrupts it.

    The step is saved, and the resumed run repeats the validation.
    """
    output, of = tmp_path / "out", {"loss": ValidationSamples, "samples": StableDiffusionPipeline}[moment]
    name = {"loss": "batches", "samples": "__call__"}[moment]
    before = getattr(of, name)
    flags = [*base_flags, "--method", "reslora", "--output_dir", output, "--checkpointing_steps", "100"]

    def interrupted(self, *args, **more):
        if (output / "reslora" / "samples" / "step-000000").is_dir():
            signal.raise_signal(signal.SIGTERM)
        return before(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(of, name, interrupted)
        assert main(*flags) == 128 + signal.SIGTERM
    method = output / "reslora"
    assert {path.name for path in method.glob("checkpoint-*")} == {"checkpoint-2"}
    assert not (method / "samples" / "step-000002").exists()
    validated = [row["step"] for row in of_split(read_log(method / "log.jsonl"), "validation")]
    assert validated == ([0] if moment == "loss" else [0, 2])
    assert main(*flags, *RESUME) == 0
    assert_same(final_weights(output), final_weights(run))
    assert losses(output) == losses(run)
    names = [sorted(p.name for p in (o / "reslora" / "samples").iterdir()) for o in (output, run)]
    assert names[0] == names[1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("moment", ["step", "samples"])
def test_a_stop_in_the_last_step_or_its_samples_leaves_them_to_the_next_start(
    run, base_flags, tmp_path, monkeypatch, moment
):
    """An exported method is not validated again, so nothing is exported before the last validation."""
    output, take, draw = tmp_path / "out", loop.take_step, StableDiffusionPipeline.__call__
    flags, asked = [*base_flags, "--method", "lora", "--output_dir", output], []

    def stopped_in_step(learner, *rest):
        if learner.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return take(learner, *rest)

    def stopped_in_samples(pipeline, *args, **more):
        if (output / "lora" / "checkpoint-4").is_dir() and not asked:
            asked.append("once")  # twice would end this process
            signal.raise_signal(signal.SIGTERM)
        return draw(pipeline, *args, **more)

    with monkeypatch.context() as patch:
        if moment == "step":
            patch.setattr(loop, "take_step", stopped_in_step)
        else:
            patch.setattr(StableDiffusionPipeline, "__call__", stopped_in_samples)
        assert main(*flags) == 128 + signal.SIGTERM
    assert (output / "lora" / "checkpoint-4").is_dir() and not (output / "lora" / "exports.json").exists()
    assert main(*flags, *RESUME) == 0
    assert losses(output, "lora") == losses(run, "lora")
    assert digests(output / "lora", "samples/*/*") == digests(run / "lora", "samples/*/*")


@pytest.mark.exhaustive
def test_a_stop_before_a_merge_alone_leaves_a_finished_run_as_it_is(run, base_flags, tmp_path, monkeypatch):
    """No step follows after which the stop would be handled, and merging a large model takes long."""
    output, prepare = shutil.copytree(run, tmp_path / "out"), loop.prepare
    flags = [*base_flags, "--method", "lora", "reslora", "--merge", "none", "--output_dir", output]

    def asked_before(*given):
        signal.raise_signal(signal.SIGTERM)
        prepare(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "prepare", asked_before)
        assert main(*flags) == 128 + signal.SIGTERM
    for pattern in ("*.json", "*.safetensors", "merged/*", "unet/*"):
        assert digests(output / "reslora", pattern) == digests(run / "reslora", pattern)
    assert (output / "loss.png").is_file()


@pytest.mark.exhaustive
@pytest.mark.parametrize("moment", ["material", "step"])
def test_a_folder_that_is_moved_is_not_made_anew(base_flags, tmp_path, monkeypatch, capsys, moment):
    """The run ends before it writes there, and can be resumed in the moved folder."""
    output, moved, take, encode = tmp_path / "out", tmp_path / "moved", loop.take_step, running.load_training_data
    flags = [*base_flags, "--method", "lora", "--output_dir"]

    def moved_in_step(learner, *rest):
        if learner.step == 2:
            output.rename(moved)
        return take(learner, *rest)

    def moved_while_it_prepares(*given):
        training_data = encode(*given)
        output.rename(moved)
        return training_data

    with monkeypatch.context() as patch:
        if moment == "step":
            patch.setattr(loop, "take_step", moved_in_step)
        else:
            patch.setattr(running, "load_training_data", moved_while_it_prepares)
        assert f"--output_dir {output} was moved or removed during training" in failed(capsys, *flags, output)
    assert not output.exists() and (moved / "lora" / "checkpoint-2").is_dir() == (moment == "step")
    assert main(*flags, moved, *RESUME) == 0
    assert not output.exists() and (moved / "lora" / "exports.json").is_file()


@pytest.mark.exhaustive
def test_a_stop_in_the_first_samples_leaves_them_to_the_next_start(run, base_flags, tmp_path, monkeypatch):
    """Nothing is trained yet; with a checkpoint of a later step, these samples would never be generated."""
    output, draw = tmp_path / "out", StableDiffusionPipeline.__call__
    flags = [*base_flags, "--method", "reslora", "--output_dir", output]

    def interrupted(pipeline, *args, **more):
        signal.raise_signal(signal.SIGTERM)
        return draw(pipeline, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusionPipeline, "__call__", interrupted)
        assert main(*flags) == 128 + signal.SIGTERM
    assert not list((output / "reslora").glob("checkpoint-*"))
    assert main(*flags, *RESUME) == 0
    assert digests(output / "reslora", "samples/*/*.png") == digests(run / "reslora", "samples/*/*.png")


def is_over(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.exhaustive
def test_sigterm_to_the_launcher_ends_and_saves_the_training(brief_flags, tmp_path):
    """`accelerate launch` exits without a signal to the process that it started, which has many steps to notice.

    Started as `nohup accelerate launch train_sd.py &`; tests/texts/test_launching.py starts it in a terminal.
    """
    flags = [*brief_flags, *LONG, "--output_dir", str(tmp_path / "out")]
    words = ["--num_processes", "1", str(SCRIPT), *flags]
    launcher = start(words, tmp_path / "printed", background=True, stdin=subprocess.DEVNULL)
    method = tmp_path / "out" / "lora"
    wait_for_step(method / "log.jsonl", launcher)
    (trainer,) = psutil.Process(launcher.pid).children()
    launcher.terminate()
    ended(launcher)
    wait_until(lambda: is_over(trainer), "the trainer's end")
    (checkpoint,) = method.glob("checkpoint-*")
    last = read_log(method / "log.jsonl")[-1]["step"]
    assert last < int(LONG[1]) and checkpoint.name == f"checkpoint-{last}"
    assert f"lora stopped after step {last}; resume with" in (tmp_path / "printed").read_text()


# -- half precision ----------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_each_method_starts_with_a_scale_of_its_own(brief_flags, tmp_path, monkeypatch):
    """In fp16, losses are scaled; the scale found by the first method would affect the second."""

    def scaler(*_: object) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)

    def start(flags):
        accelerator = start_accelerator(flags)
        accelerator.scaler = scaler()
        return accelerator

    start_accelerator = running.start_accelerator
    monkeypatch.setattr(running, "start_accelerator", start)
    monkeypatch.setattr("reslora.training.loop.get_grad_scaler", scaler)
    flags = [*without(brief_flags, "--method"), "--method", "lora", "lora_x2", "--max_train_steps", "2"]
    assert main(*flags, "--output_dir", tmp_path) == 0
    for method in ("lora", "lora_x2"):
        assert training_state(tmp_path, 2, method)["scaler"]["scale"] == 256.0
