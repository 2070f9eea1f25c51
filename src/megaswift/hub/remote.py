"""The two model hubs: where their caches keep a model, whether they can be reached, and fetching a model from them."""

from __future__ import annotations

import http.client
import importlib.util
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megaswift.errors import first_line

# What is fetched: weights as safetensors, and the side files. Pickles and code are never fetched.
FETCHED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*"]
NOT_FETCHED = [
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.py", "*.gguf", "*.onnx", "*.h5", "*.msgpack",
    "consolidated*", "original/*", "*/*",
]  # fmt: skip
PROBE_SECONDS = 4.0  # for one answer of a hub; both are asked at the same time


@dataclass(frozen=True)
class Hub:
    """One model hub.

    Args:
        key: short name, as in `HF::` and `MS::` prefixes, lower case.
        title: name for people.
        cached: model id, revision -> directories in which a fetched copy may lie, best first, each with its revision.
        fetch: model id, revision -> directory; raises whatever the hub's library raises.
        address: model id, revision -> address that answers when the hub can be reached.
        package: Python package that fetches.
    """

    key: str
    title: str
    cached: Callable[[str, str | None], Iterator[tuple[Path, str | None]]]
    fetch: Callable[[str, str | None], Path]
    address: Callable[[str, str | None], str]
    package: str


def _hf_cache() -> Path:
    """The Hugging Face cache, as huggingface_hub finds it."""
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(os.environ.get("HF_HOME", base / "huggingface")).expanduser() / "hub"


def _hf_cached(model_id: str, revision: str | None) -> Iterator[tuple[Path, str | None]]:
    """`models--owner--name/snapshots/<sha>`; a branch or tag name is looked up in `refs`."""
    place = _hf_cache() / f"models--{model_id.replace('/', '--')}"
    wanted = revision or "main"
    reference = place / "refs" / wanted
    if reference.is_file():
        wanted = reference.read_text(encoding="utf-8").strip()
    snapshot = place / "snapshots" / wanted
    if snapshot.is_dir():
        yield snapshot, wanted


def _hf_fetch(model_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            model_id, revision=revision, allow_patterns=FETCHED, ignore_patterns=NOT_FETCHED, library_name="megaswift"
        )
    )


def _hf_address(model_id: str, revision: str | None) -> str:
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{host}/api/models/{model_id}" + (f"/revision/{revision}" if revision else "")


def _ms_roots() -> list[Path]:
    """Where the versions of the ModelScope library keep their cache."""
    if "MODELSCOPE_CACHE" in os.environ:
        base = Path(os.environ["MODELSCOPE_CACHE"]).expanduser()
    else:
        base = Path("~/.cache/modelscope").expanduser()
    return [base, base / "hub"]


def _ms_cached(model_id: str, revision: str | None) -> Iterator[tuple[Path, str | None]]:
    """All layouts: `models/owner--name/snapshots/<revision>`, `models/owner/name` and `owner/name`, dots as ___ or not.

    Owner and name are compared without case, because ModelScope renamed qwen to Qwen.
    """
    owner, name = model_id.split("/", 1)
    for root in _ms_roots():
        for place in _children(root / "models", f"{owner}--{name}"):
            for wanted in [revision] if revision else ["master", "main"]:
                if (place / "snapshots" / wanted).is_dir():
                    yield place / "snapshots" / wanted, wanted
        for parent in (root / "models", root):
            for folder in _children(parent, owner):
                for place in _children(folder, name, name.replace(".", "___")):
                    found = _ms_revision(place)
                    if revision in (None, found):
                        yield place, found


def _children(parent: Path, *names: str) -> list[Path]:
    """Directories in `parent` with one of the names, without case."""
    wanted = {name.lower() for name in names}
    try:
        return sorted(item for item in parent.iterdir() if item.name.lower() in wanted and item.is_dir())
    except OSError:
        return []


def _ms_revision(place: Path) -> str | None:
    """The revision that ModelScope notes beside a model (`.mv`: "Revision:master,CreatedAt:...")."""
    try:
        note = (place / ".mv").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    return note.partition("Revision:")[2].partition(",")[0].strip() or None


def _ms_fetch(model_id: str, revision: str | None) -> Path:
    from modelscope import snapshot_download

    return Path(snapshot_download(model_id, revision=revision, allow_patterns=FETCHED, ignore_patterns=NOT_FETCHED))


def _ms_address(model_id: str, revision: str | None) -> str:
    return f"https://{os.environ.get('MODELSCOPE_DOMAIN', 'www.modelscope.cn')}/api/v1/models/{model_id}"


HUGGING_FACE = Hub("hf", "Hugging Face", _hf_cached, _hf_fetch, _hf_address, "huggingface_hub")
MODELSCOPE = Hub("ms", "ModelScope", _ms_cached, _ms_fetch, _ms_address, "modelscope")


def hubs() -> tuple[Hub, Hub]:
    """Both hubs, the preferred one first: ModelScope, or Hugging Face where USE_HF=1."""
    prefer_hf = os.environ.get("USE_HF", "").strip().lower() in ("1", "true", "yes", "on")
    return (HUGGING_FACE, MODELSCOPE) if prefer_hf else (MODELSCOPE, HUGGING_FACE)


def offline() -> bool:
    """Whether the user forbids the network (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on") for name in names)


def installed(hub: Hub) -> bool:
    """Whether the package that fetches from a hub is there."""
    return importlib.util.find_spec(hub.package) is not None


def probe(addresses: list[str], seconds: float = PROBE_SECONDS) -> list[str]:
    """For each address "" if its host answers (with any status), else why not. Takes at most about `seconds` in all.

    The threads are daemons: a name server that never answers cannot be interrupted, only left behind.
    """
    answers = [f"no answer within {seconds:g} s"] * len(addresses)

    def ask(number: int) -> None:
        try:
            request = urllib.request.Request(addresses[number], headers={"User-Agent": "megaswift"})
            with urllib.request.urlopen(request, timeout=seconds):
                answers[number] = ""
        except urllib.error.HTTPError:
            answers[number] = ""
        except urllib.error.URLError as error:
            # a certificate that Python does not know may be known to the hub's library
            answers[number] = "" if "CERTIFICATE" in str(error.reason).upper() else str(error.reason)
        except (OSError, ValueError, http.client.HTTPException) as error:
            answers[number] = str(error) or type(error).__name__

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(len(addresses))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 0.5)
    return list(answers)


def read_text_error(error: BaseException) -> str:
    """The first line of a library's error, shortened, for a list of what was tried."""
    return f"{type(error).__name__}: {first_line(error) if str(error).strip() else ''}"[:200]
