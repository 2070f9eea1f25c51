"""Whether the packages that the engine stands on have versions that it was tested with."""

from __future__ import annotations

from importlib import metadata

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
