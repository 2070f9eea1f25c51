"""What a machine is like for training: each fact with its consequence, and the one command that mends it."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megaswift.errors import MegaswiftError
from megaswift.launch import agent
from megaswift.launch.versions import NEEDED, check_devices
from megaswift.store.cache import cache_root
from megaswift.terminal import shown

GIB = 1 << 30
PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "triton",
    "flash-attn-4",
    "vllm",
    "flash-linear-attention",
    "peft",
    "datasets",
)
# Packages whose own demands break runs or inference when they are not met, and what breaks.
STRICT = {
    "torchvision": "transformers fails while it is imported",
    "torchaudio": "transformers fails while it is imported",
    "vllm": "inference by vLLM fails",
    "flash-attn-4": "attention falls back to a slower kernel",
    "transformers": "models are not loaded",
    "peft": "exported adapters are not proven",
}
SMALL_SHM, FEW_FILES, SLOW_DISK, LITTLE_DISK = GIB, 4096, 100e6, 10 * GIB
PROBE_BYTES = 64 << 20
HOPPER = (9, 0)  # compute capability from which FlashAttention 4 has kernels


@dataclass(frozen=True)
class Finding:
    """One fact.

    Attributes:
        state: "ok", "note" (a run starts, and something is slower or missing), or "bad" (no run would start).
        found: what is there; consequence: what that means; fix: the command that mends it.
    """

    name: str
    state: str
    found: str
    consequence: str = ""
    fix: str = ""


def checks(output: Path) -> Iterator[Finding]:
    """Every check of this machine, in the order in which they are told; no network.

    Args:
        output: where runs would go.
    """
    for check in (
        _python, _packages, _together, _environment, _gpus, _nccl, _shared_memory, _limits, _host, lambda: _disk(output), _caches,
        lambda: _clock(output),
    ):  # fmt: skip
        try:
            yield from check()
        except Exception as error:  # a check that fails is a finding, not the end of the others
            name = getattr(check, "__name__", "check").strip("_<>")
            yield Finding(name, "note", f"could not be looked at: {type(error).__name__}: {error}"[:200])


def _python() -> Iterator[Finding]:
    good = (3, 11) <= sys.version_info[:2] <= (3, 12) and sys.platform == "linux"
    yield Finding(
        "Python", "ok" if good else "note", f"{platform.python_version()}, {platform.system()} {platform.release()}",
        "" if good else "nothing was tested with it", "" if good else "use Python 3.11 or 3.12 on Linux",
    )  # fmt: skip


def version_of(name: str) -> str | None:
    """The installed version of a package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def declared(package: str = "megaswift") -> dict[str, tuple[Any, str]]:
    """Package -> (the versions that we ask for, the extra that brings it); empty where we are run from a source tree."""
    from packaging.requirements import Requirement

    found: dict[str, tuple[Any, str]] = {}
    try:
        lines = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return {}
    for one in map(Requirement, lines):
        extra = str(one.marker).rpartition("extra == ")[2].strip("\"'") if one.marker and "extra" in str(one.marker) else ""
        if extra != "dev":
            found.setdefault(one.name, (one.specifier, extra))
    return found


def _packages() -> Iterator[Finding]:
    """Versions outside of the tested range, and what is missing on this machine."""
    known, gpu = declared(), _has_gpu()
    for name in PACKAGES:
        version = version_of(name)
        wanted, extra = known.get(name, ("", "" if name in NEEDED else "gpu"))
        needed = name in NEEDED or not extra
        install = f"pip install '.[{extra}]'" if extra else "pip install --upgrade ."
        if version is None:
            if needed:
                yield Finding(name, "bad", "not installed", "nothing can be trained", install)
            elif name in _MISSED and (name == "vllm" or (gpu and _can_use(name))):
                yield Finding(
                    name, "note" if gpu else "ok", "not installed", _MISSED[name] if gpu else "", install if gpu else ""
                )
            continue
        fits = not wanted or wanted.contains(version, prereleases=True)
        yield Finding(
            name, "ok" if fits else "bad" if name in NEEDED else "note", version if fits else f"{version}, tested with {wanted}", "" if fits
            else "no run starts with it" if name in NEEDED else "nothing was tested with it", "" if fits else install,
        )  # fmt: skip


_MISSED = {
    "triton": "no fused kernel runs: PyTorch's own operations take their place, which is slower (by how much was not measured)",
    "flash-attn-4": "attention takes 1.1 times (whole rows) to 1.7 times (packed rows) as long on an H100",
    "vllm": "answers come from transformers, one batch at a time",
}


def slow_paths() -> Iterator[str]:
    """A line for each package whose kernels this machine's card could run and does not have, with its price; nothing on a CPU."""
    if not _has_gpu():
        return
    for one in _packages():
        if one.state == "note" and one.name in ("triton", "flash-attn-4"):
            yield f"{one.name} {one.found}: {one.consequence}; {one.fix}"


def _can_use(name: str) -> bool:
    """Whether the first card runs what a package brings."""
    import torch

    return name != "flash-attn-4" or torch.cuda.get_device_capability(0) >= HOPPER


def _together(names: dict[str, str] | None = None) -> Iterator[Finding]:
    """Packages that ask for other versions of each other than are installed."""
    from packaging.requirements import Requirement

    wrong = []
    for name, breaks in (names or STRICT).items():
        with contextlib.suppress(metadata.PackageNotFoundError):
            for one in map(Requirement, metadata.requires(name) or []):
                version = version_of(one.name)
                if version is None or (one.marker is not None and not one.marker.evaluate({"extra": ""})):
                    continue
                if one.specifier and not one.specifier.contains(version, prereleases=True):
                    wrong.append(
                        Finding(
                            f"{name} with {one.name}",
                            "note",
                            f"{name} {version_of(name)} asks for {one.name}{one.specifier}, {version} is installed",
                            breaks,
                            f"pip install '{one.name}{one.specifier}'"
                            if one.name not in NEEDED
                            else f"pip install --upgrade {name}",
                        )
                    )
    yield from wrong or [Finding("versions together", "ok", "no package asks for another version of one that is here")]


def _environment() -> Iterator[Finding]:
    """Variables that a run reads."""
    try:
        place = agent.cluster()
        yield Finding("processes", "ok", f"{place.processes} here, machines: {place.machines}")
        check_devices(place.processes)
    except MegaswiftError as error:
        yield Finding("environment", "bad", error.what, "no run starts", error.fix)


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _gpus() -> Iterator[Finding]:
    import torch

    if not _has_gpu():
        yield Finding("GPUs", "ok", "none that torch can use: runs are on the CPU, over gloo")
        return
    with contextlib.suppress(OSError, IndexError):
        line = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
        yield Finding("driver", "ok", f"{line.partition(':')[2].strip()[:80]}; torch is built for CUDA {torch.version.cuda}")
    names = set()
    for index in range(torch.cuda.device_count()):
        told = torch.cuda.get_device_properties(index)
        names.add(told.name)
        free, total = torch.cuda.mem_get_info(index)
        used = total - free
        busy = used > 0.05 * total
        yield Finding(
            f"GPU {index}", "note" if busy else "ok", f"{told.name}, {total / GIB:.1f} GiB, {free / GIB:.1f} free, capability {told.major}.{told.minor}",
            "another program holds memory of it: runs that fill the card end out of memory" if busy else "",
            "nvidia-smi --query-compute-apps=pid,used_memory --format=csv" if busy else "",
        )  # fmt: skip
        if (told.major, told.minor) < (8, 0):
            yield Finding(
                f"GPU {index}", "note", "has no bf16", "runs are in fp16, with a loss scale", "use an Ampere card or newer"
            )
    if len(names) > 1:
        yield Finding(
            "cards", "note", f"of several kinds: {', '.join(sorted(names))}", "the slowest one sets the pace, the smallest one the size",
            "CUDA_VISIBLE_DEVICES=... (those of one kind)",
        )  # fmt: skip


def _nccl() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    if _has_gpu():
        if not dist.is_nccl_available():
            yield Finding("NCCL", "bad", "torch was built without it", "several GPUs cannot be used", "pip install --upgrade .")
            return
        version: Any = torch.cuda.nccl.version()
        yield Finding("NCCL", "ok", ".".join(map(str, version)))
    elif not dist.is_gloo_available():
        yield Finding("gloo", "bad", "torch was built without it", "no run starts", "pip install --upgrade .")
    else:
        yield Finding("gloo", "ok", "in torch")


def _shared_memory(place: Path = Path("/dev/shm")) -> Iterator[Finding]:
    if not place.is_dir():
        yield Finding(
            "shared memory",
            "note",
            f"{place} is not there",
            "NCCL between GPUs of a machine, and workers of vLLM, need it",
            f"mount -t tmpfs tmpfs {place}",
        )
        return
    usage = shutil.disk_usage(place)
    small = usage.free < SMALL_SHM
    yield Finding(
        "shared memory", "note" if small else "ok", f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free in {place}",
        "NCCL between GPUs of a machine may fail at its first message" if small else "",
        "docker run --shm-size=16g ... (or: mount -o remount,size=16g /dev/shm)" if small else "",
    )  # fmt: skip


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= soft < FEW_FILES
    yield Finding(
        "open files", "note" if few else "ok", f"at most {soft}", "folders of many shards, and many ranks, may meet it" if few else "",
        f"ulimit -n {max(FEW_FILES, min(hard, 65536) if hard > 0 else 65536)}" if few else "",
    )  # fmt: skip
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    fabric = Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir())
    if fabric and locked != resource.RLIM_INFINITY:
        yield Finding(
            "locked memory", "note", f"at most {locked / 2**20:.0f} MiB", "NCCL over InfiniBand fails", "ulimit -l unlimited"
        )


def _host() -> Iterator[Finding]:
    values = {}
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        values[name] = int(value.split()[0]) * 1024
    total, available = values["MemTotal"], values.get("MemAvailable", 0)
    limit = Path("/sys/fs/cgroup/memory.max")
    inside = ""
    with contextlib.suppress(OSError, ValueError):
        inside = f", {int(limit.read_text()) / GIB:.1f} in this container"
    little = available < 2 * GIB
    yield Finding(
        "host memory", "note" if little else "ok", f"{available / GIB:.1f} of {total / GIB:.1f} GiB available{inside}; {len(os.sched_getaffinity(0))} cores",
        "loading a model may end out of memory" if little else "", "ps aux --sort=-rss | head" if little else "",
    )  # fmt: skip


def _disk(output: Path) -> Iterator[Finding]:
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if not _writable(place):
        yield Finding(
            "disk",
            "bad",
            f"{shown(place)} cannot be written",
            "no run starts with this --output_dir",
            f"chmod u+w {place}, or --output_dir DIR",
        )
        return
    speed, file = 0.0, place / f".megaswift-{uuid.uuid4().hex[:8]}"
    try:
        data = os.urandom(PROBE_BYTES)
        began = time.perf_counter()
        with file.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        speed = PROBE_BYTES / (time.perf_counter() - began)
    finally:
        file.unlink(missing_ok=True)
    hours = 106.6e9 / speed / 60
    slow, little = speed < SLOW_DISK, free < LITTLE_DISK
    told = [f"a checkpoint of a 7B model takes {hours:.0f} min"] * slow + [
        "a checkpoint of more than half a billion parameters may not fit"
    ] * little
    yield Finding(
        "disk", "note" if slow or little else "ok", f"{speed / 1e6:,.0f} MB/s written, {free / GIB:,.1f} GiB free in {shown(place)}", "; ".join(told),
        "--output_dir on another disk" if told else "",
    )  # fmt: skip


def _writable(place: Path) -> bool:
    file = place / f".megaswift-{uuid.uuid4().hex[:8]}"
    try:
        file.touch()
        file.unlink()
    except OSError:
        return False
    return True


def _caches() -> Iterator[Finding]:
    home = Path.home()
    places: dict[str, tuple[Path, str, str, str]] = {
        "cache": (cache_root(), "bad", "no data can be prepared", "MEGASWIFT_CACHE=DIR"),
        "Hugging Face cache": (
            Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or home / ".cache" / "huggingface"), "note", "nothing can be fetched from there",
            "HF_HOME=DIR",
        ),
        "ModelScope cache": (
            Path(os.environ.get("MODELSCOPE_CACHE") or home / ".cache" / "modelscope"), "note", "nothing can be fetched from there", "MODELSCOPE_CACHE=DIR"
        ),
    }  # fmt: skip
    if _has_gpu():
        triton = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton")
        places["Triton's cache"] = (triton, "note", "kernels are compiled anew in every run", "TRITON_CACHE_DIR=DIR")
    for name, (place, state, consequence, fix) in places.items():
        there = next(path for path in (place.expanduser().absolute(), *place.expanduser().absolute().parents) if path.exists())
        good = there.is_dir() and _writable(there)
        yield Finding(
            name,
            "ok" if good else state,
            shown(place) if good else f"{shown(place)} cannot be written",
            "" if good else consequence,
            "" if good else fix,
        )


def _clock(output: Path, now: Callable[[], float] = time.time) -> Iterator[Finding]:
    """The system's clock beside that of the disk, and beside the time at which this very file was installed."""
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    off = 0.0
    with contextlib.suppress(OSError):
        file = place / f".megaswift-{uuid.uuid4().hex[:8]}"
        file.touch()
        off = file.stat().st_mtime - now()
        file.unlink()
    behind = Path(__file__).stat().st_mtime - now() > 3600
    wrong = behind or abs(off) > 30
    yield Finding(
        "clock", "note" if wrong else "ok", f"{time.strftime('%Y-%m-%d %H:%M:%S %Z', time.localtime(now()))}"
        + (f", {off:+.0f} s off the disk's" if abs(off) > 30 else ""),
        "certificates of hubs are refused, and files seem newer than they are" if wrong else "", "sudo timedatectl set-ntp true" if wrong else "",
    )  # fmt: skip


__all__ = ["Finding", "checks", "declared", "slow_paths", "version_of"]
