"""Control methods: alphas and rotations against their formulas, written out by hand in float64."""

import copy
import json
import math

import pytest
import torch
from core_models import STACK_INPUTS, Stack, assert_equal, lora_stack, randomize, run, stack_chain
from safetensors import safe_open
from safetensors.torch import load_file

from reslora import ResLoraConfig
from reslora.chains import base_model, lora_layers
from reslora.methods.adapters import load_adapter, remove_adapters, save_adapter, trained_state
from reslora.methods.control_scales import gauged
from reslora.methods.controls import Rotations, merged, put_on, settings_of

BATCHES = [STACK_INPUTS["x"], 3 * STACK_INPUTS["x"].flip(1)]
ALPHA, RANK = 5, 3


def at_start(**more) -> torch.nn.Module:
    """Return a stack of plain LoRA with B = 0."""
    model = lora_stack(**more)
    for layer in lora_layers(base_model(model), "default").values():
        torch.nn.init.zeros_(layer.lora_B["default"].weight)
    return model


def measured(
    method: str, model, shortcut: str = "input", pre_num: int = 2, head: str = "repeat", seed: int = 0
) -> dict:
    with gauged(method, model, ResLoraConfig(shortcut, pre_num, head), STACK_INPUTS) as gauge:
        for batch in BATCHES:
            base_model(model)(batch)
    return gauge.settings(seed)


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
    put_on(model, measured("lora_matched", model, shortcut, head=head))
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
    assert measured("lora_matched", model, "none") == {"alphas": {}}
    assert measured("lora_matched", model, pre_num=0) == {"alphas": {}}
    assert measured("ms_placebo", model, pre_num=0) == {"seed": 0, "rotations": {}}


def test_measuring_leaves_the_model_as_it_was():
    model = at_start()
    before, expected = copy.deepcopy(model.state_dict()), run(model, STACK_INPUTS)
    measured("lora_matched", model, "middle")
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(run(model, STACK_INPUTS), expected) and settings_of(model) is None


def test_a_shortcut_without_a_link_is_refused():
    model = at_start(target_modules=["layers.0.proj"])
    with pytest.raises(ValueError, match="finds no link"), gauged("ms_placebo", model, ResLoraConfig(), STACK_INPUTS):
        pass


# -- placebos ----------------------------------------------------------------------------------------------------------


def rotations_of(model, name: str) -> tuple[list, float]:
    """Return R_1, R_2, ... as matrices, and c."""
    (rotations,) = base_model(model).get_submodule(name).lora_A["default"].parametrizations.weight
    eye = torch.eye(6, dtype=torch.float64)
    return [eye[:, at] * sign for at, sign in zip(rotations.places, rotations.signs, strict=True)], rotations.scale


def placebo(method: str, head: str = "repeat", seed: int = 0) -> torch.nn.Module:
    model = at_start()
    put_on(model, measured(method, model, head=head, seed=seed))
    return randomize(model, seed=7)


@pytest.mark.parametrize(("method", "head"), [("is_placebo", "repeat"), ("is_placebo", "none"), ("ms_placebo", "none")])
def test_a_placebo_adds_as_many_rotations_as_there_are_neighbours_and_as_much_as_they_add(method, head):
    start = at_start()
    a, x = by_hand(start)
    model = placebo(method, head)
    layers = lora_layers(base_model(model), "default")
    reach, firsts = 1 if method == "is_placebo" else 2, set()
    for n, name in enumerate(stack_chain()):
        layer, probe = layers[name], torch.randn(5, 6, dtype=torch.float64)
        original, up = (value for key, value in trained_state(model).items() if f".{n}.proj.lora_" in key)
        own, added = probe @ original.T, 0
        if n == 0 and (method, head) == ("is_placebo", "repeat"):
            added = own
        elif n:
            matrices, scale = rotations_of(model, name)
            assert len(matrices) == min(n, reach)
            firsts.add(tuple(matrices[0].flatten().tolist()))
            neighbours = x[n - 1] @ a[n].T if reach == 1 else sum(x[k] @ a[k].T for k in range(max(0, n - 2), n))
            ratio = neighbours.norm() / (x[n] @ a[n].T).norm()
            assert scale == pytest.approx(ratio.item() / math.sqrt(len(matrices)), rel=1e-12)
            for matrix in matrices:
                assert torch.equal(matrix @ matrix.T, torch.eye(6, dtype=torch.float64))
            added = scale * sum(probe @ matrix.T @ original.T for matrix in matrices)
        assert_equal(layer(probe), layer.base_layer(probe) + ALPHA / RANK * (own + added) @ up.T)
    assert len(firsts) == 3  # no two layers have the same


def test_rotations_are_of_the_seed_and_of_the_block_and_leave_wide_inputs_uncorrelated():
    weight = torch.zeros(1, 4096)
    one, same, *others = (Rotations(weight, 2, 1.0, key) for key in ("0 a", "0 a", "0 b", "1 a"))
    assert torch.equal(one.places, same.places) and torch.equal(one.signs, same.signs)
    assert not any(torch.equal(one.places, other.places) for other in others)
    x = torch.randn(4096, dtype=torch.float64).abs()  # unlike its mean, a permutation alone would keep it
    turned = [x[at] * sign for at, sign in zip(one.places, one.signs, strict=True)]
    for value, other in ((turned[0], x), (turned[1], x), (turned[0], turned[1])):
        assert abs((value @ other / (value.norm() * other.norm())).item()) < 0.08


@pytest.mark.parametrize("method", ["is_placebo", "ms_placebo"])
def test_a_placebo_merges_exactly_into_plain_lora(method):
    model = placebo(method)
    expected = run(model, STACK_INPUTS)
    folded = {}
    for n, name in enumerate(stack_chain()):
        layer = lora_layers(base_model(model), "default")[name]
        original = trained_state(model)[f"base_model.model.layers.{n}.proj.lora_A.default.weight"].clone()
        folded[name] = original
        if hasattr(layer.lora_A["default"], "parametrizations"):
            matrices, scale = rotations_of(model, name)
            folded[name] = original @ (torch.eye(6, dtype=torch.float64) + scale * sum(matrices))
    assert merged(model) is model and settings_of(model) is None
    for name, layer in lora_layers(base_model(model), "default").items():
        assert type(layer.lora_A["default"]) is torch.nn.Linear
        assert_equal(layer.lora_A["default"].weight, folded[name])
    assert torch.equal(run(model, STACK_INPUTS), expected)
    plain = lora_stack()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(run(plain, STACK_INPUTS), expected)


# -- trained, saved and loaded -----------------------------------------------------------------------------------------


def test_rotations_pass_gradients_to_a_and_keep_the_parameters_that_an_optimizer_holds():
    model = at_start()
    held = [parameter for parameter in model.parameters() if parameter.requires_grad]
    put_on(model, measured("is_placebo", model))
    randomize(model)
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    base_model(model)(STACK_INPUTS["x"]).sum().backward()
    layer = base_model(model).layers[3].proj.lora_A["default"]
    matrices, scale = rotations_of(model, "layers.3.proj")
    layer_gradient = layer.parametrizations.weight.original.grad
    folded = merged(copy.deepcopy(model))
    folded.zero_grad()
    base_model(folded)(STACK_INPUTS["x"]).sum().backward()
    plain = base_model(folded).layers[3].proj.lora_A["default"].weight.grad
    assert_equal(layer_gradient, plain @ (torch.eye(6, dtype=torch.float64) + scale * sum(matrices)).T)


@pytest.mark.parametrize("method", ["lora_matched", "is_placebo", "ms_placebo"])
def test_what_was_measured_is_saved_and_loaded_with_the_adapter(method, tmp_path):
    model = placebo(method)
    save_adapter(model, tmp_path)
    plain = {name: value.shape for name, value in trained_state(lora_stack()).items()}
    assert {name: value.shape for name, value in load_file(tmp_path / "adapter.safetensors").items()} == plain
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert json.loads(file.metadata()["control"]) == settings_of(model)
    other = lora_stack()
    put_on(other, measured(method, other, seed=1))  # of what it takes the place
    for fresh in (lora_stack(), other):
        load_adapter(fresh, tmp_path)
        assert settings_of(fresh) == settings_of(model)
        assert torch.equal(run(fresh, STACK_INPUTS), run(model, STACK_INPUTS))
    assert not torch.equal(run(placebo(method, seed=1), STACK_INPUTS), run(model, STACK_INPUTS)) or (
        method == "lora_matched"
    )


@pytest.mark.parametrize("earlier", [{"factor": 0.25}, {"mean": True}])
def test_terms_that_fade_or_are_averaged_are_refused_with_the_commit_that_loads_them(tmp_path, earlier):
    model = placebo("is_placebo")
    base_model(model)._control = settings_of(model) | earlier
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"adapter\.safetensors has averaged or fading shortcut terms: .* 8aaa5c1e$"):
        load_adapter(lora_stack(), tmp_path)


def test_what_does_not_fit_changes_nothing(tmp_path):
    save_adapter(placebo("is_placebo"), tmp_path)
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

    model = placebo("lora_matched")
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(base_model(model))
    remove_adapters(base)
    assert torch.equal(run(PeftModel.from_pretrained(base, tmp_path), STACK_INPUTS), run(model, STACK_INPUTS))
