"""Whether the engine can run here: packages of versions that it was tested with, and a GPU for each process that can what is asked."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

from megaswift.errors import UserError

NEEDED = ("torch", "megatron-core", "transformers")
FP8_CAPABILITY = (8, 9)  # the first with FP8 tensor cores


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
            "; ".join(problems) + ".",
            where="environment",
            fix="pip install --upgrade . in the checkout, in an environment of its own",
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


def check_fp8(processes: int) -> None:
    """Raise UserError where a GPU that a process of this machine will use cannot multiply in FP8."""
    import torch

    fix = "leave --fp8 out"
    if not torch.cuda.is_available():
        raise UserError("--fp8 needs a GPU; this machine has none that torch can use.", where="--fp8", fix=fix)
    for index in range(processes):
        major, minor = torch.cuda.get_device_capability(index)
        if (major, minor) < FP8_CAPABILITY:
            raise UserError(
                f"--fp8 needs GPUs of compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or above, as Ada and Hopper have; "
                f"GPU {index}, {torch.cuda.get_device_name(index)}, has {major}.{minor}.",
                where="--fp8",
                fix=fix,
            )


def has_bf16() -> bool:
    """Whether the GPU computes in bf16; older ones only emulate it, at a fraction of their speed in fp16."""
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)


def _gpus() -> list[Path]:
    """Device files of the NVIDIA GPUs that this process may open."""
    return sorted(Path("/dev").glob("nvidia[0-9]*"))
