"""connect and disconnect: the round trip, wrappers, two processes, and every invalid input."""

import ast
import copy
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from core_models import (
    ARCHITECTURES,
    RANK,
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
    randomize,
    run,
    stack_chain,
    tiny_llama,
)
from launching import fork_server, free_port
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from waiting import LIMIT

import reslora
from reslora import ResLoraConfig

SHORTCUTS = ["input", "block", "middle"]
shortcuts = pytest.mark.parametrize("shortcut", ["block", "middle"])


def hook_counts(model: nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


# --- the round trip ---------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("shortcut", [*SHORTCUTS, "none"])
def test_disconnect_gives_back_plain_lora_bit_for_bit(arch, shortcut):
    model = arch.lora(lora_dropout=0.3)
    plain = copy.deepcopy(model)
    reslora.connect(model, ResLoraConfig(shortcut, 2, window=2))
    gradients_of(model, arch.inputs(seed=4))
    reslora.disconnect(model)
    results = []
    for candidate in (model, plain):
        torch.manual_seed(0)
        results.append({"output": run(candidate, arch.inputs()).detach(), **gradients_of(candidate, arch.inputs())})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.exhaustive
@pytest.mark.parametrize("finish", [reslora.disconnect, lambda model: reslora.merge(model, method="none")])
@pytest.mark.parametrize("shortcut", [*SHORTCUTS, "none"])
def test_nothing_is_left_on_the_layers(llama, shortcut, finish):
    model = llama.lora()
    hooks = hook_counts(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    flags = [layer.cast_input_dtype_enabled for layer in adapter_layers(model).values()]
    reslora.connect(model, ResLoraConfig(shortcut, 2))
    gradients_of(model, llama.inputs())
    finish(model)
    assert hook_counts(model) == hooks
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert [layer.cast_input_dtype_enabled for layer in adapter_layers(model).values()] == flags
    assert all(not layer.lora_variant for layer in adapter_layers(model).values())


@shortcuts
def test_the_input_cast_flag_is_restored_as_it_was(llama, shortcut):
    model = llama.lora()
    for layer in adapter_layers(model).values():
        layer.cast_input_dtype_enabled = True
    reslora.connect(model, ResLoraConfig(shortcut, 2))
    with torch.autocast("cpu", torch.bfloat16):
        run(model, llama.inputs())
    reslora.disconnect(model)
    assert {layer.cast_input_dtype_enabled for layer in adapter_layers(model).values()} == {True}


@shortcuts
def test_a_disconnected_model_connects_again(llama, shortcut):
    model = llama.lora()
    oracle = Oracle(model, llama.blocks, shortcut, 2).model
    reslora.connect(model, ResLoraConfig("middle", 1))
    reslora.disconnect(model)
    reslora.connect(model, ResLoraConfig(shortcut, 2))
    assert_equal(gradients_of(model, llama.inputs()), gradients_of(oracle, llama.inputs()))


@shortcuts
def test_connect_leaves_random_state_mode_and_gradients_alone(llama, shortcut):
    model = llama.lora(lora_dropout=0.3).eval()
    before = torch.get_rng_state()
    reslora.connect(model, ResLoraConfig(shortcut, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.exhaustive
@shortcuts
def test_a_checkpoint_of_the_lora_model_fits_the_connected_one_and_back(llama, shortcut):
    model, plain = llama.lora(seed=1), llama.lora(seed=2)
    reslora.connect(model, ResLoraConfig(shortcut, 2))
    model.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(model.state_dict(), strict=True)
    oracle = Oracle(plain, llama.blocks, shortcut, 2).model
    assert_equal(run(model, llama.inputs()), run(oracle, llama.inputs()))


@shortcuts
def test_modules_to_save_train_along(shortcut):
    arch = ARCHITECTURES["bert"]
    model = arch.lora()
    oracle = Oracle(model, arch.blocks, shortcut, 2).model
    reslora.connect(model, ResLoraConfig(shortcut, 2))
    ours = gradients_of(model, arch.inputs())
    assert any("classifier.modules_to_save" in name for name in ours)
    assert_equal(ours, gradients_of(oracle, arch.inputs()))


@shortcuts
def test_the_base_model_can_be_connected_without_its_peft_wrapper(llama, shortcut):
    model = llama.lora()
    oracle = Oracle(model, llama.blocks, shortcut, 2).model
    reslora.connect(model.get_base_model(), ResLoraConfig(shortcut, 2))
    assert_equal(run(model, llama.inputs()), run(oracle, llama.inputs()))
    assert_equal(run(model.get_base_model(), llama.inputs()), run(oracle, llama.inputs()))


@shortcuts
def test_custom_modules_connect_with_example_inputs(shortcut):
    model = lora_stack()
    oracle = Oracle(model, [stack_chain()], shortcut, 2).model
    reslora.connect(model, ResLoraConfig(shortcut, 2), example_inputs=STACK_INPUTS)
    assert_equal(gradients_of(model, STACK_INPUTS), gradients_of(oracle, STACK_INPUTS))


# --- wrappers ---------------------------------------------------------------------------------------------------------


@shortcuts
def test_the_verbs_see_through_a_compiled_model(llama, shortcut):
    model = llama.lora()
    oracle = Oracle(model, llama.blocks, shortcut, 2).model
    compiled = torch.compile(model, backend="eager")
    reslora.connect(compiled, ResLoraConfig(shortcut, 2))
    assert_equal(run(model, llama.inputs()), run(oracle, llama.inputs()))
    reslora.disconnect(compiled)
    reslora.connect(compiled, ResLoraConfig(shortcut, 2))
    reslora.merge(compiled, method="weights")
    assert all(not layer.lora_variant for layer in adapter_layers(model).values())


@shortcuts
def test_data_parallel_is_refused(llama, shortcut):
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.connect(nn.DataParallel(llama.lora()), ResLoraConfig(shortcut))
    assert_one_line(error, "DataParallel")


def test_what_is_no_model_is_refused():
    model = None
    with pytest.raises(ValueError) as error:
        reslora.connect(model, ResLoraConfig())
    assert_one_line(error, f"model is a {type(model).__name__}", "unet")


def _two_process_worker(rank: int, port: str, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name, shortcut, checkpointing, connect_inside in TWO_PROCESS_CASES:
        arch = ARCHITECTURES[name]
        model = arch.lora()
        if connect_inside:
            reslora.connect(model, ResLoraConfig(shortcut, 2))
        parallel = nn.parallel.DistributedDataParallel(model)
        if not connect_inside:
            reslora.connect(parallel, ResLoraConfig(shortcut, 2))
        if checkpointing:
            reslora.enable_gradient_checkpointing(parallel)
        half = {key: value[2 * rank : 2 * rank + 2] for key, value in arch.inputs(batch=4).items()}
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            run(parallel, half).square().mean().backward()
        torch.save(gradients(model), Path(directory) / f"{name}-{shortcut}-{checkpointing}-{rank}.pt")
        reslora.merge(parallel, method="weights")
        assert all(not layer.lora_variant for layer in adapter_layers(model).values())
    dist.destroy_process_group()


TWO_PROCESS_CASES = [
    *[("llama", shortcut, checkpointing, checkpointing) for shortcut in SHORTCUTS for checkpointing in (False, True)],
    ("unet", "input", False, False),
    ("unet", "middle", True, True),
]


@pytest.mark.exhaustive
def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(tmp_path):
    fork_server()
    mp.start_processes(_two_process_worker, (free_port(), str(tmp_path)), nprocs=2, start_method="forkserver")
    for name, shortcut, checkpointing, _ in TWO_PROCESS_CASES:
        arch = ARCHITECTURES[name]
        model = Oracle(arch.lora(), arch.blocks, shortcut, 2).model
        run(model, arch.inputs(batch=4)).square().mean().backward()
        for rank in (0, 1):
            assert_equal(torch.load(tmp_path / f"{name}-{shortcut}-{checkpointing}-{rank}.pt"), gradients(model))


# --- bad input --------------------------------------------------------------------------------------------------------


def assert_plain(model: nn.Module, arch) -> None:
    """Assert that a refused connect leaves plain LoRA."""
    assert all(not layer.lora_variant for layer in adapter_layers(model).values())
    assert torch.equal(run(model, arch.inputs()), run(arch.lora(), arch.inputs()))


@pytest.mark.parametrize("shortcut", [*SHORTCUTS, "none"])
def test_a_model_without_lora_layers_is_an_error(shortcut):
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.connect(tiny_llama(), ResLoraConfig(shortcut))
    assert_one_line(error, "LoRA")


@pytest.mark.exhaustive
def test_an_adapter_that_is_not_there_is_named(llama):
    model, config = llama.lora(), ResLoraConfig("block")
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.connect(model, config, adapter_name="missing")
    assert_one_line(error, "missing")
    reslora.connect(model, config)
    for verb in (reslora.disconnect, reslora.merge):
        with pytest.raises((ValueError, RuntimeError)) as error:
            verb(model, adapter_name="missing")
        assert_one_line(error, "missing")


@pytest.mark.exhaustive
@pytest.mark.parametrize("first", [*SHORTCUTS])
@pytest.mark.parametrize("second", SHORTCUTS)
def test_connecting_twice_is_an_error(llama, first, second):
    model = llama.lora()
    oracle = Oracle(model, llama.blocks, first, 2).model
    reslora.connect(model, ResLoraConfig(first, 2))
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.connect(model, ResLoraConfig(second, 1))
    assert_one_line(error, "disconnect")
    assert_equal(run(model, llama.inputs()), run(oracle, llama.inputs()))


@shortcuts
def test_a_second_adapter_cannot_be_connected(llama, shortcut):
    model = llama.lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    reslora.connect(model, ResLoraConfig(shortcut))
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.connect(model, ResLoraConfig(shortcut), adapter_name="other")
    assert_one_line(error)


@shortcuts
def test_disconnecting_what_is_not_connected_is_an_error(llama, shortcut):
    model = llama.lora()
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.disconnect(model)
    assert_one_line(error)


@shortcuts
def test_a_shortcut_that_finds_no_link_names_layers_and_shapes(llama, shortcut):
    model = llama.lora(target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.connect(model, ResLoraConfig(shortcut))
    assert_one_line(error, "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "32", "16")
    assert all(not layer.lora_variant for layer in adapter_layers(model).values())


def test_a_config_that_is_not_one_is_an_error(llama):
    model = llama.lora()
    with pytest.raises((ValueError, RuntimeError, TypeError)) as error:
        reslora.connect(model, "input")
    assert "ResLoraConfig" in str(error.value)


@shortcuts
def test_a_layer_with_a_variant_is_named(llama, shortcut):
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_llama().float(), LoraConfig(r=3, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    )
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.connect(model, ResLoraConfig(shortcut))
    assert_one_line(error, "q_proj", "ora")


def test_other_adapters_are_named():
    config = LoHaConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError) as error:
        reslora.connect(get_peft_model(tiny_llama(), config), ResLoraConfig())
    assert_one_line(error, f"has no LoRA layers, only {config.peft_type.value}: first call get_peft_model")


@shortcuts
def test_lora_bias_is_refused(shortcut):
    arch = ARCHITECTURES["bert"]
    model = arch.lora(lora_bias=True)
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.connect(model, ResLoraConfig(shortcut))
    assert_one_line(error, "query", "lora_bias")


@shortcuts
def test_a_block_that_runs_twice_is_named(shortcut):
    class Twice(Stack):
        def forward(self, x):
            return super().forward(x) + self.layers[2](x)

    model = lora_stack(Twice())
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.connect(model, ResLoraConfig(shortcut), example_inputs=STACK_INPUTS)
    assert_one_line(error, "layers.2.proj")
    assert all(not layer.lora_variant for layer in adapter_layers(model).values())


@shortcuts
def test_tied_layers_are_refused(shortcut):
    model = Stack()
    model.layers[3].proj.weight = model.layers[1].proj.weight
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.connect(lora_stack(model), ResLoraConfig(shortcut), example_inputs=STACK_INPUTS)
    assert_one_line(error, "layers.3.proj")


@shortcuts
def test_a_layer_shared_by_two_blocks_is_refused(shortcut):
    model = Stack()
    model.layers[3] = model.layers[1]
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.connect(lora_stack(model), ResLoraConfig(shortcut), example_inputs=STACK_INPUTS)
    assert_one_line(error, "layers.1.proj")


class DeafLinear(nn.Module, peft.tuners.lora.LoraLayer):
    """A LoRA layer class whose forward pass ignores variants, as PEFT's AWQ and EETQ layers do."""

    def __init__(self, base_layer, adapter_name, config, r=0, lora_alpha=1, **kwargs):
        super().__init__()
        peft.tuners.lora.LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(self, x):
        low = self.lora_A["default"](x)
        return self.base_layer(x) + self.lora_B["default"](low) * self.scaling["default"]


class Deaf(nn.Linear):
    pass


@shortcuts
def test_a_layer_class_that_ignores_variants_is_refused(shortcut):
    model = Stack()
    for layer in list(model.layers)[2:]:
        layer.proj = Deaf(6, 6)
    config = LoraConfig(r=3, target_modules=["proj"])
    config._register_custom_module({Deaf: DeafLinear})
    model = randomize(get_peft_model(model.double(), config))
    assert type(find_layer(model, "layers.2.proj")) is DeafLinear
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.connect(model, ResLoraConfig(shortcut), example_inputs=STACK_INPUTS)
    assert_one_line(error, "layers.2.proj", "DeafLinear")


class Holder(nn.Module):
    """A user's module around a model that has the adapter."""

    def __init__(self, llm: nn.Module) -> None:
        super().__init__()
        self.llm = llm

    def forward(self, **inputs):
        return self.llm(**inputs)


def test_a_module_that_holds_the_model_with_the_adapter_is_refused(llama, tmp_path):
    """The inner model's `save_pretrained` would not be guarded, and the outer model has no configuration to save."""
    inner = llama.lora()
    reslora.connect(inner, ResLoraConfig("block", 2))
    reslora.save(inner, tmp_path)
    reslora.disconnect(inner)
    holder, config = Holder(inner), ResLoraConfig("block", 2)
    for verb in (
        lambda: reslora.connect(holder, config, example_inputs=llama.inputs()),
        lambda: reslora.load(holder, tmp_path),
    ):
        with pytest.raises(ValueError) as error:
            verb()
        assert_one_line(error, "the adapter is on the submodule `llm` of Holder: give that submodule")
        assert_plain(inner, llama)
    reslora.connect(holder.llm, config)


@shortcuts
def test_connecting_while_pefts_own_merge_is_active_is_an_error(llama, shortcut):
    model = llama.lora()
    model.merge_adapter()
    with pytest.raises((ValueError, RuntimeError)) as error:
        reslora.connect(model, ResLoraConfig(shortcut))
    assert_one_line(error, "unmerge")
    model.unmerge_adapter()
    reslora.connect(model, ResLoraConfig(shortcut))


@pytest.mark.exhaustive
@shortcuts
def test_offloaded_layers_are_right_or_an_error(llama, shortcut):
    model = llama.lora().float()
    expected = run(Oracle(model, llama.blocks, shortcut, 2).model, llama.inputs())
    try:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        reslora.connect(model, ResLoraConfig(shortcut, 2))
        actual = run(model, llama.inputs())
    except (ValueError, RuntimeError) as error:
        assert "offload" in str(error) and "\n" not in str(error)
    else:
        assert_equal(actual, expected, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_needs_a_connected_model():
    """For a model without LoRA it is an error or stock checkpointing, never a broken model."""
    model = tiny_llama().train()
    name = "llama" if tiny_llama is tiny_llama else "unet"
    expected = run(model, ARCHITECTURES[name].inputs())
    try:
        reslora.enable_gradient_checkpointing(model)
    except (ValueError, RuntimeError) as error:
        assert "\n" not in str(error)
    assert_equal(run(model, ARCHITECTURES[name].inputs()), expected)


class Checkpointing(Stack):
    """A model that calls torch's checkpointing itself: for its blocks, or for the layers after each."""

    def __init__(self, whole_blocks: bool) -> None:
        super().__init__()
        self.whole_blocks = whole_blocks

    def forward(self, x):
        for layer in self.layers:
            if self.whole_blocks:
                x = x + checkpoint(layer, x, use_reentrant=False)
            else:
                x = checkpoint(torch.add, x, layer(x), use_reentrant=False)
        return x


@pytest.mark.parametrize(("shortcut", "whole_blocks"), [("block", True), ("input", False), ("middle", False)])
def test_a_model_that_checkpoints_by_itself_works_as_the_error_says(shortcut, whole_blocks):
    model = lora_stack(Checkpointing(whole_blocks))
    reslora.connect(model, ResLoraConfig(shortcut, 2), example_inputs=STACK_INPUTS)
    with pytest.raises(ValueError) as error:
        reslora.enable_gradient_checkpointing(model)
    assert_one_line(error, "shortcut='block', or checkpoint only modules without connected layers")
    plain = lora_stack(Stack())
    plain.load_state_dict(model.state_dict())
    reslora.connect(plain, ResLoraConfig(shortcut, 2), example_inputs=STACK_INPUTS)
    assert_equal(gradients_of(model, STACK_INPUTS), gradients_of(plain, STACK_INPUTS))


# --- imports ----------------------------------------------------------------------------------------------------------

PACKAGE = Path(reslora.__file__).parent
CORE = (
    "config",
    "linking",
    "tracing",
    "merging",
    "regression",
    "calibration",
    "ranks",
    "guards",
    "wiring",
    "model",
    "checkpoint",
    "export",
    "io",
)
BELOW_CORE = {PACKAGE / f"{name}.py" for name in ("attributes", "errors", "checks", "formatting")}
CORE_FILES = [*(PACKAGE / f"{name}.py" for name in CORE), *sorted((PACKAGE / "shortcuts").glob("*.py"))]


@pytest.mark.exhaustive
def test_the_core_has_the_modules_that_readme_names_and_imports_no_more_than_peft_does():
    code = "import sys, peft; before = set(sys.modules); import reslora"
    code += "; print({'calibration', 'export'} <= set(dir(reslora)), reslora.export.export_peft.__name__)"
    code += "; print(reslora.calibration.BUDGET == 1 << 30)"
    code += "; from reslora import *; print(*(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=LIMIT)
    *found, imported = (line.split() for line in result.stdout.splitlines())
    assert found == [["True", "export_peft"], ["True"]]
    assert "reslora.shortcuts.state" in imported
    packages = {name.split(".")[0] for name in imported}
    assert not packages & {"diffusers", "gradio", "datasets", "accelerate", "torchvision", "matplotlib", "PIL"}


def test_the_configuration_is_read_without_torch():
    code = "import sys, reslora; reslora.ResLoraConfig('block', 4); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=LIMIT)
    assert not {"torch", "peft", "transformers"} & set(result.stdout.split())


def top_level_imports(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_its_declared_dependencies(path):
    allowed = {"torch", "peft", "transformers", "safetensors", "reslora"} | set(sys.stdlib_module_names)
    assert top_level_imports(path) <= allowed


def package_imports(path: Path) -> set[Path]:
    """Return the files of the package that a file imports anywhere at run time, without imports for type checkers."""
    tree, imported = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1]
            module = folder.joinpath(*node.module.split(".")) if node.module else folder
            names = [module] if node.module else [module / alias.name for alias in node.names]
            imported |= {file for name in names for file in (name.with_suffix(".py"), name / "__init__.py")}
    return {file for file in imported if file.exists()}


def test_imports_inside_the_package_go_one_way():
    """There is no cycle, and the core does not import what is built on it."""
    graph = {path: package_imports(path) for path in PACKAGE.rglob("*.py")}
    graphlib.TopologicalSorter(graph).prepare()  # raises on a cycle
    for path in CORE_FILES:
        assert graph[path] <= {*CORE_FILES, *BELOW_CORE}, path


def test_the_public_names_are_the_documented_ones():
    documented = {
        "ResLoraConfig",
        "Chains",
        "MergeReport",
        "chains",
        "connect",
        "disconnect",
        "enable_gradient_checkpointing",
        "load",
        "merge",
        "save",
    }
    assert documented <= set(dir(reslora))
    assert callable(reslora.chains)


# --- an adapter that goes away, and layers that merge themselves ------------------------------------------------------


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_a_plain_lora_in_place_of_the_connected_one_is_not_connected(shortcut):
    model = lora_stack()
    reslora.connect(model, ResLoraConfig(shortcut), example_inputs=STACK_INPUTS)
    fresh = lora_stack(model.unload())
    with pytest.raises(ValueError) as error:
        reslora.merge(fresh, "weights")
    assert_one_line(error, "not connected")
    reslora.connect(fresh, ResLoraConfig(shortcut), example_inputs=STACK_INPUTS)


def test_pefts_merge_is_refused_before_any_layer_is_merged():
    model = lora_stack(target_modules=["layers.2.proj", "layers.3.proj"])
    model.add_adapter("other", LoraConfig(r=RANK, target_modules=["proj"]))
    reslora.connect(model, ResLoraConfig("input"), example_inputs=STACK_INPUTS)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(RuntimeError) as error:
        model.merge_adapter()
    assert_one_line(error, "call reslora.merge first")
    assert not any(getattr(module, "merged", False) for module in model.modules())


@shortcuts
def test_a_model_that_draws_numbers_keeps_the_random_state(shortcut):
    class Drawing(type(lora_stack().get_base_model())):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.rand([])
            return super().forward(x)

    model = lora_stack(Drawing())
    before = torch.get_rng_state()
    reslora.connect(model, ResLoraConfig(shortcut), example_inputs=STACK_INPUTS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_block_refuses_an_initialisation_that_changes_the_frozen_weights(init):
    model = get_peft_model(Stack(), LoraConfig(r=RANK, target_modules=["proj"], init_lora_weights=init))
    inputs = {"x": STACK_INPUTS["x"].float()}
    with pytest.raises(ValueError) as error:
        reslora.connect(model, ResLoraConfig("block"), example_inputs=inputs)
    assert_one_line(error, init, "middle")
    reslora.connect(model, ResLoraConfig("middle"), example_inputs=inputs)
