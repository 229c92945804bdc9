"""No tensor outlives its forward pass."""

import contextlib
import gc
import weakref

import pytest
import torch
from core_models import ARCHITECTURES, adapter_layers, find_layer, gradients_of, loss_of, run
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from wired import Interrupted, connected, interrupt, one_each, with_checkpointing

import reslora
from reslora import ResLoraConfig

pytestmark = pytest.mark.exhaustive


class Storages(TorchDispatchMode):
    """Weak references to the storage of every tensor that an operator returns."""

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
        """Return how many storages are alive, except those of the model, its gradients and its inputs."""
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
    """Return weak references that live as long as the autograd node of a LoRA layer's output."""
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
    """As many tensors remain as with plain LoRA under the same checkpointing."""
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
