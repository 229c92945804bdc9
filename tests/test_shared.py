"""One product for all blocks that read one tensor, and the sum in place: few operations, the same values."""

import contextlib
import copy

import pytest
import torch
from core_models import (
    ARCHITECTURES,
    Oracle,
    adapter_layers,
    assert_equal,
    assert_one_line,
    find_layer,
    gradients_of,
    lora_stack,
    run,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import reslora
from reslora import ResLoraConfig

LAYERS = 3
WIDTH = 30  # so wide that A comes before B in every block-shortcut
ROLES = ("q", "k", "v", "o")
INPUTS = {"x": torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
shortcuts = pytest.mark.parametrize("shortcut", ["block", "middle"])


class Attention(nn.Module):
    """q, k and v read the same tensor.

    `between` is called on it between q and k; its result is the input of k and v.
    """

    between = staticmethod(lambda x: x)
    around = contextlib.nullcontext
    linear = nn.Linear

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (self.linear(WIDTH, WIDTH) for _ in ROLES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.around():
            q = self.q(x)
        x = self.between(x)
        scores = q.to(x.dtype) @ self.k(x).mT / WIDTH
        return self.o(scores.softmax(-1) @ self.v(x))


class Attentions(nn.Module):
    def __init__(self, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.layers = nn.ModuleList(attention() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(torch.tanh(x))
        return x


def pair(shortcut, attention=Attention, inputs=INPUTS, change=None, **lora):
    """Return a connected model, and the oracle with the same weights."""
    model = lora_stack(Attentions(attention), **{"target_modules": list(ROLES), **lora})
    if change is not None:
        change(model)
    oracle = Oracle(model, [[f"layers.{n}.{role}" for n in range(LAYERS)] for role in ROLES], shortcut, 2).model
    reslora.connect(model, ResLoraConfig(shortcut, 2, window=0), example_inputs=inputs)
    return model, oracle


def set_for_all(model, **attributes):
    for module in model.modules():
        if isinstance(module, Attention):
            for name, value in attributes.items():
                setattr(module, name, value)


class Products(TorchDispatchMode):
    """Count products that are not added in place: the frozen layers here have a bias, and B adds to them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation is torch.ops.aten.mm.default
        return operation(*args, **(kwargs or {}))


def products(model, inputs=INPUTS) -> int:
    with Products() as counted:
        run(model, inputs)
    return counted.count


# --- who reads one tensor ---------------------------------------------------------------------------------------------


def test_the_plan_says_who_reads_one_tensor():
    plan = reslora.chains(lora_stack(Attentions(), target_modules=list(ROLES)), example_inputs=INPUTS)
    assert plan.readers == tuple(tuple(f"layers.{n}.{role}" for role in "qkv") for n in range(LAYERS))


def test_a_change_in_place_is_another_tensor():
    model = lora_stack(Attentions(), target_modules=list(ROLES))
    set_for_all(model, between=lambda x: x.add_(1))
    plan = reslora.chains(model, example_inputs=INPUTS)
    assert plan.readers == tuple((f"layers.{n}.k", f"layers.{n}.v") for n in range(LAYERS))


@pytest.mark.exhaustive
def test_captions_are_read_together_only_within_a_block():
    """All cross-attentions read one tensor; a checkpoint may begin between any two blocks."""
    readers = reslora.chains(ARCHITECTURES["unet"].lora()).readers
    for place in ("down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.1"):
        for layer in (0, 1):
            block = f"{place}.transformer_blocks.{layer}"
            assert tuple(f"{block}.attn1.to_{part}" for part in "qkv") in readers
            assert tuple(f"{block}.attn2.to_{part}" for part in "kv") in readers
    assert all(len({name.split(".attn")[0] for name in names}) == 1 for names in readers)


# --- as many products as tensors are read -----------------------------------------------------------------------------


@shortcuts
def test_one_product_for_q_k_and_v(shortcut):
    model, oracle = pair(shortcut)
    assert products(model) == 2 * LAYERS  # q, k and v together, and o
    assert_equal(run(model, INPUTS), run(oracle, INPUTS))
    assert_equal(gradients_of(model, INPUTS), gradients_of(oracle, INPUTS))


@shortcuts
def test_a_backward_makes_one_gradient_for_q_k_and_v(shortcut):
    """Six products for each of the two tensors and for B of four layers, besides the four of the frozen layers."""
    model, _ = pair(shortcut)
    loss = run(model, {"x": INPUTS["x"].clone().requires_grad_()}).sum()
    with Products() as counted:
        loss.backward()
    frozen, up, down = 4 * LAYERS, 2 * 4 * LAYERS, 2 * 2 * LAYERS
    assert counted.count == frozen + up + down


@shortcuts
def test_half_precision_layers_share_without_autocast(shortcut):
    """PEFT would convert x for each layer separately."""
    model = lora_stack(Attentions(), target_modules=list(ROLES)).bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    inputs = {"x": INPUTS["x"].bfloat16()}
    reslora.connect(model, ResLoraConfig(shortcut, 2), example_inputs=inputs)
    assert products(model, inputs) == 2 * LAYERS + 4 * LAYERS  # and B, whose float32 is rounded as PEFT does


@shortcuts
def test_a_second_adapter_is_still_converted_to(shortcut):
    model, _ = pair(shortcut)
    model.float().add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "other"])
    model.bfloat16()
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.data = parameter.data.float()
    assert run(model, {"x": INPUTS["x"].bfloat16()}).isfinite().all()


@pytest.mark.exhaustive
@shortcuts
def test_a_compiled_graph_shares_too(shortcut):
    model, oracle = pair(shortcut)
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model.base_model.model, backend=keep, fullgraph=True)
    assert_equal(run(compiled, INPUTS), run(oracle, INPUTS))
    linears = [node for node in graphs[0].graph.nodes if node.target is torch._C._nn.linear]
    # Block-shortcuts may be compiled with any kind of checkpointing, inside which nothing can be handed on.
    assert len(linears) == (4 + (4 if shortcut == "block" else 2)) * LAYERS


@pytest.mark.exhaustive
@shortcuts
def test_a_model_without_numbers_runs(shortcut):
    """On the meta device, as for counting operations, which has no autocast."""
    model = lora_stack(Attentions(), target_modules=list(ROLES)).to("meta")
    inputs = {"x": torch.empty(60, 4, WIDTH, dtype=torch.float64, device="meta")}
    reslora.connect(model, ResLoraConfig(shortcut, 1), example_inputs=inputs)
    run(model, inputs).sum().backward()
    assert all(parameter.grad.is_meta for parameter in model.parameters() if parameter.requires_grad)


@shortcuts
def test_a_product_is_let_go_of_when_all_have_theirs(shortcut):
    model, _ = pair(shortcut)
    slot, seen = model.base_model.model._reslora.wires.threads.slot, []
    for role in ROLES:
        layer = find_layer(model, f"layers.0.{role}")
        layer.register_forward_hook(lambda *called: seen.append(slot.state.shared is not None))
    run(model, INPUTS)
    assert seen == [True, True, False, False]


# --- what must not be shared ------------------------------------------------------------------------------------------


@shortcuts
def test_with_dropout_each_block_has_a_product_of_its_own(shortcut):
    model, _ = pair(shortcut, lora_dropout=0.5)
    assert products(model) == 4 * LAYERS
    assert products(model.eval()) == 2 * LAYERS


@pytest.mark.exhaustive
@shortcuts
def test_another_tensor_than_in_the_trace_is_multiplied_by_itself(shortcut):
    model, oracle = pair(shortcut)
    for candidate in (model, oracle):
        set_for_all(candidate, between=torch.clone)
    assert_equal(run(model, INPUTS), run(oracle, INPUTS))
    assert_equal(gradients_of(model, INPUTS), gradients_of(oracle, INPUTS))


@pytest.mark.exhaustive
@shortcuts
def test_a_tensor_changed_in_place_since_the_trace_is_multiplied_by_itself(shortcut):
    model, oracle = pair(shortcut)
    set_for_all(model, between=lambda x: x.mul_(3))
    set_for_all(oracle, between=lambda x: x * 3)
    with torch.enable_grad():
        assert_equal(run(model, INPUTS), run(oracle, INPUTS))


@pytest.mark.exhaustive
@shortcuts
def test_autocast_for_q_alone_leaves_k_and_v_exact(shortcut):
    model, oracle = pair(shortcut)
    model, oracle = model.float(), oracle.float()
    inputs = {"x": INPUTS["x"].float()}
    for candidate in (model, oracle):
        set_for_all(candidate, around=lambda: torch.autocast("cpu", torch.bfloat16))
    seen = []
    for candidate in (model, oracle):
        find_layer(candidate, "layers.0.k").register_forward_hook(lambda module, args, result: seen.append(result))
        run(candidate, inputs)
    assert_equal(seen[0], seen[1], rtol=1e-5, atol=1e-6)


@shortcuts
def test_where_one_has_another_dtype_all_multiply_by_themselves(shortcut):
    """Stacked, all would be computed in the widest dtype."""

    def change(model):
        for n in range(LAYERS):
            find_layer(model, f"layers.{n}.k").lora_A.float()
            find_layer(model, f"layers.{n}.k").lora_B.float()

    model, oracle = pair(shortcut, change=change)
    assert products(model) == 4 * LAYERS + LAYERS  # and B of k, whose sum is rounded as PEFT does
    assert_equal(run(model, INPUTS), run(oracle, INPUTS), rtol=1e-5, atol=1e-5)


def test_a_product_without_gradients_is_not_taken_with_them():
    """Only a block-shortcut may run without gradients inside a forward pass with gradients."""
    model, oracle = pair("block")
    for candidate in (model, oracle):
        set_for_all(candidate, around=torch.no_grad)
    assert_equal(gradients_of(model, INPUTS), gradients_of(oracle, INPUTS))


@pytest.mark.parametrize("shortcut", ["input", "block"])
def test_a_sharded_a_is_stacked_with_no_other(sharded, shortcut):
    model, _ = pair(shortcut)
    lora_a = find_layer(model, "layers.1.k").lora_A["default"]
    lora_a.weight = sharded(lora_a.weight)
    with pytest.raises(RuntimeError) as error:
        run(model, INPUTS)
    assert_one_line(error, "k cannot read", "sharded")


def test_an_a_that_was_replaced_counts():
    model, oracle = pair("block")
    name = f"layers.{LAYERS - 1}.k"  # no block behind it reads its A
    for candidate in (model, oracle):
        weight = torch.full_like(find_layer(candidate, name).lora_A["default"].weight, 0.25)
        find_layer(candidate, name).lora_A["default"] = nn.Linear(*weight.shape[::-1], bias=False).double()
        find_layer(candidate, name).lora_A["default"].weight.data = weight
    assert_equal(run(model, INPUTS), run(oracle, INPUTS))


class Checkpointed(nn.Module):
    """A layer inside a checkpoint that begins between q and k."""

    def __init__(self, layer: nn.Module, context_fn) -> None:
        super().__init__()
        self.layer, self.context_fn = layer, context_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.layer, x, use_reentrant=False, context_fn=self.context_fn)


@pytest.mark.exhaustive
@shortcuts
def test_a_checkpoint_takes_no_product_from_before(shortcut):
    model, oracle = pair(shortcut)
    wires = model.base_model.model._reslora.wires
    for layer in model.base_model.model.layers:
        layer.k = Checkpointed(layer.k, wires.contexts)
    found = {name.replace(".k.layer", ".k"): grad for name, grad in gradients_of(model, INPUTS).items()}
    assert_equal(found, gradients_of(oracle, INPUTS))


@shortcuts
def test_a_product_goes_on_behind_the_checkpoint_that_made_it(shortcut):
    model, oracle = pair(shortcut)
    wires = model.base_model.model._reslora.wires
    for layer in model.base_model.model.layers:
        layer.q = Checkpointed(layer.q, wires.contexts)
    found = {name.replace(".q.layer", ".q"): grad for name, grad in gradients_of(model, INPUTS).items()}
    assert_equal(found, gradients_of(oracle, INPUTS))


# --- the sum in place -------------------------------------------------------------------------------------------------


class Exponential(nn.Linear):
    """A subclass of a linear layer whose backward pass needs its output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).exp()


class ExponentialAttention(Attention):
    linear = Exponential


@pytest.mark.exhaustive
@shortcuts
def test_what_a_layer_of_another_class_returned_is_left_alone(shortcut):
    model, oracle = pair(shortcut, ExponentialAttention)
    assert_equal(gradients_of(model, INPUTS), gradients_of(oracle, INPUTS))


@shortcuts
def test_a_replaced_forward_is_left_alone(shortcut):
    """accelerate and diffusers replace `forward` on the layer to move or convert weights."""

    def change(model):
        base = find_layer(model, "layers.1.q").base_layer
        base.forward = lambda x: nn.functional.linear(x, base.weight, base.bias).exp()

    model, oracle = pair(shortcut, change=change)
    base = find_layer(oracle, "layers.1.q").base_layer
    base.forward = lambda x: nn.functional.linear(x, base.weight, base.bias).exp()
    assert_equal(gradients_of(model, INPUTS), gradients_of(oracle, INPUTS))


class Exponentiating:
    """A variant of another adapter whose backward pass needs its input from the frozen layer, and its output."""

    def forward(self, module, active_adapter, x, result, **kwargs):
        return result.exp()


@pytest.mark.exhaustive
@shortcuts
def test_what_another_adapter_returned_is_left_alone(shortcut):
    model, _ = pair(shortcut)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["other", "default"])
    for layer in adapter_layers(model).values():
        layer.lora_variant["other"] = Exponentiating()
    found = gradients_of(model, INPUTS)
    for layer in adapter_layers(model).values():  # the frozen layers are looked at, so that nothing is done in place
        layer.base_layer.register_forward_hook(lambda *called: None)
    assert_equal(found, gradients_of(model, INPUTS))
