"""Helpers of the tests in this folder: a tiny adapted model, runs of the scripts, and their log."""

import copy
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from core_models import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import train_glue
import train_llm
from reslora.options.texts import GlueOptions, LlmOptions, MethodOptions
from reslora.runtime.signals import StopRequest
from reslora.texts import glue, llm
from reslora.texts.adapter import attach
from reslora.texts.arguments import read, resolve
from reslora.texts.llm_tokens import token_losses
from reslora.texts.study import Texts, TextStudy, plan_of, schedule_of
from reslora.training.checkpoints import plan_resume
from reslora.training.context import Context
from reslora.training.loop import train_method
from reslora.training.state import Learner
from reslora.training.study import Identity

METHODS = [("reslora", "input"), ("reslora", "middle"), ("reslora", "block"), ("lora", "none"), ("adalora", "none")]
METHODS += [("loha", "none"), ("lokr", "none"), ("lora_x2", "none"), ("dora", "none")]
METHODS = [(method, shortcut, {}) for method, shortcut in METHODS]
METHODS += [("lora", "none", {"init_lora_weights": "pissa_niter_2"})]
STEPS = 6
SCRIPT = Path(__file__).resolve().parents[2] / "train_llm.py"
VALIDATED = ("--shortcut", "input", "--eval_strategy", "steps", "--eval_steps", "2", "--max_steps", "3")


def rows(count: int = 16, length: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 64, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def build(method: str = "reslora", shortcut: str = "input", base=None, **flags):
    torch.manual_seed(0)
    base = tiny_llama(layers=3).float() if base is None else base
    adapter = adapter_of(method=method, shortcut=shortcut, **flags)
    return attach(base, adapter, STEPS), adapter


@torch.no_grad()
def token_loss(model, rows) -> float:
    """Return the mean loss over all answer tokens, computed one encoded example at a time."""
    losses = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        learnt = [(n, label) for n, label in enumerate(row["labels"]) if label != -100]
        losses += [-logits[n - 1, label].item() for n, label in learnt]
    return sum(losses) / len(losses)


def adapter_of(method: str = "reslora", **options) -> MethodOptions:
    """Return the options of a method's adapter, as a run has them."""
    return resolve(LlmOptions, {"method": [method], **options}).adapter


def parsed(argv: list[str]) -> LlmOptions:
    """Return the options of a run of train_llm.py."""
    return read(LlmOptions, llm.PROG, argv)


def parsed_glue(argv: list[str]) -> GlueOptions:
    """Return the options of a run of train_glue.py."""
    return read(GlueOptions, glue.PROG, argv)


def run_llm(argv: list[str], stop: StopRequest | None = None) -> None:
    """Run train_llm.py in this process; its errors are raised."""
    train_llm.start(argv, stop or StopRequest())


def run_glue(argv: list[str], stop: StopRequest | None = None) -> None:
    """Run train_glue.py in this process; its errors are raised."""
    train_glue.start(argv, stop or StopRequest())


def read_log(folder) -> list[dict]:
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_log(folder)]


def trained(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def trained_parameters(model):
    return (value for value in model.parameters() if value.requires_grad)


class TinyTexts(Texts):
    """A tiny LLaMA in memory, trained on random tokens and evaluated on half of them."""

    prog, real, tokenizer = "train_llm.py", "", None

    def __init__(self, base: torch.nn.Module | None = None) -> None:
        self.base = base
        self.rows = [{name: value.tolist() for name, value in row.items()} for row in rows()]

    def load(self, options, device):
        return tiny_llama(layers=3).float() if self.base is None else copy.deepcopy(self.base)

    def collate(self, rows):
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    def losses(self, model, batch):
        return token_losses(model, batch)

    def count(self, batch):
        return batch["labels"][:, 1:].numel()

    def validation(self, options, model, check):
        check()
        return {"loss": token_losses(model, self.collate(self.rows[:8])).mean().item()}

    def calibration(self, options):
        return [{"input_ids": self.collate(self.rows)["input_ids"]}]

    def nothing(self, *_):
        raise NotImplementedError

    empty = model_of = read = parts = prepare = figures = measured = facts = nothing


class KeptStudy(TextStudy):
    """A study that exports nothing; its texts keep the learner."""

    def export(self, learner, schedule):
        self.texts.learner = learner
        return {}


def trained_in(
    folder: Path, method="reslora", shortcut="input", stop=None, resume=None, base=None, texts=None, **options
) -> Learner:
    """Train `TinyTexts` by the training loop in this process, and return what was trained."""
    values = {
        "method": [method], "shortcut": [shortcut], "output_dir": str(folder), "max_steps": STEPS, "save_steps": 2,
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": ["none"], "eval_strategy": "no",
        "resume_from_checkpoint": resume, "model_name_or_path": "tiny",
    }  # fmt: skip
    asked = resolve(LlmOptions, values | options)
    texts, accelerator = texts or TinyTexts(base), Accelerator(cpu=True)
    schedule, resolved = schedule_of(plan_of(texts, asked, accelerator).updates, asked)
    context, identity = Context(resolved, texts, accelerator, stop or StopRequest()), Identity("m", "d", "--m", "--d")
    train_method(method, plan_resume(asked, identity), KeptStudy(schedule, identity, context, texts))
    return texts.learner


# -- files for train_llm.py -------------------------------------------------------------------------------------------


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token per byte; the end of sequence is its only special token and also pads."""
    vocabulary = {"<end>": 0} | {char: n for n, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def write_llama(folder: Path) -> Path:
    """Write a tiny LLaMA with tied embeddings and a tokenizer, in transformers' format."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    return folder


def row(number: int) -> dict:
    a, b = number % 7 + 1, number % 5
    return {
        "Body": f"Tom has {a} pens. He finds {b}.",
        "Question": "How many?",
        "Equation": f"{a} + {b}",
        "Answer": a + b,
    }


def write_rows(folder: Path, **splits: list) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows), encoding="utf-8")
    return folder


def flags(tiny: Path, data: Path, output: Path, *more) -> list[str]:
    common = f"--model_name_or_path {tiny} --data_dir {data} --output_dir {output} --max_new_tokens 8 --use_cpu"
    training = "--per_device_train_batch_size 4 --max_steps 4 --save_steps 2 --learning_rate 1e-2 --report_to none"
    return [*common.split(), *training.split(), *map(str, more)]
