"""What a method's optimizer is told."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from reslora.diffusion.arguments import Flags
from reslora.diffusion.training.state import new_optimizer

FLAGS = Flags(
    learning_rate=1e-3, scale_lr=False, train_batch_size=2, gradient_accumulation_steps=3, adam_beta1=0.8,
    adam_beta2=0.95, adam_weight_decay=0.1, adam_epsilon=1e-6, use_8bit_adam=False,
)  # fmt: skip


@pytest.mark.parametrize(("scaled", "rate"), [(False, 1e-3), (True, 2 * 3 * 4 * 1e-3)])
def test_a_scaled_rate_is_times_the_samples_of_a_step_in_all_processes(scaled, rate):
    accelerator = SimpleNamespace(num_processes=4, device=torch.device("cpu"), scaler=None)
    optimizer = new_optimizer([nn.Parameter(torch.ones(2))], FLAGS.replace(scale_lr=scaled), accelerator)
    (group,) = optimizer.param_groups
    assert group["lr"] == pytest.approx(rate)
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.8, 0.95), 0.1, 1e-6)
