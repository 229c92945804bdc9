"""Connected models of every shortcut, and an oracle with the same weights for each."""

import pytest
import torch
from core_models import Oracle
from suites import quick

import reslora
from reslora import ResLoraConfig

WIRED = [
    ("input", 1, "repeat"),
    ("input", 1, "none"),
    ("input", 4, "repeat"),
    ("input", -1, "none"),
    ("block", 1, "repeat"),
    ("block", 2, "none"),
    ("block", 100, "repeat"),
    ("block", -1, "repeat"),
    ("middle", 1, "repeat"),
    ("middle", 2, "none"),
    ("middle", 100, "repeat"),
    ("middle", -1, "repeat"),
]
PLAIN = [
    ("none", 1, "repeat"),
    ("none", -1, "none"),
    ("input", 0, "repeat"),
    ("block", 0, "repeat"),
    ("middle", 0, "none"),
]
STATEFUL = [("input", 1, "repeat"), ("middle", 2, "repeat")]
SOME = [*STATEFUL, ("input", 1, "none"), ("middle", -1, "none"), ("block", 2, "repeat")]
ONE_EACH = [*STATEFUL, ("block", 2, "repeat")]
wired = pytest.mark.parametrize("shortcut, pre_num, head", WIRED)
stateful = pytest.mark.parametrize("shortcut, pre_num, head", STATEFUL)
some = pytest.mark.parametrize("shortcut, pre_num, head", SOME)
one_each = pytest.mark.parametrize("shortcut, pre_num, head", ONE_EACH)
language = pytest.mark.parametrize("name", ["llama", "unet"])
with_checkpointing = pytest.mark.parametrize(
    "name, checkpointing", quick([("llama", False), ("llama", True), ("unet", True)], ("llama", False), ("llama", True))
)


def connected(arch, shortcut, pre_num, head, window=0, **lora):
    model = arch.lora(**lora)
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head, window))
    return model


def pair(arch, shortcut, pre_num, head, window=0, **lora):
    """Return a connected model, and the oracle with the same weights."""
    model = arch.lora(**lora)
    oracle = Oracle(model, arch.blocks, shortcut, pre_num, head)
    reslora.connect(model, ResLoraConfig(shortcut, pre_num, head, window))
    return model, oracle.model


class Interrupted(Exception):
    pass


def interrupt(layer: torch.nn.Module):
    def hook(module, args):
        raise Interrupted

    return layer.register_forward_pre_hook(hook)
