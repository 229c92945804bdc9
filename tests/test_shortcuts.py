"""The residual forward against Eqs. 1-4 written out by hand."""

import copy
import itertools
from functools import partial

import pytest
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
    fix_dropout,
    gradients,
    gradients_of,
    lora_stack,
    loss_of,
    randomize,
    results_of,
    run,
    stack_chain,
    tiny_llama,
)
from suites import quick
from torch.func import functional_call, grad, vmap
from wired import PLAIN, SOME, WIRED, connected, language, one_each, pair, some, stateful, wired

import reslora
from reslora import ResLoraConfig
from reslora.linking import base_model
from reslora.wiring import connection_of

# --- Eqs. 1-4 ---------------------------------------------------------------------------------------------------------


LLAMAS = [("llama", *plan) for plan in WIRED]
OTHERS = [(name, *plan) for name in ("bert", "roberta", "gpt2", "unet") for plan in SOME]


@pytest.mark.parametrize(
    "name, shortcut, pre_num, head",
    quick([*LLAMAS, *OTHERS], *LLAMAS, *[case for case in OTHERS if case[0] == "unet" or case[1:] == SOME[1]]),
)
def test_forward_and_gradients_follow_the_equation(name, shortcut, pre_num, head):
    arch = ARCHITECTURES[name]
    model, oracle = pair(arch, shortcut, pre_num, head)
    assert_equal(results_of(model, arch.inputs()), results_of(oracle, arch.inputs()))


@pytest.mark.parametrize("shortcut, pre_num", [("block", 2), ("block", -1), ("middle", 2)])
def test_many_rows_follow_the_equation(llama, shortcut, pre_num):
    """With more rows than the rank, `block` first sums the B A, and passes on a sum that starts at the head."""
    model, oracle = pair(llama, shortcut, pre_num, "repeat", r=16)
    inputs = llama.inputs(length=40)
    assert_equal(results_of(model, inputs), results_of(oracle, inputs))


@some
def test_evaluation_without_gradients_follows_the_equation(llama, shortcut, pre_num, head):
    model, oracle = pair(llama, shortcut, pre_num, head)
    with torch.no_grad():
        assert_equal(run(model.eval(), llama.inputs()), run(oracle.eval(), llama.inputs()))
    with torch.inference_mode():
        assert_equal(run(model, llama.inputs()).clone(), run(oracle, llama.inputs()).clone())


@pytest.mark.exhaustive
@pytest.mark.parametrize("window", [0, 100])
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


@pytest.mark.parametrize("name", quick(["llama", "gpt2"], "llama"))
@wired
def test_dropout_is_drawn_once_per_block(name, shortcut, pre_num, head):
    """x_{n-k} enters a neighbor with block n-k's mask; `block` uses its own mask for all its terms."""
    arch = ARCHITECTURES[name]
    model, oracle = pair(arch, shortcut, pre_num, head, lora_dropout=0.4)
    masks = fix_dropout(model)
    fix_dropout(oracle)
    assert_equal(gradients_of(model, arch.inputs()), gradients_of(oracle, arch.inputs()))
    assert {mask.draws for mask in masks} == {1}


@pytest.mark.exhaustive
@one_each
def test_stock_dropout_is_drawn_in_training_and_not_in_evaluation(llama, shortcut, pre_num, head):
    model, oracle = pair(llama, shortcut, pre_num, head, lora_dropout=0.5)
    inputs = llama.inputs()
    assert not torch.equal(run(model, inputs), run(model, inputs))
    assert_equal(run(model.eval(), inputs), run(oracle.eval(), inputs))


@pytest.mark.parametrize(
    "lora",
    [{"use_rslora": True}, {"alpha_pattern": {"layers.1.self_attn.q_proj": 11, "layers.3.mlp.down_proj": 1}}],
    ids=["rslora", "alpha_pattern"],
)
@one_each
def test_every_block_keeps_its_own_scale(llama, shortcut, pre_num, head, lora):
    model, oracle = pair(llama, shortcut, pre_num, head, **lora)
    assert_equal(gradients_of(model, llama.inputs()), gradients_of(oracle, llama.inputs()))


@pytest.mark.exhaustive
@one_each
def test_a_rank_pattern_cuts_the_chain_and_the_equation(llama, shortcut, pre_num, head):
    model = llama.lora(rank_pattern={"layers.2.self_attn.q_proj": 7})
    blocks = llama.chains["self_attn.v_proj"] + llama.chains["mlp.down_proj"]
    q = llama.chains["self_attn.q_proj"][0]
    oracle = Oracle(model, [*blocks, q[:2], q[2:3], q[3:]], shortcut, pre_num, head)
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head))
    assert_equal(gradients_of(model, llama.inputs()), gradients_of(oracle.model, llama.inputs()))


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
@language
@one_each
def test_autocast_with_fp32_adapters_is_as_precise_as_the_equation_under_autocast(name, shortcut, pre_num, head):
    arch = ARCHITECTURES[name]
    model, oracle = (candidate.float() for candidate in pair(arch, shortcut, pre_num, head, window=2))
    for candidate in (model, oracle):
        randomize(candidate, scale=0.15)
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in arch.inputs().items()}

    def step(candidate, enabled):
        candidate.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
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
    quick(
        [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
        (torch.bfloat16, torch.float32),
    ),
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
    """A model that passes every block its input in the dtype of its weight."""

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x.to(layer.proj.weight.dtype)).to(x.dtype)
        return x


@pytest.mark.exhaustive
@pytest.mark.parametrize("tokens", [1, 4])
@one_each
def test_a_chain_whose_adapters_have_two_dtypes(shortcut, pre_num, head, tokens):
    model = lora_stack(Casting()).float()
    inputs = {"x": STACK_INPUTS["x"][:, :tokens].float()}
    for layer in model.get_base_model().layers[slice(2)]:
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


@stateful
def test_gradients_of_single_samples_record_no_norms(shortcut, pre_num, head):
    model = lora_stack()
    oracle = Oracle(model, [stack_chain()], shortcut, pre_num, head).model
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head, window=3), example_inputs=STACK_INPUTS)

    def results(candidate):
        def loss(weights, x):
            return functional_call(candidate, weights, (x[None],)).square().sum()

        weights = {name: value.detach() for name, value in candidate.named_parameters() if value.requires_grad}
        return vmap(grad(loss), in_dims=(None, 0))(weights, STACK_INPUTS["x"])

    assert_equal(results(model), results(oracle))
    model(**STACK_INPUTS)
    assert connection_of(base_model(model)).wires.norms.count == 1
    assert_equal(results(model), results(oracle))


# --- state_dict, PEFT's own merge -------------------------------------------------------------------------------------


@pytest.mark.exhaustive
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


# --- sharded weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut, part", [("input", "lora_A"), ("block", "lora_A"), ("block", "lora_B")])
def test_a_sharded_neighbour_is_an_error_in_one_line(sharded, shortcut, part):
    """A sharded weight has the complete shape, but only a part of the values."""
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
    """LoRA layers pass the cast input and the base output to `lora_variant[adapter].forward`, and return its result."""
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
