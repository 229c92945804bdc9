"""Train PEFT's plain LoRA by transformers' `Trainer` on the examples of train_llm.py, without this package's loop."""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from reslora.texts.llm_tasks import read_examples
from reslora.texts.llm_tokens import Encoder


def main(model: str, data: str, output: str, *words: str) -> None:
    """Write the losses of the steps and the trained weights; `words`: names and values of `TrainingArguments`."""
    encoder = Encoder(AutoTokenizer.from_pretrained(model))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    flags = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    torch.manual_seed(42)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        output_dir=output, seed=42, report_to=[], logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True,
        ddp_find_unused_parameters=False, **{name: json.loads(value) for name, value in flags.items()},
    )  # fmt: skip
    trainer = Trainer(
        get_peft_model(base, lora),
        arguments,
        train_dataset=[encoder(example) for example in read_examples("svamp", "train", data)],
        data_collator=encoder.collate,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
        save_file(trained, Path(output) / "trained.safetensors")
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        (Path(output) / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
