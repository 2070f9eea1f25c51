"""A LoRA adapter merged into its base model, tensor by tensor: a Hugging Face folder that any backend can load.

An adapter (https://arxiv.org/abs/2106.09685, in PEFT's form) holds for some matrices W a pair A [r, in] and B [out, r];
the merged matrix is W + scale x B A, with scale = lora_alpha / r, or lora_alpha / sqrt(r) where use_rslora says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from megaswift.errors import DataError, UserError
from megaswift.models.adapters import STACKED_GATES
from megaswift.models.head import SCORE, ScoreHead
from megaswift.weights.hf.folder import ADAPTER_CONFIG, side_files
from megaswift.weights.hf.header import read_header
from megaswift.weights.hf.json_files import read_json
from megaswift.weights.hf.score_head import with_score_head
from megaswift.weights.hf.shards import PlannedTensor
from megaswift.weights.hf.write import write_checkpoint

if TYPE_CHECKING:
    from megaswift.weights.hf.read import HFCheckpoint

T = TypeVar("T")

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_LENGTHS = ".lora_magnitude_vector"
# Kinds of adapter that compute something else than W + scale x B A.
_REFUSED = {
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "lora_bias": "biases in the adapter (lora_bias)",
    "alora_invocation_tokens": "activation by tokens (aLoRA)",
}
# First words of init_lora_weights with which PEFT takes the adapter's first product out of the base, in memory: what is
# trained belongs to weights that no folder holds. "gaussian", "eva" and "orthogonal" leave the base as it is.
_CHANGES_BASE = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA", "loftq": "LoftQ"}
_OWN_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt")


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        base: the model that it was trained on, as its config names it.
        pairs: weight name -> (A, B, scale).
        replaced: weight name -> a whole tensor that takes the place of the base's (modules_to_save).
        lengths: weight name -> the length of each row (DoRA, https://arxiv.org/abs/2402.09353).
    """

    path: Path
    base: str | None
    pairs: dict[str, tuple[Tensor, Tensor, float]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    lengths: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Adapter:
        """Read an adapter directory. Raises UserError for a kind that cannot be merged, DataError for damaged files."""
        config, where = read_json(path / ADAPTER_CONFIG), str(path / ADAPTER_CONFIG)
        _require_plain(config, where, "merged")
        require_weights(path)
        read_header(path / WEIGHTS)  # names what is wrong with a damaged file
        from safetensors.torch import load_file

        base = config.get("base_model_name_or_path")
        return cls._made(path, base if isinstance(base, str) and base else None, load_file(path / WEIGHTS), config, where)

    def added_to(self, name: str, weight: Tensor) -> Tensor:
        """A matrix of the base with the adapter in it, fp32."""
        a, b, scale = self.pairs[name]
        made = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
        if name in self.lengths:
            made *= (self.lengths[name].float() / made.norm(dim=1)).unsqueeze(1)
        return made

    def stored_as(self, names: Mapping[str, str]) -> Adapter:
        """The same under the names that a folder gives to the weights; `names`: of transformers' loaded model -> of the folder."""
        return Adapter(
            self.path, self.base, _renamed(self.pairs, names), _renamed(self.replaced, names), _renamed(self.lengths, names)
        )

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], scale: float, path: Path, base: str) -> Adapter:
        """An adapter whose tensors are at hand, under PEFT's names; `path`: where they are from."""
        rank = next(value.shape[0] for name, value in tensors.items() if ".lora_A." in name)
        return cls._made(path, base, tensors, {"lora_alpha": scale * rank}, str(path))

    @classmethod
    def _made(cls, path: Path, base: str | None, tensors: Mapping[str, Tensor], config: dict[str, Any], where: str) -> Adapter:
        made, halves = cls(path, base), dict[str, dict[str, Tensor]]()
        for name, value in tensors.items():
            plain = name.removeprefix(_PREFIX)
            part = _PART.fullmatch(plain)
            if part is not None:
                halves.setdefault(part.group(1), {})[part.group(2)] = value
            elif plain.endswith(_LENGTHS):
                made.lengths[f"{plain.removesuffix(_LENGTHS)}.weight"] = value
            elif "lora_" in plain:
                raise UserError(f"the adapter has {name}, which cannot be merged.", where=where, fix="merge it with peft first")
            else:
                made.replaced[plain] = value
        for module, half in halves.items():
            made.pairs[f"{module}.weight"] = _pair(module, half, config, str(path / WEIGHTS))
        bare = sorted(set(made.pairs) - set(made.lengths)) if config.get("use_dora") else []
        if bare:
            raise UserError(
                f"the adapter uses DoRA, but has no lengths of rows for {len(bare)} matrices, first {bare[0]}.",
                where=where,
                fix="save it again with peft, or set use_dora to false if it was trained as plain LoRA",
            )
        return made


def _renamed(part: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    return {names.get(name, name): value for name, value in part.items()}


def check_adapter(path: Path) -> None:
    """Raise UserError for an adapter that computes something else than W + scale x B A, DataError for one without weights."""
    _require_plain(read_json(path / ADAPTER_CONFIG), str(path / ADAPTER_CONFIG), "used beside its base")
    require_weights(path)


def _require_plain(config: dict[str, Any], where: str, done: str) -> None:
    """Raise UserError for a kind of adapter that computes something else than W + scale x B A; `done`: what it is wanted for."""
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise UserError(f"the adapter is {config['peft_type']}, not LoRA.", where=where, fix="merge it with peft first")
    for name, what in _REFUSED.items():
        if config.get(name):
            raise UserError(f"the adapter uses {what}, which cannot be {done}.", where=where, fix="merge it with peft first")
    _require_plain_start(config, where)


def _require_plain_start(config: dict[str, Any], where: str) -> None:
    """Raise UserError for an adapter that was trained beside another base than the one that its config names."""
    start = str(config.get("init_lora_weights", True))
    kind = next((what for word, what in _CHANGES_BASE.items() if start.lower().startswith(word)), None)
    if kind is None:
        return
    fix = "merge it with peft first (merge_and_unload), save that model, and give its folder"
    if kind != "LoftQ":
        fix = (
            "store it as a plain LoRA with peft: model.save_pretrained(DIR, path_initial_model_for_weight_conversion=START), "
            "where START holds the adapter as it was before training"
        )
    raise UserError(
        f"the adapter began as {kind} (init_lora_weights {start!r}), which changed the base, so it does not fit the model as published.",
        where=where,
        fix=fix,
    )


def adapter_options(path: Path) -> dict[str, Any]:
    """The options of `swift sft` that an adapter directory decides.

    Raises UserError for an adapter that cannot be trained on: another kind, or one whose layers differ in rank or alpha.
    """
    config, where = read_json(path / ADAPTER_CONFIG), str(path / ADAPTER_CONFIG)
    _require_plain(config, where, "trained on")
    # Where each expert's matrices stand apart a pattern of all gates only says what PEFT makes of them.
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if set(config.get(name) or ()) - {STACKED_GATES}]
    if patterns:
        raise UserError(
            f"the adapter has a {patterns[0]}: its layers differ in {patterns[0].split('_')[0]}.",
            where=where,
            fix="merge it into its base, and begin a new adapter from that",
        )
    names = [name.removeprefix(_PREFIX) for name in load_adapter(path)]
    modules = {_PART.fullmatch(name) for name in names}
    whole = {name.removesuffix(".weight") for name in names if "lora_" not in name}
    return {
        "lora_rank": int(config.get("r", 8)),
        "lora_alpha": float(config.get("lora_alpha", 8)),
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")),
        "target_modules": sorted({match.group(1) for match in modules if match is not None}),
        "modules_to_save": sorted(whole),
    }


def load_adapter(path: Path) -> dict[str, Tensor]:
    """PEFT's name -> value of every tensor of an adapter directory, without the name that PEFT may give an adapter."""
    from safetensors.torch import load_file

    require_weights(path)
    read_header(path / WEIGHTS)  # names what is wrong with a damaged file
    return {name.replace(".default.weight", ".weight"): value for name, value in load_file(path / WEIGHTS).items()}


def require_weights(path: Path) -> None:
    """Raise DataError for an adapter directory without its weights as safetensors."""
    if not (path / WEIGHTS).is_file():
        raise DataError(f"{WEIGHTS} is missing.", where=str(path), fix="save the adapter as safetensors")


def _pair(module: str, half: dict[str, Tensor], config: dict[str, Any], where: str) -> tuple[Tensor, Tensor, float]:
    if set(half) != {"A", "B"} or half["A"].dim() != 2 or half["B"].dim() != 2 or half["A"].shape[0] != half["B"].shape[1]:
        found = {name: list(value.shape) for name, value in half.items()}
        raise DataError(f"lora_A [r, in] and lora_B [out, r] of {module} do not fit: {found}.", where=where)
    rank = half["A"].shape[0]
    alpha = float(_by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    return half["A"], half["B"], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT reads rank_pattern and alpha_pattern."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def merge_adapter(
    adapter: Adapter,
    base: HFCheckpoint,
    out: Path,
    manifest: Callable[[Any], None] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    replace: bool = False,
    sides: Path | None = None,
) -> Path:
    """Write base and adapter as one Hugging Face folder, in the base's dtypes. Memory: the adapter and one tensor a thread.

    Args:
        manifest: called with the written folder's record before it gets its name.
        extra_files: name -> content of more files.
        replace: take the place of what is at `out`.
        sides: directory of config and tokenizer; default: the base's, with a head of scores where the adapter brings one.

    Raises DataError where the adapter does not fit the base.
    """
    _require_fit(adapter, base)
    planned = [
        PlannedTensor(
            name,
            base.dtype(name),
            base.shape(name),
            partial(_merged, adapter, base, name),
            partial(base.prefetch, name),
            partial(base.release, name),
        )
        for name in base.names
        if not (SCORE in adapter.replaced and name in ("lm_head.weight", SCORE))
    ]
    if SCORE in adapter.replaced:  # in place of the base's output layer, or of its head
        head = adapter.replaced[SCORE].to(base.dtype("model.embed_tokens.weight"))
        planned.append(PlannedTensor(SCORE, head.dtype, tuple(head.shape), lambda: head, lambda: None, lambda: None))
        sides = sides or with_score_head(base.path, ScoreHead(head.shape[0]))
    own = {file.name: file for mark in _OWN_FILES for file in adapter.path.glob(mark)}
    if "tokenizer_config.json" not in own:  # a tokenizer is taken as a whole or not at all
        own = {}
    files = {file.name: file for file in (base.side_files() if sides is None else side_files(sides))} | own
    write_checkpoint(out, planned, list(files.values()), extra_files=extra_files, before_publish=manifest, replace=replace)
    return out


def _require_fit(adapter: Adapter, base: HFCheckpoint) -> None:
    """Raise DataError unless every tensor of the adapter has its place in the base."""
    wanted: dict[str, tuple[int, ...]] = {name: (b.shape[0], a.shape[1]) for name, (a, b, _) in adapter.pairs.items()}
    wanted |= {name: tuple(value.shape) for name, value in adapter.replaced.items() if name != SCORE}
    wrong = [
        f"{name} {list(shape)}: the base has {list(base.shape(name)) if name in base.table else 'no such tensor'}"
        for name, shape in wanted.items()
        if name not in base.table or base.shape(name) != shape
    ]
    if wrong or not wanted:
        raise DataError(
            f"the adapter does not fit the model: {'; '.join(wrong[:5]) or 'it holds no tensor'}.",
            where=f"{adapter.path} and {base.path}",
            fix=f"name the model that it was trained on ({adapter.base or 'its config does not say'}) as --model_id_or_path",
        )


def _merged(adapter: Adapter, base: HFCheckpoint, name: str) -> Tensor:
    if name in adapter.replaced:
        return adapter.replaced[name].to(base.dtype(name))
    weight = base.tensor(name)
    if name not in adapter.pairs:
        return weight
    return adapter.added_to(name, weight).to(weight.dtype)
