"""The order of a block-shortcut's products: `B (A x)`, or `(B A) x` if many blocks take part."""

import contextlib
from collections.abc import Sequence

import pytest
import torch
from core_models import Oracle, assert_equal, find_layer, gradients_of, lora_stack, run, stack_chain
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import reslora
from reslora import ResLoraConfig
from reslora.shortcuts.block import rows_for_a_first

LAYERS = 6
WIDTH = 13  # a third block of rank 3 makes it less work to multiply B by A first
MANY = {"x": torch.randn(2, 30, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}


class Layers(nn.Module):
    """Layers of one shape, so narrow that a few blocks of rank 3 are wider; `around[n]` opens around layer n."""

    def __init__(self, layers: int = LAYERS, roles: Sequence[str] = ("proj",), times: int = 1) -> None:
        super().__init__()
        widths = {role: WIDTH if number else times * WIDTH for number, role in enumerate(roles)}
        self.layers = nn.ModuleList(
            nn.ModuleDict({role: nn.Linear(WIDTH, width) for role, width in widths.items()}) for _ in range(layers)
        )
        self.around = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for n, layer in enumerate(self.layers):
            with self.around.get(n, contextlib.nullcontext)():
                changes = [torch.tanh(role(x))[..., :WIDTH] for role in layer.values()]
            x = x + sum(changes)
        return x


def pair(pre_num=-1, inputs=MANY, layers=LAYERS, roles=("proj",), times=1, **lora):
    """Return a connected model, and the oracle with the same weights; the first role is this many times wider."""
    model = lora_stack(Layers(layers, roles, times), target_modules=list(roles), **lora)
    chains = [[f"layers.{n}.{role}" for n in range(layers)] for role in roles]
    oracle = Oracle(model, chains, "block", pre_num).model
    reslora.connect(model, ResLoraConfig("block", pre_num), example_inputs=inputs)
    return model, oracle


def flops(layers: int, pre_num: int = -1) -> int:
    """Return the operations of a forward and a backward pass."""
    model, _ = pair(pre_num, layers=layers)
    with FlopCounterMode(display=False) as counted:
        run(model, MANY).sum().backward()
    return counted.get_total_flops()


# --- which order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "rows"), [(1, None), (2, None), (3, 36), (5, 20)])
def test_the_order_is_the_one_with_less_work(blocks, rows):
    """By counting: `rows r (p + q)` multiplications against `rows p q` and `r p q` for the product of B and A."""
    a, b = nn.Linear(12, 3, bias=False), nn.Linear(3, 12, bias=False)

    def a_first(rows):
        return rows * 3 * blocks * (12 + 12)

    def b_first(rows):
        return rows * 12 * 12 + 3 * blocks * 12 * 12

    limit = rows_for_a_first(a, b, blocks)
    for rows in (1, 10, 19, 20, 21, 35, 36, 37, 10**6):
        assert (rows <= limit) == (a_first(rows) <= b_first(rows))


@pytest.mark.parametrize("rows", [1, 60], ids=["A first", "B first"])
@pytest.mark.parametrize("roles", ["q", "qv"])
@pytest.mark.parametrize("pre_num", [1, -1])
def test_both_orders_are_the_equation(pre_num, roles, rows):
    inputs = {"x": MANY["x"].view(-1, WIDTH)[:rows]}
    model, oracle = pair(pre_num, inputs, roles=roles)
    assert_equal(run(model, inputs), run(oracle, inputs))
    assert_equal(gradients_of(model, inputs), gradients_of(oracle, inputs))


def test_each_block_drops_out_of_its_own_input():
    model, oracle = pair(lora_dropout=0.5)
    results = []
    for candidate in (model, oracle):
        torch.manual_seed(0)
        results.append(run(candidate, MANY))
    assert_equal(*results)


@pytest.mark.exhaustive
def test_a_compiled_model_chooses_the_order_too():
    model, oracle = pair()
    compiled = torch.compile(model.base_model.model, backend="eager", fullgraph=True)
    for rows in (60, 2, 60):
        inputs = {"x": MANY["x"].view(-1, WIDTH)[:rows]}
        assert_equal(run(compiled, inputs), run(oracle, inputs))


class Operations(TorchDispatchMode):
    """Lists the operations that run, with the shapes of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen.append((operation, [value.shape for value in args if isinstance(value, torch.Tensor)]))
        return operation(*args, **(kwargs or {}))

    def of(self, operation) -> list:
        """Return the shapes of the arguments of all operations of one kind."""
        return [shapes for name, shapes in self.seen if name is operation]


@pytest.mark.parametrize(
    ("times", "widths"),
    [
        (1, [2 * 3, 2 * 6]),  # of q and v together, as long as A comes first for both
        (2, [2 * 3, 2 * 6, 9]),  # and of q by itself, whose larger B is multiplied by A a layer later
    ],
)
def test_blocks_that_read_one_tensor_share_no_product_that_they_do_not_need(times, widths):
    model, oracle = pair(roles="qv", times=times)
    assert len(model.base_model.model._reslora.chains.readers) == LAYERS
    with Operations() as seen:
        run(model, MANY)
    rows = MANY["x"].numel() // WIDTH
    assert [b[1] for a, b in seen.of(torch.ops.aten.mm.default) if a[0] == rows] == widths
    assert_equal(gradients_of(model, MANY), gradients_of(oracle, MANY))


def test_under_autocast_the_product_is_added_in_place_too():
    model, _ = pair()
    model.float()
    with torch.autocast("cpu", torch.bfloat16), Operations() as seen:
        run(model, {"x": MANY["x"].float()})
    assert len(seen.of(torch.ops.aten.addmm_.default)) == LAYERS


# --- the sum that a chain hands on ------------------------------------------------------------------------------------


def test_a_longer_chain_costs_each_block_the_same():
    """With all earlier blocks: without the running sum, each block would multiply three more columns."""
    by_depth = [flops(layers) for layers in (9, 10, 11)]
    assert by_depth[2] - by_depth[1] == by_depth[1] - by_depth[0]


def test_a_sum_is_let_go_of_when_the_next_block_has_taken_it():
    model, _ = pair()
    slot, kept = model.base_model.model._reslora.wires.threads.slot, []
    for name in stack_chain(LAYERS):
        find_layer(model, name).register_forward_hook(lambda *called: kept.append(len(slot.state.handed)))
    run(model, MANY)
    assert kept == [0, 0, 1, 1, 1, 0]  # two blocks that multiply by A first, and the last has nobody behind it


@pytest.mark.parametrize("without", range(LAYERS))
def test_a_sum_without_gradients_is_not_taken_with_them(without):
    model, oracle = pair()
    for candidate in (model, oracle):
        candidate.base_model.model.around[without] = torch.no_grad
    assert_equal(gradients_of(model, MANY), gradients_of(oracle, MANY))


def test_a_checkpoint_makes_its_own_sum():
    model, oracle = pair()
    layers = model.base_model.model.layers

    class Checkpointed(nn.Module):
        def __init__(self, proj: nn.Module) -> None:
            super().__init__()
            self.proj = proj

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.proj, x, use_reentrant=False)

    for n in (3, 4):
        layers[n]["proj"] = Checkpointed(layers[n]["proj"])
    found = {name.replace(".proj.proj", ".proj"): grad for name, grad in gradients_of(model, MANY).items()}
    assert_equal(found, gradients_of(oracle, MANY))


@pytest.mark.exhaustive
def test_a_sum_is_not_rounded_to_half_precision_again_and_again():
    """Sixty B A, the first of ones and the others of 2**-10: in bfloat16, 1 + 2**-10 is 1."""
    names = stack_chain(60)
    model = lora_stack(Layers(60), r=1, lora_alpha=1).float()
    for n, name in enumerate(names):
        layer = find_layer(model, name)
        for parameter in layer.base_layer.parameters():
            parameter.data.zero_()
        layer.lora_A["default"].weight.data.fill_(1.0)
        layer.lora_B["default"].weight.data.fill_(2.0**-10 if n else 1.0)
    x = torch.ones(600, WIDTH, dtype=torch.float32)
    reslora.connect(model, ResLoraConfig("block", -1), example_inputs={"x": x})
    seen = []
    find_layer(model, names[-1]).register_forward_hook(lambda module, args, result: seen.append((args[0], result)))
    find_layer(model, names[-2]).base_layer.register_forward_hook(lambda *called: None)  # no sum in place there
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    ((x, result),) = seen
    expected = (1 + 59 * 2.0**-10) * x.double().sum(1, keepdim=True).expand(-1, WIDTH)
    assert_equal(result.double(), expected, rtol=2.0**-7)
