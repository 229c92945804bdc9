"""Tiny real models, random LoRA weights, and the paper's equations written out by hand: the oracle of the suite."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

LAYERS = 5
RANK = 3


def tiny_llama(layers: int = LAYERS, width: int = 32, **overrides) -> LlamaForCausalLM:
    """A LLaMA with grouped-query attention, in float64 throughout (stock RMSNorm computes in float32)."""
    config = LlamaConfig(
        **{
            "vocab_size": 64,
            "hidden_size": width,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
            **overrides,
        }
    )
    model = LlamaForCausalLM(config)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(parent, name, nn.RMSNorm(child.weight.shape, eps=config.rms_norm_eps))
    return model.double()


def _encoder_config(config_class, layers: int):
    return config_class(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=48,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
    )


def tiny_bert(layers: int = LAYERS) -> BertForSequenceClassification:
    return BertForSequenceClassification(_encoder_config(BertConfig, layers)).double()


def tiny_roberta(layers: int = LAYERS) -> RobertaForSequenceClassification:
    return RobertaForSequenceClassification(_encoder_config(RobertaConfig, layers)).double()


def tiny_gpt2(layers: int = LAYERS) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=64,
        n_positions=48,
        n_embd=32,
        n_layer=layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).double()


def tiny_unet(**overrides) -> UNet2DConditionModel:
    """A U-Net in the layout of Stable Diffusion 2 (the middle block last in registration order), two transformer
    layers in every block."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "transformer_layers_per_block": 2,
        "attention_head_dim": 2,
        "cross_attention_dim": 12,
        "norm_num_groups": 4,
        "use_linear_projection": True,
        **overrides,
    }
    return UNet2DConditionModel(**config).double()


def token_inputs(batch: int = 2, length: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(2, 64, (batch, length), generator=generator)}


def unet_inputs(batch: int = 2, length: int = 5, seed: int = 0, size: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, size, size, generator=generator, dtype=torch.float64),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "encoder_hidden_states": torch.randn(batch, length, 12, generator=generator, dtype=torch.float64),
    }


def _layers(pattern: str, layers: int = LAYERS) -> list[list[str]]:
    return [[pattern.format(n) for n in range(layers)]]


UNET_STAGES = {
    "down": ["down_blocks.0.attentions.0"],
    "middle": ["mid_block.attentions.0"],
    "up": ["up_blocks.1.attentions.0", "up_blocks.1.attentions.1"],
}
IMAGE_STAGES = [["down"], ["middle"], ["up"]]
TEXT_STAGES = [["down", "middle", "up"]]


def _unet_chains() -> dict[str, list[list[str]]]:
    """Execution order by hand: image tokens are cut at every change of resolution, text tokens nowhere."""
    chains = {}
    for role in ("to_q", "to_k", "to_v", "to_out.0"):
        for attention in ("attn1", "attn2"):
            text = attention == "attn2" and role in ("to_k", "to_v")
            chains[f"{attention}.{role}"] = [
                [
                    f"{prefix}.transformer_blocks.{layer}.{attention}.{role}"
                    for stage in stages
                    for prefix in UNET_STAGES[stage]
                    for layer in (0, 1)
                ]
                for stages in (TEXT_STAGES if text else IMAGE_STAGES)
            ]
    return chains


MADE: OrderedDict[tuple[Callable, str], tuple[nn.Module, torch.Tensor]] = OrderedDict()
"""The latest LoRA models, and the random state that each left. A copy is there three times sooner than another one."""


@dataclass(frozen=True)
class Architecture:
    """One kind of tiny model, with its chains (role -> chains of module names in execution order) written by hand."""

    build: Callable[..., nn.Module]
    targets: list[str]
    chains: dict[str, list[list[str]]]
    inputs: Callable[..., dict[str, torch.Tensor]] = token_inputs
    peft: bool = True
    config: dict = field(default_factory=dict)

    def lora(self, seed: int = 0, adapter: str = "default", base: nn.Module | None = None, **overrides) -> nn.Module:
        """A plain LoRA model with random A and B, float64, in train mode."""
        if base is not None:
            return self._made(seed, adapter, base, overrides)
        key = self.build, repr((self.targets, self.config, self.peft, seed, adapter, overrides))
        if key not in MADE:
            MADE[key] = self._made(seed, adapter, None, overrides), torch.get_rng_state()
            if len(MADE) > 16:
                MADE.popitem(last=False)
        model, random_state = MADE[key]
        torch.set_rng_state(random_state)
        return copy_of(model)

    def _made(self, seed: int, adapter: str, base: nn.Module | None, overrides: dict) -> nn.Module:
        torch.manual_seed(seed)
        base = self.build() if base is None else base
        config = LoraConfig(
            **{"r": RANK, "lora_alpha": 5, "target_modules": self.targets, **self.config, **overrides},
        )
        if self.peft:
            model = get_peft_model(base, config, adapter_name=adapter)
        else:
            base.add_adapter(config, adapter_name=adapter)
            model = base
        randomize(model, seed=seed + 1, adapter=adapter)
        return model.train()

    @property
    def blocks(self) -> list[list[str]]:
        return [chain for chains in self.chains.values() for chain in chains]


ARCHITECTURES = {
    "llama": Architecture(
        tiny_llama,
        ["q_proj", "v_proj", "down_proj"],
        {
            "self_attn.q_proj": _layers("model.layers.{}.self_attn.q_proj"),
            "self_attn.v_proj": _layers("model.layers.{}.self_attn.v_proj"),
            "mlp.down_proj": _layers("model.layers.{}.mlp.down_proj"),
        },
        config={"task_type": "CAUSAL_LM"},
    ),
    "bert": Architecture(
        tiny_bert,
        ["query", "value"],
        {
            "attention.self.query": _layers("bert.encoder.layer.{}.attention.self.query"),
            "attention.self.value": _layers("bert.encoder.layer.{}.attention.self.value"),
        },
        config={"modules_to_save": ["classifier"]},
    ),
    "roberta": Architecture(
        tiny_roberta,
        ["query", "value"],
        {
            "attention.self.query": _layers("roberta.encoder.layer.{}.attention.self.query"),
            "attention.self.value": _layers("roberta.encoder.layer.{}.attention.self.value"),
        },
        config={"task_type": "SEQ_CLS"},
    ),
    "gpt2": Architecture(
        tiny_gpt2,
        ["c_attn", "mlp.c_proj"],
        {
            "attn.c_attn": _layers("transformer.h.{}.attn.c_attn"),
            "mlp.c_proj": _layers("transformer.h.{}.mlp.c_proj"),
        },
        config={"fan_in_fan_out": True},
    ),
    "unet": Architecture(
        tiny_unet, ["to_q", "to_k", "to_v", "to_out.0"], _unet_chains(), inputs=unet_inputs, peft=False
    ),
}


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 1, adapter: str = "default", scale: float = 0.3) -> nn.Module:
    """Fill every A and B of the adapter with random numbers (PEFT starts B at zero)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"lora_A.{adapter}." in name or f"lora_B.{adapter}." in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise.to(parameter.dtype) * scale)
    return model


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The module of the base model named `name`, whether PEFT wraps it or not."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.get_submodule(name.removeprefix("base_model.model."))


def output(result) -> torch.Tensor:
    """The main tensor of a model output."""
    for key in ("logits", "sample"):
        if hasattr(result, key):
            return getattr(result, key)
    return result


def run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return output(model(**inputs))


def weighted(result: torch.Tensor, seed: int = 3) -> torch.Tensor:
    """A scalar that depends on every output with another weight (the models' own losses compute in float32)."""
    generator = torch.Generator().manual_seed(seed)
    return (result * torch.randn(result.shape, generator=generator, dtype=torch.float64)).sum()


def loss_of(model: nn.Module, inputs: dict[str, torch.Tensor], seed: int = 3) -> torch.Tensor:
    return weighted(run(model, inputs), seed)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss_of(model, inputs).backward()
    return gradients(model)


def results_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output of a forward pass, and the gradients of its backward pass."""
    model.zero_grad(set_to_none=True)
    result = run(model, inputs)
    weighted(result).backward()
    return {"": result.detach(), **gradients(model)}


def assert_equal(actual, expected, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """Equality of float64 computations that differ in the order of their sums."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def assert_one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    """The error is one of ours, on one line, and names what it must."""
    assert isinstance(error.value, (ValueError, RuntimeError))
    message = str(error.value)
    assert message.strip() and "\n" not in message
    for word in words:
        assert word in message


def base_weight(layer: nn.Module) -> torch.Tensor:
    """W of a LoRA layer as (out, in)."""
    weight = layer.get_base_layer().weight.detach()
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight


def delta(layer: nn.Module, adapter: str = "default") -> torch.Tensor:
    """s B A of a LoRA layer as (out, in)."""
    return layer.scaling[adapter] * (layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight).detach()


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every LoRA layer of a model by its name in that model."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


class FixedDropout(nn.Module):
    """Inverted dropout whose masks are a function of (seed, number of the draw) alone."""

    def __init__(self, seed: int, p: float = 0.4) -> None:
        super().__init__()
        self.seed, self.p, self.draws = seed, p, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.draws)
        self.draws += 1
        keep = torch.rand(x.shape, generator=generator, dtype=torch.float64) >= self.p
        return x * keep.to(x.dtype) / (1 - self.p)


def fix_dropout(model: nn.Module, adapter: str = "default") -> list[FixedDropout]:
    """Give every LoRA layer reproducible masks; two models with the same layers get the same masks."""
    masks = []
    for seed, (_, layer) in enumerate(sorted(adapter_layers(model).items())):
        layer.lora_dropout[adapter] = FixedDropout(seed)
        masks.append(layer.lora_dropout[adapter])
    return masks


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, soon made: most of the time goes to the dicts of hooks, eleven a module and nearly all empty."""
    hooks = [value for module in model.modules() for value in vars(module).values() if isinstance(value, OrderedDict)]
    return copy.deepcopy(model, {id(value): OrderedDict() for value in hooks if not value})


class Oracle:
    """A copy of a plain LoRA model whose LoRA layers compute Eqs. 1-4 as they are printed.

    `inputs[name]` collects what entered each layer (before dropout), one tensor per forward; `outputs[name]` the
    LoRA path's contribution.
    """

    def __init__(self, model, chains, shortcut, pre_num=1, head="repeat", adapter="default") -> None:
        self.model = copy_of(model)
        self.shortcut, self.head, self.adapter = shortcut, head, adapter
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self.outputs: dict[str, list[torch.Tensor]] = {}
        for chain in chains:
            layers = [find_layer(self.model, name) for name in chain]
            entered: list[torch.Tensor | None] = [None] * len(layers)
            for n, name in enumerate(chain):
                m = n if pre_num == -1 else min(pre_num, n)
                layers[n].forward = self._equation(layers, n, m, entered, name, pre_num == 0)

    def _equation(self, layers, n, m, entered, name, plain):
        def down(k):
            return layers[k].lora_A[self.adapter].weight

        def up(k):
            return layers[k].lora_B[self.adapter].weight

        def forward(x, *args, **kwargs):
            self.inputs.setdefault(name, []).append(x.detach())
            hidden = layers[n].base_layer(x, *args, **kwargs)
            x = x if torch.is_autocast_enabled("cpu") else x.to(down(n).dtype)
            x = entered[n] = layers[n].lora_dropout[self.adapter](x)
            if plain or self.shortcut == "none":
                lora = x @ down(n).T @ up(n).T  # Eq. 1
            elif self.shortcut == "input" and n == 0:
                # the text under Eq. 2, or App. C
                lora = (x + x if self.head == "repeat" else x) @ down(n).T @ up(n).T
            elif self.shortcut == "input":
                lora = (x + entered[n - 1]) @ down(n).T @ up(n).T  # Eq. 2
            elif self.shortcut == "block":
                lora = sum(x @ down(n - k).T @ up(n - k).T for k in range(m + 1))  # Eq. 3
            else:
                lora = sum(entered[n - k] @ down(n - k).T for k in range(m + 1)) @ up(n).T  # Eq. 4
            lora = layers[n].scaling[self.adapter] * lora
            self.outputs.setdefault(name, []).append(lora.detach())
            return (hidden + lora).to(hidden.dtype)

        return forward


class Stack(nn.Module):
    """A residual stack of equal blocks, `proj` then tanh: the smallest model that has a chain."""

    class Block(nn.Module):
        def __init__(self, width: int, out: int | None = None) -> None:
            super().__init__()
            self.proj = nn.Linear(width, out or width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.proj(x))

    def __init__(self, layers: int = 4, width: int = 6, pool_at: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Block(width) for _ in range(layers))
        self.pool_at = pool_at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for n, layer in enumerate(self.layers):
            x = x[:, ::2] if n == self.pool_at else x
            x = x + layer(x)
        return x


STACK_INPUTS = {"x": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}


def lora_stack(model: nn.Module | None = None, **overrides) -> nn.Module:
    """A plain LoRA `Stack` (or another custom module) with random weights."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": RANK, "lora_alpha": 5, "target_modules": ["proj"], **overrides})
    return randomize(get_peft_model((model or Stack()).double(), config)).train()


def stack_chain(layers: int = 4) -> list[str]:
    return [f"layers.{n}.proj" for n in range(layers)]
