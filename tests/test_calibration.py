"""Calibration: the statistics of any batches, in one pass or in several, and its memory."""

import pytest
import torch
from core_models import (
    ARCHITECTURES,
    STACK_INPUTS,
    Stack,
    adapter_layers,
    assert_equal,
    assert_one_line,
    delta,
    find_layer,
    lora_stack,
    randomize,
    tiny_llama,
    tiny_unet,
    token_inputs,
    unet_inputs,
)
from live_tensors import LiveTensors
from peft import LoraConfig
from suites import quick
from test_merging import Case, merged_by_lstsq, ridge_regression
from tiny_models import flux, flux_inputs, sd3, sd3_inputs, z_image, z_image_inputs
from torch import nn

import reslora
from reslora import ResLoraConfig, calibration, regression
from reslora.merging import Moments
from reslora.regression import Inputs

plans = pytest.mark.parametrize("shortcut, pre_num, head", [("input", 1, "repeat"), ("middle", -1, "none")])


def merged(model: nn.Module, batches, shortcut: str = "input", **arguments) -> reslora.MergeReport:
    reslora.connect(model, ResLoraConfig(shortcut, -1), **arguments)
    return reslora.merge(model, "lstsq", calibration=batches)


def without_notes(report: reslora.MergeReport) -> list[dict]:
    return [
        {**block, "error": pytest.approx(block["error"], rel=1e-9, abs=1e-9)} for block in report.to_dict()["blocks"]
    ]


# --- few tokens, many tokens ------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("name", ["llama", "unet"])
@plans
def test_few_tokens_solve_the_same_ridge_regression(name, shortcut, pre_num, head, length):
    """LLaMA's layers are 32 and 48 wide: one token or ten are stored as rows, eighty are not."""
    arch = ARCHITECTURES[name]
    case = Case(arch, shortcut, pre_num, head)
    batches = case.calibrate([arch.inputs(seed=seed, batch=1, length=length) for seed in (1, 2)])
    report = reslora.merge(case.model, "lstsq", calibration=batches)
    case.assert_merged_to(merged_by_lstsq(case), tolerance=1e-8)
    for tail in (tail for chain in arch.blocks for tail in chain):
        (block,) = [block for block in report.blocks if block.name.endswith(tail)]
        unmerged = torch.cat([output.flatten(0, -2) for output in case.oracle.outputs[tail]])
        result = case.tokens(tail) @ delta(find_layer(case.model, tail)).T
        assert block.error == pytest.approx(float((result - unmerged).norm() / unmerged.norm()), rel=1e-6, abs=1e-7)


# --- several passes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, length, budget",
    quick(
        [("llama", 2, 1), ("llama", 2, 20_000), ("llama", 11, 1), ("llama", 11, 40_000), ("unet", 5, 3000)],
        ("llama", 2, 20_000),
    ),
)
@plans
def test_several_passes_equal_one(monkeypatch, name, length, shortcut, pre_num, head, budget):
    arch = ARCHITECTURES[name]
    batches = [arch.inputs(seed=seed, batch=seed, length=length) for seed in (1, 2, 4)]
    one, several = Case(arch, shortcut, pre_num, head), Case(arch, shortcut, pre_num, head)
    whole = reslora.merge(one.model, "lstsq", calibration=batches)
    monkeypatch.setattr(calibration, "BUDGET", budget)
    report = reslora.merge(several.model, "lstsq", calibration=iter(batches))
    assert not whole.notes and "passes" in report.notes[0] and len(report.notes) == 1
    assert report.to_dict()["blocks"] == without_notes(whole)
    for name in adapter_layers(one.model):
        assert_equal(delta(find_layer(several.model, name)), delta(find_layer(one.model, name)))


def distinct_inputs(model: nn.Module, inputs: dict, names: list[str]) -> int:
    """Return how many different tensors the layers read in one forward pass."""
    read = []
    hooks = [find_layer(model, n).register_forward_pre_hook(lambda module, args: read.append(args[0])) for n in names]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    assert len(read) == len(names)
    return len({id(tensor) for tensor in read})


@pytest.mark.exhaustive
def test_layers_that_read_one_tensor_stay_together(monkeypatch):
    arch = ARCHITECTURES["llama"]
    case = Case(arch, "middle", -1)
    linked = [tail for chain in arch.blocks for tail in chain[1:]]
    expected = distinct_inputs(case.oracle.model, arch.inputs(), linked)
    assert expected < len(linked)
    forwards = []
    case.model.register_forward_pre_hook(lambda module, args: forwards.append(1))
    (case.model.get_base_model() if arch.peft else case.model).register_forward_pre_hook(
        lambda module, args: forwards.append(1)
    )
    monkeypatch.setattr(calibration, "BUDGET", 1)
    report = reslora.merge(case.model, "lstsq", calibration=[arch.inputs(seed=seed, batch=8) for seed in (1, 2)])
    assert f" {expected} passes" in report.notes[0]
    assert len(forwards) == 2 * expected * (1 if arch.peft else 2)


def test_layers_that_cast_what_they_read_share_it_too(monkeypatch):
    """With a half-precision base and float32 adapters, PEFT casts the input of q and of v separately."""
    torch.manual_seed(0)
    model = ARCHITECTURES["llama"].lora(base=tiny_llama().bfloat16())
    assert find_layer(model, "model.layers.0.self_attn.q_proj").lora_A["default"].weight.dtype == torch.float32
    monkeypatch.setattr(calibration, "BUDGET", 1)
    report = merged(model, [token_inputs(batch=8)])
    assert " 8 passes" in report.notes[0]  # four layers behind the first: what q and v read, and what down_proj reads


class InPlace(Stack):
    """A residual stack that adds to its stream in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        for layer in self.layers:
            x += layer(x)
        return x


def test_a_tensor_that_changes_in_place_is_another_input_for_each_layer():
    reports = []
    for kind in (Stack, InPlace):
        torch.manual_seed(0)
        model = lora_stack(kind())
        reslora.connect(model, ResLoraConfig("input"), example_inputs=STACK_INPUTS)
        reports.append(reslora.merge(model, "lstsq", calibration=[STACK_INPUTS]))
    assert reports[0] == reports[1]


def test_merges_that_fit_nothing_take_one_pass(llama, monkeypatch):
    monkeypatch.setattr(calibration, "BUDGET", 1)
    case = Case(llama, "input")
    forwards = []
    case.model.get_base_model().register_forward_pre_hook(lambda module, args: forwards.append(1))
    report = reslora.merge(case.model, "input", calibration=case.batches(3))
    assert len(forwards) == 3 and not report.notes


def test_a_widest_layer_beyond_the_budget_is_merged_all_the_same(llama, monkeypatch):
    monkeypatch.setattr(calibration, "BUDGET", 0)
    case = Case(llama, "input")
    reslora.merge(case.model, "lstsq", calibration=case.calibrate(case.batches()))
    case.assert_merged_to(merged_by_lstsq(case), tolerance=1e-8)


def test_values_that_are_not_finite_are_named_in_whatever_pass_they_come(llama, monkeypatch):
    case = Case(llama, "input")
    layer = find_layer(case.model, "model.layers.4.mlp.down_proj")
    layer.register_forward_pre_hook(lambda module, args: args[0] * torch.nan)
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    monkeypatch.setattr(calibration, "BUDGET", 1)
    with pytest.raises(ValueError) as error:
        reslora.merge(case.model, "lstsq", calibration=case.batches())
    assert_one_line(error, "model.layers.4.mlp.down_proj", "NaN")
    assert all(torch.equal(value, before[key]) for key, value in case.model.state_dict().items())


class Sometimes(nn.Module):
    """Two layers that read one tensor; the second does not always run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Stack.Block(6) for _ in range(4))
        for layer in self.layers:
            layer.other = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, both: bool = True) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer.proj(x) + (layer.other(x) if both else 0))
        return x


def test_a_layer_that_runs_on_some_batches_only_is_an_error():
    model = lora_stack(Sometimes(), target_modules=["proj", "other"])
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    batches = [{"x": x, "both": True}, {"x": x, "both": False}]
    with pytest.raises(ValueError) as error:
        merged(model, batches, example_inputs={"x": x})
    assert_one_line(error, "layers.1.other", "give batches that run")


# --- memory -----------------------------------------------------------------------------------------------------------


class Sizes:
    """A wide and deep stack, and calibration batches of few tokens."""

    width, layers = 256, 6
    moment = 4 * 256**2

    def merge(self, batches: int, tokens: int = 64) -> tuple[int, reslora.MergeReport]:
        """Return the most bytes alive at a time, in addition to the model."""
        model = lora_stack(Stack(self.layers, self.width), r=2).float()
        x = torch.randn(1, tokens, self.width)
        reslora.connect(model, ResLoraConfig(), example_inputs={"x": x})
        given = [{"x": torch.randn(1, tokens, self.width)} for _ in range(batches)]
        with LiveTensors() as live:
            report = reslora.merge(model, "lstsq", calibration=given)
        return live.peak, report


@pytest.mark.exhaustive
def test_memory_is_that_of_one_second_moment_at_least_budget(monkeypatch):
    """In addition: activations, tensors of width r, and the new weights of the adapter. A sum is half of a matrix."""
    monkeypatch.setattr(regression, "PANEL", 16)
    beside = 12 * 64 * 256 * 4 + 6 * 4 * 2 * 256 * 8 + 0.1 * Sizes.moment
    peak, report = Sizes().merge(batches=8)
    assert (
        3 * Sizes.moment < peak < 3.2 * Sizes.moment + beside and not report.notes
    )  # five sums, of which one is solved
    monkeypatch.setattr(calibration, "BUDGET", 1)
    peak, report = Sizes().merge(batches=8)
    assert " 5 passes" in report.notes[0]
    assert Sizes.moment < peak < 1.1 * Sizes.moment + beside
    monkeypatch.setattr(calibration, "BUDGET", int(1.7 * Sizes.moment))
    peak, report = Sizes().merge(batches=8)
    assert " 3 passes" in report.notes[0] and peak < 1.7 * Sizes.moment + beside
    _, report = Sizes().merge(batches=1, tokens=160)
    assert " 3 passes" in report.notes[0]


def test_few_tokens_take_no_second_moments(monkeypatch):
    monkeypatch.setattr(calibration, "BUDGET", Sizes.moment)
    peak, report = Sizes().merge(batches=2, tokens=4)
    assert not report.notes and peak < Sizes.moment


def test_gaps_are_kept_with_the_rows_only():
    x, own = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    moments = Moments(stand_in=torch.zeros(2, 8, dtype=torch.float64))
    moments.inputs = Inputs(x)
    for count in range(1, 5):
        moments.inputs.add(x)
        moments.add(x, own, own, x.norm())
        assert len(moments.gaps) == (count if moments.inputs.dual else 0)
    assert not moments.inputs.dual


# --- batches of every kind --------------------------------------------------------------------------------------------


def doubled(inputs: dict) -> dict:
    """Return values in float64, integers unchanged."""
    return {
        name: [value.double() for value in item]
        if isinstance(item, list)
        else item.double()
        if isinstance(item, torch.Tensor) and item.is_floating_point()
        else doubled(item)
        if isinstance(item, dict)
        else item
        for name, item in inputs.items()
    }


def sdxl() -> nn.Module:
    return tiny_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 8
    )


def sdxl_inputs(batch: int, length: int, seed: int) -> dict:
    extra = {"text_embeds": torch.randn(batch, 8), "time_ids": torch.randn(batch, 6)}
    return unet_inputs(batch, length, seed) | {"added_cond_kwargs": extra}


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
KINDS = {
    "z_image": (
        z_image,
        r"layers\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)",
        [z_image_inputs([(4, 4), (2, 6)], [5, 40]), z_image_inputs([(6, 4)], [70])],
    ),
    "sdxl": (sdxl, ATTENTION, [sdxl_inputs(2, 5, 0), sdxl_inputs(3, 9, 1)]),
    "flux": (flux, ["to_q", "to_k", "add_k_proj", "ff.net.2"], [flux_inputs(16, 5), flux_inputs(36, 9)]),
    "sd3": (sd3, ["to_q", "to_v", "add_q_proj"], [sd3_inputs(4, 8, 5), sd3_inputs(8, 8, 7)]),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("budget", [2**30, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_other_sizes_lists_and_nested_dicts(monkeypatch, kind, budget):
    """C of every block from the inputs of the connected model's layers, by the normal equations."""
    build, targets, batches = KINDS[kind]
    torch.manual_seed(0)
    model = build().double()
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    randomize(model)
    batches = [doubled(batch) for batch in batches]
    plan = reslora.connect(model, ResLoraConfig("middle", 2))
    entered = {block.name: [] for block in plan.blocks}
    hooks = [
        find_layer(model, name).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].flatten(0, -2))
        )
        for name, seen in entered.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model.eval()(**batch)
    for hook in hooks:
        hook.remove()
    x = {name: torch.cat(parts) for name, parts in entered.items()}
    a = {name: find_layer(model, name).lora_A["default"].weight.detach().clone() for name in x}
    monkeypatch.setattr(calibration, "BUDGET", budget)
    reslora.merge(model, "lstsq", calibration=batches)
    for chain in plan:
        names = [block.name for block in chain]
        for n in range(1, len(names)):
            now, past = names[n], names[max(0, n - 2) : n]
            terms = [(a[name], x[name]) for name in past]
            c = ridge_regression(x[now], sum(rows @ part.T for part, rows in terms), sum(part for part, _ in terms))
            assert_equal(find_layer(model, now).lora_A["default"].weight, a[now] + c, rtol=1e-6, atol=1e-7)
