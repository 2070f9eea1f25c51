"""A process that has imported what others made, and forks for each run of pytest: no run waits for torch to be imported.

No module of the tree is imported before a fork, so that each run has the fault that is planted by then.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

THIRD_PARTIES = (
    "pytest", "_pytest.junitxml", "hypothesis", "numpy", "pyarrow.parquet", "torch.utils.tensorboard",
    "torch.distributed.checkpoint", "torch.distributed.elastic.multiprocessing.errors", "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt", "megatron.core.optimizer", "megatron.core.pipeline_parallel", "safetensors.torch", "transformers",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
SETTINGS = {  # of tests/conftest.py: these packages read them when they are imported
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}  # fmt: skip
RANKS = ("RankPool", "FaultRun")  # in a test's file: its ranks are forked from a server, which is then forked, too
SERVER = ["tests.faults.preload"]  # what that server imports, as tests/ranks.py has it


def main(orders: Connection, names: Sequence[str]) -> None:
    """Fork for each order, (words of pytest, environment, file for its output); answers with the process id, then its exit code."""
    os.environ.update(SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    gc.freeze()
    while True:
        try:
            words, environment, output = orders.recv()
        except EOFError:
            return
        number = os.fork()
        if not number:
            orders.close()
            sys.exit(_run(words, environment, output))
        orders.send(number)
        _, status = os.waitpid(number, 0)
        orders.send(os.waitstatus_to_exitcode(status))


def _run(words: list[str], environment: dict[str, str], output: str) -> int:
    """Be `python -m pytest` in a session of its own."""
    import pytest

    os.setsid()
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    os.dup2(1, 2)
    os.environ.clear()
    os.environ.update(environment | SETTINGS)
    tempfile.tempdir = None
    sys.argv = ["pytest", *words]
    files = {word.partition("::")[0] for word in words if word.partition("::")[0].endswith(".py")}
    texts = [Path(file).read_text(encoding="utf-8") for file in files if Path(file).is_file()]
    if any(name in text for name in RANKS for text in texts):
        _fork_the_server()
    return int(pytest.main(words))


def _fork_the_server() -> None:
    """Start multiprocessing's fork server as a fork of this process, not as a new interpreter that imports all again."""
    start = multiprocessing.util.spawnv_passfds

    def fork(path: bytes, args: Sequence[Any], passed: Sequence[int]) -> int:
        if "multiprocessing.forkserver" not in str(args[-1]):
            return start(path, args, passed)
        number = os.fork()
        if number:
            return number
        for entry in os.listdir("/proc/self/fd"):  # as exec does: above all the end of the pipe that tells of our own end
            if int(entry) > 2 and int(entry) not in passed:
                with contextlib.suppress(OSError):
                    os.close(int(entry))
        try:
            exec(args[-1], {})
        finally:
            os._exit(0)

    multiprocessing.get_context("forkserver").set_forkserver_preload(SERVER)
    multiprocessing.util.spawnv_passfds = fork
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        multiprocessing.util.spawnv_passfds = start


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # as python -m has it
    main(Connection(int(sys.argv[1])), sys.argv[2:])
