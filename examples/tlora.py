"""T-LoRA (Soboleva et al., 2025, arXiv 2507.05964) for U-Nets, brought by `--method`: fewer ranks at high noise.

At timestep t of T, only the first r(t) of r ranks are active: r(t) = floor((r - r_min) (1 - t / T)) + r_min. Here r_min
is half of r. The orthogonal initialization of the paper is left out.

A lower rank is not all that changes: PEFT's scale stays alpha / r, so that the update is also smaller by r(t) / r. Two
controls separate the rank from this scale:

- `faded`: all ranks, and the scale alpha / r times r(t) / r. If it does as well as `tlora`, its gain is not from ranks.
- `rescaled`: T-LoRA with the scale alpha / r(t), which is that of a LoRA of rank r(t).

    python train_sd.py --method lora examples.tlora:tlora examples.tlora:faded examples.tlora:rescaled \
        --learning_rate 1e-3 3e-3 --seed 0 1 2

No LoRA file depends on the timestep: exported files have all ranks at all timesteps, and reports compare T-LoRA itself.
"""

import math
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from reslora.methods.updates import layers, sides

TIMESTEPS = 1000


class Clock:
    """The noise level of the present forward pass: t / T of each sample."""

    def __init__(self) -> None:
        self.noise = torch.ones(1)  # before the first forward pass

    def read(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Read the timestep, the U-Net's second argument; a hook that runs before the forward pass."""
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.noise = torch.as_tensor(timestep).reshape(-1) / TIMESTEPS


class TimedLoRA(nn.Module):
    """LoRA of which a part is active, by the timestep; `masked`: by ranks, `power`: the scale's power of r(t) / r."""

    def __init__(self, layer: nn.Module, r: int, alpha: float, clock: Clock, masked: bool, power: int) -> None:
        super().__init__()
        outputs, inputs = sides(layer)
        self.down, self.up = nn.Parameter(torch.empty(r, inputs)), nn.Parameter(torch.zeros(outputs, r))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # PEFT's initialization
        self.clock, self.scale, self.masked, self.power = clock, alpha / r, masked, power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what is added to the layer's output; `x`: batch x tokens x inputs."""
        r = len(self.down)
        least = (r + 1) // 2
        active = ((r - least) * (1 - self.clock.noise.to(x))).floor() + least
        weights = (active / r).pow(self.power)[:, None]
        if self.masked:
            weights = weights * (torch.arange(r, device=x.device) < active[:, None])
        return (x @ self.down.T * weights[:, None]) @ self.up.T * self.scale

    def delta(self) -> torch.Tensor:
        """Return the change of the layer's weight with all ranks, which is that of timestep 0."""
        return self.scale * self.up @ self.down


def timed(model: nn.Module, settings, masked: bool, power: int) -> dict[str, nn.Module]:
    """Return an update for each layer; they read the timestep from the U-Net's forward pass."""
    if not isinstance(model, UNet2DConditionModel):
        raise TypeError(f"T-LoRA of this example is for U-Nets, and {type(model).__name__} is none")
    clock = Clock()
    model.register_forward_pre_hook(clock.read, with_kwargs=True)
    return {
        name: TimedLoRA(layer, settings.r, settings.alpha, clock, masked, power)
        for name, layer in layers(model, settings).items()
    }


tlora = partial(timed, masked=True, power=0)
faded = partial(timed, masked=False, power=1)
rescaled = partial(timed, masked=True, power=-1)
