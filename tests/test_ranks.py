"""New factors, ranks and scales after a merge, as stock PEFT reads them back."""

import copy
import math

import pytest
import torch
from core_models import (
    RANK,
    STACK_INPUTS,
    Stack,
    assert_equal,
    assert_one_line,
    find_layer,
    gradients_of,
    lora_stack,
    run,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import reslora
from reslora import ResLoraConfig, ranks


class Full(TorchDispatchMode):
    """A stand-in for memory that has room for only this many tensors."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.left = tensors

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        new = all(returned.alias_info is None for returned in func._schema.returns)
        if new and isinstance(result, torch.Tensor) and not result.is_meta:
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError("full")
        return result


def merges_within(model: nn.Module, tensors: int, **options: object) -> bool:
    try:
        with Full(tensors):
            reslora.merge(model, **options)
    except torch.OutOfMemoryError:
        return False
    return True


@pytest.mark.exhaustive
@pytest.mark.parametrize("shortcut, max_rank", [("block", None), ("middle", None)])
def test_a_merge_that_runs_out_of_memory_changes_nothing(shortcut, max_rank):
    model, other = lora_stack().eval(), lora_stack().eval()
    for wired in (model, other):
        reslora.connect(wired, ResLoraConfig(shortcut, 2), example_inputs=STACK_INPUTS)
    unmerged, tensors = run(model, STACK_INPUTS), 0
    while not merges_within(model, tensors, max_rank=max_rank):
        assert_equal(run(model, STACK_INPUTS), unmerged, rtol=0, atol=0)
        tensors += 1
    assert tensors > 8
    reslora.merge(other, max_rank=max_rank)
    assert_equal(run(model, STACK_INPUTS), run(other, STACK_INPUTS), rtol=0, atol=0)


def test_a_model_merged_in_inference_mode_trains_on():
    model, other = lora_stack(), lora_stack()
    for wired in (model, other):
        reslora.connect(wired, ResLoraConfig("block", 2), example_inputs=STACK_INPUTS)
    with torch.inference_mode():
        reslora.merge(model, max_rank=None)
    reslora.merge(other, max_rank=None)
    assert_equal(gradients_of(model, STACK_INPUTS), gradients_of(other, STACK_INPUTS), rtol=0, atol=0)


@pytest.mark.parametrize(
    "put, take",
    [
        (weight_norm, lambda module: remove_parametrizations(module, "weight")),
        (lambda module: prune.l1_unstructured(module, "weight", 0.5), lambda module: prune.remove(module, "weight")),
    ],
    ids=["parametrized", "pruned"],
)
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_a_weight_that_is_made_when_it_is_read_is_refused_until_it_is_fixed(shortcut, part, put, take):
    model = lora_stack().eval()
    reslora.connect(model, ResLoraConfig(shortcut, 2), example_inputs=STACK_INPUTS)
    module = getattr(find_layer(model, "layers.1.proj"), part)["default"]
    put(module)
    unmerged = run(model, STACK_INPUTS)
    with pytest.raises(ValueError) as error:
        reslora.merge(model)
    assert_one_line(error, "layers.1.proj", part, "remove_parametrizations")
    assert_equal(run(model, STACK_INPUTS), unmerged)
    take(module)
    reslora.merge(model)
    if shortcut == "block":
        assert_equal(run(model, STACK_INPUTS), unmerged)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scaling_is_the_same_to_the_last_bit(rslora):
    model = lora_stack(lora_alpha=7.3, use_rslora=rslora)
    layers = [find_layer(model, f"layers.{n}.proj") for n in range(4)]
    before = [layer.scaling["default"] for layer in layers]
    reslora.connect(model, ResLoraConfig("block", 2), example_inputs=STACK_INPUTS)
    reslora.merge(model)
    root = math.sqrt if rslora else float
    for n, layer in enumerate(layers):
        assert layer.r["default"] == RANK * (min(n, 2) + 1) == layer.lora_A["default"].weight.shape[0]
        assert layer.lora_alpha["default"] / root(layer.r["default"]) == pytest.approx(before[n], rel=1e-15)
        assert layer.scaling["default"] == before[n]


def test_whole_alphas_stay_whole_numbers():
    """`lora_alpha: 10`, as users write it, and not 10.0."""
    model = lora_stack(lora_alpha=5)
    reslora.connect(model, ResLoraConfig("block", 1), example_inputs=STACK_INPUTS)
    reslora.merge(model)
    alphas = [find_layer(model, f"layers.{n}.proj").lora_alpha["default"] for n in range(4)]
    assert alphas == [5, 10, 10, 10] and all(type(alpha) is int for alpha in alphas)


def test_a_merge_leaves_the_configuration_of_the_user_alone():
    config = LoraConfig(r=RANK, lora_alpha=5, target_modules=["proj"])
    model = get_peft_model(Stack().double(), config)
    model.add_adapter("other", config)
    reslora.connect(model, ResLoraConfig("block", 2), example_inputs=STACK_INPUTS)
    reslora.merge(model)
    assert model.peft_config["default"].rank_pattern and model.peft_config["other"] is config
    assert config.rank_pattern == {} == config.alpha_pattern


def test_stock_peft_loads_an_odd_rank_of_an_orthogonal_start(tmp_path):
    model = lora_stack(r=2, init_lora_weights="orthogonal")
    reslora.connect(model, ResLoraConfig("block", 1), example_inputs=STACK_INPUTS)
    reslora.merge(model, max_rank=3)
    model.save_pretrained(tmp_path)
    bare = lora_stack(r=2, init_lora_weights="orthogonal").unload()
    assert_equal(run(PeftModel.from_pretrained(bare, tmp_path).eval(), STACK_INPUTS), run(model.eval(), STACK_INPUTS))


@pytest.mark.parametrize(
    "init, changes",
    [(True, False), ("pissa", True)],
)
def test_initialisations_that_change_the_frozen_weights(init, changes):
    assert ranks.changes_base(LoraConfig(init_lora_weights=init)) == changes


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 6)
        self.stack = type(lora_stack().get_base_model())()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.stack(self.emb(ids))


@pytest.mark.parametrize(
    "patterns",
    [{"alpha_pattern": {"^stack.layers.*proj": 9}}, {"rank_pattern": {".*emb": 2}}],
)
def test_patterns_of_the_users_survive_a_block_merge(tmp_path, patterns):
    inputs = {"ids": torch.arange(4).view(1, 4)}
    torch.manual_seed(0)
    base = Embedded().double()
    bare = copy.deepcopy(base)
    model = lora_stack(base, target_modules=["emb", "proj"], **patterns)
    reslora.connect(model, ResLoraConfig("block", 2), example_inputs=inputs)
    reslora.merge(model)
    merged = run(model.eval(), inputs)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert_equal(run(PeftModel.from_pretrained(bare, tmp_path).eval(), inputs), merged)
