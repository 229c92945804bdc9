"""Six steps of a small model with DeepSpeed, in bf16: `zero_steps.py STAGE FILE`.

They are trained at once, and again by a model that resumes after the third step. Their states are written to FILE; if
it exists, the model resumes from the states that another start has written.
"""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from reslora.training.zero import full_state, load_full_state

BATCH = 8


def main(stage: int, file: Path) -> None:
    deepspeed.init_distributed(dist_backend="gloo")
    states = torch.load(file, weights_only=True) if file.exists() else {}
    if not states:
        engine = started(stage)
        steps(engine, range(3))
        states["middle"] = state_of(engine)
        steps(engine, range(3, 6))
        states["end"] = state_of(engine)
    engine = started(stage)
    load_full_state(engine.optimizer, engine.module.named_parameters(), states["middle"])
    states["taken over"] = state_of(engine)
    steps(engine, range(3, 6))
    states["resumed end"] = state_of(engine)
    if dist.get_rank() == 0:
        torch.save(states, file)
    dist.barrier()
    dist.destroy_process_group()


def started(stage: int) -> deepspeed.DeepSpeedEngine:
    """Return the untrained model with two groups; the second has an odd number of weights, so shards are padded."""
    torch.manual_seed(0)
    down, up = nn.Linear(5, 3, bias=False), nn.Linear(3, 11, bias=False)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), down, nn.Tanh(), up)
    model[0].weight.requires_grad_(False)
    settings = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
    }
    groups = [{"params": [model[0].bias, down.weight]}, {"params": [up.weight], "lr": 5e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def steps(engine: deepspeed.DeepSpeedEngine, numbers: range) -> None:
    """Train; each process takes its part of a step's batch. The learning rate changes, and is part of the state."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        x, y = (torch.randn(BATCH, width, generator=generator).bfloat16() for width in (7, 11))
        part = slice(dist.get_rank(), None, dist.get_world_size())
        engine.backward((engine(x[part]) - y[part]).float().pow(2).mean())
        engine.step()
        for group in engine.optimizer.param_groups:
            group["lr"] /= 2


def state_of(engine: deepspeed.DeepSpeedEngine) -> dict:
    """Return the complete state, and the model's weights."""
    weights = {name: value.clone() for name, value in engine.module.state_dict().items()}
    return full_state(engine.optimizer, engine.module.named_parameters()) | {"weights": weights}


main(int(sys.argv[1]), Path(sys.argv[2]))
