"""`swift deploy`: a model behind the OpenAI API, on this machine only unless --host says otherwise.

swift deploy --ckpt_dir DIR
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megaswift.arguments import DeployArguments, parse
from megaswift.errors import UserError
from megaswift.run_model import choose

KEY_VARIABLE = "MEGASWIFT_API_KEY"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]"]


def deploy_main(arguments: DeployArguments | list[str]) -> None:
    """Serve a model until Ctrl-C or SIGTERM.

    Args:
        arguments: options, or the words of the command line.

    Raises UserError for options that cannot work, before the model is loaded.
    """
    given = parse(DeployArguments, arguments) if isinstance(arguments, list) else arguments
    key = given.api_key or os.environ.get(KEY_VARIABLE) or None
    size = check(given, key)
    chosen = choose(given)
    args: DeployArguments = chosen.args
    from megaswift.inference.backends import load_backend, note, pick_backend

    serves_itself = pick_backend(args.infer_backend) == "vllm"
    if not serves_itself:
        _require_packages()
    located = chosen.locate()
    name = args.served_model_name or located.model_type
    if serves_itself:
        _run_vllm(args, located.path, name, key)
        return
    listening = _listen(args.host, args.port)  # a port that is taken is told before the model is loaded
    from megaswift.inference.options import GenerationOptions
    from megaswift.inference.server import Limits, Service, make_app

    backend = load_backend(args, located.path, located.model_type)
    options = GenerationOptions(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    limits = Limits(size, args.max_new_tokens, args.max_concurrency)
    service = Service(backend, name, options, limits, args.infer_batch_size)
    address = f"http://{_shown(args.host)}:{listening.getsockname()[1]}/v1"
    note(f"{name} ({backend.description}) answers at {address}{'' if key else ', without an API key'}; Ctrl-C ends it")
    _serve(
        make_app(service, key, _LOOPBACK_NAMES if is_loopback(args.host) else None), listening, 4 * args.max_concurrency + 16
    )
    service.line.close()


def check(args: DeployArguments, key: str | None) -> int:
    """Raise UserError for options that cannot be; returns --max_body_size in bytes."""
    from megaswift.inference.backends import check_backend

    check_backend(args)
    checks = (
        ("port", 0 <= args.port <= 65535, "0 to 65535"),
        ("max_new_tokens", args.max_new_tokens >= 1, "1 or more"),
        ("max_concurrency", args.max_concurrency >= 1, "1 or more"),
        ("infer_batch_size", args.infer_batch_size >= 1, "1 or more"),
    )
    for name, good, legal in checks:
        if not good:
            raise UserError(f"--{name} {getattr(args, name)} is not possible.", where=f"--{name}", fix=f"legal values: {legal}")
    if not key and not is_loopback(args.host):
        raise UserError(
            f"--host {args.host} lets other machines in, and there is no API key.",
            where="--host",
            fix=f"give --api_key KEY, or set {KEY_VARIABLE}",
        )
    return _bytes(args.max_body_size)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    if not match or match.group(2).upper() not in _UNITS or float(match.group(1)) <= 0:
        raise UserError(f"--max_body_size {text!r} is no size.", where="--max_body_size", fix="use for example 500KB or 4MB")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def _require_packages() -> None:
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"the server needs {' and '.join(missing)}.", where="swift deploy", fix="pip install 'megaswift[deploy]'"
        )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host.strip("[]"), port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror or error}.", where="--port", fix="use another --port, or --port 0"
        ) from error
    return listening


def _serve(app: Any, listening: socket.socket, connections: int) -> None:
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        limit_concurrency=connections,  # requests whose body never comes wait for nothing, but each holds a connection
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(config).run(sockets=[listening])


def _run_vllm(args: DeployArguments, path: Path, name: str, key: str | None) -> None:
    """Become vLLM's own server, which batches continuously; limits on bodies and requests are then vLLM's."""
    from megaswift.inference.loading import pick_dtype

    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--served-model-name", name]
    words += ["--host", args.host.strip("[]"), "--port", str(args.port), "--seed", str(args.seed)]
    words += ["--dtype", str(pick_dtype(args.dtype)).removeprefix("torch."), "--max-num-seqs", str(args.max_concurrency)]
    words += ["--tensor-parallel-size", str(args.tensor_parallel_size)]
    words += ["--gpu-memory-utilization", str(args.gpu_memory_utilization)]
    if args.max_model_len is not None:
        words += ["--max-model-len", str(args.max_model_len)]
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if key:
        os.environ["VLLM_API_KEY"] = key  # not on the command line, where every user of the machine could read it
    sys.stdout.flush()
    os.execv(sys.executable, words)


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
