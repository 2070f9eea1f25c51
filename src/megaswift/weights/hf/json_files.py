"""JSON files of a model folder, read with limits and without leaving the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megaswift.errors import DataError

MAX_JSON = 256 * 2**20  # bytes; the largest real index has a few MB


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises DataError naming the file."""
    try:
        size = file.stat().st_size
        if size > MAX_JSON:
            raise DataError(f"{file.name} has {size:,} bytes; at most {MAX_JSON:,} are read.", where=str(file))
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file.name} cannot be read: {error.strerror}.", where=str(file)) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.name} ({size:,} bytes) is not JSON.", where=str(file), fix="fetch this file again") from error
    if not isinstance(value, dict):
        raise DataError(f"{file.name} must hold a JSON object, found {type(value).__name__}.", where=str(file))
    return value


def inside(path: Path, file: Path) -> Path:
    """`file`, which must really lie in `path`. Raises DataError for a link that leaves it.

    Hub caches keep `snapshots/<sha>/<name>` as links to `blobs/<hash>`; those are followed.
    """
    root, target = path.resolve(), file.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise DataError(
            f"{file.name} is a link out of the model directory, to {target}.",
            where=str(file),
            fix="put the file itself there, or give the directory that it lies in",
        )
    return file
