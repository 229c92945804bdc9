"""--compile: the first gradients are compared with those without a compiler, and nothing is left of that."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd

from diffusion.runs import assert_same, main, refused
from reslora.diffusion import compiling

COMPILE = torch.compile


def compiles_with(monkeypatch, backend) -> None:
    """Without code generation, which would take minutes."""
    monkeypatch.setattr(torch, "compile", lambda model: COMPILE(model, backend=backend))


def wrong_backward(graph, inputs):
    """Returns three quarters of every gradient."""
    return lambda *args: [0.75 * value if isinstance(value, torch.Tensor) else value for value in graph(*args)]


def checkpoint_of(output: Path) -> dict[str, torch.Tensor]:
    """The adapter and the recorded norms of a method's last checkpoint."""
    return load_file(output / "reslora" / "checkpoint-4" / "reslora_model.safetensors")


def test_a_compiler_that_computes_other_gradients_is_refused(brief_flags, capsys, tmp_path, monkeypatch):
    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=wrong_backward)
    compiles_with(monkeypatch, backend)
    line = refused(capsys, *brief_flags, "--compile", "--output_dir", tmp_path / "out", quiet=False)
    assert "--compile" in line and "25% off" in line and "leave it out" in line
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


def test_the_check_leaves_nothing_behind(run, base_flags, tmp_path, monkeypatch):
    """The same weights and the same recorded norms as without a compiler, to the last bit."""
    compiles_with(monkeypatch, "eager")
    flags = [*base_flags, "--compile", "--method", "reslora", "--output_dir", tmp_path / "out"]
    assert main(*flags) == 0
    assert "reslora.norms" in checkpoint_of(run)
    assert_same(checkpoint_of(tmp_path / "out"), checkpoint_of(run))


def test_dropout_is_not_compared(brief_flags, tmp_path, monkeypatch):
    """A compiler may draw other masks."""
    compiles_with(monkeypatch, "eager")
    monkeypatch.setattr(compiling, "_error", lambda *args: pytest.fail("compared"))
    assert main(*brief_flags, "--compile", "--lora_dropout", "0.1", "--output_dir", tmp_path / "out") == 0


def test_a_step_that_only_fits_compiled_is_trained(brief_flags, capsys, tmp_path, monkeypatch):
    gradients = compiling._gradients

    def too_large(model, *args):
        if not isinstance(model, torch._dynamo.OptimizedModule):
            raise torch.OutOfMemoryError
        return gradients(model, *args)

    compiles_with(monkeypatch, "eager")
    monkeypatch.setattr(compiling, "_gradients", too_large)
    assert main(*brief_flags, "--compile", "--output_dir", tmp_path / "out") == 0
    assert "--compile is not checked" in capsys.readouterr().out
