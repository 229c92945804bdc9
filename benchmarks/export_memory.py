"""Measure the memory of exporting a large denoiser: a Flux.1 of fewer blocks with random bf16 weights, and its LoRA.

Each way runs in a separate process. It loads the exact denoiser with an adapter, predicts once, writes the merged
weights, reads them back, and predicts again. `whole` has the float32 denoiser in memory; `stored` leaves the weights of
its blocks on disk. Bytes are peaks above the memory at the start: `own` without pages of mapped files, `resident` with
them, which the system reclaims if memory is short.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from measured import keep
from peft import LoraConfig
from watched import PeakAnonymous, anonymous

from reslora.export import export_merged
from reslora.images.model import stored
from reslora.images.output.merged_weights import write_merged

HERE = torch.device("cpu")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def write_base(folder: Path, blocks: int, single: int) -> tuple[int, int]:
    """Write the base in shards; return its bytes and those of its largest weight."""
    with torch.device("meta"):
        base = FluxTransformer2DModel(num_layers=blocks, num_single_layers=single, guidance_embeds=True)
    base = base.bfloat16().to_empty(device=HERE)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    base.save_pretrained(folder, max_shard_size="2GB")
    sizes = [parameter.nbytes for parameter in base.parameters()]
    return sum(sizes), max(sizes)


@torch.no_grad()
def predicted(denoiser: FluxTransformer2DModel) -> torch.Tensor:
    """Return the prediction for 16 tokens of an image and 8 of a caption."""
    random = torch.Generator().manual_seed(0)
    config = denoiser.config
    return denoiser(
        hidden_states=torch.randn(1, 16, config.in_channels, generator=random),
        encoder_hidden_states=torch.randn(1, 8, config.joint_attention_dim, generator=random),
        pooled_projections=torch.randn(1, config.pooled_projection_dim, generator=random),
        timestep=torch.tensor([0.5]), guidance=torch.ones(1), img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(8, 3),
    ).sample  # fmt: skip


def export(way: str, base: Path, out: Path) -> float:
    """Load, export and read back a denoiser.

    Returns the largest difference of the predictions before and after, relative to the largest value.
    """
    if way == "whole":
        stored.IN_MEMORY = 2**62
    denoiser = stored.load_exact(FluxTransformer2DModel, base, HERE)
    torch.manual_seed(0)
    denoiser.add_adapter(LoraConfig(r=16, target_modules=TARGETS, init_lora_weights=False))
    expected = predicted(denoiser)
    if way == "whole":
        export_merged(denoiser, out)
    else:
        write_merged(denoiser, out, stored.stored_weights(base))
    del denoiser
    found = predicted(stored.load_exact(FluxTransformer2DModel, out, HERE))
    return float((found - expected).abs().max() / expected.abs().max())


def most_resident() -> int:
    """Return the peak resident memory of this process in bytes, since `measure` reset it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def measure(work: Callable[[], float]) -> dict:
    """Return peaks and seconds of `work`, and its result."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    resident, own, began = most_resident(), anonymous(os.getpid()), time.perf_counter()
    watch = PeakAnonymous(os.getpid())
    watch.start()
    difference = work()
    peaks = {"own": watch.end() - own, "resident": most_resident() - resident}
    return {**peaks, "seconds": round(time.perf_counter() - began, 1), "difference": difference}


def main() -> None:
    """Measure both ways, and write benchmarks/results/export/memory.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=2, help="double blocks, of 340 million weights each")
    parser.add_argument("--single", type=int, default=6, help="single blocks, of 142 million each")
    parser.add_argument("--way", nargs=3, help=argparse.SUPPRESS)  # for the child processes
    arguments = parser.parse_args()
    if arguments.way:
        way, base, out = arguments.way
        print(json.dumps(measure(lambda: export(way, Path(base), Path(out)))))
        return
    with tempfile.TemporaryDirectory() as folder:
        total, largest = write_base(Path(folder, "base"), arguments.blocks, arguments.single)
        figures: dict = {"base": total, "largest_weight": largest}
        for way in ("whole", "stored"):
            command = [sys.executable, __file__, "--way", way, f"{folder}/base", f"{folder}/{way}"]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            figures[way] = json.loads(printed.splitlines()[-1])
            print(way, figures[way], flush=True)
    keep("export/memory", figures)


if __name__ == "__main__":
    main()
