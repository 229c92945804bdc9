"""Which training examples each batch has, in the same way as transformers' `Trainer` batches examples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..options.texts import TrainingOptions


@dataclass(frozen=True)
class BatchPlan(Dataset):
    """The batches of a process: a pure function of the seed and the number of the step.

    Every epoch uses each example once, in a random order. With several processes, the last batches are filled up with
    the first examples of the epoch. The last step of an epoch may have fewer batches than the earlier steps.
    """

    rows: Sequence[dict[str, Any]]
    collate: Callable[[list], dict[str, torch.Tensor]]
    training: TrainingOptions
    processes: int
    process: int
    orders: dict[int, list[int]] = field(default_factory=dict)
    """Numbers of the examples in order, by epoch; only the epoch of the latest batch is stored."""

    @property
    def passes(self) -> int:
        """Number of batches in an epoch for each process."""
        return math.ceil(math.ceil(len(self.rows) / self.training.train_batch_size) / self.processes)

    @property
    def updates(self) -> int:
        """Number of steps in an epoch."""
        return math.ceil(self.passes / self.training.gradient_accumulation_steps)

    def of_step(self, step: int) -> list[tuple[int, int]]:
        """Return the batches of a step, which counts from 1, as pairs of epoch and number in the epoch."""
        epoch, number = divmod(step - 1, self.updates)
        first = number * self.training.gradient_accumulation_steps
        return [(epoch, i) for i in range(first, min(first + self.training.gradient_accumulation_steps, self.passes))]

    def order(self, epoch: int) -> list[int]:
        """Return the numbers of an epoch's examples in order; the order is the same in every process."""
        random = torch.Generator().manual_seed(self.training.seed + epoch)
        if not self.training.group_by_length:
            return torch.randperm(len(self.rows), generator=random).tolist()
        size = self.training.train_batch_size * self.training.gradient_accumulation_steps * self.processes
        lengths = [len(row["input_ids"]) for row in self.rows]
        return get_length_grouped_indices(lengths, size, generator=random)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return the batch for a pair that `of_step` returned: epoch, and number in the epoch."""
        epoch, number = place
        if epoch not in self.orders:
            self.orders.clear()
            self.orders[epoch] = self.order(epoch)
        order, size = self.orders[epoch], self.training.train_batch_size
        if self.processes > 1:
            whole = size * self.processes * self.passes
            order = (order * math.ceil(whole / len(order)))[:whole]
        first = (number * self.processes + self.process) * size
        return self.collate([self.rows[i] for i in order[first : first + size]])

    def loader(self, steps: range, pin: bool) -> DataLoader:
        """Return the batches of steps, which count from 0."""
        places = [place for step in steps for place in self.of_step(step + 1)]
        return DataLoader(
            self, batch_size=None, sampler=places, num_workers=self.training.dataloader_num_workers, pin_memory=pin,
            generator=torch.Generator(),
        )  # fmt: skip
