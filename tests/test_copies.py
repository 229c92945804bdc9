"""Copies of a connected model, several models and adapters at once, and generation."""

import copy
import io

import pytest
import torch
from core_models import (
    ARCHITECTURES,
    Oracle,
    adapter_layers,
    assert_equal,
    find_layer,
    gradients_of,
    randomize,
    run,
    tiny_llama,
)
from peft import LoraConfig
from wired import connected, one_each, pair, some

import reslora
from reslora import ResLoraConfig


def _deepcopy(model):
    return copy.deepcopy(model)


def _torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name, duplicate", [("llama", _deepcopy), ("unet", _torch_save)])
@one_each
def test_a_copy_is_connected_to_itself_alone(name, duplicate, shortcut, pre_num, head):
    arch = ARCHITECTURES[name]
    model, oracle = pair(arch, shortcut, pre_num, head)
    if duplicate is _deepcopy:  # transformers' checkpointing leaves a local function on the model
        reslora.enable_gradient_checkpointing(model)
    gradients_of(model, arch.inputs())
    twin = duplicate(model)
    randomize(model, seed=77)
    with torch.no_grad():
        run(model, arch.inputs(seed=5))
    assert_equal(gradients_of(twin, arch.inputs()), gradients_of(oracle, arch.inputs()))


@pytest.mark.exhaustive
@one_each
def test_a_copy_can_be_disconnected_alone(llama, shortcut, pre_num, head):
    model, oracle = pair(llama, shortcut, pre_num, head)
    twin = copy.deepcopy(model)
    reslora.disconnect(twin)
    assert_equal(run(model, llama.inputs()), run(oracle, llama.inputs()))
    assert_equal(run(twin, llama.inputs()), run(llama.lora(), llama.inputs()))


@pytest.mark.exhaustive
@one_each
def test_a_model_called_inside_another_models_forward(llama, shortcut, pre_num, head):
    """A teacher that runs during the student's forward pass does not change the student's state."""
    student, oracle = pair(llama, shortcut, pre_num, head)
    teacher = connected(llama, shortcut, pre_num, head, seed=4)

    def teach(module, args):
        run(teacher, llama.inputs(seed=5))

    find_layer(student, "model.layers.2").register_forward_pre_hook(teach)
    assert_equal(gradients_of(student, llama.inputs()), gradients_of(oracle, llama.inputs()))


@one_each
def test_disabled_adapters_give_the_base_model(llama, shortcut, pre_num, head):
    model, oracle = pair(llama, shortcut, pre_num, head)
    with model.disable_adapter():
        disabled = run(model, llama.inputs())
    torch.manual_seed(0)
    assert_equal(disabled, run(tiny_llama(), llama.inputs()))
    assert_equal(run(model, llama.inputs()), run(oracle, llama.inputs()))


@pytest.mark.exhaustive
@one_each
def test_a_second_adapter_stays_plain(llama, shortcut, pre_num, head):
    def add_other(model):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"))
        randomize(model, seed=9, adapter="other")

    model = llama.lora()
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head))
    add_other(model)
    plain = llama.lora()
    add_other(plain)
    for candidate in (model, plain):
        candidate.set_adapter("other")
    assert torch.equal(run(model, llama.inputs()), run(plain, llama.inputs()))
    model.set_adapter("default")
    plain.set_adapter("default")
    oracle = Oracle(plain, llama.blocks, shortcut, pre_num, head)
    assert_equal(gradients_of(model, llama.inputs()), gradients_of(oracle.model, llama.inputs()))


@pytest.mark.exhaustive
@one_each
def test_two_active_adapters_add_up(unet, shortcut, pre_num, head):
    """In every layer, the connected adapter's equation plus the other adapter's plain LoRA."""
    model = unet.lora()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="other")
    randomize(model, seed=9, adapter="other")
    oracle = Oracle(model, unet.blocks, shortcut, pre_num, head)
    for layer in adapter_layers(oracle.model).values():
        if "other" in layer.lora_A:
            equation = layer.forward

            def both(x, layer=layer, equation=equation):
                low = x @ layer.lora_A["other"].weight.T
                return equation(x) + layer.scaling["other"] * (low @ layer.lora_B["other"].weight.T)

            layer.forward = both
    for candidate in (model, oracle.model):
        candidate.set_adapter(["default", "other"])
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head))
    assert_equal(run(model, unet.inputs()), run(oracle.model, unet.inputs()))


def generate(model, ids, use_cache: bool):
    result = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return result.sequences, torch.stack(result.logits).double()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@some
def test_generation_with_a_cache_equals_generation_without(name, shortcut, pre_num, head):
    arch = ARCHITECTURES[name]
    model = connected(arch, shortcut, pre_num, head)
    ids = arch.inputs()["input_ids"]
    cached, whole = generate(model.eval(), ids, True), generate(model, ids, False)
    assert torch.equal(cached[0], whole[0])
    assert_equal(cached[1], whole[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pre_num", [1, -1])
def test_generation_equals_that_of_the_merged_model_for_block(pre_num):
    arch = ARCHITECTURES["llama"]
    model = connected(arch, "block", pre_num, "repeat")
    ids = arch.inputs()["input_ids"]
    unmerged = generate(model.eval(), ids, True)
    reslora.merge(model)
    merged = generate(model, ids, True)
    assert torch.equal(unmerged[0], merged[0])
    assert_equal(unmerged[1], merged[1], rtol=1e-5, atol=1e-6)
