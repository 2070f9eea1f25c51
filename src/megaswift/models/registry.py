"""Registered models: the name a user types, both hub ids, the chat template and the family, one model a line of registry.tsv.

Names and ModelScope ids are those of ms-swift 2.x; models that came later follow the same pattern. Where the tokenizers of
chat models bring their templates the table names that of base models. Nothing heavy is imported here, so that the command
line can look up names at once. Qwen2.5-Math's own template asks for the steps, so ours does too (ms-swift 2.x gave it the text of
qwen2_5).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megaswift.errors import UserError, nearest

# System message that a template adds when the user gives none; a template that is not here adds none.
TEMPLATE_SYSTEMS = {
    "qwen": "You are a helpful assistant.",
    "qwen2_5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "qwen2_5_math": "Please reason step by step, and put your final answer within \\boxed{}.",
    "smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
}
BASE_TEMPLATE = "default-generation"  # what models without instruction tuning have


@dataclass(frozen=True)
class ModelType:
    """One registered model.

    Args:
        name: what `--model_type` takes.
        ms_id: id on ModelScope.
        hf_id: id on the Hugging Face hub.
        template: name of the chat template.
        family: `model_type` in the config.json of this model.
    """

    name: str
    ms_id: str
    hf_id: str
    template: str
    family: str

    @property
    def default_system(self) -> str | None:
        """The system message that the template adds by itself, or None."""
        return TEMPLATE_SYSTEMS.get(self.template)


def _registered() -> tuple[ModelType, ...]:
    """The rows of the table, in its order."""
    lines = (Path(__file__).parent / "registry.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = (line.split("\t") for line in lines)
    return tuple(ModelType(name, ms_id, hf_id, template, family) for name, family, template, ms_id, hf_id in rows)


_REGISTERED = _registered()

MODEL_TYPES: dict[str, ModelType] = {entry.name: entry for entry in _REGISTERED}

# Second spellings, after the name on the hub. The name that a user typed is the name that directories get.
_ALIASES = {
    "mixtral-8x7b": "mixtral-moe-7b",
    "mixtral-8x7b-instruct": "mixtral-moe-7b-instruct",
    "mistral-7b-v0.1": "mistral-7b",
    "mistral-7b-v0.2": "mistral-7b-v2",
    "mistral-7b-instruct-v0.1": "mistral-7b-instruct",
    "mistral-7b-instruct-v0.2": "mistral-7b-instruct-v2",
    "mistral-7b-instruct-v0.3": "mistral-7b-instruct-v3",
}
for _alias, _name in _ALIASES.items():
    _entry = MODEL_TYPES[_name]
    MODEL_TYPES[_alias] = ModelType(_alias, _entry.ms_id, _entry.hf_id, _entry.template, _entry.family)


def model_type(name: str) -> ModelType:
    """The registered model of that name. Raises UserError naming the nearest ones."""
    if name not in MODEL_TYPES:
        raise UserError(
            f"model_type {name!r} is not registered.",
            where="--model_type",
            fix=f"nearest: {nearest(name, list(MODEL_TYPES))}; for any other model give --model_id_or_path DIR",
        )
    return MODEL_TYPES[name]


def by_hub_id(hub_id: str) -> ModelType | None:
    """The registered model with that ModelScope or Hugging Face id (case does not matter), or None."""
    wanted = hub_id.lower()
    return next((entry for entry in _REGISTERED if wanted in (entry.ms_id.lower(), entry.hf_id.lower())), None)


def type_for_directory(path: Path | str) -> str | None:
    """The model_type that a model directory tells by itself, or None.

    Asked in this order: sft_args.json and export_args.json (then any name is taken), `_name_or_path` in config.json, the
    name of the directory: a registered name (also with "-hf" behind it), the name of a hub repository, or its place in a
    hub cache. The last three count only where config.json has the family of the registered model.
    """
    directory = Path(path)
    for file in ("sft_args.json", "export_args.json"):
        told = _read_json(directory / file).get("model_type")
        if isinstance(told, str) and told:
            return told
    config = _read_json(directory / "config.json")
    for guess in _guesses(directory, config):
        if guess is not None and guess.family == config.get("model_type"):
            return guess.name
    return None


def _guesses(directory: Path, config: dict) -> list[ModelType | None]:
    """Registered models that the config or the name of a directory points to, best first."""
    guesses: list[ModelType | None] = []
    told = config.get("_name_or_path")
    if isinstance(told, str):
        guesses.append(by_hub_id(told))
    name = repository_name(directory)
    guesses += [MODEL_TYPES.get(name.lower()), MODEL_TYPES.get(name.lower().removesuffix("-hf"))]
    repositories = {
        part.lower(): entry for entry in _REGISTERED for part in (entry.ms_id.split("/")[1], entry.hf_id.split("/")[1])
    }
    return [*guesses, repositories.get(name.lower())]


def repository_name(directory: Path | str) -> str:
    """The name of a model directory; inside a hub cache, that of the repository.

    `.../models--Qwen--Qwen2.5-7B/snapshots/<sha>` and `.../Qwen2___5-7B` both give "Qwen2.5-7B".
    """
    place = Path(directory).absolute()
    cached = place.parent.name == "snapshots"
    name = place.parent.parent.name if cached else place.name
    return (name.split("--")[-1] if cached or name.startswith("models--") else name).replace("___", ".")


def _read_json(path: Path) -> dict:
    """The object in a JSON file, or an empty one: a guess must not fail where the reader will report the file anyway."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
