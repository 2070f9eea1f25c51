"""`swift experts`: what the routers of a model with experts do with given rows, without training; or of two models, side by side.

swift experts --model_id_or_path DIR --dataset rows.jsonl#500
swift experts --model_id_or_path TUNED --compare BASE --dataset rows.jsonl#500 --output page/
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaswift.commands.data import model_directory, template_of_folder
from megaswift.config.options import ExpertsArguments, parse
from megaswift.data.batches import EvalBatches
from megaswift.data.encode import prepare
from megaswift.errors import UserError
from megaswift.hub.locate import locate
from megaswift.inference.loading import pick_dtype
from megaswift.megatron import compat
from megaswift.models import family_of
from megaswift.report.experts import load_moved, models_page
from megaswift.store.cache import cache_root
from megaswift.store.publish import put
from megaswift.terminal import console, say, shown
from megaswift.weights.hf.config import load_config
from megaswift.weights.hf.tokenizer import require_embedding_rows, table_rows
from megaswift.weights.load_hf import is_hf_folder
from megaswift.weights.torch_dtypes import FLAGS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

JSON, PAGE = "experts.json", "experts.html"
ROWS = 8  # samples of one forward pass


def experts_main(args: ExpertsArguments | list[str]) -> dict[str, Any]:
    """Print the load of experts layer by layer, and return it as experts.json has it.

    Raises UserError for a model without experts, and for two whose layers differ.
    """
    args = parse(ExpertsArguments, args) if isinstance(args, list) else args
    for name in {"val_dataset", "dataset_test_ratio"} & args.explicit():
        raise UserError(
            f"--{name} means nothing here: nothing is held out.",
            where=f"--{name}",
            fix="leave it out; --dataset names all rows",
        )
    folder = model_directory(args)
    config = _with_experts(folder)
    other = None if args.compare is None else _other(args.compare, config)
    template, table = template_of_folder(args, folder), table_rows(folder)
    data = prepare(args.changed(dataset_test_ratio=0.0), template, cache_dir=cache_root(), table=table)
    require_embedding_rows(template.vocabulary, table, folder)

    compat.quiet()  # again: what was imported since has put the filters of warnings back
    from megaswift.train.expert_health import line, summary
    from megaswift.train.expert_load import load_of

    size = min(ROWS, len(data.train))
    batches = EvalBatches(
        data.train, micro_batch_size=size, global_batch_size=size, dp_rank=0, dp_size=1, pad_id=template.pad_id
    )
    dtype = FLAGS[pick_dtype(args.dtype)]
    tokens = f"{len(data.train):,} rows, {int(data.train.lengths.sum()):,} tokens"
    before, weights = (None, None) if other is None else load_of(other, batches, dtype)
    layers, _ = load_of(folder, batches, dtype, weights)
    found: dict[str, Any] = {"model": shown(folder), "rows": tokens, "layers": layers}
    if other is not None:
        found |= {"compared": shown(other), "before": before}
    row = summary(layers)
    if other is None:
        del row["router_drift"]  # from nothing
    _print(found, line(row))
    if args.output:
        place = Path(args.output).expanduser()
        place.mkdir(parents=True, exist_ok=True)
        put(place / JSON, json.dumps(found, ensure_ascii=False) + "\n", durable=False)
        put(place / PAGE, models_page(found), durable=False)
        say(f"page: {shown(place / PAGE)}")
    return found


def _with_experts(folder: Path) -> PreTrainedConfig:
    config = load_config(folder)
    if not any(kind.experts for kind in family_of(config.model_type, str(folder)).layers(config)):
        raise UserError(f"{config.model_type} has no experts.", where=shown(folder), fix="name a model that has some")
    return config


def _other(name: str, config: PreTrainedConfig) -> Path:
    """The folder of --compare. Raises UserError where its layers or experts are others."""
    folder = Path(name).expanduser()
    folder = folder if is_hf_folder(folder) else locate(None, name, None).path
    theirs = _with_experts(folder)
    ours = [kind.experts for kind in family_of(config.model_type).layers(config)]
    if theirs.model_type != config.model_type or ours != [kind.experts for kind in family_of(theirs.model_type).layers(theirs)]:
        raise UserError(
            "its layers have other experts, so that nothing can be compared.",
            where=f"--compare {name}",
            fix="name a model of the same shape",
        )
    return folder


def _print(found: dict[str, Any], told: str) -> None:
    from rich.table import Table

    from megaswift.train.expert_health import load_entropy

    table = Table(title=f"{found['model']}: experts on {found['rows']}", title_justify="left")
    before = {layer["layer"]: layer["load"] for layer in found.get("before") or []}
    for name in ("layer", "idle", "busiest", "evenness", "router entropy", *(("load moved", "router moved") if before else ())):
        table.add_column(name, justify="right")
    for layer in found["layers"]:
        load, total = layer["load"], max(sum(layer["load"]), 1)
        cells = [
            str(layer["layer"]), str(sum(value == 0 for value in load)), f"{max(load) * len(load) / total:.2f} x",
            f"{load_entropy(load):.3f}", f"{layer['router_entropy']:.3f}",
        ]  # fmt: skip
        if before:
            cells += [load_moved(before.get(layer["layer"]), load), f"{100 * layer['drift']:.2f} %"]
        table.add_row(*cells)
    console().print(table)
    say(told)
