"""Read the oldest published LoRA layout, that of cloneofsimo's lora_diffusion, which numbers the layers.

`unet:0:up` and `unet:0:down` are B and A of the first layer; all scales are 1. The metadata names the classes of
modules whose layers are numbered, in the order in which the model registers them.
"""

import dataclasses
import json
import re
from collections.abc import Sequence

import torch

from ....errors import InvalidArgument
from .names import Names
from .reading import GIVE_PLAIN, NUMBERED, Content, is_numbered

LAYERS = {
    "CrossAttention": r".*\.attn[12]\.to_(q|k|v|out\.0)",
    "Attention": r".*\.attn[12]\.to_(q|k|v|out\.0)",  # its name in later versions of diffusers
    "GEGLU": r".*\.ff\.net\.0\.proj",
    "ResnetBlock2D": r".*\.resnets\.\d+\.(conv1|time_emb_proj|conv2|conv_shortcut)",
}
"""Layers of the U-Net, by the classes in the metadata."""
TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")
"""The numbered layers of each block of CLIP, in order."""
EMBEDDING = "<embed>"
NONE = torch.empty(0)


def named(content: Content, names: Names) -> Content:
    """Return the content with names of layers instead of numbers; other layouts are returned unchanged.

    Prints that the file has this layout. Raises `InvalidArgument` if the layers are not those of the model.
    """
    if not is_numbered(content):
        return content
    tokens = [name for name, value in content.metadata.items() if value == EMBEDDING]
    tensors: dict[str, torch.Tensor] = {}
    for part in ("unet", "text_encoder"):
        ups = [key for key in content.tensors if key.startswith(f"{part}:") and key.endswith(":up")]
        layers = _layers_of(part, len(ups), content, names) if ups else []
        for number, layer in enumerate(layers):
            for word, factor in (("up", "lora_up"), ("down", "lora_down")):
                if (value := content.tensors.get(f"{part}:{number}:{word}")) is None:
                    raise InvalidArgument(content.flag, f"{part}:{number}:{word} is missing", "give a complete file")
                tensors[f"{part}.{layer}.{factor}.weight"] = value
    others = content.tensors.keys() - set(tokens) - {key for key in content.tensors if NUMBERED.fullmatch(key)}
    if others:
        raise InvalidArgument(content.flag, f"{min(others)} is not part of a plain LoRA", GIVE_PLAIN)
    left = f"; the embeddings of {', '.join(tokens)} are not part of a LoRA, and are left out" if tokens else ""
    print(f"{content.flag}: cloneofsimo's layout, with numbered layers{left}")
    metadata = {
        key: value
        for key, value in content.metadata.items()
        if key not in (*tokens, "unet", "text_encoder") and not key.endswith(":rank")
    }
    return dataclasses.replace(content, tensors=tensors, metadata=metadata)


def _layers_of(part: str, count: int, content: Content, names: Names) -> Sequence[str]:
    """Return the names of the `count` numbered layers of a part of the pipeline, in order."""
    try:
        classes = set(json.loads(content.metadata[part]))
    except (KeyError, ValueError, TypeError):
        problem = f"its metadata does not say which layers of {part} are numbered"
        raise InvalidArgument(content.flag, problem, "give the original file") from None
    if part == "text_encoder":
        if classes == {"CLIPAttention"} and count % len(TEXT) == 0:
            blocks = range(count // len(TEXT))
            return [f"text_model.encoder.layers.{block}.self_attn.{name}" for block in blocks for name in TEXT]
    elif classes <= LAYERS.keys():
        wanted = re.compile("|".join(LAYERS[name] for name in classes))
        layers = [name for name in names.shapes if wanted.fullmatch(name)]
        # Until 2023, diffusers registered the feed-forward layers before cross-attention.
        for order in (layers, _feed_forward_first(layers)):
            ups = [content.tensors.get(f"{part}:{number}:up", NONE) for number in range(count)]
            if [up.shape[:1] for up in ups] == [names.shapes[name][:1] for name in order]:
                return order
    problem = f"its {count} numbered layers of {part} ({', '.join(sorted(classes))}) are not those of the model"
    raise InvalidArgument(content.flag, problem, "give the model that it was made for with --base")


def _feed_forward_first(layers: Sequence[str]) -> list[str]:
    """Return the layers with the feed-forward layers of each block before its cross-attention."""
    order: list[str] = []
    for name in layers:
        block, dot, _ = name.partition(".ff.")
        place = next((at for at, other in enumerate(order) if other.startswith(f"{block}.attn2.")), len(order))
        order.insert(place if dot else len(order), name)
    return order
