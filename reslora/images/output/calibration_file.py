"""Write and read the calibration batches of a merge, so that the merge can be repeated with another method.

A tensor's name is its path in the denoiser's arguments: `sample`, `added_cond_kwargs.time_ids` (in a dict),
`cap_feats.0` (first in a list). The tensors of all batches are concatenated along the first dimension. If their shapes
differ, they are stored separately, for example as `cap_feats.0@1` (the tensor of the second batch). The metadata
`batches` has the structure: JSON of the original batches with `{"tensor": name, "rows": [first, end]}` in place of
every tensor.
"""

import json
import os
from collections.abc import Mapping, Sequence

import torch

from ...errors import first_line
from ...io import read_tensors, write_tensors


def write_calibration(path: str | os.PathLike, batches: Sequence[Mapping]) -> None:
    """Write batches of the denoiser's arguments: tensors, plain values, or nested lists and dicts of these."""
    parts: dict[str, list[torch.Tensor]] = {}
    trees = [_take_apart(batch, "", number, parts) for number, batch in enumerate(batches)]
    tensors = {name: torch.cat(found) if len(found) > 1 else found[0] for name, found in parts.items()}
    write_tensors(path, tensors, {"format": "pt", "batches": json.dumps(trees)})


def read_calibration(path: str | os.PathLike) -> list[dict]:
    """Return the batches of a calibration file; raises `ValueError` if the file is damaged or of another kind."""
    try:
        tensors, metadata = read_tensors(path)
        batches = _put_together(json.loads(metadata["batches"]), tensors)
        if not isinstance(batches, list) or not all(isinstance(batch, dict) for batch in batches):
            raise ValueError("the file has no list of dicts")
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{path} holds no calibration batches ({reason}): train again") from None
    return batches


def _take_apart(value: object, path: str, batch: int, parts: dict[str, list[torch.Tensor]]) -> object:
    """Return `value` as JSON, and add its tensors to `parts` by name."""
    if isinstance(value, Mapping):
        return {
            name: _take_apart(item, f"{path}.{name}" if path else name, batch, parts) for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_take_apart(item, f"{path}.{number}", batch, parts) for number, item in enumerate(value)]
    if not isinstance(value, torch.Tensor):
        return value
    value, before = value.cpu(), parts.get(path, [])
    alike = all((other.shape[1:], other.dtype) == (value.shape[1:], value.dtype) for other in before)
    if value.dim() == 0 or not alike:
        parts[f"{path}@{batch}"] = [value]
        return {"tensor": f"{path}@{batch}"}
    first = sum(map(len, before))
    parts[path] = [*before, value]
    return {"tensor": path, "rows": [first, first + len(value)]}


def _put_together(tree: object, tensors: Mapping[str, torch.Tensor]) -> object:
    """Return the original value, given the result `tree` of `_take_apart`.

    Tensors are copied, because the last digit of a matrix product depends on the memory alignment of its operands.
    """
    if isinstance(tree, list):
        return [_put_together(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]][slice(*tree["rows"]) if "rows" in tree else ...].clone()
    return {name: _put_together(item, tensors) for name, item in tree.items()}
