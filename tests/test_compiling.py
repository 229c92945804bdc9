"""Connected models under `torch.compile`, with few layers because compiling is slow."""

import dataclasses

import pytest
import torch
from core_models import assert_equal, gradients, gradients_of, loss_of, run, tiny_llama, tiny_unet
from waiting import join, start_thread
from wired import one_each, pair, stateful

import reslora

pytestmark = pytest.mark.exhaustive

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
    """`torch.compile` supports neither our context nor writes to a state inside a checkpoint."""
    roles = ("attn1.to_v", "attn2.to_v")
    chains = {role: [[f"{name}.transformer_blocks.0.{role}" for name in SHALLOW_CHAIN]] for role in roles}
    arch = dataclasses.replace(unet, build=lambda: tiny_unet(**SHALLOW_UNET), targets=["to_v"], chains=chains)
    model, oracle = pair(arch, "block", 2, "repeat")
    reslora.enable_gradient_checkpointing(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss_of(compiled, arch.inputs()).backward()
    assert_equal(gradients(model), gradients_of(oracle, arch.inputs()))


def shallow(arch, layers: int = 3):
    """Return the same architecture with fewer layers, which compiles faster."""
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
    """The state of a forward pass is created and dropped inside the graph, on every thread, without recompiling."""
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
