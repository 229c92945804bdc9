"""New tokens that are trained together with the adapter (--new_tokens): pivotal tuning.

Each new token has one trained embedding in each CLIP text encoder (textual inversion, Gal et al., 2022). All other
embeddings are frozen.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedTokenizerBase

from ...errors import InvalidArgument
from ...io import read_tensors, replacing, write_tensors
from .families.base import Family

FOLDER = "embeddings"
LEGACY_EOS = 2
"""The end token in the configuration of older text encoders, which is wrong: transformers then takes the token with the
highest number for the end, which would be a new token."""


class WithNewTokens(nn.Module):
    """The frozen embeddings of a text encoder, and the trained ones of new tokens, numbered from `first`."""

    def __init__(self, base: nn.Embedding, rows: nn.Embedding, first: int) -> None:
        super().__init__()
        self.base, self.rows, self.first = base, rows, first

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (... x width) of tokens, in the dtype of the frozen ones."""
        known = self.base(ids.clamp(max=self.first - 1))
        new = self.rows((ids - self.first).clamp(min=0))
        return torch.where((ids >= self.first).unsqueeze(-1), new.to(known.dtype), known)


def tokenizer_of(pipeline: DiffusionPipeline, encoder: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a text encoder, by the encoder's name in the pipeline."""
    return getattr(pipeline, encoder.replace("text_encoder", "tokenizer"))


def add_tokens(pipeline: DiffusionPipeline, family: Family, tokens: Iterable[str]) -> None:
    """Add new tokens to the tokenizers; raises `InvalidArgument` for a token that exists already."""
    for part in family.trainable if tokens else ():
        tokenizer = tokenizer_of(pipeline, part.name)
        for token in tokens:
            pieces = tokenizer.tokenize(token)
            if len(pieces) == 1 and pieces[0] != tokenizer.unk_token:
                fix = f"choose another one, such as <{token}>"
                raise InvalidArgument(f"--new_tokens {token}", "the model has this token already", fix)
        tokenizer.add_tokens(list(tokens))


def add_embeddings(
    encoders: Mapping[str, nn.Module], pipeline: DiffusionPipeline, words: Mapping[str, str]
) -> dict[str, nn.Embedding]:
    """Add trainable embeddings of new tokens to text encoders; return them in float32, by the encoder's name.

    `words`: for each token, the words whose mean embedding it starts from; if empty, the mean of all embeddings.
    """
    found = {}
    for name, encoder in encoders.items() if words else ():
        tokenizer, base = tokenizer_of(pipeline, name), encoder.get_input_embeddings()
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in words.values()]
        starts = torch.stack([(base.weight[own] if own else base.weight).float().mean(0) for own in ids])
        found[name] = nn.Embedding.from_pretrained(starts, freeze=False)
        first = tokenizer.convert_tokens_to_ids(next(iter(words)))
        encoder.set_input_embeddings(WithNewTokens(base, found[name], first))
        for module in encoder.modules():
            if getattr(module, "eos_token_id", None) == LEGACY_EOS:
                module.eos_token_id = tokenizer.eos_token_id
    return found


def embeddings_in(pipeline: DiffusionPipeline, family: Family, words: Mapping[str, str]) -> dict[str, nn.Embedding]:
    """Return the embeddings that `add_embeddings` has added to the pipeline's text encoders."""
    return {part.name: getattr(pipeline, part.name).get_input_embeddings().rows for part in family.trainable if words}


def file_stem(token: str) -> str:
    """Return the name of a token's file: the token's letters, digits, underscores and hyphens."""
    return re.sub(r"[^\w-]", "", token)


def exported(pipeline: DiffusionPipeline, family: Family, words: Mapping[str, str]) -> dict[str, dict]:
    """Return the tensors (1 x width) of each token's file.

    With one text encoder, the key is the token, as diffusers writes it; with two, the keys are clip_l and clip_g, as
    kohya's scripts and ComfyUI have them.
    """
    found: dict[str, dict] = {}
    for name, rows in embeddings_in(pipeline, family, words).items():
        for token, row in zip(words, rows.weight.detach().split(1), strict=True):
            key = family.text_names[name][1].split(".")[1] if len(family.trainable) > 1 else token
            found.setdefault(f"{file_stem(token)}.safetensors", {})[key] = row
    return found


def write_embeddings(folder: Path, files: Mapping[str, dict]) -> None:
    """Write the result of `exported` to `embeddings/` in a method's folder; nothing if there are no new tokens."""
    if files:
        with replacing(folder / FOLDER) as temporary:
            temporary.mkdir()
            for name, tensors in files.items():
                write_tensors(temporary / name, tensors, {"format": "pt"})


def read_embeddings(folder: Path, files: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of the files in `embeddings/`, by file and key."""
    return {f"{name} {key}": value for name in files for key, value in read_tensors(folder / FOLDER / name)[0].items()}
