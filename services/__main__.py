"""The `prfaas` command. Each subcommand imports what it needs when it is called, so that `--help` is quick."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from prfaas.common import command_line
from prfaas.common.command_line import EXIT_USAGE
from prfaas.common.errors import UsageError

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
  plan-live   what a running router would do about nodes' roles, and why
  certs init  makes a private CA and node certificates for TLS
  wan         an emulated WAN between two networks, changed while it runs
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


def _plan_live(argv: Sequence[str]) -> int:
    from prfaas.services.commands.plan_live import main

    return main(argv)


def _capture_kv(argv: Sequence[str]) -> int:
    from prfaas.services.commands.capture_kv import main

    return main(argv)


def _wan(argv: Sequence[str]) -> int:
    from prfaas.services.commands.wan import main

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
    "plan-live": _plan_live,
    "capture-kv": _capture_kv,
    "bench": _bench,
    "certs": _certs,
    "wan": _wan,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 called or configured wrongly, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return command_line.run(f"prfaas {_name(arguments)}", _run, arguments)


def _name(arguments: Sequence[str]) -> str:
    """Of the command, as it was called: `router`, `bench codec`."""
    words = arguments[: 2 if arguments[:1] in (["bench"], ["certs"], ["wan"]) else 1]
    return " ".join(word for word in words if word[:1] != "-") or " ".join(words)


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0 if arguments else EXIT_USAGE
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        sys.stdout.write(f"prfaas {version('prfaas')}\n")
        return 0
    if arguments[0] not in COMMANDS:
        raise command_line.no_such_command("prfaas", arguments[0], COMMANDS)
    return COMMANDS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
