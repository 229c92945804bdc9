"""Which private parts of libraries the product relies on, and why there is no public way.

If a library has removed a part, the test fails with a line that names the library and its version. It also fails for a
private name that is used and not listed in `PRIVATE`. `UNDOCUMENTED` lists names without an underscore that no
documentation promises, with the test that states what is relied on.
"""

import ast
import importlib.metadata
import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIPELINES = "diffusers.pipelines."

PRIVATE = {
    # Torch: what it documents for extensions, but keeps in private modules.
    "torch.utils._pytree.tree_map": "arguments and results of any model; no public function walks them",
    "torch.utils._pytree.tree_map_only": "the same",
    "torch.utils._pytree.tree_leaves": "the same",
    "torch.utils._python_dispatch.TorchDispatchMode": "--plan counts the bytes of each operation on the meta device",
    "torch._subclasses.fake_tensor.FakeTensorMode": "--plan counts a GPU's memory on a machine without one",
    "torch.UntypedStorage._cdata": "identifies a storage on the meta device, where all addresses are 0",
    "torch.Tensor._version": "whether a tensor was written to since a shared product was computed",
    "torch._C._functorch.peek_interpreter_stack": "no shared product under `vmap`; torch has no public query",
    "torch._C._autograd._top_saved_tensors_default_hooks": "whether activations are offloaded in this forward pass",
    "torch.ops.aten._unsafe_view": "a view that autograd does not track, as torch's own linear layer makes it",
    "torch.nn.Identity()._forward_hooks": "a layer with hooks is called, and not replaced by its product",
    "torch.nn.Identity()._backward_hooks": "the same",
    "torch.nn.Identity()._parameters": "a weight that is offloaded is no parameter, but still an attribute",
    "torch.nn.Identity()._buffers": "--plan replaces the tensors of a model in place",
    "torch.nn.modules.module._global_forward_hooks": "as `_forward_hooks`",
    "torch._inductor.list_options": "whether this compiler has the option that loses gradients (`training/trained.py`)",
    "torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model": (
        "frozen weights are not broadcast; torch's documentation names this function"
    ),
    "torch.utils.data.dataloader._MultiProcessingDataLoaderIter._shutdown_workers": (
        "workers that ignore signals end only when told to, and garbage collection may come late"
    ),
    # Diffusers: a pipeline's steps. `__call__` is their only public caller, and training needs them one by one.
    f"{PIPELINES}flux.pipeline_flux.FluxPipeline._pack_latents": "the layout of tokens",
    f"{PIPELINES}flux.pipeline_flux.FluxPipeline._unpack_latents": "the same",
    f"{PIPELINES}flux.pipeline_flux.FluxPipeline._prepare_latent_image_ids": "positions of tokens",
    f"{PIPELINES}flux.pipeline_flux.FluxPipeline._get_clip_prompt_embeds": "one encoder alone, of several",
    f"{PIPELINES}flux.pipeline_flux.FluxPipeline._get_t5_prompt_embeds": "the same",
    f"{PIPELINES}flux2.pipeline_flux2_klein.Flux2KleinPipeline._patchify_latents": "the layout of latents",
    f"{PIPELINES}flux2.pipeline_flux2_klein.Flux2KleinPipeline._prepare_latent_ids": "positions of tokens",
    f"{PIPELINES}flux2.pipeline_flux2_klein.Flux2KleinPipeline._prepare_text_ids": "the same",
    f"{PIPELINES}qwenimage.pipeline_qwenimage.QwenImagePipeline._get_qwen_prompt_embeds": "captions without an image",
    "diffusers.utils._add_variant": "names of a variant's files",
    # DeepSpeed (an extra, which this test does not need): see tests/images/training/test_zero.py.
    "deepspeed._lazy_init_hp_params_optimizer_state": "a resumed ZeRO state is written in place",
    "deepspeed._hp_optimizer_states_linked": "the same",
    # Transformers.
    "transformers.integrations.peft.PeftAdapterMixin._hf_peft_config_loaded": (
        "an adapter that PEFT itself has added to a text encoder counts as one, and can be saved and unloaded"
    ),
    # Gradio.
    "gradio.HTML()._id": "the number of a component on an open page, which Gradio changes (`app/handlers.py`)",
    # Python.
    "argparse.ArgumentParser()._option_string_actions": "the nearest option, for an option that does not exist",
    "argparse._ArgumentGroup": "the type that `add_argument_group` returns",
    "sys._getframe": "who calls a block outside of a forward pass",
    "os._exit": "documented; a second Ctrl-C",
}
UNDOCUMENTED = {
    "peft.tuners.lora.layer.LoraVariant": "a shortcut is a variant of a LoRA layer: tests/test_shortcuts.py",
    "peft.tuners.tuners_utils.BaseTuner": "unwrapping a model: tests/test_chains.py",
    "peft.tuners.tuners_utils.check_target_module_exists": "layers that match: tests/methods/test_targets.py",
    "peft.tuners.lycoris_utils.LycorisLayer": "LoHa and LoKr: tests/methods/test_adapters.py",
    "peft.utils.other.get_pattern_key": "patterns of ranks: tests/methods/test_patterns.py",
    "peft.utils.integrations.dequantize_module_weight": "a merge in float32: tests/images/model/test_quantising.py",
    "peft.utils.hotswap.hotswap_adapter_from_state_dict": "refused while connected: tests/test_guards.py",
    "peft.utils.hotswap._convert_scalings_to_tensor": "the same",
    "accelerate.commands.config.config_args.default_config_file": "the launcher's file: tests/app/test_launcher.py",
    "accelerate.utils.memory.should_reduce_batch_size": "memory that runs out: tests/images/data/test_encoding.py",
    "accelerate.utils.get_grad_scaler": "a scaler for each method of a run: tests/images/training/test_training.py",
    "accelerate.optimizer.AcceleratedOptimizer": "skipped steps: tests/images/training/test_state.py",
    "transformers.pytorch_utils.Conv1D": "GPT-2's layers: tests/core_models.py",
    "transformers.trainer_pt_utils.get_length_grouped_indices": "order of texts: tests/texts/test_study.py",
    "transformers.optimization.get_inverse_sqrt_schedule": "a schedule: tests/images/training/test_learning_rates.py",
    "diffusers.loaders.single_file_model.SINGLE_FILE_LOADABLE_CLASSES": "tests/images/model/test_single_files.py",
    "diffusers.loaders.single_file_utils.infer_diffusers_model_type": "the same",
    "diffusers.loaders.single_file_utils.load_single_file_checkpoint": "the same",
    "gradio.exceptions.InvalidPathError": "a file that was not uploaded: tests/app/test_access.py",
    "gradio.Blocks.preprocess_data": "the same",
    "gradio.Blocks.call_function": "errors of handlers as sentences: tests/app/test_handlers.py",
    "gradio.Blocks.postprocess_data": "the memory of an open page: tests/app/test_server.py",
    f"{PIPELINES}flux.pipeline_flux.calculate_shift": "timesteps: tests/images/model/test_flow_objective.py",
    f"{PIPELINES}flux2.pipeline_flux2.format_input": "Flux 2's chat: tests/images/model/families/test_losses.py",
    f"{PIPELINES}qwenimage.pipeline_qwenimage_edit.calculate_dimensions": "tests/images/test_qwen_image_edit.py",
}
OURS = {
    "_replace",
    "_reslora",
    "_control",
    "_rank_allocator",
}  # of named tuples, and our own


def resolved(name: str) -> object:
    """Return what a dotted name stands for; `()` in it calls a class."""
    owner, _, attribute = name.partition("().")
    found = pkgutil.resolve_name(owner)
    return getattr(found(), attribute) if attribute else found


@pytest.mark.parametrize("name", [name for name in [*PRIVATE, *UNDOCUMENTED] if not name.startswith("deepspeed")])
def test_the_library_still_has_it(name):
    library = name.partition(".")[0]
    try:
        resolved(name)
    except (ImportError, AttributeError) as error:
        known = library in importlib.metadata.packages_distributions()
        version = importlib.metadata.version(library) if known else "of this Python"
        pytest.fail(f"{library} {version} has no {name} any more ({error}): {(PRIVATE | UNDOCUMENTED)[name]}")


def private_uses() -> dict[str, set[str]]:
    """Return file -> private names of libraries that it uses: those that no file of the product defines."""
    trees = {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in (*ROOT.glob("*.py"), *(ROOT / "reslora").rglob("*.py"), *(ROOT / "app").rglob("*.py"))
    }
    own, used = set(OURS), {path: set() for path in trees}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                    own.add(name)
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    own.add(name)
                case ast.Attribute(attr=name):
                    used[path].add(name)
                case ast.ImportFrom(level=0, module=module, names=names):
                    used[path] |= {each.name for each in names}
                    used[path] |= set(module.split("."))
    return {path: {name for name in names - own if re.match("_[a-zA-Z]", name)} for path, names in used.items()}


def test_every_private_name_is_listed():
    words = {word for name in (*PRIVATE, *UNDOCUMENTED) for word in name.split(".")}
    missing = {path: names - words for path, names in private_uses().items() if names - words}
    assert not missing, "use a public name, or add the private one to PRIVATE with a reason"
