"""`prfaas wan`: an emulated WAN between two networks, to be changed while it runs."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from prfaas.common.command_line import Parser, no_such_command
from prfaas.common.errors import UsageError
from prfaas.services.commands.flags import new_parser, number, whole
from prfaas.services.wan import control, route
from prfaas.services.wan.line import Counters
from prfaas.services.wan.settings import MAX_DELAY_MS, Change, Settings, State

CONTROL = "/run/prfaas-wan/control"
LEAST_RATE_MBIT, MAX_RATE_MBIT = 0.01, 1e6

HELP = """\
usage: prfaas wan route | set | show [flags]

  route  carry what two networks send one another over an emulated line
  set    change the line that runs: rate, delay, jitter, loss, cut and heal
  show   how it is set, and what has crossed it

Every command has --help. Without privileges, for single TCP connections:
python -m prfaas.services.wan.proxy --help

example:
  docker compose exec wan prfaas wan set --rate-mbit 40 --loss-percent 0.1
"""


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0 if argv else 2
    commands = {"route": _route, "set": _set, "show": _show}
    if argv[0] not in commands:
        raise no_such_command("prfaas wan", argv[0], commands)
    return commands[argv[0]](argv[1:])


def _gateway(text: str) -> ipaddress.IPv4Interface:
    try:
        made = ipaddress.IPv4Interface(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must look like 10.0.0.254/24 ({error})") from None
    if made.network.prefixlen > 30:
        raise argparse.ArgumentTypeError(f"{text!r} must name its network too, as in {made.ip}/24")
    return made


def _route(argv: Sequence[str]) -> int:
    parser = new_parser(
        "prfaas wan route",
        "Carries what two networks send one another over an emulated line, until SIGTERM. Their hosts have the\n"
        "gateways as default route. Needs CAP_NET_ADMIN, /dev/net/tun, net.ipv4.ip_forward = 1, rp_filter = 0.",
        "prfaas wan route --gateways 10.80.1.254/24 10.80.2.254/24 --rate-mbit 1000 --delay-ms 40",
    )
    parser.add_argument(
        "--gateways",
        nargs=2,
        type=_gateway,
        required=True,
        metavar="ADDRESS/BITS",
        help="this machine's address in either network",
    )
    parser.add_argument("--user", default="", metavar="NAME", help="what the process becomes once the line is up")
    _line_flags(parser)
    given = parser.parse_args(argv)
    first, second = given.gateways
    if first.network.overlaps(second.network):
        raise UsageError(f"the networks {first.network} and {second.network} overlap")
    defaults = Settings()
    settings = Settings(**{name: _or(value, getattr(defaults, name)) for name, value in _line(given).items()})
    route.run((first, second), settings, path=Path(given.control), user=given.user, stop=_stop_signal())
    return 0


def _set(argv: Sequence[str]) -> int:
    parser = new_parser(
        "prfaas wan set",
        "Changes the line that runs on this machine. Packets under way keep their time.",
        "prfaas wan set --rate-mbit 40 --loss-percent 0.1",
    )
    _line_flags(parser)
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument("--down", action="store_true", default=None, help="every packet is lost from now on")
    cut.add_argument("--up", action="store_false", dest="down", default=None, help="no longer")
    given = parser.parse_args(argv)
    wanted = _line(given) | {"down": given.down}
    change = Change(**{name: _or(value, msgspec.UNSET) for name, value in wanted.items()})
    if change == Change():
        raise UsageError("name what to change: --rate-mbit, --delay-ms, --loss-percent, ... (prfaas wan set --help)")
    sys.stdout.write(text(control.ask(Path(given.control), change)))
    return 0


def _show(argv: Sequence[str]) -> int:
    parser = new_parser("prfaas wan show", "How the line is set, and what has crossed it.", "prfaas wan show --json")
    parser.add_argument("--json", action="store_true", help="one object")
    _control_flag(parser)
    given = parser.parse_args(argv)
    state = control.ask(Path(given.control), Change())
    sys.stdout.write(json.dumps(msgspec.to_builtins(state)) + "\n" if given.json else text(state))
    return 0


def text(state: State) -> str:
    line, conditions = state.settings, state.settings.conditions()
    how = "DOWN, " if line.down else ""
    lines = [
        f"line  {how}{line.rate_mbit:g} Mbit/s, {line.delay_ms:g} ms one way, jitter {line.jitter_ms:g} ms, "
        f"loss {line.loss_percent:g} %, queue {conditions.queue_bytes / 1e3:,.0f} KB"
    ]
    lines += [_counted("there", state.there), _counted("back ", state.back)]
    return "\n".join(lines) + "\n"


def _counted(way: str, counters: Counters) -> str:
    figures = asdict(counters)
    late_ms = figures.pop("latest_s") * 1e3
    return (
        f"{way} {figures['packets']:,} packets, {figures['packet_bytes'] / 1e6:,.1f} MB arrived; "
        f"{figures['lost']:,} lost, {figures['overflowed']:,} dropped by the full queue; at most {late_ms:.1f} ms late"
    )


def _line_flags(parser: Parser) -> None:
    rate, delay, loss = number(LEAST_RATE_MBIT, MAX_RATE_MBIT), number(0, MAX_DELAY_MS), number(0, 100)
    default = Settings()
    parser.add_argument("--rate-mbit", type=rate, metavar="N", help=f"each way, of IP packets [{default.rate_mbit:g}]")
    parser.add_argument("--delay-ms", type=delay, metavar="N", help=f"one way [{default.delay_ms:g}]")
    parser.add_argument("--jitter-ms", type=delay, metavar="N", help="longest further delay of a packet [0]")
    parser.add_argument("--loss-percent", type=loss, metavar="N", help="of packets [0]")
    parser.add_argument(
        "--queue-bytes", type=whole(0, 1 << 40), metavar="N", help="before the line; 0 = rate x round trip [0]"
    )
    _control_flag(parser)


def _control_flag(parser: Parser) -> None:
    parser.add_argument("--control", default=CONTROL, metavar="PATH", help=f"the running line's socket [{CONTROL}]")


def _line(given: argparse.Namespace) -> dict[str, Any]:
    names = ("rate_mbit", "delay_ms", "jitter_ms", "loss_percent", "queue_bytes")
    return {name: getattr(given, name) for name in names}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _stop_signal() -> int:
    """A descriptor that is readable once the process is asked to end."""
    read, write = os.pipe()

    def asked(*_: object) -> None:
        os.write(write, b"x")

    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, asked)
    return read
