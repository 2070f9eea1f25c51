"""`swift deploy`: a model behind the OpenAI API, on this machine only unless --host says otherwise.

swift deploy --ckpt_dir DIR
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from megaswift.config.options import DeployArguments, parse
from megaswift.config.parse import size_of
from megaswift.errors import UserError
from megaswift.inference.gate import KEY_VARIABLE, Rules
from megaswift.inference.model_ref import choose, gives_scores
from megaswift.inference.options import GenerationOptions

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
    if gives_scores(chosen):
        raise UserError(
            "this model gives scores and no answers, and the API asks for answers.",
            where="swift deploy",
            fix="score rows with swift infer --val_dataset FILE",
        )
    args: DeployArguments = chosen.args
    from megaswift.inference.backends import pick_backend

    by_vllm = pick_backend(args.infer_backend) == "vllm"
    if not by_vllm:
        _require_packages()
    located = chosen.locate()
    name = args.served_model_name or located.model_type
    listening = _listen(args.host, args.port)  # a port that is taken is told before the model is loaded
    hosts = tuple(dict.fromkeys([*_LOOPBACK_NAMES, _in_url(args.host).lower()])) if is_loopback(args.host) else None
    if name in chosen.named:
        raise UserError(f"an adapter has the model's own name, {name}.", where="--adapters", fix="use another NAME=DIR")
    rules = Rules(size, args.max_concurrency, hosts, model=name, adapters=tuple(chosen.named))
    if by_vllm:
        from megaswift.inference.vllm_server import VllmServer

        server = VllmServer(args, located.path, located.model_type, name, chosen.named)
        greeting = _greeting(name, server.description, args.host, listening, key)
        server.become(replace(rules, greeting=greeting), key, listening)
    _serve(args, located.path, located.model_type, name, chosen.named, rules, key, listening)


def check(args: DeployArguments, key: str | None) -> int:
    """Raise UserError for options that cannot be; returns --max_body_size in bytes."""
    from megaswift.inference.backends import check_backend

    check_backend(args)
    if not key and not is_loopback(args.host):
        raise UserError(
            f"--host {args.host} lets other machines in, and there is no API key.",
            where="--host",
            fix=f"give --api_key KEY, or set {KEY_VARIABLE}",
        )
    return size_of(args.max_body_size, "max_body_size")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _require_packages() -> None:
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"the server needs {' and '.join(missing)}.", where="swift deploy", fix="in the checkout: pip install '.[deploy]'"
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


def _serve(
    args: DeployArguments,
    path: Path,
    model_type: str,
    name: str,
    adapters: Mapping[str, Path],
    rules: Rules,
    key: str | None,
    listening: socket.socket,
) -> None:
    """Load the model into transformers and serve it."""
    import uvicorn

    from megaswift.inference.backends import load_backend
    from megaswift.inference.server import Limits, Service, make_app

    backend = load_backend(args, path, model_type, adapters=adapters)
    options = GenerationOptions(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    service = Service(backend, name, options, Limits(args.max_new_tokens), args.infer_batch_size, args.system, tuple(adapters))
    rules = replace(rules, greeting=_greeting(name, backend.description, args.host, listening, key))
    config = uvicorn.Config(
        make_app(service, rules, key),
        log_level="warning",
        access_log=False,
        limit_concurrency=4 * args.max_concurrency + 16,  # a request whose body never comes holds a connection
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(config).run(sockets=[listening])
    service.line.close()


def _in_url(host: str) -> str:
    """An address as it stands in a URL, and in the Host header of a request."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _greeting(name: str, description: str, host: str, listening: socket.socket, key: str | None) -> str:
    address = f"http://{_in_url(host)}:{listening.getsockname()[1]}/v1"
    return f"{name} ({description}) answers at {address}{'' if key else ', without an API key'}; Ctrl-C ends it"
