"""The residual forward against Eqs. 1-4 written out by hand, and the state of one forward."""

import contextlib
import copy
import dataclasses
import gc
import io
import itertools
import pickle
import weakref
from functools import partial

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    STACK_INPUTS,
    Oracle,
    Stack,
    adapter_layers,
    assert_equal,
    assert_one_line,
    find_layer,
    fix_dropout,
    gradients,
    gradients_of,
    lora_stack,
    loss_of,
    randomize,
    run,
    stack_chain,
    tiny_llama,
    tiny_unet,
)
from peft import LoraConfig
from torch.func import functional_call, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from waiting import join, start_thread

import reslora
from reslora import ResLoraConfig

WIRED = [
    ("input", 1, "repeat"),
    ("input", 1, "none"),
    ("input", 4, "repeat"),
    ("input", -1, "none"),
    ("block", 1, "repeat"),
    ("block", 2, "none"),
    ("block", 100, "repeat"),
    ("block", -1, "repeat"),
    ("middle", 1, "repeat"),
    ("middle", 2, "none"),
    ("middle", 100, "repeat"),
    ("middle", -1, "repeat"),
]
PLAIN = [
    ("none", 1, "repeat"),
    ("none", -1, "none"),
    ("input", 0, "repeat"),
    ("block", 0, "repeat"),
    ("middle", 0, "none"),
]
STATEFUL = [("input", 1, "repeat"), ("middle", 2, "repeat")]
SOME = [*STATEFUL, ("input", 1, "none"), ("middle", -1, "none"), ("block", 2, "repeat")]
ONE_EACH = [*STATEFUL, ("block", 2, "repeat")]
wired = pytest.mark.parametrize("shortcut, pre_num, head", WIRED)
stateful = pytest.mark.parametrize("shortcut, pre_num, head", STATEFUL)
some = pytest.mark.parametrize("shortcut, pre_num, head", SOME)
one_each = pytest.mark.parametrize("shortcut, pre_num, head", ONE_EACH)
language = pytest.mark.parametrize("name", ["llama", "unet"])
with_checkpointing = pytest.mark.parametrize("name, checkpointing", [("llama", False), ("llama", True), ("unet", True)])


def connected(arch, shortcut, pre_num, head, window=0, **lora):
    model = arch.lora(**lora)
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head, window))
    return model


def pair(arch, shortcut, pre_num, head, window=0, **lora):
    """A connected model and the oracle with the same weights."""
    model = arch.lora(**lora)
    oracle = Oracle(model, arch.blocks, shortcut, pre_num, head)
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head, window))
    return model, oracle.model


# --- Eqs. 1-4 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, shortcut, pre_num, head",
    [
        *[("llama", *plan) for plan in WIRED],
        *[(name, *plan) for name in ("bert", "roberta", "gpt2", "unet") for plan in SOME],
    ],
)
def test_forward_and_gradients_follow_the_equation(name, shortcut, pre_num, head):
    arch = ARCHITECTURES[name]
    model, oracle = pair(arch, shortcut, pre_num, head)
    inputs = arch.inputs()
    assert_equal(run(model, inputs), run(oracle, inputs))
    assert_equal(gradients_of(model, inputs), gradients_of(oracle, inputs))


@some
def test_evaluation_without_gradients_follows_the_equation(llama, shortcut, pre_num, head):
    model, oracle = pair(llama, shortcut, pre_num, head)
    with torch.no_grad():
        assert_equal(run(model.eval(), llama.inputs()), run(oracle.eval(), llama.inputs()))
    with torch.inference_mode():
        assert_equal(run(model, llama.inputs()).clone(), run(oracle, llama.inputs()).clone())


@pytest.mark.parametrize("window", [0, 1, 100])
@one_each
def test_recording_norms_changes_nothing(llama, shortcut, pre_num, head, window):
    model, oracle = pair(llama, shortcut, pre_num, head, window=window)
    for seed in range(3):
        assert_equal(gradients_of(model, llama.inputs(seed=seed)), gradients_of(oracle, llama.inputs(seed=seed)))


@pytest.mark.parametrize("shortcut, pre_num, head", PLAIN)
def test_no_wires_is_plain_lora_bit_for_bit(arch, shortcut, pre_num, head):
    model = arch.lora(lora_dropout=0.3)
    plain = copy.deepcopy(model)
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head))
    inputs = arch.inputs()
    results = []
    for candidate in (model, plain):
        torch.manual_seed(0)
        results.append({"output": run(candidate, inputs).detach(), **gradients_of(candidate, inputs)})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("shortcut, pre_num, head", PLAIN)
def test_no_wires_needs_no_links(llama, shortcut, pre_num, head):
    model = llama.lora(target_modules=["q_proj"], layers_to_transform=[1])
    assert reslora.connect(model, ResLoraConfig(shortcut, pre_num, head)).links == 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@wired
def test_dropout_is_drawn_once_per_block(name, shortcut, pre_num, head):
    """x_{n-k} enters a neighbour with block n-k's mask; `block` uses its own mask for all its terms."""
    arch = ARCHITECTURES[name]
    model, oracle = pair(arch, shortcut, pre_num, head, lora_dropout=0.4)
    masks = fix_dropout(model)
    fix_dropout(oracle)
    assert_equal(gradients_of(model, arch.inputs()), gradients_of(oracle, arch.inputs()))
    assert {mask.draws for mask in masks} == {1}


@one_each
def test_stock_dropout_is_drawn_in_training_and_not_in_evaluation(llama, shortcut, pre_num, head):
    model, oracle = pair(llama, shortcut, pre_num, head, lora_dropout=0.5)
    inputs = llama.inputs()
    assert not torch.equal(run(model, inputs), run(model, inputs))
    assert_equal(run(model.eval(), inputs), run(oracle.eval(), inputs))


@one_each
def test_recorded_norms_leave_the_dropout_masks_alone(llama, shortcut, pre_num, head):
    outputs = []
    for window in (0, 5):
        model = connected(llama, shortcut, pre_num, head, window=window, lora_dropout=0.5)
        torch.manual_seed(0)
        outputs.append(run(model, llama.inputs()))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"layers.1.self_attn.q_proj": 11, "layers.3.mlp.down_proj": 1}},
        {"use_rslora": True, "alpha_pattern": {"layers.2.self_attn.v_proj": 9}},
        {"r": 1},
    ],
    ids=["rslora", "alpha_pattern", "both", "rank_one"],
)
@one_each
def test_every_block_keeps_its_own_scale(llama, shortcut, pre_num, head, lora):
    model, oracle = pair(llama, shortcut, pre_num, head, **lora)
    assert_equal(gradients_of(model, llama.inputs()), gradients_of(oracle, llama.inputs()))


@one_each
def test_a_rank_pattern_cuts_the_chain_and_the_equation(llama, shortcut, pre_num, head):
    model = llama.lora(rank_pattern={"layers.2.self_attn.q_proj": 7})
    blocks = llama.chains["self_attn.v_proj"] + llama.chains["mlp.down_proj"]
    q = llama.chains["self_attn.q_proj"][0]
    oracle = Oracle(model, [*blocks, q[:2], q[2:3], q[3:]], shortcut, pre_num, head)
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head))
    assert_equal(gradients_of(model, llama.inputs()), gradients_of(oracle.model, llama.inputs()))


@one_each
def test_a_scale_changed_after_connect_counts(llama, shortcut, pre_num, head):
    model = llama.lora()
    oracle = Oracle(model, llama.blocks, shortcut, pre_num, head)
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head))
    for candidate in (model, oracle.model):
        find_layer(candidate, "model.layers.1.self_attn.q_proj").set_scale("default", 0.5)
    assert_equal(run(model, llama.inputs()), run(oracle.model, llama.inputs()))


@one_each
def test_weights_updated_by_an_optimizer_count(llama, shortcut, pre_num, head):
    model, oracle = pair(llama, shortcut, pre_num, head)
    for candidate in (model, oracle):
        optimizer = torch.optim.SGD([p for p in candidate.parameters() if p.requires_grad], lr=0.1)
        for seed in range(3):
            optimizer.zero_grad()
            loss_of(candidate, llama.inputs(seed=seed)).backward()
            optimizer.step()
    assert_equal(run(model, llama.inputs()), run(oracle, llama.inputs()), rtol=1e-7)


@one_each
def test_gradients_accumulate_over_forwards(llama, shortcut, pre_num, head):
    model, oracle = pair(llama, shortcut, pre_num, head)
    for candidate in (model, oracle):
        for seed in range(3):
            loss_of(candidate, llama.inputs(seed=seed)).backward()
    assert_equal(gradients(model), gradients(oracle))


@wired
def test_the_base_is_left_frozen_and_unchanged(llama, shortcut, pre_num, head):
    model = llama.lora()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head))
    gradients_of(model, llama.inputs())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@one_each
def test_inputs_without_a_token_axis_work(shortcut, pre_num, head):
    inputs = {"x": STACK_INPUTS["x"][:, 0]}
    model = lora_stack()
    oracle = Oracle(model, [stack_chain()], shortcut, pre_num, head)
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head), example_inputs=inputs)
    assert_equal(gradients_of(model, inputs), gradients_of(oracle.model, inputs))


# --- precision --------------------------------------------------------------------------------------------------------


def flat_gradients(model) -> torch.Tensor:
    return torch.cat([grad.flatten() for _, grad in sorted(gradients(model).items())])


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@language
@one_each
def test_autocast_with_fp32_adapters_is_as_precise_as_the_equation_under_autocast(name, dtype, shortcut, pre_num, head):
    arch = ARCHITECTURES[name]
    model, oracle = (candidate.float() for candidate in pair(arch, shortcut, pre_num, head, window=2))
    for candidate in (model, oracle):
        randomize(candidate, scale=0.15)
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in arch.inputs().items()}

    def step(candidate, enabled):
        candidate.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype, enabled=enabled):
            result = run(candidate, inputs)
        result.float().square().mean().backward()
        return result, flat_gradients(candidate)

    exact, theirs, ours = step(oracle, False), step(oracle, True), step(model, True)
    assert ours[0].dtype == theirs[0].dtype
    assert ours[1].dtype == torch.float32
    for n in (0, 1):
        assert relative(ours[n], exact[n]) < 2 * relative(theirs[n], exact[n]) + 0.01


@pytest.mark.parametrize(
    "base, adapter",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
@one_each
def test_mixed_dtypes_without_autocast_keep_the_base_dtype(llama, base, adapter, shortcut, pre_num, head):
    torch.manual_seed(0)
    model = llama.lora(base=tiny_llama().to(base))
    for layer in adapter_layers(model).values():
        layer.lora_A.to(adapter)
        layer.lora_B.to(adapter)
    oracle = Oracle(model, llama.blocks, shortcut, pre_num, head).model
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head))
    seen = []
    layer = find_layer(model, "model.layers.3.self_attn.q_proj")
    layer.register_forward_hook(lambda module, args, result: seen.append(result.dtype))
    actual, expected = run(model, llama.inputs()), run(oracle, llama.inputs())
    assert seen == [base]
    assert relative(actual, expected) < 0.05


class Casting(Stack):
    """Hands every block what it reads in the dtype of its weight."""

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x.to(layer.proj.weight.dtype)).to(x.dtype)
        return x


@pytest.mark.parametrize("place", [slice(2), slice(2, 4)])
@pytest.mark.parametrize("tokens", [1, 4])
@one_each
def test_a_chain_whose_adapters_have_two_dtypes(shortcut, pre_num, head, tokens, place):
    model = lora_stack(Casting()).float()
    inputs = {"x": STACK_INPUTS["x"][:, :tokens].float()}
    for layer in model.get_base_model().layers[place]:
        layer.bfloat16()
    oracle = Oracle(copy.deepcopy(model).float(), [stack_chain()], shortcut, pre_num, head).model
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head), example_inputs=inputs)
    assert relative(run(model, inputs), run(oracle, inputs)) < 0.01
    for candidate in (model, oracle):
        run(candidate, inputs).square().mean().backward()
    assert relative(flat_gradients(model), flat_gradients(oracle)) < 0.05
    before = run(model.eval(), inputs)
    reslora.merge(model, calibration=[inputs])
    assert run(model, inputs).dtype == before.dtype


# --- functional transforms --------------------------------------------------------------------------------------------


@one_each
def test_an_ensemble_of_adapters_is_computed_at_once(shortcut, pre_num, head):
    model = lora_stack()
    oracle = Oracle(model, [stack_chain()], shortcut, pre_num, head).model
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head), example_inputs=STACK_INPUTS)

    def results(candidate):
        stacked = {
            name: torch.stack([value.detach(), 2 * value.detach()])
            for name, value in candidate.named_parameters()
            if value.requires_grad
        }
        return vmap(lambda weights: functional_call(candidate, weights, (STACK_INPUTS["x"],)))(stacked)

    assert_equal(results(model), results(oracle))


# --- gradient checkpointing -------------------------------------------------------------------------------------------


def steps_with_and_without_dropout(model, inputs) -> list[tuple[dict, int]]:
    """The gradients of each step, and how often a layer ran for them."""
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


@pytest.mark.parametrize("name", ["llama", "unet", "bert"])
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


@language
@one_each
def test_a_checkpointed_backward_in_another_thread(name, shortcut, pre_num, head):
    arch = ARCHITECTURES[name]
    model, oracle = pair(arch, shortcut, pre_num, head)
    reslora.enable_gradient_checkpointing(model)
    loss = loss_of(model, arch.inputs())
    join(start_thread(loss.backward))
    assert_equal(gradients(model), gradients_of(oracle, arch.inputs()))


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
    """Checkpointing as transformers and diffusers turn it on, without reslora's context."""
    if name == "unet":
        model.enable_gradient_checkpointing(
            lambda module, *args: checkpoint(module.__call__, *args, use_reentrant=use_reentrant)
        )
    else:
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})


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


@stateful
def test_the_stock_switch_of_diffusers_is_refused(unet, shortcut, pre_num, head):
    model = connected(unet, shortcut, pre_num, head)
    model.enable_gradient_checkpointing()
    with pytest.raises((ValueError, RuntimeError)) as error:
        run(model, unet.inputs())
    assert_one_line(error, "reslora.enable_gradient_checkpointing")


# One size of image, hence one chain of each role: compiling takes its time.
SHALLOW_UNET = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "block_out_channels": (8,),
    "transformer_layers_per_block": 1,
}
SHALLOW_CHAIN = ["down_blocks.0.attentions.0", "mid_block.attentions.0"]
SHALLOW_CHAIN += ["up_blocks.0.attentions.0", "up_blocks.0.attentions.1"]


def test_block_is_compiled_with_checkpointing(unet):
    """`torch.compile` follows neither our context nor what is written to a state inside a checkpoint."""
    roles = ("attn1.to_v", "attn2.to_v")
    chains = {role: [[f"{name}.transformer_blocks.0.{role}" for name in SHALLOW_CHAIN]] for role in roles}
    arch = dataclasses.replace(unet, build=lambda: tiny_unet(**SHALLOW_UNET), targets=["to_v"], chains=chains)
    model, oracle = pair(arch, "block", 2, "repeat")
    reslora.enable_gradient_checkpointing(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss_of(compiled, arch.inputs()).backward()
    assert_equal(gradients(model), gradients_of(oracle, arch.inputs()))


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


@with_checkpointing
@one_each
def test_batch_and_size_may_change_between_forwards(name, checkpointing, shortcut, pre_num, head):
    arch = ARCHITECTURES[name]
    model, oracle = pair(arch, shortcut, pre_num, head)
    if checkpointing:
        reslora.enable_gradient_checkpointing(model)
    shapes = [{"batch": 2}, {"batch": 1, "length": 9}, {"batch": 3, "length": 2}]
    shapes += [{"size": 16}, {"batch": 1, "size": 4}] if name == "unet" else []
    for n, shape in enumerate(shapes):
        inputs = arch.inputs(seed=n, **shape)
        assert_equal(gradients_of(model, inputs), gradients_of(oracle, inputs))


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


class Interrupted(Exception):
    pass


def interrupt(layer: torch.nn.Module):
    def hook(module, args):
        raise Interrupted

    return layer.register_forward_pre_hook(hook)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("where", ["model.layers.2.self_attn.q_proj", "model.layers.3.mlp", "lm_head"])
@one_each
def test_a_clean_forward_after_an_exception_is_that_of_a_fresh_model(
    llama, where, checkpointing, shortcut, pre_num, head
):
    model, oracle = pair(llama, shortcut, pre_num, head)
    if checkpointing:
        reslora.enable_gradient_checkpointing(model)
    handle = interrupt(find_layer(model, where))
    with pytest.raises(Interrupted):
        run(model, llama.inputs(seed=5, batch=3))
    handle.remove()
    assert_equal(gradients_of(model, llama.inputs()), gradients_of(oracle, llama.inputs()))


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
    assert_one_line(error, "neighbour layers.1.proj, or that one's adapter is switched off", "enable_adapters(True)")
    layer.enable_adapters(True)
    assert_equal(run(model, STACK_INPUTS), expected)


class Moody(Stack):
    """A stack that can be told to behave otherwise than in the trace."""

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


@pytest.mark.parametrize("mood", ["reversed", "skipping", "pooling", "folding"])
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


@pytest.mark.parametrize("mood", ["reversed", "skipping", "pooling", "folding"])
def test_block_does_not_depend_on_what_ran_before(mood):
    model = lora_stack(Moody())
    oracle = Oracle(model, [stack_chain()], "block", 2).model
    reslora.connect(model, ResLoraConfig("block", 2), example_inputs=STACK_INPUTS)
    for candidate in (model, oracle):
        candidate.base_model.model.mood = mood
    assert_equal(gradients_of(model, STACK_INPUTS), gradients_of(oracle, STACK_INPUTS))


# --- copies, adapters, generation -------------------------------------------------------------------------------------


def _deepcopy(model):
    return copy.deepcopy(model)


def _pickle(model):
    return pickle.loads(pickle.dumps(model))


def _torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "name, duplicate", [("llama", _deepcopy), ("llama", _pickle), ("unet", _deepcopy), ("unet", _torch_save)]
)
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


@one_each
def test_a_copy_can_be_disconnected_alone(llama, shortcut, pre_num, head):
    model, oracle = pair(llama, shortcut, pre_num, head)
    twin = copy.deepcopy(model)
    reslora.disconnect(twin)
    assert_equal(run(model, llama.inputs()), run(oracle, llama.inputs()))
    assert_equal(run(twin, llama.inputs()), run(llama.lora(), llama.inputs()))


@one_each
def test_two_connected_models_do_not_meet(llama, unet, shortcut, pre_num, head):
    pairs = [(arch, *pair(arch, shortcut, pre_num, head, seed=seed)) for seed, arch in enumerate((llama, unet, llama))]
    losses = [loss_of(model, arch.inputs()) for arch, model, _ in pairs]
    for loss in losses:
        loss.backward()
    for arch, model, oracle in pairs:
        assert_equal(gradients(model), gradients_of(oracle, arch.inputs()))


@one_each
def test_a_model_called_inside_another_models_forward(llama, shortcut, pre_num, head):
    """A teacher that runs in the middle of the student's forward leaves the student's state alone."""
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


@one_each
def test_disabled_adapters_of_a_unet_give_the_base_model(unet, shortcut, pre_num, head):
    model, oracle = pair(unet, shortcut, pre_num, head)
    model.disable_adapters()
    torch.manual_seed(0)
    assert_equal(run(model, unet.inputs()), run(unet.build(), unet.inputs()))
    model.enable_adapters()
    assert_equal(run(model, unet.inputs()), run(oracle, unet.inputs()))


@pytest.mark.parametrize("connected_first", [True, False])
@one_each
def test_a_second_adapter_stays_plain(llama, shortcut, pre_num, head, connected_first):
    def add_other(model):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"))
        randomize(model, seed=9, adapter="other")

    model = llama.lora()
    if connected_first:
        reslora.connect(model, ResLoraConfig(shortcut, pre_num, head))
        add_other(model)
        plain = llama.lora()
        add_other(plain)
    else:
        add_other(model)
        plain = copy.deepcopy(model)
        reslora.connect(model, ResLoraConfig(shortcut, pre_num, head))
    for candidate in (model, plain):
        candidate.set_adapter("other")
    assert torch.equal(run(model, llama.inputs()), run(plain, llama.inputs()))
    model.set_adapter("default")
    plain.set_adapter("default")
    oracle = Oracle(plain, llama.blocks, shortcut, pre_num, head)
    assert_equal(gradients_of(model, llama.inputs()), gradients_of(oracle.model, llama.inputs()))


@one_each
def test_two_active_adapters_add_up(unet, shortcut, pre_num, head):
    """The connected adapter's equation plus the other's plain LoRA, in every layer."""
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


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@some
def test_generation_with_a_cache_equals_generation_without(name, shortcut, pre_num, head):
    arch = ARCHITECTURES[name]
    model = connected(arch, shortcut, pre_num, head)
    ids = arch.inputs()["input_ids"]
    cached, whole = generate(model.eval(), ids, True), generate(model, ids, False)
    assert torch.equal(cached[0], whole[0])
    assert_equal(cached[1], whole[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("pre_num", [1, -1])
def test_generation_equals_that_of_the_merged_model_for_block(name, pre_num):
    arch = ARCHITECTURES[name]
    model = connected(arch, "block", pre_num, "repeat")
    ids = arch.inputs()["input_ids"]
    unmerged = generate(model.eval(), ids, True)
    reslora.merge(model)
    merged = generate(model, ids, True)
    assert torch.equal(unmerged[0], merged[0])
    assert_equal(unmerged[1], merged[1], rtol=1e-5, atol=1e-6)


# --- nothing outlives its forward -------------------------------------------------------------------------------------


class Storages(TorchDispatchMode):
    """Weak references to the storage of every tensor an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.refs: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.refs[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self, model, inputs, larger_than: int = 0) -> int:
        """How many are left, the model's own tensors, its gradients and what was fed to it aside."""
        gc.collect()
        own = [*model.parameters(), *model.buffers(), *inputs.values()]
        own += [p.grad for p in model.parameters() if p.grad is not None]
        kept = {tensor.untyped_storage()._cdata for tensor in own}
        return sum(
            not ref.expired() for key, (ref, size) in self.refs.items() if key not in kept and size > larger_than
        )


class Sentinel:
    pass


def watch_graph(model: torch.nn.Module) -> list[weakref.ref]:
    """Weak references that live as long as the autograd node of a LoRA layer's output does."""
    sentinels = []

    def hook(module, args, result):
        if result.grad_fn is not None:
            sentinel = Sentinel()
            result.grad_fn.metadata["sentinel"] = sentinel
            sentinels.append(weakref.ref(sentinel))

    for layer in adapter_layers(model).values():
        layer.register_forward_hook(hook)
    return sentinels


WINDOW = 2
NORM_BYTES = 8 * 8 * WINDOW * 120  # a ring buffer per block may stay, or one for all


def leak_case(name, checkpointing, shortcut, pre_num, head, window):
    arch = ARCHITECTURES[name]
    model = connected(arch, shortcut, pre_num, head, window=window)
    if checkpointing:
        reslora.enable_gradient_checkpointing(model)
    gradients_of(model, arch.inputs())  # whatever is allocated once
    return model, arch.inputs(batch=6, length=20)


checkpointed = pytest.mark.parametrize("checkpointing", [False, True])
leak_cases = pytest.mark.parametrize(
    "name, checkpointing, window", [("llama", False, 0), ("llama", True, WINDOW), ("unet", True, 0)]
)


@with_checkpointing
@one_each
def test_no_activation_outlives_a_forward_without_gradients(name, checkpointing, shortcut, pre_num, head):
    model, inputs = leak_case(name, checkpointing, shortcut, pre_num, head, WINDOW)
    with torch.no_grad(), Storages() as storages:
        run(model, inputs)
    assert storages.refs and storages.alive(model, inputs) == 0


@leak_cases
@one_each
def test_nothing_outlives_a_dropped_loss_or_the_backward(name, checkpointing, shortcut, pre_num, head, window):
    model, inputs = leak_case(name, checkpointing, shortcut, pre_num, head, window)
    sentinels = watch_graph(model)
    for backward in (False, True):
        with Storages() as storages:
            loss = loss_of(model, inputs)
            if backward:
                loss.backward()
        del loss
        assert storages.alive(model, inputs, larger_than=NORM_BYTES if window else 0) == 0
        assert sentinels and not any(ref() for ref in sentinels)
        sentinels.clear()


@checkpointed
@one_each
def test_activations_are_freed_by_the_backward_while_the_loss_lives(llama, checkpointing, shortcut, pre_num, head):
    """As many tensors stay as with plain LoRA under the same checkpointing."""
    alive = []
    for config in (ResLoraConfig("none"), ResLoraConfig(shortcut, pre_num, head, 0)):
        model = llama.lora()
        reslora.connect(model, config)
        if checkpointing:
            reslora.enable_gradient_checkpointing(model)
        inputs = llama.inputs(batch=6, length=20)
        with Storages() as storages:
            loss = loss_of(model, inputs)
            loss.backward()
        alive.append(storages.alive(model, inputs))
        del loss
    assert alive[1] <= alive[0]


@checkpointed
@one_each
def test_nothing_outlives_an_exception_in_the_forward(llama, checkpointing, shortcut, pre_num, head):
    model, inputs = leak_case("llama", checkpointing, shortcut, pre_num, head, 0)
    sentinels = watch_graph(model)
    handle = interrupt(find_layer(model, "lm_head"))
    with Storages() as storages, contextlib.suppress(Interrupted):
        run(model, inputs)
    handle.remove()
    assert storages.alive(model, inputs) == 0
    assert sentinels and not any(ref() for ref in sentinels)


@one_each
def test_a_connected_model_can_be_collected(llama, shortcut, pre_num, head):
    model = connected(llama, shortcut, pre_num, head)
    gradients_of(model, llama.inputs())
    refs = [weakref.ref(model), *map(weakref.ref, adapter_layers(model).values())]
    del model
    gc.collect()
    assert not any(ref() for ref in refs)


# --- state_dict, PEFT's own merge, torch.compile ----------------------------------------------------------------------


@one_each
def test_state_dict_has_exactly_the_keys_of_the_lora_model(arch, shortcut, pre_num, head):
    def names():
        named = (model.named_parameters(), model.named_buffers(), model.named_modules())
        return [list(model.state_dict()), *([name for name, _ in kind] for kind in named)]

    model = arch.lora()
    before = names()
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head, window=3))
    gradients_of(model, arch.inputs())
    assert names() == before


def _unmerge(model):
    for layer in adapter_layers(model).values():
        layer.merged_adapters.append("default")
    model.unmerge_adapter()


@one_each
def test_pefts_own_merge_is_refused(llama, shortcut, pre_num, head):
    model = connected(llama, shortcut, pre_num, head)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merges = itertools.product((model.merge_adapter, model.merge_and_unload), (False, True))
    for call in (*(partial(merge, safe_merge=safe) for merge, safe in merges), partial(_unmerge, model)):
        with pytest.raises((ValueError, RuntimeError)) as error:
            call()
        assert_one_line(error, "reslora.merge")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@one_each
def test_fuse_lora_is_refused(unet, shortcut, pre_num, head):
    model, oracle = pair(unet, shortcut, pre_num, head)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for safe_fusing in (False, True):
        with pytest.raises((ValueError, RuntimeError)) as error:
            model.fuse_lora(safe_fusing=safe_fusing)
        assert_one_line(error, "reslora.merge")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_equal(run(model, unet.inputs()), run(oracle, unet.inputs()))


def shallow(arch, layers: int = 3):
    """The same architecture with fewer layers: compiling takes its time."""
    chains = {role: [chain[:layers] for chain in chains] for role, chains in arch.chains.items()}
    return dataclasses.replace(arch, build=lambda: tiny_llama(layers), chains=chains)


def test_block_compiles_without_a_graph_break(llama):
    model, oracle = pair(shallow(llama), "block", 2, "repeat")
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    inputs = {**llama.inputs(), "use_cache": False}
    loss_of(compiled, inputs).backward()
    assert_equal(gradients(model), gradients_of(oracle, inputs))


@stateful
def test_a_compiled_model_equals_the_eager_one(llama, shortcut, pre_num, head):
    model, oracle = pair(shallow(llama), shortcut, pre_num, head)
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(2):
        inputs = {**llama.inputs(seed=seed), "use_cache": False}
        compiled.zero_grad(set_to_none=True)
        loss_of(compiled, inputs).backward()
        assert_equal(gradients(model), gradients_of(oracle, inputs))


@one_each
def test_a_compiled_model_is_one_graph_and_stays_it(llama, shortcut, pre_num, head):
    """The state of a forward is made and dropped inside the graph, on every thread, and asks for no other graph."""
    model, oracle = pair(shallow(llama), shortcut, pre_num, head)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model.base_model.model, backend=count, fullgraph=True)
    found = {}

    def work(seed):
        found[seed] = run(compiled, {**llama.inputs(seed=seed), "use_cache": False})

    for seed in range(2):
        work(seed)
    join(start_thread(work, 2))
    assert len(graphs) == 1
    for seed in range(3):
        assert_equal(found[seed], run(oracle, {**llama.inputs(seed=seed), "use_cache": False}))


# --- sharded weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut, part", [("input", "lora_A"), ("block", "lora_A"), ("block", "lora_B")])
def test_a_sharded_neighbour_is_an_error_in_one_line(sharded, shortcut, part):
    """A sharded weight has the shape of the whole and a part of its numbers."""
    model = lora_stack()
    reslora.connect(model, ResLoraConfig(shortcut, 2), example_inputs=STACK_INPUTS)
    linear = getattr(find_layer(model, "layers.1.proj"), part)["default"]
    linear.weight = sharded(linear.weight)
    assert linear.weight.shape == find_layer(model, "layers.0.proj").get_parameter(f"{part}.default.weight").shape
    with pytest.raises(RuntimeError) as error:
        run(model, STACK_INPUTS)
    assert_one_line(error, "layers.", "sharded", "middle")


# --- what is relied on in PEFT ----------------------------------------------------------------------------------------


def test_peft_calls_the_variant_of_the_active_adapter_after_the_base_layer():
    """LoRA layers hand the cast input and the base output to `lora_variant[adapter].forward` and return its result."""
    calls = []

    class Probe:
        def forward(self, module, active_adapter, x, result, **kwargs):
            calls.append((active_adapter, x, result, kwargs))
            return result + 1

    layer = next(iter(adapter_layers(lora_stack()).values()))
    layer.lora_variant["default"] = Probe()
    x = torch.randn(2, 6, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base_layer(x) + 1)
    adapter, entered, base, kwargs = calls.pop()
    assert adapter == "default" and torch.equal(entered, x) and torch.equal(base, layer.base_layer(x))
    assert all(value is None for value in kwargs.values())


def test_peft_merges_through_the_variant():
    calls = []

    class Probe:
        def merge_safe(self, module, active_adapter, weight):
            calls.append("merge_safe")
            return weight

        def merge_unsafe(self, module, active_adapter, weight):
            calls.append("merge_unsafe")

        def unmerge(self, module, active_adapter, weight):
            calls.append("unmerge")
            return weight

    layer = next(iter(adapter_layers(lora_stack()).values()))
    layer.lora_variant["default"] = Probe()
    layer.merge(safe_merge=True)
    layer.unmerge()
    layer.merge()
    assert calls == ["merge_safe", "unmerge", "merge_unsafe"]
