"""The factor of the shortcut terms over the steps of training."""

import pytest
import torch
from core_models import STACK_INPUTS, lora_stack, run

import reslora
from reslora.chains import base_model
from reslora.methods.decay import factor_at, set_factor
from reslora.wiring import connection_of


def test_the_factor_falls_linearly_to_zero_and_stays_there():
    assert [factor_at(step, 8, 0.75) for step in range(9)] == pytest.approx(
        [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0, 0], abs=1e-15
    )


@pytest.mark.parametrize("part", [0.001, 1 / 3, 0.75, 0.999])
def test_it_is_one_before_the_first_step_and_exactly_zero_after_the_last(part):
    for steps in (1, 2, 3, 200, 9999):
        assert factor_at(0, steps, part) == 1 and factor_at(steps, steps, part) == 0


def test_a_connected_model_gets_the_factor_and_plain_lora_none():
    model, plain = lora_stack(), lora_stack()
    before = run(plain, STACK_INPUTS)
    reslora.connect(model, reslora.ResLoraConfig("middle", 2), example_inputs=STACK_INPUTS)
    for each in (model, plain):
        set_factor(each, 0.5)
    assert connection_of(base_model(model)).wires.factor == 0.5
    assert torch.equal(run(plain, STACK_INPUTS), before)
