"""`prfaas router`, `prfaas prefill`, `prfaas decode`: settings in, a service out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from prfaas.common import log
from prfaas.common.config import FLAG_ALIASES, ROUTER_FLAG_ALIASES, Config
from prfaas.common.errors import ConfigError
from prfaas.services.commands.flags import parse_config_command
from prfaas.services.log_file import STDERR, LogFile
from prfaas.services.model_store import PACKAGED, ensure_model, find_model

BYTES = "bytes"
"""The emulated engine's tokenizer: no model directory."""

ROUTER_ALIASES: Mapping[str, str] = {**ROUTER_FLAG_ALIASES, "--engine": "engine.kind"}


def router(argv: Sequence[str]) -> int:
    config = parse_config_command(
        "prfaas router",
        "The OpenAI API: takes requests, chooses nodes, relays their streams.",
        "prfaas router --model smollm2 --bind 127.0.0.1:8000",
        ROUTER_ALIASES,
        argv,
    )
    config = with_router_model(config)
    from prfaas.services.router.app import serve

    log.configure(config.log.level, config.log.format, partial(LogFile, STDERR))
    if config.router.processes > 1 and not config.router.process:
        from prfaas.services.router import processes

        return processes.serve(config, argv)
    serve(config)
    return 0


def node(role: Literal["prefill", "decode"], argv: Sequence[str]) -> int:
    config = parse_config_command(
        f"prfaas {role}",
        f"A node with one engine, in the role {role}. It heartbeats to every router it is told of.",
        f"prfaas {role} --model smollm2 --region {'dense' if role == 'prefill' else 'home'} "
        "--routers http://127.0.0.1:8000",
        FLAG_ALIASES,
        argv,
    )
    config = with_engine_model(config)
    from prfaas.services.node.app import serve

    log.configure(config.log.level, config.log.format, partial(LogFile, STDERR))
    serve(config, role)
    return 0


def with_engine_model(config: Config) -> Config:
    """`engine.model` becomes a directory; the emulated engine needs none."""
    engine = config.engine
    if engine.kind == "emulated":
        return config
    if not engine.model:
        raise ConfigError(["engine.model is not set: name a directory, a Hugging Face id or smollm2 with --model"])
    served = engine.served_model or _served_name(engine.model)
    return dataclasses.replace(
        config, engine=dataclasses.replace(engine, model=_directory(engine.model), served_model=served)
    )


def with_router_model(config: Config) -> Config:
    """`router.model_path` becomes a directory, or `bytes` for the emulated engine. By default it is the engine's."""
    name = config.router.model_path or (BYTES if config.engine.kind == "emulated" else config.engine.model)
    if not name:
        raise ConfigError(["router.model_path is not set: name the nodes' model with --model (bytes: emulated engine)"])
    path = name if name == BYTES else _directory(name)
    return dataclasses.replace(config, router=dataclasses.replace(config.router, model_path=path))


def _served_name(model: str) -> str:
    """A Hugging Face id is its own name (its directory in the hub's cache is called by a hash); else the engine
    takes the directory's name."""
    return "" if model in PACKAGED or find_model(model) is not None else model


def _directory(model: str) -> str:
    if (here := find_model(model)) is not None:
        return str(ensure_model(str(here)))
    from prfaas.services.commands.progress import progress_bar

    with progress_bar() as progress:
        return str(ensure_model(model, progress))
