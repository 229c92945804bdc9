"""Run the unmerged model on calibration batches and collect the statistics of every connected block."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from .errors import first_line
from .merging import Factors, Merged, Moments
from .regression import Inputs
from .shortcuts.base import Shortcut
from .shortcuts.state import Wires
from .shortcuts.tensors import rows, version_of
from .tracing import evaluating, to_device

BUDGET = 2**30
"""Maximum memory, in bytes, for the layer inputs that the least-squares merge stores; a single layer may exceed it.

If all layers together need more, the batches run through the model several times, each time for as many layers as fit.
The widest feed-forward layers of Flux, with 12,288 input features, need 0.6 GB each. Small tensors, such as those of
the adapter's size, are not counted.
"""


class Calibrator:
    """Record the `Moments` of every block while the unmerged model runs on the calibration batches."""

    def __init__(self, plan: list[list[Factors]], merged: list[list[Merged]] | None, needs_moments: bool) -> None:
        """Prepare the calibration of the blocks of all chains in `plan`.

        `merged` holds the results of a merge that needs no calibration; the calibration then measures the error of that
        merge. With `needs_moments`, the second moments x x^T of every block's input are collected too.
        """
        self.blocks = {block.name: block for chain in plan for block in chain}
        results = [None] * len(self.blocks) if merged is None else [result for chain in merged for result in chain]
        self.merged = dict(zip(self.blocks, results, strict=True))
        self.needs_moments = needs_moments
        self.waiting = dict.fromkeys(self.blocks)
        """Names of the blocks whose moments have not been recorded yet."""
        self.leaders: dict[str, str] = {}
        """Block name -> the first block that reads the same input tensor."""
        self.inputs: dict[str, Inputs] = {}
        """Inputs collected in this pass, by the name of the first block that reads them."""
        self.postponed: set[str] = set()
        """Names of first blocks (see `leaders`) whose inputs did not fit into `BUDGET` in this pass."""
        # Weak references, so that the calibration does not keep every layer's input in memory.
        self.seen: list[tuple[weakref.ref, int | None, str]] = []
        self.entered: torch.Tensor | None = None

    def read(self, base: nn.Module, wires: Wires, calibration: Iterable[Mapping]) -> list[str]:
        """Run every batch through the model, once, or several times if the inputs of all blocks exceed `BUDGET`.

        Returns notes for the merge report. Raises `ValueError` if the batches are empty, do not fit the model or give
        non-finite values.
        """
        if isinstance(calibration, (int, float)):
            raise ValueError(f"calibration={calibration} is a number; give the batches, dicts of the model's arguments")
        device = next(base.parameters()).device
        batches: Iterable[Mapping] = calibration
        kept: list[Mapping] = []
        passes = 0
        with evaluating(base), self._watching(base, wires):
            while self.waiting:
                passes += 1
                count = 0
                for batch in batches:
                    self.seen.clear()
                    _forward(base, batch, device, count)
                    count += 1
                    if self.needs_moments and batches is not kept:
                        kept.append(dict(batch))
                if count == 0:
                    raise ValueError("calibration is empty; give at least one dict of the base model's arguments")
                self._finish_pass()
                batches = kept
        several = f"calibration took {passes} passes through the model, with {BUDGET / 2**30:.3g} GiB for each"
        return [several] if passes > 1 else []

    @contextmanager
    def _watching(self, base: nn.Module, wires: Wires) -> Iterator[None]:
        """Record the inputs of all connected blocks inside this context, in their dtypes before PEFT's cast."""

        def record_input(module: nn.Module, args: tuple) -> None:
            """Record the block's input, in its dtype before PEFT casts it."""
            self.entered = args[0] if args else None

        layers = [base.get_submodule(name) for name in self.blocks]
        handles = [layer.register_forward_pre_hook(record_input) for layer in layers]
        wires.observer = self
        try:
            yield
        finally:
            wires.observer = self.entered = None
            self.seen.clear()
            for handle in handles:
                handle.remove()

    def __call__(self, variant: Shortcut, x: torch.Tensor, own: torch.Tensor, handed: torch.Tensor | None) -> None:
        """Record one forward pass of a block; see `Wires.observer`."""
        name, entered, self.entered = variant.name, self.entered, None
        if name not in self.waiting:
            return
        with torch.autocast(x.device.type, enabled=False):
            block = self.blocks[name]
            block.moments = block.moments or Moments.of(block, self.merged[name], self.needs_moments)
            tokens = rows(x)
            tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
            if self.needs_moments and block.moments.stand_in is not None:
                block.moments.inputs = self._inputs(name, x if entered is None else entered, tokens)
                if block.moments.inputs is None:
                    return
            variant.measure(block, self.merged[name], tokens, own, handed)

    def _inputs(self, name: str, entered: torch.Tensor, tokens: torch.Tensor) -> Inputs | None:
        """Return the collected inputs of the block `name`, which reads the tensor `entered`.

        The first block that reads the tensor adds its rows `tokens` (T x p); other blocks use the same collection.
        Returns None if the inputs exceed `BUDGET`.
        """
        version = version_of(entered)
        same = (other for seen, at, other in self.seen if seen() is entered and at == version and version is not None)
        leader = next(same, name)
        if leader == name:
            self.seen.append((weakref.ref(entered), version, name))
        if self.leaders.setdefault(name, leader) != leader:
            raise ValueError(
                f"{name} shares its input with other layers than in the first calibration batch; give batches that "
                "run the model in the same way"
            )
        if name == leader and name not in self.postponed:
            inputs = self.inputs.pop(name, None) or Inputs(tokens)
            sizes = [*(other.nbytes() for other in self.inputs.values()), inputs.nbytes(len(tokens))]
            held, solving = zip(*sizes, strict=True)
            if len(sizes) == 1 or sum(held) + max(solving) <= BUDGET:  # one input is always held
                inputs.add(tokens)
                self.inputs[name] = inputs
            else:
                self.postponed.add(name)
        return self.inputs.get(leader)

    def _finish_pass(self) -> None:
        """Check the statistics of this pass, solve the regressions and free the collected inputs."""
        later = {name: None for name in self.waiting if self.leaders.get(name) in self.postponed}
        done = [self.blocks[name] for name in self.waiting if name not in later]
        for block in done:
            if block.moments is None:
                raise ValueError(
                    f"{block.name} did not run on the calibration batches: is the adapter active and enabled?"
                )
            if not block.moments.finite():
                raise ValueError(f"calibration gives NaN or infinity at the input of {block.name}; check the batches")
            inputs = block.moments.inputs
            if inputs is not None and block.moments.rows != inputs.count:
                raise ValueError(
                    f"{block.name} did not run on all calibration batches that {self.leaders[block.name]} ran on; "
                    "give batches that run the same layers"
                )
            block.norm = block.moments.norm
        while self.inputs:
            leader, inputs = self.inputs.popitem()
            inputs.factorise()
            for block in (block for block in done if self.leaders.get(block.name) == leader):
                block.moments.fit()
        for name in later:
            self.blocks[name].moments = None
        self.waiting, self.postponed = later, set()


def _forward(base: nn.Module, batch: Mapping, device: torch.device, number: int) -> None:
    if not isinstance(batch, Mapping):
        raise ValueError(f"calibration[{number}] is a {type(batch).__name__}; give dicts of the model's arguments")
    try:
        base(**to_device(dict(batch), device))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        problem = f"does not run through {type(base).__name__}: {first_line(error)}"
        raise ValueError(f"calibration[{number}] {problem}") from error
