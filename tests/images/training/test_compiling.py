"""--compile: gradients of a compiled block, and a run that saves the same bits."""

import shutil

import pytest
import torch
from diffusers.models.unets.unet_2d_blocks import UpBlock2D

from reslora.training.trained import compiled

COMPILE = torch.compile


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
