"""--compile: the first gradients are compared with those of the uncompiled model, without side effects."""

import contextlib
import shutil
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from core_models import STACK_INPUTS, lora_stack
from diffusers.models.unets.unet_2d_blocks import UpBlock2D
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from images.runs import assert_same, main, refused
from reslora import ResLoraConfig, connect
from reslora.errors import InvalidArgument
from reslora.images.context import ImageContext
from reslora.options.images import Options
from reslora.training import compiling
from reslora.training.compiling import checked
from reslora.training.trained import Trained, compiled
from reslora.wiring import connection_of

COMPILE = torch.compile
BATCHES = [{"x": STACK_INPUTS["x"] * scale} for scale in range(1, 9)]


@pytest.mark.exhaustive
def test_gradients_pass_an_upsampling_when_it_is_compiled(monkeypatch):
    if shutil.which("c++") is None:  # nothing can be compiled for a CPU then
        monkeypatch.setattr(torch, "compile", lambda model, options: COMPILE(model, backend="eager"))
    torch.manual_seed(0)
    block = UpBlock2D(8, 16, 16, 32, num_layers=1, resnet_groups=4).requires_grad_(False)
    inputs = [torch.randn(2, width, 4, 4, requires_grad=True) for width in (16, 8)]
    timesteps, weight = torch.randn(2, 32), torch.randn(2, 16, 8, 8)
    expected, found = [
        torch.autograd.grad((model(inputs[0], (inputs[1],), timesteps) * weight).sum(), inputs)
        for model in (block, compiled(block))
    ]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def forward_only_right(factor: float) -> Callable:
    """Return a compiler without code generation, whose backward pass returns `factor` times every gradient."""

    def backward(graph, inputs):
        return make_boxed_func(
            lambda *args: [factor * value if isinstance(value, torch.Tensor) else value for value in graph(*args)]
        )

    return aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=backward)


class Checked:
    """The result of `checked` with `BATCHES` for a stack with input-shortcuts and a compiler."""

    def __init__(self, backend: str | Callable, precision: str = "no", dropout: float = 0.0, fits: bool = True) -> None:
        wrapped = lora_stack(lora_dropout=dropout)
        connect(wrapped, ResLoraConfig(), example_inputs=STACK_INPUTS)
        self.denoiser, self.fits, self.forwards = wrapped.get_base_model(), fits, 0
        trained = Trained({"stack": self.denoiser}, self.loss)
        trained._compiled = (COMPILE(self.denoiser, backend=backend),)
        self.learner = SimpleNamespace(
            denoiser=self.denoiser, trained=trained, model=trained, timed=contextlib.nullcontext
        )
        accelerator = SimpleNamespace(
            mixed_precision=precision,
            num_processes=1,
            distributed_type=Accelerator(cpu=True).distributed_type,
            print=print,
        )
        self.context = ImageContext(Options.of(compile=True, lora_dropout=dropout), None, accelerator, None)

    def loss(self, model: torch.nn.Module, batch: dict) -> torch.Tensor:
        self.forwards += 1
        if not self.fits and model is self.denoiser:
            raise torch.OutOfMemoryError
        return model(**batch).square().mean(dim=(1, 2))

    def batches(self) -> list[dict]:
        return list(checked(iter(BATCHES), self.learner, self.context))


@pytest.mark.exhaustive
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_equal_gradients_pass_and_leave_nothing_behind(precision):
    case = Checked("aot_eager", precision)
    case.loss(case.denoiser, BATCHES[1]).sum()
    norms, random = connection_of(case.denoiser).wires.norms, torch.get_rng_state()
    recorded = norms.values.clone()
    assert case.batches() == BATCHES and case.forwards == 3
    assert norms.count == 1 and torch.equal(norms.values.nan_to_num(), recorded.nan_to_num())
    assert all(parameter.grad is None for parameter in case.denoiser.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("factor", "precision"), [(0.85, "no"), (-1.0, "bf16"), (float("nan"), "bf16")])
def test_other_gradients_are_refused(factor, precision):
    with pytest.raises(InvalidArgument, match=r"--compile: gradients .* differ by .*; leave it out"):
        Checked(forward_only_right(factor), precision).batches()


@pytest.mark.exhaustive
def test_gradients_in_half_precision_may_differ_by_its_rounding():
    assert Checked(forward_only_right(0.85), "bf16").batches() == BATCHES


def test_no_single_batch_condemns_a_compiler(monkeypatch):
    """Rounding errors exceed the tolerance in some batches."""
    case, errors = Checked("eager"), iter([0.9, 0.7, 0.01])
    monkeypatch.setattr(compiling, "_error", lambda *args: next(errors))
    assert case.batches() == BATCHES and list(errors) == []


def test_dropout_is_not_compared(capsys):
    """Compiled dropout masks differ."""
    case = Checked("eager", dropout=0.5)
    assert case.batches() == BATCHES and case.forwards == 0
    assert "--compile: gradients are not compared" in capsys.readouterr().out


def test_a_step_that_only_fits_compiled_is_not_compared(capsys):
    assert Checked("eager", fits=False).batches() == BATCHES
    assert "--compile is not checked" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_a_run_is_refused_before_its_first_step(brief_flags, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, options: COMPILE(model, backend=forward_only_right(0.75)))
    line = refused(capsys, *brief_flags, "--compile", "--output_dir", tmp_path / "out", quiet=False)
    assert "--compile" in line and "differ by 25%" in line
    assert {path.parent.name for path in (tmp_path / "out").glob("**/*.safetensors")} <= {"cache"}


@pytest.mark.exhaustive
def test_a_run_saves_the_same_bits(run, base_flags, tmp_path, monkeypatch):
    """The same weights and recorded norms as without a compiler."""
    monkeypatch.setattr(torch, "compile", lambda model, options: COMPILE(model, backend="eager"))
    flags = [*base_flags, "--compile", "--method", "reslora", "--max_train_steps", "2", "--num_validation_images", "0"]
    assert main(*flags, "--output_dir", tmp_path / "out") == 0
    saved = "reslora/checkpoint-2/reslora_model.safetensors"
    assert "reslora.norms" in load_file(run / saved)
    assert_same(load_file(tmp_path / "out" / saved), load_file(run / saved))
