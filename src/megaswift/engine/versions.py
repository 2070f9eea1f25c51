"""Whether the engine can run here: packages of versions that it was tested with, and a GPU for each process."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

from megaswift.errors import UserError

NEEDED = ("torch", "megatron-core", "transformers")


def check_versions(names: tuple[str, ...] = NEEDED, package: str = "megaswift") -> None:
    """Raise UserError where one is missing or outside of the range that this package declares; without its metadata nothing is checked."""
    from packaging.requirements import Requirement

    try:
        declared = {found.name: found for found in map(Requirement, metadata.requires(package) or ()) if found.marker is None}
    except metadata.PackageNotFoundError:  # run from a source tree
        return
    problems = []
    for name in names:
        wanted = declared.get(name)
        if wanted is None:
            continue
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{name} {wanted.specifier} is needed, none is installed")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            problems.append(f"{name} {wanted.specifier} is needed, {version} is installed")
    if problems:
        raise UserError(
            "; ".join(problems) + ".", where="environment", fix="pip install --upgrade megaswift, in an environment of its own"
        )


def check_devices(processes: int) -> None:
    """Raise UserError where the GPUs of this machine are fewer than its processes, or torch cannot use them.

    CUDA_VISIBLE_DEVICES="" asks for the CPU.
    """
    import torch

    if torch.cuda.is_available():
        found = torch.cuda.device_count()
        if processes > found:
            raise UserError(
                f"{processes} processes need {processes} GPUs, {found} are visible.",
                where="NPROC_PER_NODE, CUDA_VISIBLE_DEVICES",
                fix=f"NPROC_PER_NODE={found}, or make more GPUs visible",
            )
        return
    if _gpus() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        built = torch.version.cuda
        reason = f"needs a driver for CUDA {built}" if built else "is built without CUDA"
        raise UserError(
            f"this machine has {len(_gpus())} NVIDIA GPUs, but torch {torch.__version__} {reason}.",
            where="environment",
            fix="update the driver or install the build of torch that fits it; CUDA_VISIBLE_DEVICES= (empty) trains on the CPU",
        )


def _gpus() -> list[Path]:
    """Device files of the NVIDIA GPUs that this process may open."""
    return sorted(Path("/dev").glob("nvidia[0-9]*"))
