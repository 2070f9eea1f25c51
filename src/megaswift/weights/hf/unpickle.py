"""The unpickler for files from strangers: only what a reader knows by name is ever looked up, and nothing that is shared is changed."""

from __future__ import annotations

import enum
import inspect
import io
import pickle
from typing import Any


class GuardedUnpickler(pickle._Unpickler):
    """Python's own unpickler, in which a name means what `known` says.

    The machine of a pickle can do two things to what a name stands for: call it, and set attributes of it. The second would
    change classes and functions for the whole process, so only instances, which the pickle itself has made, take a state.
    """

    dispatch = dict(pickle._Unpickler.dispatch)
    stack: list[Any]  # the machine's; typeshed names the public half of the class only

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))

    def known(self, module: str, name: str) -> Any:
        """What a name stands for. Raises pickle.UnpicklingError for a name that no such file needs."""
        raise NotImplementedError

    def find_class(self, module: str, name: str) -> Any:
        return self.known(module, name)

    def get_extension(self, code: int) -> None:
        """Extension codes stand for names that other code of this process has registered, or looked up before."""
        raise pickle.UnpicklingError(f"it names the extension {code}, which no such file needs")

    def guarded_build(self) -> None:
        """Set the state of an object."""
        target = self.stack[-2]
        if isinstance(target, (type, enum.Enum)) or inspect.isroutine(target):
            raise pickle.UnpicklingError(f"it would change {getattr(target, '__name__', target)}, which is not its own")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = guarded_build  # type: ignore[assignment]
