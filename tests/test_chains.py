"""Which blocks are neighbours: roles, execution order, links, and what the trace leaves alone."""

import copy

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    STACK_INPUTS,
    Architecture,
    Stack,
    adapter_layers,
    assert_one_line,
    lora_stack,
    tiny_llama,
    tiny_unet,
    token_inputs,
)
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import nn

import reslora


def shape_of(chains) -> list[tuple[str, list[str]]]:
    """(role, names) of every chain."""
    return [(chain.role, [block.name for block in chain]) for chain in chains]


def counts(chains) -> dict[str, tuple[int, int]]:
    """Blocks and links per role."""
    result = {}
    for chain in chains:
        blocks, links = result.get(chain.role, (0, 0))
        result[chain.role] = (blocks + len(chain), links + len(chain) - 1)
    return result


def assert_chains(chains, expected: dict[str, list[list[str]]]) -> None:
    found: dict[str, list[list[str]]] = {}
    for role, names in shape_of(chains):
        found.setdefault(role, []).append(names)
    assert found.keys() == expected.keys()
    for role, lists in expected.items():
        assert [len(names) for names in found[role]] == [len(names) for names in lists]
        for names, tails in zip(found[role], lists, strict=True):
            assert all(name == tail or name.endswith("." + tail) for name, tail in zip(names, tails, strict=True))


def test_roles_and_execution_order_match_the_hand_written_chains(arch):
    assert_chains(reslora.chains(arch.lora()), arch.chains)


def test_links_counts_every_pair_of_neighbours(arch):
    expected = sum(len(chain) - 1 for chain in arch.blocks)
    assert reslora.chains(arch.lora()).links == expected


def test_every_block_carries_the_role_of_its_chain(unet):
    for chain in reslora.chains(unet.lora()):
        assert {block.role for block in chain} == {chain.role}


def test_a_chain_is_a_sequence(llama):
    chain = next(iter(reslora.chains(llama.lora())))
    assert len(chain) == 5
    assert [chain[n].name for n in range(5)] == [block.name for block in chain]
    assert chain[-1].name == chain[4].name


def test_the_plan_is_the_same_before_and_after_connect(arch):
    model = arch.lora()
    before = shape_of(reslora.chains(model))
    connected = reslora.connect(model, reslora.ResLoraConfig("block", 2))
    assert shape_of(connected) == before == shape_of(reslora.chains(model))


def test_the_middle_block_of_a_unet_runs_between_down_and_up(unet):
    plan = shape_of(reslora.chains(unet.lora()))
    names = [name for role, names in plan if role == "attn2.to_k" for name in names]
    stages = [next(s for s in ("down_blocks", "mid_block", "up_blocks") if s in name) for name in names]
    order = [stage for n, stage in enumerate(stages) if n == 0 or stages[n - 1] != stage]
    assert order == ["down_blocks", "mid_block", "up_blocks"]


def test_feed_forward_layers_have_their_own_roles(unet):
    model = unet.lora(target_modules=["ff.net.0.proj", "ff.net.2", "to_q"])
    assert set(counts(reslora.chains(model))) == {"ff.net.0.proj", "ff.net.2", "attn1.to_q", "attn2.to_q"}


STABLE_DIFFUSION = {
    "sd15": (
        {"cross_attention_dim": 768, "attention_head_dim": 8},
        {"image": (16, 9), "text": (16, 11)},
    ),
    "sd2": (
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
        {"image": (16, 9), "text": (16, 11)},
    ),
    "sdxl": (
        {
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
        },
        {"image": (70, 67), "text": (70, 67)},
    ),
}


@pytest.fixture(scope="module", params=list(STABLE_DIFFUSION))
def stable_diffusion(request):
    """A full-size U-Net with LoRA on the meta device, and its blocks and links per role."""
    config, expected = STABLE_DIFFUSION[request.param]
    with torch.device("meta"):
        model = UNet2DConditionModel(**{"sample_size": 64, **config})
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    per_role = {
        f"{attention}.{role}": expected["text" if attention == "attn2" and role in ("to_k", "to_v") else "image"]
        for attention in ("attn1", "attn2")
        for role in ("to_q", "to_k", "to_v", "to_out.0")
    }
    return model, per_role


def test_full_size_unets_have_the_expected_blocks_and_links(stable_diffusion):
    model, expected = stable_diffusion
    chains = reslora.chains(model)
    assert counts(chains) == expected
    assert chains.links == sum(links for _, links in expected.values())


def test_full_size_unets_connect_on_the_meta_device(stable_diffusion):
    model, expected = stable_diffusion
    connected = reslora.connect(model, reslora.ResLoraConfig("input"))
    reslora.disconnect(model)
    assert counts(connected) == expected


def test_a_bare_block_of_unequal_list_items_is_not_a_repeated_block(unet):
    roles = {block.role for chain in reslora.chains(unet.lora(target_modules=["to_out.0"])) for block in chain}
    assert roles == {"attn1.to_out.0", "attn2.to_out.0"}


def test_layers_left_out_do_not_break_the_chain(llama):
    model = llama.lora(target_modules=["q_proj"], layers_to_transform=[0, 2, 3])
    assert_chains(
        reslora.chains(model), {"self_attn.q_proj": [[f"model.layers.{n}.self_attn.q_proj" for n in (0, 2, 3)]]}
    )


def test_another_rank_cuts_the_chain(llama):
    model = llama.lora(target_modules=["q_proj"], rank_pattern={"layers.2.self_attn.q_proj": 7})
    assert_chains(
        reslora.chains(model),
        {"self_attn.q_proj": [[f"model.layers.{n}.self_attn.q_proj" for n in part] for part in ((0, 1), (2,), (3, 4))]},
    )


def test_another_alpha_does_not_cut_the_chain(llama):
    model = llama.lora(target_modules=["q_proj"], alpha_pattern={"layers.2.self_attn.q_proj": 16})
    assert reslora.chains(model).links == 4


def test_another_token_shape_cuts_the_chain():
    model = lora_stack(Stack(layers=5, pool_at=3))
    chains = reslora.chains(model, example_inputs=STACK_INPUTS)
    assert_chains(chains, {"proj": [[f"layers.{n}.proj" for n in part] for part in ((0, 1, 2), (3, 4))]})


def test_another_width_cuts_the_chain():
    class Widening(Stack):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Stack.Block(6), Stack.Block(6), Stack.Block(6, 10), Stack.Block(10, 10)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    chains = reslora.chains(lora_stack(Widening()), example_inputs=STACK_INPUTS)
    assert_chains(chains, {"proj": [[f"layers.{n}.proj" for n in part] for part in ((0, 1), (2,), (3,))]})


def test_order_is_execution_order_not_registration_order():
    class Reversed(Stack):
        def forward(self, x):
            for layer in reversed(self.layers):
                x = x + layer(x)
            return x

    chains = reslora.chains(lora_stack(Reversed()), example_inputs=STACK_INPUTS)
    assert_chains(chains, {"proj": [[f"layers.{n}.proj" for n in (3, 2, 1, 0)]]})


def test_a_cut_is_made_between_neighbours_only():
    """A long-short-long sequence of tokens is three chains: the third does not reach back over the second."""

    class Hourglass(Stack):
        def forward(self, x):
            for n, layer in enumerate(self.layers):
                x = x + (layer(x[:, ::2]).repeat_interleave(2, 1) if n in (2, 3) else layer(x))
            return x

    chains = reslora.chains(lora_stack(Hourglass(layers=6)), example_inputs=STACK_INPUTS)
    assert_chains(chains, {"proj": [[f"layers.{n}.proj" for n in part] for part in ((0, 1), (2, 3), (4, 5))]})


def test_batch_size_alone_does_not_cut_the_chain():
    class Splitting(Stack):
        def forward(self, x):
            for n, layer in enumerate(self.layers):
                x = torch.cat([layer(part) for part in [x]]) if n < 2 else layer(x[:1])
            return x

    chains = reslora.chains(lora_stack(Splitting()), example_inputs=STACK_INPUTS)
    assert chains.links == 3


@pytest.mark.parametrize("name", ["llama", "unet"])
def test_the_trace_leaves_the_random_state_alone(name):
    model = ARCHITECTURES[name].lora(lora_dropout=0.3)
    before = torch.get_rng_state()
    reslora.chains(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["llama", "unet", "bert"])
@pytest.mark.parametrize("training", [True, False])
def test_the_trace_leaves_mode_gradients_and_weights_alone(name, training):
    arch = ARCHITECTURES[name]
    model = arch.lora().train(training)
    next(iter(adapter_layers(model).values())).train(not training)
    for n, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, n) if parameter.requires_grad else None
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    reslora.chains(model)
    assert [module.training for module in model.modules()] == modes
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for n, parameter in enumerate(model.parameters()):
        assert (parameter.grad is None) == (not parameter.requires_grad)
        assert parameter.grad is None or bool((parameter.grad == n).all())


def hook_counts(model: nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


@pytest.mark.parametrize("name", ["llama", "unet"])
def test_the_trace_leaves_no_hooks(name):
    model = ARCHITECTURES[name].lora()
    before = hook_counts(model)
    reslora.chains(model)
    assert hook_counts(model) == before


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


def test_example_inputs_may_be_given_for_a_known_model(llama):
    chains = reslora.chains(llama.lora(), example_inputs=token_inputs(batch=1, length=3))
    assert_chains(chains, llama.chains)


def test_a_custom_module_without_example_inputs_is_told_to_give_them():
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.chains(lora_stack())
    assert_one_line(error, "example_inputs")


def test_the_table_shows_roles_and_blocks(unet):
    model = unet.lora()
    chains = reslora.chains(model)
    table = str(chains)
    assert len(table.splitlines()) > 2
    for role in unet.chains:
        assert role in table
    assert str(chains.links) in table


@pytest.mark.parametrize("target, name", [("conv_in", "conv_in"), ("resnets.0.conv1", "down_blocks.0.resnets.0.conv1")])
def test_convolutions_are_listed_as_unlinked(unet, target, name):
    chains = reslora.chains(unet.lora(target_modules=["to_q", target]))
    assert "unlinked" in str(chains).lower()
    assert name in str(chains)
    assert all(name not in block.name for chain in chains for block in chain)


def test_embeddings_are_listed_as_unlinked(llama):
    chains = reslora.chains(llama.lora(target_modules=["q_proj", "embed_tokens"]))
    assert "embed_tokens" in str(chains)
    assert set(counts(chains)) == {"self_attn.q_proj"}


def test_several_adapters_have_their_own_chains(llama):
    model = llama.lora(target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    assert set(counts(reslora.chains(model))) == {"self_attn.q_proj"}
    assert set(counts(reslora.chains(model, adapter_name="other"))) == {"self_attn.v_proj"}


def test_a_model_without_lora_layers_is_an_error():
    for model in (tiny_llama(1), tiny_unet()):
        with pytest.raises((ValueError, RuntimeError)) as error:
            reslora.chains(model)
        assert_one_line(error)


def test_an_unknown_adapter_is_named(llama):
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.chains(llama.lora(), adapter_name="missing")
    assert_one_line(error, "missing", "default")


def test_a_copy_has_the_same_plan(llama):
    model = llama.lora()
    assert shape_of(reslora.chains(copy.deepcopy(model))) == shape_of(reslora.chains(model))


def test_separate_self_and_cross_attention():
    """Two attentions in one block are two roles, whichever runs first."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.cross = nn.ModuleDict({"proj": nn.Linear(6, 6)})
            self.own = nn.ModuleDict({"proj": nn.Linear(6, 6)})

        def forward(self, x):
            return self.cross["proj"](self.own["proj"](x))

    model = Stack()
    model.layers = nn.ModuleList(Block() for _ in range(3))
    chains = reslora.chains(lora_stack(model), example_inputs=STACK_INPUTS)
    assert counts(chains) == {"cross.proj": (3, 2), "own.proj": (3, 2)}


def test_the_wrapped_model_has_the_same_plan_as_the_model_inside(llama):
    model = llama.lora()
    assert counts(reslora.chains(model)) == counts(reslora.chains(torch.compile(model, backend="eager")))


def test_architectures_are_what_they_claim():
    """The hand-written chains name every LoRA layer of each tiny model exactly once."""
    for arch in ARCHITECTURES.values():
        assert isinstance(arch, Architecture)
        names = [name for chain in arch.blocks for name in chain]
        found = adapter_layers(arch.lora())
        assert len(names) == len(set(names)) == len(found)
        assert all(any(n == name or n.endswith("." + name) for n in found) for name in names)


def test_get_peft_model_on_a_unet_has_the_chains_of_add_adapter(unet):
    config = LoraConfig(r=3, target_modules=unet.targets)
    assert_chains(reslora.chains(get_peft_model(tiny_unet(), config)), unet.chains)
