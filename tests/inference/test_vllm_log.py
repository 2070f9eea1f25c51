"""What is read from the log of vLLM's engine, without vLLM."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megaswift.inference import vllm_log
from megaswift.inference.vllm_log import EngineLog

ENGINE = """\
(EngineCore pid=7) ERROR 11-28 11:36:19 [core.py:1330] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-28 11:36:19 [core.py:1330] ValueError: No available memory for the cache blocks. Try increasing it.\r
(EngineCore pid=7) Process EngineCore:
(EngineCore pid=7) ValueError: No available memory for the cache blocks. Try increasing it.
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


@pytest.mark.parametrize(
    ("written", "cause"),
    [
        (ENGINE, "No available memory for the cache blocks. Try increasing it."),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "CUDA out of memory. Tried to allocate 2 GiB"),
        (
            "ModuleNotFoundError: No module named 'flashinfer'\n\n[rank0]: Warning: destroy_process_group()",
            "No module named 'flashinfer'",
        ),
        ("ValueError: " + "x" * 5000, "x" * 300),
        ("INFO all is well, no Error here", ""),
        ("", ""),
    ],
)
def test_the_cause_is_found_in_what_other_processes_wrote(written: str, cause: str, capfd: pytest.CaptureFixture[str]) -> None:
    log = EngineLog()
    with log.taking():
        subprocess.run([sys.executable, "-c", "import sys; sys.stderr.write(sys.argv[1])", written], check=True)
    sys.stderr.write("shown again")
    assert log.cause() == cause
    assert capfd.readouterr().err == "shown again"
    log.close()


def test_a_user_who_asks_for_vllms_log_sees_it(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(vllm_log, "_WANTED", True)
    log = EngineLog()
    with log.taking():
        subprocess.run([sys.executable, "-c", "import sys; sys.stderr.write('seen')"], check=True)
    assert (log.cause(), capfd.readouterr().err) == ("", "seen")
