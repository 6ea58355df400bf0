"""The `prfaas` command. Each subcommand imports what it needs when it is called, so that `--help` is quick."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from prfaas.common.command_line import EXIT_USAGE
from prfaas.common.errors import ConfigError, PrfaasError, UsageError

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT

HELP = """\
usage: prfaas COMMAND [flags]

Prefill-as-a-Service: prefill and decode in different regions, the KVCache
streamed layer by layer between them.

commands:
  demo        a real model answers across two regions on this machine
  router      the OpenAI API: takes requests, chooses nodes, relays streams
  prefill     a node that computes prompts and sends their KVCache
  decode      a node that receives KVCache and generates
  doctor      checks this machine and a configuration, and names the mend
  profile     measures this machine's engine, for the planner
  certs init  makes a private CA and node certificates for TLS
  capture-kv  the KV of a prompt, computed by the real model, in a file
  bench link  how fast KV lanes move bytes here
  bench codec how small codecs make real KV, how fast, and at what cost

Every command has --help with an example; services also have --help-all.
Settings: one TOML file (--config), PRFAAS_* in the environment, flags; the
last wins.

examples:
  prfaas demo
  prfaas router  --model smollm2 --bind 127.0.0.1:8000
  prfaas decode  --model smollm2 --region home
  prfaas prefill --model smollm2 --region dense
  curl http://127.0.0.1:8000/v1/models
"""


def _router(argv: Sequence[str]) -> int:
    from prfaas.services.commands.serve import router

    return router(argv)


def _prefill(argv: Sequence[str]) -> int:
    from prfaas.services.commands.serve import node

    return node("prefill", argv)


def _decode(argv: Sequence[str]) -> int:
    from prfaas.services.commands.serve import node

    return node("decode", argv)


def _demo(argv: Sequence[str]) -> int:
    from prfaas.services.commands.demo import main

    return main(argv)


def _doctor(argv: Sequence[str]) -> int:
    from prfaas.services.commands.doctor import main

    return main(argv)


def _profile(argv: Sequence[str]) -> int:
    from prfaas.services.commands.profile import main

    return main(argv)


def _capture_kv(argv: Sequence[str]) -> int:
    from prfaas.services.commands.capture_kv import main

    return main(argv)


BENCH_HELP = """\
usage: prfaas bench link | codec [flags]

  link   KV lanes over loopback, beside bare sockets
  codec  codecs on the real model's KV: ratio, speed, and what lossy ones cost

example:
  prfaas bench codec --help
"""


def _bench(argv: Sequence[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        sys.stdout.write(BENCH_HELP)
        return 0
    if not argv or argv[0] not in ("link", "codec"):
        raise UsageError("name what to measure: prfaas bench link | codec")
    if argv[0] == "codec":
        from prfaas.services.commands.bench_codec import main as codec

        return codec(argv[1:])
    from prfaas.services.commands.bench_link import main as link

    return link(argv[1:])


def _certs(argv: Sequence[str]) -> int:
    if not argv or argv[0] != "init":
        if argv and argv[0] in ("-h", "--help"):
            sys.stdout.write("usage: prfaas certs init [flags]    (prfaas certs init --help)\n")
            return 0
        raise UsageError("name what to do: prfaas certs init")
    from prfaas.services.commands.certs import main

    return main(argv[1:])


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "router": _router,
    "prefill": _prefill,
    "decode": _decode,
    "demo": _demo,
    "doctor": _doctor,
    "profile": _profile,
    "capture-kv": _capture_kv,
    "bench": _bench,
    "certs": _certs,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 called or configured wrongly, 130 interrupted."""
    _open_closed_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = _name(arguments)
    try:
        return _flushed(_run, arguments)
    except ConfigError as error:
        return _failed(name, error.problems, EXIT_USAGE)
    except UsageError as error:
        return _failed(name, [str(error)], EXIT_USAGE)
    except (PrfaasError, TimeoutError) as error:
        return _failed(name, [str(error) or type(error).__name__], EXIT_FAILURE)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("prfaas"):
            raise
        return _failed(name, [f"{error.name} is not installed; the mend: pip install 'prfaas[torch]'"], EXIT_FAILURE)
    except BrokenPipeError:
        _discard(sys.stdout)
        return EXIT_FAILURE
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _discard(sys.stdout)
        return _failed(name, [str(error)], EXIT_FAILURE)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _name(arguments: Sequence[str]) -> str:
    """Of the command, as it was called: `router`, `bench codec`."""
    words = arguments[: 2 if arguments[:1] in (["bench"], ["certs"]) else 1]
    return " ".join(word for word in words if word[:1] != "-") or " ".join(words)


def _flushed(run: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """A full disk shows now, while it can be told, and not at exit. `--help` leaves by SystemExit."""
    try:
        status = run(arguments)
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0 if arguments else EXIT_USAGE
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        sys.stdout.write(f"prfaas {version('prfaas')}\n")
        return 0
    return _command(arguments[0])(arguments[1:])


def _open_closed_streams() -> None:
    """Or the first socket takes the place of a standard error that the caller has closed, and a peer gets the log."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - until the process ends


def _discard(stream: TextIO) -> None:
    """What is still buffered can't be written; Python would complain once more, and end with 120, when it flushes at
    exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _command(name: str) -> Callable[[Sequence[str]], int]:
    if name in COMMANDS:
        return COMMANDS[name]
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    raise UsageError(f"no such command; {f'did you mean prfaas {close[0]}?' if close else 'try prfaas --help'}")


def _failed(name: str, problems: Sequence[str], status: int) -> int:
    try:
        for problem in problems:
            sys.stderr.write(f"prfaas {name}: {problem}\n")
        sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
