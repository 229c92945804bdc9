"""The trace: which holder reads the output of which, inputs made from a configuration, and no side effects."""

import itertools

import pytest
import tiny_models
import torch
from core_models import ARCHITECTURES, STACK_INPUTS, Stack, adapter_layers, assert_one_line, lora_stack, tiny_unet
from peft import LoraConfig, get_peft_model
from torch import nn

import reslora
from reslora.tracing import Trace, meta_copy, trace

X = {"x": torch.ones(2, 4, 6, dtype=torch.float64), "y": torch.ones(2, 4, 6, dtype=torch.float64)}


class Layer(nn.Module):
    """A linear layer that may also read a context."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, x, context=None):
        return torch.tanh(self.proj(x)) + (0 if context is None else context.mean(1, keepdim=True))


class Streams(nn.Module):
    """Three lists of two layers each, called as `route` says; with `real`, by operations that need real tensors."""

    def __init__(self, route, layer=Layer, real: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.ModuleList(layer() for _ in range(2)) for _ in range(3))
        self.route, self.real = route, real

    def forward(self, x, y):
        if self.real and x.sum().item() != x.numel():
            raise AssertionError("other inputs than given")
        return self.route(self, x, y)


def links(route, layer=Layer, targets=("proj",), **config) -> set[tuple[str, str]]:
    """Return (before, after) of every link, on the meta device; a real run must find the same links."""
    found = []
    for real in (False, True):
        adapted = LoraConfig(r=2, target_modules=list(targets), **config)
        model = get_peft_model(Streams(route, layer, real).double(), adapted)
        chains = reslora.chains(model, example_inputs=X)
        found.append({(a.name, b.name) for chain in chains for a, b in itertools.pairwise(chain)})
    assert found[0] == found[1]
    return found[0]


def run_through(layers, x, **kwargs):
    for layer in layers:
        x = layer(x, **kwargs)
    return x


WITHIN = {("first.0.proj", "first.1.proj"), ("second.0.proj", "second.1.proj")}
ACROSS = ("first.1.proj", "second.0.proj")


def route_in_place(model, x, y):
    for layer in (*model.first, *model.second):
        x = layer(x)
        x += 1
        x[:, 0] = 0
    return x


def route_into_a_buffer(model, x, y):
    whole = torch.zeros_like(x)
    whole[:, 1:] = run_through(model.first, x)[:, 1:]
    return run_through(model.second, whole)


def route_with_a_context_first(model, x, y):
    for layer in (*model.first, *model.second):
        x = layer(context=y, x=x)
    return x


def route_without_gradients(model, x, y):
    """As a frozen tower may be called."""
    with torch.no_grad():
        return run_through((*model.first, *model.second), x)


KEPT = {
    "straight": lambda model, x, y: run_through(model.second, run_through(model.first, x)),
    "residual": lambda model, x, y: run_through(model.second, y + 2 * run_through(model.first, x)),
    "cloned": lambda model, x, y: run_through(model.second, run_through(model.first, x).clone().contiguous()),
    "cut_and_joined": lambda model, x, y: run_through(
        model.second, torch.cat([run_through(model.first, x)[:, :2], y[:, 2:]], dim=1)
    ),
    "in_place": route_in_place,
    "into_a_buffer": route_into_a_buffer,
    "a_context_named_first": route_with_a_context_first,
    "without_gradients": route_without_gradients,
}


@pytest.mark.parametrize("route", KEPT.values(), ids=KEPT)
def test_a_layer_that_goes_on_with_what_came_before_is_linked(route):
    assert links(route) == {*WITHIN, ACROSS}


CUT = {
    "inputs_of_its_own": lambda model, x, y: run_through(model.first, x) + run_through(model.second, y),
    "the_same_inputs": lambda model, x, y: run_through(model.first, x) + run_through(model.second, x),
    "as_a_context_only": lambda model, x, y: run_through(model.second, y, context=run_through(model.first, x)),
}


@pytest.mark.parametrize("route", CUT.values(), ids=CUT)
def test_a_layer_that_reads_something_else_is_not_linked(route):
    assert links(route) == WITHIN


def test_the_table_says_why_in_words():
    model = get_peft_model(Streams(CUT["as_a_context_only"]).double(), LoraConfig(r=2, target_modules=["proj"]))
    rows = str(reslora.chains(model, example_inputs=X)).splitlines()
    (row,) = [row for row in rows if "second.0" in row]
    assert row.endswith("another stream: second.0 does not read the output of first.1")


class OneName(Layer):
    """A layer with hidden states by keyword only, after an argument that is not a floating-point tensor."""

    def forward(self, name, mask, *, hidden_states):
        return super().forward(hidden_states)


class Nested(Layer):
    """A list of tensors in a tuple as input, and a dict as output."""

    def forward(self, pair):
        _, (x, y) = pair
        return {"kept": y, "changed": [super().forward(x)]}


def route_by_keyword(model, x, y):
    for layer in (*model.first, *model.second):
        x = layer("name", x > 0, hidden_states=x)
    return x


def route_nested(model, x, y):
    for layer in (*model.first, *model.second):
        x = layer((1, [x, y]))["changed"][0]
    return x


@pytest.mark.parametrize(
    "layer, route",
    [(OneName, route_by_keyword), (Nested, route_nested)],
)
def test_hidden_states_are_found_however_they_are_passed(layer, route):
    assert links(route, layer) == {*WITHIN, ACROSS}


def test_a_list_in_the_first_argument_counts_as_a_whole():
    def route(model, x, y):
        for layer in model.first:
            x = layer((1, [x, y]))["changed"][0]
        for layer in model.second:
            y = layer((1, [y, x]))["changed"][0]
        return y

    assert links(route, Nested) == {*WITHIN, ACROSS}


class Either(nn.Module):
    """Two layers of which one is called: roles need not be in every module of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.chosen = "proj"

    def forward(self, x, context=0):
        return x + getattr(self, self.chosen)(x) + context


def test_layers_in_between_that_have_other_roles_do_not_break_a_stream():
    def route(model, x, y):
        model.first[1].chosen = model.second[0].chosen = "other"
        return run_through((*model.first, *model.second), x)

    found = links(route, Either, ("proj", "other"))
    assert found == {("first.0.proj", "second.1.proj"), ("first.1.other", "second.0.other")}


class Outer(nn.Module):
    """A module of a list that holds its own list and a layer after it, as a U-Net's `attentions` do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(2))
        self.out = nn.Linear(6, 6)

    def forward(self, x, context=None):
        return self.out(run_through(self.blocks, x))


def test_a_stream_passes_through_lists_inside_lists():
    found = links(lambda model, x, y: run_through((*model.first, *model.second), x), Outer, ("proj", "out"))
    order = [f"{name}.{n}.blocks.{k}.proj" for name in ("first", "second") for n in (0, 1) for k in (0, 1)]
    outer = [f"{name}.{n}.out" for name in ("first", "second") for n in (0, 1)]
    assert found == {*itertools.pairwise(order), *itertools.pairwise(outer)}


def test_layers_that_are_items_themselves_are_linked_in_series_only():
    plain = lambda: nn.Linear(6, 6)  # noqa: E731
    series = links(lambda model, x, y: run_through(model.first, x), plain, ("0", "1"))
    assert series == {("first.0", "first.1")}
    assert links(lambda model, x, y: model.first[0](x) + model.first[1](x), plain, ("0", "1")) == set()


def test_where_two_streams_meet_a_new_one_begins():
    def meeting(model, x, y):
        return run_through(model.third, run_through(model.first, x) + run_through(model.second, y))

    assert links(meeting) == {*WITHIN, ("third.0.proj", "third.1.proj")}
    model = get_peft_model(Streams(meeting).double(), LoraConfig(r=2, target_modules=["proj"]))
    table = str(reslora.chains(model, example_inputs=X))
    assert "another stream: third.0 combines the outputs of first.1 and second.1" in table


def test_a_stream_that_takes_in_others_on_its_way_goes_on():
    def taking_in(model, x, y):
        first, second = model.first, model.second
        hints = [first[0](y), first[1](y)]
        return second[1](second[0](x + hints[0]) + hints[1])

    assert ("second.0.proj", "second.1.proj") in links(taking_in)


def test_a_stream_that_comes_back_to_its_own_past_goes_on():
    """The up blocks of a U-Net read the output of its down blocks, in addition to that of the previous block."""

    def skips(model, x, y):
        down = run_through(model.first, x)
        middle = run_through(model.second, down)
        return run_through(model.third, middle + down)

    assert links(skips) == {*WITHIN, ACROSS, ("second.1.proj", "third.0.proj"), ("third.0.proj", "third.1.proj")}


def test_the_stream_of_a_trace_written_by_hand():
    reads = {"a.0": set(), "a.1": {"a.0"}, "b.0": {"a.1"}, "c.0": set()}
    seen = Trace({}, reads, {holder: set() for holder in reads})
    assert not seen.apart("b.0", "a.0")
    assert not seen.apart("a.1", "a.0")
    assert seen.apart("a.0", "a.1")
    assert seen.apart("c.0", "b.0") == "another stream: c.0 does not read the output of b.0"


# -- inputs made from a configuration --------------------------------------------------------------------------------


TRANSFORMERS = {
    "z_image": (tiny_models.z_image, {"dim": 24}, (64, 32, 96)),
    "flux": (tiny_models.flux, {}, (64, 24, 88)),
    "flux_guided": (tiny_models.flux, {"guidance_embeds": True}, (64, 24, 88)),
    "flux2": (tiny_models.flux2, {}, (64, 24, 88)),
    "chroma": (tiny_models.chroma, {}, (64, 24, 88)),
    "sd3": (tiny_models.sd3, {}, (16, 77, None)),
    "sd3_large": (tiny_models.sd3, {"sample_size": 128, "pos_embed_max_size": 96}, (256, 77, None)),
    "qwen_image": (tiny_models.qwen_image, {}, (64, 24, None)),
    "lumina2": (tiny_models.lumina2, {}, (64, 24, 88)),
    "krea2": (tiny_models.krea2, {"num_text_layers": 12}, (64, 24, 88, 12)),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_are_traced_without_example_inputs(name):
    """Image, caption, and both together have three different lengths."""
    build, overrides, lengths = TRANSFORMERS[name]
    model = build(**overrides).to(torch.bfloat16)
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    found = {block.tokens for block in reslora.chains(model).blocks}
    assert {(length,) for length in lengths if length} <= found


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        first, second, third = self.layers
        normed = self.norm(x)
        return first(x) + second(normed) + third(normed)


def test_a_norm_makes_another_tensor_of_what_it_reads():
    holders = {f"layers.{n}": f"layers.{n}" for n in range(3)}
    seen = trace(Normed().double(), holders, STACK_INPUTS)
    assert seen.readers == [["layers.0"], ["layers.1", "layers.2"]]


def test_another_adapter_may_be_connected():
    model = ARCHITECTURES["llama"].lora()
    plan = reslora.connect(model, reslora.ResLoraConfig(shortcut="middle"))
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    assert reslora.chains(model, "other") == plan


@pytest.mark.exhaustive
def test_a_unet_of_few_pixels_has_the_links_of_a_large_one():
    """Halved three times, a latent of 2 x 2 would end with stages of equal size."""
    stages = {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    }
    plans = []
    for size in (2, 32):
        model = tiny_unet(sample_size=size, **stages)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
        plans.append([[block.name for block in chain] for chain in reslora.chains(model)])
    assert plans[0] == plans[1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_decoders_are_traced_without_example_inputs(name):
    model = getattr(tiny_models, name)()
    targets = ["q_proj"] if name != "t5" else ["q"]
    assert reslora.chains(get_peft_model(model, LoraConfig(r=2, target_modules=targets))).links == 2 + 2 + 2


def test_a_custom_module_without_example_inputs_is_told_to_give_them():
    with pytest.raises(ValueError) as error:
        reslora.chains(lora_stack())
    assert_one_line(error, "example_inputs")


def test_example_inputs_that_are_no_dict_are_refused():
    with pytest.raises(ValueError) as error:
        reslora.chains(lora_stack(), example_inputs=[1])
    assert_one_line(error, "example_inputs", "dict")


# -- what is left alone ----------------------------------------------------------------------------------------------


class RealStack(Stack):
    """A stack that does not run on the meta device, uses random numbers also in eval mode, and can checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.checkpointed = False

    def forward(self, x):
        assert x.sum().item() == x.sum().item()
        for layer in self.layers:
            self.checkpointed |= self.gradient_checkpointing and torch.is_grad_enabled()
            x = x + layer(x) + torch.rand_like(x)
        return x


def traced(name):
    """Return a model with LoRA in train mode, and its example inputs."""
    if name == "real":
        return lora_stack(RealStack()), STACK_INPUTS
    return ARCHITECTURES[name].lora(lora_dropout=0.3), None


NAMES = ["llama", "unet", "bert", "real"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_the_trace_leaves_the_random_state_alone(name):
    model, inputs = traced(name)
    before = torch.get_rng_state()
    reslora.chains(model, example_inputs=inputs)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_the_trace_leaves_mode_gradients_and_weights_alone(name):
    model, inputs = traced(name)
    model.train(True)
    next(iter(adapter_layers(model).values())).train(False)
    for n, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, n) if parameter.requires_grad else None
    modes = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    reslora.chains(model, example_inputs=inputs)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for n, parameter in enumerate(model.parameters()):
        assert (parameter.grad is None) == (not parameter.requires_grad)
        assert parameter.grad is None or bool((parameter.grad == n).all())


def hook_counts(model: nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_the_trace_leaves_no_hooks(name):
    model, inputs = traced(name)
    before = hook_counts(model)
    reslora.chains(model, example_inputs=inputs)
    assert hook_counts(model) == before


@pytest.mark.exhaustive
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_trace_runs_with_gradients_on_or_off_and_leaves_them_so(context):
    model, inputs = traced("real")
    expected = reslora.chains(model, example_inputs=inputs)
    with context():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert reslora.chains(model, example_inputs=inputs) == expected
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert expected.links > 0


def test_the_trace_does_not_checkpoint_and_leaves_checkpointing_on():
    model = lora_stack(RealStack())
    base = model.get_base_model()
    base.gradient_checkpointing = True
    reslora.chains(model, example_inputs=STACK_INPUTS)
    assert base.gradient_checkpointing and not base.checkpointed
    with pytest.raises(ValueError):
        reslora.chains(model, example_inputs={"x": torch.zeros(2, 4, 7, dtype=torch.float64)})
    assert base.gradient_checkpointing


def test_a_trace_that_fails_leaves_no_hooks_and_no_mode():
    model = lora_stack()
    before, modes = hook_counts(model), [module.training for module in model.modules()]
    with pytest.raises((ValueError, RuntimeError)):
        reslora.chains(model, example_inputs={"x": torch.zeros(2, 4, 7, dtype=torch.float64)})
    assert hook_counts(model) == before
    assert [module.training for module in model.modules()] == modes
    assert reslora.chains(model, example_inputs=STACK_INPUTS).links == 3


def test_the_trace_does_not_change_its_example_inputs():
    inputs = {"x": STACK_INPUTS["x"].clone()}
    reslora.chains(lora_stack(), example_inputs=inputs)
    assert inputs.keys() == {"x"} and torch.equal(inputs["x"], STACK_INPUTS["x"])
    assert not inputs["x"].requires_grad


def test_layers_that_did_not_run_are_not_in_the_trace():
    stack_class = type("Half", (Stack,), {"forward": lambda self, x: self.layers[0](x)})
    seen = trace(stack_class(layers=2).double(), {f"layers.{n}.proj": f"layers.{n}" for n in (0, 1)}, STACK_INPUTS)
    assert seen.runs == {"layers.0.proj": [(4,)]}


def test_a_copy_without_storage_shares_nothing_with_its_original():
    model = ARCHITECTURES["unet"].lora()
    twin = meta_copy(model)
    assert {tensor.device.type for tensor in twin.state_dict().values()} == {"meta"}
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert {id(module) for module in twin.modules()}.isdisjoint({id(module) for module in model.modules()})
    assert model.training and not twin.training
