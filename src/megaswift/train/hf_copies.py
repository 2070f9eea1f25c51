"""`--save_safetensors`: a Hugging Face model beside each checkpoint, made by a process of its own while training goes on.

The checkpoint is on the disk already, so nothing is gathered and no GPU is asked: the copy is what
`swift export --ckpt_dir RUN --iteration N --to_hf true` makes, under the name iter_NNNNNNN-hf.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from megaswift.errors import DataError
from megaswift.launch.agent import safe_path
from megaswift.store.paths import hf_copy_of, iteration_directory
from megaswift.terminal import typed

# The process ends with the one that started it, however that one ends (1: PR_SET_PDEATHSIG).
_START = (
    "import ctypes, os, runpy, signal, sys\n"
    "getattr(ctypes.CDLL(None), 'prctl', lambda *_: None)(1, signal.SIGTERM)\n"
    "if os.getppid() != int(sys.argv.pop(1)): sys.exit(1)\n"
    "os.nice(5)\n"
    "runpy.run_module('megaswift', run_name='__main__')\n"
)
# fmt: off
_DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "NNODES")
# fmt: on


def copy_command(run_dir: Path, iteration: int, *, verify: bool) -> list[str]:
    """The words of the export that makes the copy of one checkpoint."""
    target = hf_copy_of(iteration_directory(run_dir, iteration))
    words = ["export", "--ckpt_dir", str(run_dir), "--iteration", str(iteration), "--to_hf", "true"]
    words += ["--hf_output_dir", str(target), "--overwrite", "true", "--verify", str(verify).lower()]
    return [sys.executable, *safe_path(), "-c", _START, str(os.getpid()), *words]


def copy_now(run_dir: Path, iteration: int) -> Path:
    """Make the copy of a checkpoint with its proof, here and now; what the export says goes to the terminal.

    Raises DataError where it fails.
    """
    target = hf_copy_of(iteration_directory(run_dir, iteration))
    code = subprocess.run(copy_command(run_dir, iteration, verify=True), env=_environment()).returncode
    if code != 0:
        raise DataError(
            f"the Hugging Face copy of step {iteration} could not be made (the lines above say why).",
            where=str(target),
            fix=f"the checkpoint is safe; try again with: swift export --ckpt_dir {typed(run_dir)} --iteration {iteration} --to_hf true",
        )
    return target


class HFCopies:
    """The copies of a run's checkpoints, one after the other. Only the first rank makes them.

    A copy is not proven against transformers while training needs the machine; `swift verify` and `swift export` prove it.
    """

    def __init__(self, run_dir: Path, active: bool) -> None:
        self.run_dir, self.active = run_dir, active
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[Any] | None = None
        self._iteration = 0

    def begin(self, iteration: int) -> None:
        """Start the copy of a checkpoint that is complete on the disk; `wait` was called before."""
        if not self.active:
            return
        self._iteration, self._output = iteration, tempfile.TemporaryFile()  # noqa: SIM115 - closed in _forget
        self._process = subprocess.Popen(
            copy_command(self.run_dir, iteration, verify=False),
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=_environment(),
        )

    def wait(self) -> str | None:
        """Wait for the copy on its way: one line on how it went, None where there was none."""
        if self._process is None or self._output is None:
            return None
        code = self._process.wait()
        self._output.seek(0)
        lines = [line for line in self._output.read().decode("utf-8", "replace").splitlines() if line.strip()]
        self._forget()
        name = hf_copy_of(iteration_directory(self.run_dir, self._iteration)).name
        if code == 0:
            return f"step {self._iteration}  {name} is ready"
        reason = next((line for line in lines if line.startswith("error:")), lines[-1] if lines else f"exit code {code}")
        return f"step {self._iteration}  {name} could not be made, the checkpoint is safe: {reason.removeprefix('error: ')}"

    def stop(self) -> None:
        """End the copy on its way; nothing appears under its name."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._forget()

    def _forget(self) -> None:
        if self._output is not None:
            self._output.close()
        self._process = self._output = None


def _environment() -> dict[str, str]:
    """The copy is one process without a GPU, whatever started the ranks."""
    kept = {name: value for name, value in os.environ.items() if name not in _DISTRIBUTED and "TORCHELASTIC" not in name}
    return kept | {"CUDA_VISIBLE_DEVICES": ""}
