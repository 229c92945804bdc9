"""The control method `lora_matched`: alphas against their formula, written out by hand in float64."""

import copy
import json

import pytest
import torch
from core_models import STACK_INPUTS, Stack, lora_stack, randomize, run, stack_chain
from safetensors import safe_open
from safetensors.torch import load_file

from reslora import ResLoraConfig
from reslora.linking import base_model, lora_layers
from reslora.methods.adapters import load_adapter, remove_adapters, save_adapter, trained_state
from reslora.methods.control_scales import gauged
from reslora.methods.controls import put_on, settings_of

BATCHES = [STACK_INPUTS["x"], 3 * STACK_INPUTS["x"].flip(1)]
ALPHA, RANK = 5, 3


def at_start(**more) -> torch.nn.Module:
    """Return a stack of plain LoRA with B = 0."""
    model = lora_stack(**more)
    for layer in lora_layers(base_model(model), "default").values():
        torch.nn.init.zeros_(layer.lora_B["default"].weight)
    return model


def measured(model, shortcut: str = "input", pre_num: int = 2, head: str = "repeat") -> dict:
    with gauged(model, ResLoraConfig(shortcut, pre_num, head), STACK_INPUTS) as gauge:
        for batch in BATCHES:
            base_model(model)(batch)
    return gauge.settings()


def matched() -> torch.nn.Module:
    """Return a stack of LoRA with matched alphas, and with B not zero."""
    model = at_start()
    put_on(model, measured(model))
    return randomize(model, seed=7)


@torch.no_grad()
def by_hand(model) -> tuple[list, list]:
    """Return A and the input (tokens x p) of every layer in all batches, in order."""
    base, inputs = base_model(model), []
    layers = [layer.proj for layer in base.layers]
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1))) for layer in layers
    ]
    for batch in BATCHES:
        base(batch)
    for hook in hooks:
        hook.remove()
    first, second = inputs[: len(layers)], inputs[len(layers) :]
    return [layer.lora_A["default"].weight.detach().clone() for layer in layers], [
        torch.cat(pair) for pair in zip(first, second, strict=True)
    ]


def hidden(shortcut: str, head: str, a: list, x: list) -> list:
    """Return the input of B with a shortcut over two blocks, for each block of the chain."""
    before = [range(max(0, n - 2), n) for n in range(len(a))]
    if shortcut == "input":
        first = (2 if head == "repeat" else 1) * x[0] @ a[0].T
        return [first] + [(x[n] + x[n - 1]) @ a[n].T for n in range(1, len(a))]
    if shortcut == "middle":
        return [x[n] @ a[n].T + sum(x[k] @ a[k].T for k in before[n]) for n in range(len(a))]
    return [torch.cat([x[n] @ a[k].T for k in (n, *before[n])], dim=1) for n in range(len(a))]


# -- matched alphas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shortcut", "head"), [("input", "repeat"), ("input", "none"), ("middle", "repeat"), ("block", "repeat")]
)
def test_each_layers_alpha_is_scaled_by_what_the_shortcut_does_to_what_enters_b(shortcut, head):
    model = at_start()
    a, x = by_hand(model)
    put_on(model, measured(model, shortcut, head=head))
    whole = hidden(shortcut, head, a, x)
    layers = lora_layers(base_model(model), "default")
    for n, name in enumerate(stack_chain()):
        expected = ALPHA * whole[n].norm().item() / (x[n] @ a[n].T).norm().item()
        assert layers[name].lora_alpha["default"] == pytest.approx(expected, rel=1e-12)
        assert layers[name].scaling["default"] == layers[name].lora_alpha["default"] / RANK
    sizes = [layers[name].lora_alpha["default"] / ALPHA for name in stack_chain()]
    assert sizes[0] == pytest.approx(2 if (shortcut, head) == ("input", "repeat") else 1)
    assert len({round(size, 2) for size in sizes}) == 4


def test_nothing_that_is_wired_is_nothing_that_is_scaled():
    model = at_start()
    assert measured(model, "none") == {"alphas": {}}
    assert measured(model, pre_num=0) == {"alphas": {}}


def test_measuring_leaves_the_model_as_it_was():
    model = at_start()
    before, expected = copy.deepcopy(model.state_dict()), run(model, STACK_INPUTS)
    measured(model, "middle")
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(run(model, STACK_INPUTS), expected) and settings_of(model) is None


def test_a_shortcut_without_a_link_is_refused():
    model = at_start(target_modules=["layers.0.proj"])
    with pytest.raises(ValueError, match="finds no link"), gauged(model, ResLoraConfig(), STACK_INPUTS):
        pass


# -- trained, saved and loaded -----------------------------------------------------------------------------------------


def test_what_was_measured_is_saved_and_loaded_with_the_adapter(tmp_path):
    model = matched()
    save_adapter(model, tmp_path)
    plain = {name: value.shape for name, value in trained_state(lora_stack()).items()}
    assert {name: value.shape for name, value in load_file(tmp_path / "adapter.safetensors").items()} == plain
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert json.loads(file.metadata()["control"]) == settings_of(model)
    other = lora_stack()
    put_on(other, measured(other, "middle"))  # of what it takes the place
    for fresh in (lora_stack(), other):
        load_adapter(fresh, tmp_path)
        assert settings_of(fresh) == settings_of(model)
        assert torch.equal(run(fresh, STACK_INPUTS), run(model, STACK_INPUTS))


def test_an_alpha_that_fades_is_refused_with_the_commit_that_loads_it(tmp_path):
    model = matched()
    base_model(model)._control = settings_of(model) | {"factor": 0.25}
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"adapter\.safetensors has a fading alpha: .* 8aaa5c1e$"):
        load_adapter(lora_stack(), tmp_path)


def test_what_does_not_fit_changes_nothing(tmp_path):
    save_adapter(matched(), tmp_path)
    wider = lora_stack(Stack(width=8))
    expected = run(wider, {"x": torch.ones(1, 2, 8, dtype=torch.float64)})
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(wider, tmp_path)
    assert torch.equal(run(wider, {"x": torch.ones(1, 2, 8, dtype=torch.float64)}), expected)
    assert settings_of(wider) is None


def test_plain_lora_is_saved_as_ever(tmp_path):
    save_adapter(lora_stack(), tmp_path)
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_pefts_configuration_says_the_alphas(tmp_path):
    """PEFT alone builds the same adapter from it."""
    from peft import PeftModel

    model = matched()
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(base_model(model))
    remove_adapters(base)
    assert torch.equal(run(PeftModel.from_pretrained(base, tmp_path), STACK_INPUTS), run(model, STACK_INPUTS))
