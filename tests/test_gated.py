"""The shortcut `gated` against its formula written out by hand: `[B~_n, B_S] diag(d_n) [A~_n; A_S]`."""

import copy

import pytest
import torch
import torch.distributed as dist
from core_models import (
    ARCHITECTURES,
    STACK_INPUTS,
    Stack,
    adapter_layers,
    assert_equal,
    assert_one_line,
    delta,
    find_layer,
    fix_dropout,
    gradients,
    gradients_of,
    lora_stack,
    loss_of,
    run,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from suites import quick
from torch import nn

import reslora
from reslora import ResLoraConfig
from reslora.chains import base_model
from reslora.export import export_peft
from reslora.methods.adapters import load_adapter, save_adapter, trained_state
from reslora.texts.results import merge_table

RANK, SHARED = 16, 2
GATED = ResLoraConfig("gated", 4)
architectures = pytest.mark.parametrize("name", quick(["llama", "unet", "gpt2", "bert"], "llama", "unet"))


def gates(model) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if "lora_gates" in name}


def connected(arch, seed: int = 0, **lora):
    """Return a connected model with random gates, and the same LoRA before it was connected."""
    plain = arch.lora(seed=seed, r=RANK, **lora)
    model = copy.deepcopy(plain)
    reslora.connect(model, GATED)
    torch.manual_seed(seed)
    for value in gates(model).values():
        nn.init.normal_(value)
    return model, plain


def oracle(model, plain, chains) -> dict[str, torch.Tensor]:
    """Let the layers of `plain` compute the formula term by term; return their gates, copies of the model's."""
    leaves = {}

    def equation(layer, layers, gates):
        def forward(x, *args, **kwargs):
            hidden, x = layer.base_layer(x, *args, **kwargs), layer.lora_dropout["default"](x)
            own = [(layer, k) for k in range(RANK - SHARED)]
            pool = [(other, k) for other in layers for k in range(RANK - SHARED, RANK)]
            for gate, (owner, k) in zip(gates, own + pool, strict=True):
                a, b = owner.lora_A["default"].weight[k], owner.lora_B["default"].weight[:, k]
                hidden = hidden + layer.scaling["default"] * gate * (x @ a)[..., None] * b
            return hidden

        return forward

    for chain in chains:
        layers = [find_layer(plain, name) for name in chain]
        for name, layer in zip(chain, layers, strict=True):
            leaves[name] = find_layer(model, name).lora_gates["default"].detach().clone().requires_grad_()
            layer.forward = equation(layer, layers, leaves[name])
    return leaves


@architectures
def test_forward_and_gradients_follow_the_formula(name):
    arch = ARCHITECTURES[name]
    model, plain = connected(arch)
    leaves = oracle(model, plain, arch.blocks)
    assert_equal(run(model, arch.inputs()), run(plain, arch.inputs()))
    actual, expected = gradients_of(model, arch.inputs()), gradients_of(plain, arch.inputs())
    of_gates = [actual.pop(name) for name in gates(model)]
    assert_equal(actual, expected)
    assert len(of_gates) == len(leaves) > 0
    by_name = {id(find_layer(model, name).lora_gates["default"]): leaf.grad for name, leaf in leaves.items()}
    assert_equal(of_gates, [by_name[id(value)] for value in gates(model).values()])


def test_gates_in_float32_multiply_half_precision():
    """GPT-2's layers are not `nn.Linear`, so their products are not added in place."""
    arch = ARCHITECTURES["gpt2"]
    model = connected(arch)[0].bfloat16().eval()
    expected = run(model, arch.inputs())
    for value in gates(model).values():
        value.data = value.data.float()
    assert torch.equal(run(model, arch.inputs()), expected)


def test_dropout_is_drawn_once_for_the_input_of_a_block(llama):
    model, plain = connected(llama, lora_dropout=0.4)
    fix_dropout(model), fix_dropout(plain)
    oracle(model, plain, llama.blocks)
    assert_equal(run(model, llama.inputs()), run(plain, llama.inputs()))


@pytest.mark.parametrize("name", ["llama", "unet"])
def test_gradient_checkpointing_changes_nothing(name):
    arch = ARCHITECTURES[name]
    model, _ = connected(arch)
    expected = gradients_of(model, arch.inputs())
    reslora.enable_gradient_checkpointing(model)
    assert_equal(gradients_of(model, arch.inputs()), expected)


def test_gates_start_at_the_mean_and_are_the_only_new_parameters(llama):
    model = llama.lora(r=RANK)
    before = dict(model.named_parameters())
    plan = reslora.connect(model, GATED)
    added = {name for name, _ in model.named_parameters()} - before.keys()
    assert added == gates(model).keys() and len(added) == sum(len(chain) for chain in plan)
    for chain in plan:
        for block in chain:
            own = base_model(model).get_submodule(block.name).lora_gates["default"]
            expected = [1.0] * (RANK - SHARED) + [1 / len(chain)] * (SHARED * len(chain))
            assert own.requires_grad and own.tolist() == expected
    model.set_adapter("default", inference_mode=True)  # PEFT freezes them as it does A and B
    assert not any(value.requires_grad for value in gates(model).values())
    reslora.disconnect(model)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all("lora_gates" not in layer.adapter_layer_names for layer in adapter_layers(model).values())
    reslora.connect(model, GATED)
    assert len(gates(model)) == len(added) and not any(value.requires_grad for value in gates(model).values())
    model.delete_adapter("default")
    assert not gates(model)


def test_ranks_of_layers_cut_the_chains_and_a_chain_of_one_block_stays_plain_lora(tmp_path):
    model = lora_stack(Stack(5), r=8, rank_pattern={"layers.[01].proj": 16, "layers.4.proj": 2})
    plain = copy.deepcopy(model)
    reslora.connect(model, GATED, example_inputs=STACK_INPUTS)
    assert [len(value) for value in gates(model).values()] == [16 + 2, 16 + 2, 8 + 1, 8 + 1]
    leaf = find_layer(model, "layers.4.proj")
    x = STACK_INPUTS["x"]
    assert_equal(leaf(x), find_layer(plain, "layers.4.proj")(x))
    expected = run(model, STACK_INPUTS)
    reslora.save(model, tmp_path)
    assert torch.equal(run(reslora.load(plain, tmp_path), STACK_INPUTS), expected)
    assert [block.rank for block in reslora.merge(model).blocks] == [18, 18, 9, 9, 2]


@pytest.mark.parametrize("rank, shared", [(1, 1), (4, 1), (15, 1), (16, 2), (64, 8)])
def test_an_eighth_of_the_ranks_is_shared(llama, rank, shared):
    model = llama.lora(r=rank)
    reslora.connect(model, GATED)
    merged = rank - shared + shared * len(llama.blocks[0])
    assert {len(value) for value in gates(model).values()} == {merged}
    assert {block.rank for block in reslora.merge(model).blocks} == {merged}


# -- merge -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, method",
    quick(
        [(name, method) for name in ("llama", "unet", "gpt2", "bert") for method in ("auto", "weights", "lstsq")],
        *[("llama", method) for method in ("auto", "weights", "lstsq")],
        ("unet", "auto"),
    ),
)
def test_the_merge_is_exact_whatever_the_method(name, method):
    arch = ARCHITECTURES[name]
    model, plain = connected(arch)
    oracle(model, plain, arch.blocks)
    report = reslora.merge(model, method, calibration=[arch.inputs(seed=4)])
    assert report.method == "exact" and {block.error for block in report.blocks} == {0.0} and not gates(model)
    assert_equal(run(model, arch.inputs(seed=9)), run(plain, arch.inputs(seed=9)))


def test_none_keeps_a_and_b_and_max_rank_truncates(llama):
    model, plain = connected(llama)
    cut, whole = copy.deepcopy(model), copy.deepcopy(model)
    reslora.merge(model, "none")
    assert torch.equal(run(model, llama.inputs()), run(plain, llama.inputs())) and not gates(model)
    reslora.merge(whole)
    report = reslora.merge(cut, max_rank=5, calibration=[llama.inputs(seed=4)])
    for block in report.blocks:
        assert block.rank == 5 and 0 < block.error < 1
        u, s, v = torch.linalg.svd(delta(find_layer(whole, block.name)))
        assert_equal(delta(find_layer(cut, block.name)), u[:, :5] * s[:5] @ v[:5])


def test_stock_peft_loads_the_merged_adapter(llama, tmp_path):
    model, _ = connected(llama)
    expected = run(model.eval(), llama.inputs())
    reslora.merge(model)
    export_peft(model, tmp_path)
    torch.manual_seed(0)  # the seed of the base model's weights
    assert_equal(run(PeftModel.from_pretrained(llama.build(), tmp_path), llama.inputs()), expected)


def test_a_merge_table_leaves_the_gates_as_they_were(llama):
    model, _ = connected(llama)
    before, expected = gates(model), run(model, llama.inputs())
    merge_table(model, lambda merged: {"loss": float(run(merged, llama.inputs()).abs().mean())})
    after = gates(model)
    assert after.keys() == before.keys() and all(after[name] is value for name, value in before.items())
    assert torch.equal(run(model, llama.inputs()), expected)


# -- save and load -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick(["llama", "unet"], "llama"))
def test_gates_are_saved_and_loaded(name, tmp_path):
    arch = ARCHITECTURES[name]
    model, _ = connected(arch)
    expected = run(model, arch.inputs())
    reslora.save(model, tmp_path)
    torch.manual_seed(0)  # the seed of the base model's weights
    bare = arch.build()
    for target in (bare, arch.lora(r=RANK), connected(arch)[0]):
        for value in gates(target).values():
            nn.init.zeros_(value)
        assert torch.equal(run(reslora.load(target, tmp_path), arch.inputs()), expected)


def test_files_with_other_gates_are_refused(llama, tmp_path):
    model, _ = connected(llama)
    reslora.save(model, tmp_path)
    (tmp_path / "checksums.json").unlink()
    path = tmp_path / "reslora_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("lora_gates"))
    for changed in ({}, {name: tensors[name][1:].clone()}):
        save_file({**{key: value for key, value in tensors.items() if key != name}, **changed}, path, {"format": "pt"})
        for target in (llama.lora(r=RANK), connected(llama)[0]):
            before = run(target, llama.inputs())
            with pytest.raises(ValueError) as error:
                reslora.load(target, tmp_path)
            assert_one_line(error, name)
            assert torch.equal(run(target, llama.inputs()), before)


def test_a_training_checkpoint_has_the_gates(llama, tmp_path):
    model, _ = connected(llama)
    assert gates(model).keys() <= trained_state(model).keys()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    before = {name: value.detach().clone() for name, value in gates(model).items()}
    loss_of(model, llama.inputs()).backward()
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in gates(model).items())
    save_adapter(model, tmp_path)
    other, _ = connected(llama)
    parameters = list(other.parameters())
    load_adapter(other, tmp_path)
    assert all(one is two for one, two in zip(other.parameters(), parameters, strict=True))  # an optimizer's, too
    assert torch.equal(run(other, llama.inputs()), run(model, llama.inputs()))


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_has_no_effect_is_refused(llama):
    with pytest.raises(ValueError, match=r"^shortcut_scale='mean' .*gated"):
        ResLoraConfig("gated", shortcut_scale="mean")
    model, _ = connected(llama)
    with pytest.raises(ValueError, match="no effect with shortcut='gated'"):
        reslora.set_shortcut_scale(model, 0.5)


def test_a_model_that_is_distributed_already_is_refused(llama, tmp_path):
    """DistributedDataParallel would not average gradients of gates that are added later."""
    reslora.save(connected(llama)[0], tmp_path)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = llama.lora(r=RANK)
        parallel = nn.parallel.DistributedDataParallel(model)
        for add in (lambda: reslora.connect(parallel, GATED), lambda: reslora.load(parallel, tmp_path)):
            with pytest.raises(ValueError) as error:
                add()
            assert_one_line(error, "shortcut='gated'", "DistributedDataParallel", "before")
            assert not gates(model)
        reslora.connect(model, GATED)
        assert reslora.load(nn.parallel.DistributedDataParallel(model), tmp_path) is not None
    finally:
        dist.destroy_process_group()


@pytest.mark.exhaustive
def test_it_compiles_without_a_graph_break(llama):
    model, _ = connected(llama)
    inputs = {**llama.inputs(), "use_cache": False}
    expected = gradients_of(model, inputs)
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    model.zero_grad(set_to_none=True)
    loss_of(compiled, inputs).backward()
    assert_equal(gradients(model), expected)


def test_gates_that_are_not_finite_are_named(llama):
    model, _ = connected(llama)
    with torch.no_grad():
        next(iter(gates(model).values()))[0] = float("nan")
    with pytest.raises(ValueError) as error:
        reslora.merge(model)
    assert_one_line(error, "NaN or infinity in its gates")
