"""Forward passes that are recomputed, repeated, interrupted or of other sizes still follow the equations."""

import pytest
import tiny_models
import torch
from core_models import (
    ARCHITECTURES,
    STACK_INPUTS,
    Oracle,
    Stack,
    adapter_layers,
    assert_equal,
    assert_one_line,
    find_layer,
    gradients,
    gradients_of,
    lora_stack,
    loss_of,
    run,
    stack_chain,
)
from peft import LoraConfig
from suites import quick
from torch.utils.checkpoint import checkpoint
from waiting import join, start_thread
from wired import Interrupted, connected, interrupt, language, one_each, pair, some, stateful, with_checkpointing

import reslora
from reslora import ResLoraConfig

# --- gradient checkpointing -------------------------------------------------------------------------------------------


def steps_with_and_without_dropout(model, inputs) -> list[tuple[dict, int]]:
    """Return the gradients of each step, and how often a layer ran for them."""
    calls, steps = [], []
    layers = list(adapter_layers(model).values())
    handle = layers[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    for dropout in (torch.nn.Dropout(0.4), torch.nn.Identity()):
        for layer in layers:
            layer.lora_dropout["default"] = dropout
        calls.clear()
        torch.manual_seed(0)
        steps.append((gradients_of(model, inputs), len(calls)))
    handle.remove()
    return steps


@pytest.mark.parametrize("shortcut", ["input", "block"])
def test_chromas_mask_reaches_the_blocks_that_are_checkpointed(shortcut):
    """diffusers passes it only to the two-stream blocks.

    Two forward passes before their backward passes have their own masks.
    """
    torch.manual_seed(0)
    model = tiny_models.chroma().double()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    reslora.connect(model, ResLoraConfig(shortcut, -1))
    model.train()
    inputs = {
        name: value.double() if value.is_floating_point() else value
        for name, value in tiny_models.flux_inputs(9, 4, pooled=None).items()
    }
    masks = [torch.arange(13) != hidden for hidden in (3, 13)]

    def gradients_of_both(padding: float) -> dict[str, torch.Tensor]:
        model.zero_grad()
        states = inputs["encoder_hidden_states"].clone()
        states[:, 3] += padding  # which the first mask hides
        outputs = [
            model(**inputs | {"encoder_hidden_states": states, "attention_mask": mask.expand(2, -1)}).sample
            for mask in masks
        ]
        (outputs[0].square().sum() + (outputs[1].square().sum() if not padding else 0)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    plain, hidden = gradients_of_both(0.0), gradients_of_both(3.0)
    reslora.enable_gradient_checkpointing(model)
    for padding, expected in ((0.0, plain), (3.0, hidden)):
        found = gradients_of_both(padding)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", quick(["llama", "unet", "bert"], "unet"))
@some
def test_checkpointing_recomputes_and_leaves_the_gradients_as_they_are(name, shortcut, pre_num, head):
    arch = ARCHITECTURES[name]
    model = connected(arch, shortcut, pre_num, head, window=2)
    plain = steps_with_and_without_dropout(model, arch.inputs())
    reslora.enable_gradient_checkpointing(model)
    for (expected, once), (found, twice) in zip(
        plain, steps_with_and_without_dropout(model, arch.inputs()), strict=True
    ):
        assert (once, twice) == (1, 2) and found.keys() == expected.keys()
        assert_equal(found, expected)


@with_checkpointing
@one_each
def test_two_forwards_before_the_backwards(name, checkpointing, shortcut, pre_num, head):
    arch = ARCHITECTURES[name]
    model, oracle = pair(arch, shortcut, pre_num, head)
    if checkpointing:
        reslora.enable_gradient_checkpointing(model)
    batches = [arch.inputs(seed=1), arch.inputs(seed=2, batch=3)]
    for batch in batches:
        loss_of(oracle, batch).backward()
    for order in ((0, 1), (1, 0)):
        losses = [loss_of(model, batch) for batch in batches]
        model.zero_grad(set_to_none=True)
        for n in order:
            losses[n].backward()
        assert_equal(gradients(model), gradients(oracle))


@pytest.mark.exhaustive
@language
@one_each
def test_a_checkpointed_backward_in_another_thread(name, shortcut, pre_num, head):
    arch = ARCHITECTURES[name]
    model, oracle = pair(arch, shortcut, pre_num, head)
    reslora.enable_gradient_checkpointing(model)
    loss = loss_of(model, arch.inputs())
    join(start_thread(loss.backward))
    assert_equal(gradients(model), gradients_of(oracle, arch.inputs()))


@pytest.mark.exhaustive
@one_each
def test_an_evaluation_between_a_checkpointed_forward_and_its_backward(llama, shortcut, pre_num, head):
    model, oracle = pair(llama, shortcut, pre_num, head)
    reslora.enable_gradient_checkpointing(model)
    loss = loss_of(model, llama.inputs())
    with torch.no_grad():
        run(model.eval(), llama.inputs(seed=9, length=4))
    model.train()
    loss.backward()
    assert_equal(gradients(model), gradients_of(oracle, llama.inputs()))


def enable_stock(model, name: str, use_reentrant: bool) -> None:
    """Enable checkpointing as transformers and diffusers do, without this package's context."""
    if name == "unet":
        model.enable_gradient_checkpointing(
            lambda module, *args: checkpoint(module.__call__, *args, use_reentrant=use_reentrant)
        )
    else:
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})


@pytest.mark.exhaustive
@language
@stateful
def test_checkpointing_without_our_context_is_refused_with_the_call_that_fixes_it(name, shortcut, pre_num, head):
    arch = ARCHITECTURES[name]
    model, oracle = pair(arch, shortcut, pre_num, head)
    for use_reentrant in (True, False):
        enable_stock(model, name, use_reentrant)
        with pytest.raises((ValueError, RuntimeError)) as error:
            run(model, arch.inputs())
        assert_one_line(error, "reslora.enable_gradient_checkpointing")
    reslora.enable_gradient_checkpointing(model)
    assert_equal(gradients_of(model, arch.inputs()), gradients_of(oracle, arch.inputs()))


@pytest.mark.exhaustive
@language
def test_block_takes_any_kind_of_checkpointing(name):
    arch = ARCHITECTURES[name]
    model, oracle = pair(arch, "block", 2, "repeat")
    inputs = arch.inputs()
    if name == "unet":  # reentrant checkpointing has no gradient unless an input has one
        inputs["sample"].requires_grad_()
    for use_reentrant in (True, False):
        enable_stock(model, name, use_reentrant)
        assert_equal(gradients_of(model, inputs), gradients_of(oracle, arch.inputs()))


@pytest.mark.parametrize("use_reentrant", [True, False])
@stateful
def test_checkpointing_inside_a_custom_forward_is_never_silently_wrong(use_reentrant, shortcut, pre_num, head):
    class Checkpointed(Stack):
        def forward(self, x):
            for layer in self.layers:
                x = x + (checkpoint(layer, x, use_reentrant=use_reentrant) if self.training else layer(x))
            return x

    model = lora_stack(Checkpointed())
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head), example_inputs=STACK_INPUTS)
    with pytest.raises((ValueError, RuntimeError)) as error:
        loss_of(model, {"x": STACK_INPUTS["x"].clone().requires_grad_()}).backward()
    assert_one_line(error)


# --- what may change between forwards ---------------------------------------------------------------------------------


@pytest.mark.exhaustive
@one_each
def test_evaluation_between_training_steps_changes_nothing(llama, shortcut, pre_num, head):
    model, oracle = pair(llama, shortcut, pre_num, head, window=2)
    for seed in range(2):
        assert_equal(
            gradients_of(model.train(), llama.inputs(seed=seed)), gradients_of(oracle, llama.inputs(seed=seed))
        )
        with torch.no_grad():
            evaluated = run(model.eval(), llama.inputs(seed=8, length=3))
        assert_equal(evaluated, run(oracle, llama.inputs(seed=8, length=3)).detach())


@pytest.mark.exhaustive
@pytest.mark.parametrize("checkpointing", [False, True])
@one_each
def test_a_clean_forward_after_an_exception_is_that_of_a_fresh_model(llama, checkpointing, shortcut, pre_num, head):
    model, oracle = pair(llama, shortcut, pre_num, head)
    if checkpointing:
        reslora.enable_gradient_checkpointing(model)
    handle = interrupt(find_layer(model, "model.layers.2.self_attn.q_proj"))
    with pytest.raises(Interrupted):
        run(model, llama.inputs(seed=5, batch=3))
    handle.remove()
    assert_equal(gradients_of(model, llama.inputs()), gradients_of(oracle, llama.inputs()))


@pytest.mark.exhaustive
@one_each
def test_a_clean_step_after_an_exception_in_a_recomputation(llama, shortcut, pre_num, head):
    model, oracle = pair(llama, shortcut, pre_num, head)
    reslora.enable_gradient_checkpointing(model)
    loss = loss_of(model, llama.inputs(seed=5, batch=3))
    handle = interrupt(find_layer(model, "model.layers.2.self_attn.v_proj"))
    with pytest.raises(Interrupted):
        loss.backward()
    handle.remove()
    assert_equal(gradients_of(model, llama.inputs()), gradients_of(oracle, llama.inputs()))


@stateful
def test_a_block_called_outside_a_forward_of_the_model_is_an_error(llama, shortcut, pre_num, head):
    model, oracle = pair(llama, shortcut, pre_num, head)
    layer = find_layer(model, "model.layers.1.self_attn.q_proj")
    with pytest.raises((ValueError, RuntimeError)) as error:
        layer(torch.zeros(1, 2, 32, dtype=torch.float64))
    assert_one_line(error, "layers.1.self_attn.q_proj")
    assert_equal(run(model, llama.inputs()), run(oracle, llama.inputs()))


@stateful
def test_an_adapter_that_is_switched_off_in_the_middle_of_a_chain_is_named_with_the_fix(shortcut, pre_num, head):
    model = lora_stack(Stack())
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head), example_inputs=STACK_INPUTS)
    expected = run(model, STACK_INPUTS)
    layer = find_layer(model, "layers.1.proj")
    layer.enable_adapters(False)
    with pytest.raises(RuntimeError) as error:
        run(model, STACK_INPUTS)
    assert_one_line(error, "neighbor layers.1.proj, or the neighbor's adapter is disabled", "enable_adapters(True)")
    layer.enable_adapters(True)
    assert_equal(run(model, STACK_INPUTS), expected)


class Moody(Stack):
    """A stack that can be set to behave differently than in the trace."""

    mood = "calm"

    def forward(self, x):
        layers = list(self.layers)
        if self.mood == "reversed":
            layers.reverse()
        if self.mood == "skipping":
            del layers[1]
        for n, layer in enumerate(layers):
            x = x[:, ::2] if self.mood == "pooling" and n == 2 else x
            x = x.reshape(4, 2, 6) if self.mood == "folding" and n == 2 else x
            x = x + layer(x)
        return x


@pytest.mark.parametrize("mood", ["reversed", "skipping"])
@stateful
def test_a_forward_that_differs_from_the_trace_is_an_error(mood, shortcut, pre_num, head):
    model = lora_stack(Moody())
    oracle = Oracle(model, [stack_chain()], shortcut, pre_num, head).model
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head), example_inputs=STACK_INPUTS)
    model.base_model.model.mood = mood
    with pytest.raises((ValueError, RuntimeError)) as error:
        run(model, STACK_INPUTS)
    assert_one_line(error, "layers.", *(["layerdrop", 'shortcut="block"'] if mood == "skipping" else []))
    model.base_model.model.mood = "calm"
    assert_equal(gradients_of(model, STACK_INPUTS), gradients_of(oracle, STACK_INPUTS))


@pytest.mark.parametrize("mood", ["reversed", "skipping"])
def test_block_does_not_depend_on_what_ran_before(mood):
    model = lora_stack(Moody())
    oracle = Oracle(model, [stack_chain()], "block", 2).model
    reslora.connect(model, ResLoraConfig("block", 2), example_inputs=STACK_INPUTS)
    for candidate in (model, oracle):
        candidate.base_model.model.mood = mood
    assert_equal(gradients_of(model, STACK_INPUTS), gradients_of(oracle, STACK_INPUTS))
