"""Measure one method's training step on a language model, and print it as JSON; `paper.py run cost` starts it.

python benchmarks/paper_cost.py MODEL                                       # stock PEFT LoRA, without this library
python benchmarks/paper_cost.py MODEL --method reslora --shortcut block --pre_num 4

Without options the library is not imported, because its modules would count in the peak memory of stock PEFT.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

BATCH, TOKENS, STEPS, WARM_UP = 8, 128, 8, 2


def model_of(name: str, flags: list[str]) -> torch.nn.Module:
    """Return the model with its adapter: PEFT's own without options, else as the trainers create it."""
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    if not flags:
        return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from reslora.options.texts import LlmOptions
    from reslora.texts.adapter import attach
    from reslora.texts.arguments import read

    return attach(base, read(LlmOptions, "paper_cost.py", flags).adapter, STEPS)


def main() -> None:
    """Measure the step, and print seconds and peak memory (MiB)."""
    name, *flags = sys.argv[1:]
    torch.manual_seed(0)
    model = model_of(name, flags).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(1000, (BATCH, TOKENS))
    seconds = []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": statistics.median(seconds[WARM_UP:]), "peak_mib": peak}))


if __name__ == "__main__":
    main()
