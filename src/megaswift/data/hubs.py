"""Datasets of the ModelScope and Hugging Face hubs, through their own libraries and caches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from megaswift.data.tables import Joined, Source, TableRows
from megaswift.errors import DataError
from megaswift.hub.remote import offline, probe, read_text_error

HUB_NAMES = {"hf": "Hugging Face", "ms": "ModelScope"}


Places = Sequence[tuple[str, str]]


def load(places: Places, subsets: tuple[str, ...], splits: tuple[str, ...], name: str) -> tuple[Source, str]:
    """The rows of the first place that can be loaded, and text that changes when they do.

    Args:
        places: (hub, id) pairs in the order in which they are tried.
        subsets: subsets to join; empty for the hub's default one.
        splits: splits to join.
        name: what the user wrote, for messages.

    Raises:
        DataError: none could be loaded; says what was tried and what happened.
    """
    (hub, dataset_id), parts = _first(places, subsets, splits, name, streaming=False)
    sources: list[Source] = [TableRows(dataset_id, part.data.table) for part in parts]
    joined = Joined(sources) if len(sources) > 1 else sources[0]
    return joined, "|".join([hub, dataset_id, *subsets, *splits, *(part._fingerprint for part in parts)])


def stream(places: Places, subsets: tuple[str, ...], splits: tuple[str, ...], name: str) -> tuple[list[Any], str]:
    """The same as iterables of rows, fetched while they are read. Of a stream only its name is known beforehand."""
    (hub, dataset_id), parts = _first(places, subsets, splits, name, streaming=True)
    return parts, "|".join([hub, dataset_id, *subsets, *splits])


def _first(
    places: Places, subsets: tuple[str, ...], splits: tuple[str, ...], name: str, streaming: bool
) -> tuple[Any, list[Any]]:
    """The first place that can be loaded, and its parts."""
    tried = []
    answers = dict(zip(dict(places), _ask([hub for hub, _ in places]), strict=True))
    for hub, dataset_id in places:
        loader = _load_hf if hub == "hf" else _load_ms
        wanted = [(subset, split) for subset in (subsets or (None,)) for split in splits]
        try:
            parts = [loader(dataset_id, subset, split, not answers[hub], streaming) for subset, split in wanted]
        except ImportError as error:
            tried.append(f"{HUB_NAMES[hub]} {dataset_id}: {error.name} is not installed (pip install {error.name})")
        except Exception as error:  # the hub libraries raise many classes of their own
            why = f" ({answers[hub]}; its cache was searched)" if answers[hub] else ""
            tried.append(f"{HUB_NAMES[hub]} {dataset_id}{why}: {read_text_error(error)}")
        else:
            return (hub, dataset_id), parts
    raise DataError(
        f"dataset {name} could not be loaded. Tried: " + "; ".join(tried) + ".",
        where=f"--dataset {name}",
        fix="check the name and the connection, or download its files and give their path",
    )


def _ask(hubs: list[str]) -> list[str]:
    """For each hub "" if it answers, else why not: a missing connection shows in seconds, not after minutes of retries."""
    if offline() or os.environ.get("HF_DATASETS_OFFLINE"):
        return ["offline by HF_HUB_OFFLINE"] * len(hubs)
    addresses = {
        "hf": os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
        "ms": f"https://{os.environ.get('MODELSCOPE_DOMAIN', 'www.modelscope.cn')}",
    }
    return probe([addresses[hub] for hub in hubs])


def _load_hf(dataset_id: str, subset: str | None, split: str, reachable: bool, streaming: bool) -> Any:
    import datasets
    import huggingface_hub.constants

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    if not reachable:
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(dataset_id, subset, split=split, streaming=streaming)
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def _load_ms(dataset_id: str, subset: str | None, split: str, reachable: bool, streaming: bool) -> Any:
    from modelscope import MsDataset

    if not reachable:
        raise ConnectionError("no connection")
    loaded = MsDataset.load(dataset_id, subset_name=subset or "default", split=split, use_streaming=streaming)
    return loaded.to_hf_dataset() if hasattr(loaded, "to_hf_dataset") else loaded
