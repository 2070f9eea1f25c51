"""Datasets of the ModelScope and Hugging Face hubs, through their own libraries and caches."""

from __future__ import annotations

import os
from typing import Any

from megaswift.data.tables import Joined, Source, TableRows
from megaswift.errors import DataError
from megaswift.hf.hubs import offline, probe, read_text_error

HUB_NAMES = {"hf": "Hugging Face", "ms": "ModelScope"}


def load(places: list[tuple[str, str]], subsets: tuple[str, ...], splits: tuple[str, ...], name: str) -> tuple[Source, str]:
    """The rows of the first place that can be loaded, and text that changes when they do.

    Args:
        places: (hub, id) pairs in the order in which they are tried.
        subsets: subsets to join; empty for the hub's default one.
        splits: splits to join.
        name: what the user wrote, for messages.

    Raises:
        DataError: none could be loaded; says what was tried and what happened.
    """
    tried = []
    answers = dict(zip(dict(places), _ask([hub for hub, _ in places]), strict=True))
    for hub, dataset_id in places:
        try:
            loader = _load_hf if hub == "hf" else _load_ms
            tables = [
                loader(dataset_id, subset, split, not answers[hub]) for subset in (subsets or (None,)) for split in splits
            ]
        except ImportError as error:
            tried.append(f"{HUB_NAMES[hub]} {dataset_id}: {error.name} is not installed (pip install {error.name})")
        except Exception as error:  # the hub libraries raise many classes of their own
            why = f" ({answers[hub]}; its cache was searched)" if answers[hub] else ""
            tried.append(f"{HUB_NAMES[hub]} {dataset_id}{why}: {read_text_error(error)}")
        else:
            sources: list[Source] = [TableRows(dataset_id, table) for table, _ in tables]
            joined = Joined(sources) if len(sources) > 1 else sources[0]
            return joined, "|".join([hub, dataset_id, *(mark for _, mark in tables)])
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


def _load_hf(dataset_id: str, subset: str | None, split: str, reachable: bool) -> tuple[Any, str]:
    import datasets
    import huggingface_hub.constants

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    if not reachable:
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        loaded = datasets.load_dataset(dataset_id, subset, split=split)
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before
    return loaded.data.table, f"{subset}/{split}/{loaded._fingerprint}"


def _load_ms(dataset_id: str, subset: str | None, split: str, reachable: bool) -> tuple[Any, str]:
    from modelscope import MsDataset  # type: ignore[import-not-found]

    if not reachable:
        raise ConnectionError("no connection")
    loaded = MsDataset.load(dataset_id, subset_name=subset or "default", split=split)
    loaded = loaded.to_hf_dataset() if hasattr(loaded, "to_hf_dataset") else loaded
    return loaded.data.table, f"{subset}/{split}/{loaded._fingerprint}"
