"""What all tests share. Functions import the libraries: the process that starts those of `pytest -n` needs none."""

import gc
import os
import sys
from collections.abc import Callable, Iterator

import pytest
from suites import quick

pytest.register_assert_rewrite("core_models")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Tiny models gain nothing from a second thread, and threads that wait for each other cost a lot on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Give models with random weights the same weights in every run, those of fixtures too."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Forget what earlier tests compiled: functions are compiled anew only so often."""
    if (compiler := sys.modules.get("torch._dynamo.utils")) and compiler.counters:
        sys.modules["torch"]._dynamo.reset()
        compiler.counters.clear()


@pytest.fixture
def sharded() -> Iterator[Callable]:
    """A weight as FSDP2 keeps it; one process as a mesh is enough for that."""
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda weight: nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
    dist.destroy_process_group()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a browser, before tests are chosen by their marks."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)


def pytest_collection_finish() -> None:
    """Exclude objects that the imports created from garbage collection, which every run calls."""
    gc.collect()
    gc.freeze()


def architecture(name: str):
    from core_models import ARCHITECTURES

    return ARCHITECTURES[name]


@pytest.fixture(params=quick(["llama", "bert", "roberta", "gpt2", "unet"], "llama", "unet"))
def arch(request):
    return architecture(request.param)


@pytest.fixture
def llama():
    return architecture("llama")


@pytest.fixture
def unet():
    return architecture("unet")
