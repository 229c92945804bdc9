"""Results of a run: metrics of every merge, exported files, and `results.json`."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from ..config import AUTO, MERGES
from ..errors import Diverged, RunFailed, first_line
from ..export import export_peft, merged_state_dict
from ..io import remove, remove_leftovers, replacing, write_json
from ..linking import base_model
from ..methods import initial
from ..methods.adapters import rank_allocator
from ..methods.conversion import convert, is_plain, write_converted
from ..methods.own import CONVERSION, conversion_in_words
from ..methods.registry import METHODS
from ..methods.updates import delta_error, has_updates
from ..model import Connection, MergeReport, connection_of, merge
from ..options.texts import MethodOptions
from ..runtime.folder_lock import check_held
from ..runtime.processes import broadcast_from_main, is_main

PLAIN_LORA = "plain_lora"
"""Folder with PEFT's conversion to LoRA; an experiment's folder may have runs in `lora/`."""

# -- merging -----------------------------------------------------------------------------------------------------------


def merge_table(
    model: nn.Module,
    evaluate: Callable[[nn.Module], Mapping[str, float]],
    calibration: Sequence[Mapping] | None = None,
    methods: Sequence[str] | None = None,
) -> dict[str, dict]:
    """Return the metrics of a model unmerged and merged by each merge method, as in the paper's Tables 3, 6 and 7.

    `evaluate` returns the metrics of a model; `calibration` is as in `reslora.merge`. `methods`
    are merge methods; by default all that are applicable, which are `none` and `exact` for block-shortcuts. `input`
    uses the norms recorded in training if there are any (Eqs. 8-9), else those of the calibration.

    The result maps `unmerged` and each merge method to metrics; a merge method also has the `report` of its merge. A
    model without shortcuts has only the row `unmerged`. Copies are merged; the model itself does not change.

    Raises `RunFailed` if the metrics of the unmerged model are not finite, or if the model's weights cannot be merged.
    """
    table: dict[str, dict[str, Any]] = {"unmerged": dict(evaluate(model))}
    for name, value in table["unmerged"].items():
        if not math.isfinite(value):
            raise RunFailed(f"{name} is {value} after training, which has diverged: lower --learning_rate")
    connection = connection_of(base_model(model))
    if connection is None or not connection.config.wired:
        return table
    _share_norms(connection)
    for method in methods or _applicable(connection, calibration):
        twin = _twin(model)
        report = _merge(twin, method, calibration)
        table[method] = {**evaluate(twin), "report": report.to_dict()}
    return table


def _applicable(connection: Connection, calibration: object) -> list[str]:
    has_norms = calibration is not None or connection.wires.norms.count > 0
    return [
        name
        for name, merge in connection.shortcut.merges.items()
        if (has_norms or not merge.needs_norms) and (calibration is not None or not merge.needs_moments)
    ]


def _merge(model: nn.Module, method: str, calibration: Sequence[Mapping] | None) -> MergeReport:
    connection = connection_of(base_model(model))
    merges = connection.shortcut.merges if connection.shortcut is not None else {}
    if connection.wires.norms.count > 0 and method in merges and merges[method].needs_norms:
        calibration = None  # use the norms recorded in training
    try:
        return merge(model, method if method in MERGES else AUTO, calibration)  # an exact merge has no name
    except ValueError as error:
        if "NaN or infinity" not in str(error):
            raise
        raise Diverged(f"the training has diverged: {first_line(error)}", "lower --learning_rate") from error


def _twin(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares all modules without trained parameters, such as quantized weights."""
    frozen = [module for module in model.modules() if not any(p.requires_grad for p in module.parameters())]
    return copy.deepcopy(model, {id(module): module for module in frozen})


def _share_norms(connection: Connection) -> None:
    """Broadcast the norms that process 0 has recorded in the latest steps, so that every process merges identically."""
    norms = connection.wires.norms
    values, count = broadcast_from_main(
        lambda: (norms.values if norms.values is None else norms.values.cpu(), norms.count)
    )
    if values is not None and not is_main():
        norms.restore(values, count)


def as_plain(
    model: PeftModel,
    adapter: MethodOptions,
    calibration: Sequence[Mapping] | None = None,
    folder: Path | None = None,
) -> MergeReport | None:
    """Merge a model permanently, in this process only; return the report, None if the model was not connected.

    `folder`: directory for `chains.json` and `merge.json`; None: write nothing.
    """
    report = None
    if (connection := connection_of(base_model(model))) is not None:
        plan = connection.chains.to_dict()
        report = _merge(model, adapter.merge, calibration)
        if folder:
            write_json(folder / "chains.json", plan)
            write_json(folder / "merge.json", report.to_dict())
    initial.merged(model)
    return report


# -- files of a run ----------------------------------------------------------------------------------------------------


def export(
    model: PeftModel,
    folder: Path,
    adapter: MethodOptions,
    calibration: Sequence[Mapping] | None = None,
    tokenizer=None,
) -> MergeReport | None:
    """Merge a connected model permanently, write its files into `folder`, and return the report of the merge.

    - `peft/`: a plain adapter, with which PEFT computes the merged model's logits.
    - `chains.json` and `merge.json`, if the model was connected: its chains of blocks, and the report.
    - `plain_lora/` and `conversion.json`, for a method that the user brings: see `_export_adapter`.
    - `merged/`, with --merge_and_save: the base model with the adapter merged in float32, and the tokenizer, for
      transformers. Without --merge_and_save, a `merged/` of an earlier export is removed.

    Every process must call this function; rank 0 writes the files.
    """
    if (connection := connection_of(base_model(model))) is not None:
        _share_norms(connection)
    report = as_plain(model, adapter, calibration, folder if is_main() else None)
    if is_main():
        if not adapter.merge_and_save:
            remove(folder / "merged")  # of an earlier export, whose adapter was another one
        remove_leftovers(folder / "peft")  # of a process that was killed while writing
        if allocator := rank_allocator(model):
            allocator.read_ranks()
        _export_adapter(model, folder, adapter)
        if adapter.merge_and_save:
            _write_merged(base_model(model), folder / "merged", tokenizer)
    return report


def _export_adapter(model: PeftModel, folder: Path, adapter: MethodOptions) -> None:
    """Write `peft/`, and for a method that the user brings and that is not LoRA, PEFT's conversion to LoRA.

    The LoRA is in `plain_lora/`, or in `peft/` if PEFT does not have the method; `conversion.json` has its error.
    """
    remove(folder / PLAIN_LORA)  # of an earlier export, whose adapter was another one
    (folder / CONVERSION).unlink(missing_ok=True)
    own = METHODS[adapter.name].own and not is_plain(model)
    found = convert(model, adapter.rank) if own else None
    if not has_updates(model):
        export_peft(model, folder / "peft")
    if found is not None:
        converted, error = found
        write_converted(model, converted, folder / ("peft" if has_updates(model) else PLAIN_LORA))
        record = {"rank": adapter.rank, "error": error, "delta_error": delta_error(model)}
        write_json(folder / CONVERSION, record)
        print(f"{METHODS[adapter.name].title}: {conversion_in_words(record)}", flush=True)


def _write_merged(base: PreTrainedModel, directory: Path, tokenizer) -> None:
    with torch.device("meta"):
        plain = type(base)(base.config)
    plain.load_state_dict(merged_state_dict(base), assign=True)
    plain.tie_weights()
    plain.generation_config = getattr(base, "generation_config", None)
    with replacing(directory) as temporary:
        try:
            plain.save_pretrained(str(temporary))
        except SafetensorError as error:  # a full disk, for example
            raise OSError(f"{directory}: {error}") from error
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))


def write_results(
    folder: Path, adapter: MethodOptions, table: dict[str, dict], report: MergeReport | None, **facts
) -> dict:
    """Write `results.json` and return its content.

    The content has `facts` (task, model, sizes, steps, time), the method with its settings, `table` (see
    `merge_table`), and `merge`: the merge method of the exported adapter, None if there was nothing to merge.
    """
    row = METHODS[adapter.name]
    wired = ("shortcut", "pre_num", "head") * row.reads_shortcut
    content = {
        **facts,
        "method": adapter.name,
        **{name: getattr(adapter, name) for name in wired},
        "lora_r": adapter.rank,
        "lora_alpha": adapter.lora_alpha,
        "merge": report.method if report is not None else None,
        "table": table,
    }
    broadcast_from_main(check_held)  # predictions may have taken hours
    if is_main():
        write_json(folder / "results.json", content)
    return content


def table_text(table: Mapping[str, Mapping]) -> str:
    """Return a `merge_table` as text: a line for each row, with its metrics and the mean merge error over blocks."""
    names = [name for name in next(iter(table.values())) if name != "report"]
    lines = [f"  {'':<10}" + "".join(f"{name:>14}" for name in names)]
    for row, figures in table.items():
        errors = [block["error"] for block in figures.get("report", {}).get("blocks", ()) if block["error"] is not None]
        error = f"   error of a block {sum(errors) / len(errors):.2%} on average" if errors else ""
        lines.append(f"  {row:<10}" + "".join(f"{figures[name]:>14.4f}" for name in names) + error)
    return "\n".join(lines)
