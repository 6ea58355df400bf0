"""`prfaas plan-live`: what a running router's slow planner would do now, and why."""

from __future__ import annotations

import http.client
import os
import ssl
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from prfaas.common.command_line import Parser
from prfaas.common.errors import ConfigError, PrfaasError, UsageError
from prfaas.services.commands.flags import new_parser, number
from prfaas.services.messages import ErrorBody, PlanReport, RegionPlan

ANSWER_TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 4 << 20
KEY_VARIABLE = "OPENAI_API_KEY"
SHOWN_HISTORY = 10
CLEAR = "\x1b[2J\x1b[H"
DEFAULT_URL = "http://127.0.0.1:8000"


class RouterAnswerError(PrfaasError):
    """The router can't be reached, or its answer is no plan."""


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    url, headers, context = _url(options.router), _headers(options.api_key_file), _tls(options.cacert)
    while True:
        text = show(fetch(url, headers, context), as_json=options.json)
        clear = CLEAR if options.watch is not None and not options.json and sys.stdout.isatty() else ""
        print(clear + text, flush=True)
        if options.watch is None:
            return 0
        time.sleep(options.watch)


def parser() -> Parser:
    made = new_parser(
        "prfaas plan-live",
        "What a running router's slow planner would do now, and why: roles of nodes, thresholds, what it waits for.",
        "prfaas plan-live --router http://127.0.0.1:8000 --watch 5",
    )
    made.add_argument("--router", metavar="URL", default=DEFAULT_URL, help=f"the router [{DEFAULT_URL}]")
    made.add_argument("--json", action="store_true", help="print one object; with --watch one a line")
    made.add_argument("--watch", type=number(0.1, 86400), metavar="S", help="again every so many seconds, until Ctrl-C")
    made.add_argument("--api-key-file", metavar="FILE", help=f"a key for the router [{KEY_VARIABLE}]")
    made.add_argument("--cacert", metavar="FILE", help="certificates that the router's is checked by")
    return made


# -- the router -------------------------------------------------------------------------------------------------------


def fetch(url: str, headers: dict[str, str], context: ssl.SSLContext) -> PlanReport:
    """GET /plan. Raises RouterAnswerError."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=ANSWER_TIMEOUT_S, context=context)
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=ANSWER_TIMEOUT_S)
    try:
        connection.request("GET", "/plan", headers=headers)
        response = connection.getresponse()
        data = response.read(MAX_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise RouterAnswerError(f"no answer from {url}: {why}; name a router that runs by --router") from None
    finally:
        connection.close()
    if response.status != 200:
        raise RouterAnswerError(f"{url}/plan answered {response.status}: {_what_it_says(data)}")
    try:
        return msgspec.json.decode(data, type=PlanReport)
    except msgspec.DecodeError:
        raise RouterAnswerError(f"{url}/plan is no plan: is a router of this version there?") from None


def _what_it_says(data: bytes) -> str:
    try:
        return msgspec.json.decode(data, type=ErrorBody).error.message
    except msgspec.DecodeError:
        return "it is no router of this version, it seems"


def _url(text: str) -> str:
    given = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(given)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None:
        raise UsageError(f"--router {text[:100]}: it is like {DEFAULT_URL}")
    return f"{parts.scheme}://{parts.netloc}"


def _headers(file: str | None) -> dict[str, str]:
    key = os.environ.get(KEY_VARIABLE, "")
    if file is not None:
        try:
            key = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"--api-key-file {file} can't be read: {error}"]) from None
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError([f"the API key (--api-key-file or {KEY_VARIABLE}) has characters that no key has"])
    return {"authorization": f"Bearer {key}"} if key else {}


def _tls(ca_file: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError:
        raise ConfigError([f"--cacert {ca_file} holds no certificates (PEM)"]) from None
    except OSError as error:
        raise ConfigError([f"--cacert {ca_file} can't be read: {error.strerror or error}"]) from None


# -- for people -------------------------------------------------------------------------------------------------------


def show(report: PlanReport, *, as_json: bool = False) -> str:
    """The report as text, or as one line of JSON."""
    if as_json:
        return msgspec.json.encode(report).decode()
    if report.why_off:
        return f"router {report.router} plans nothing: {report.why_off}"
    lines = [f"router {report.router}: {_lease(report)}"]
    for region in report.regions:
        lines += ["", *_region(region)]
    if not report.regions:
        lines += ["", "no region decodes yet"]
    if report.history:
        lines += ["", "decided before, the newest first:"]
        for past in reversed(report.history[-SHOWN_HISTORY:]):
            at = time.strftime("%H:%M:%S", time.localtime(past.at_s))
            lines.append(f"  {at}  {past.region}: {past.why}")
    return "\n".join(lines)


def _lease(report: PlanReport) -> str:
    lease = report.lease
    if report.mode != "convert":
        return "it plans thresholds and only shows what roles would be better (planner.mode is threshold)"
    grants = f"{lease.grants} nodes' grants, {lease.needed} are needed"
    if lease.mine:
        return f"it plans and converts nodes ({grants})"
    if lease.router and lease.router != report.router:
        return f"router {lease.router} converts nodes"
    return f"no router has the planner's lease yet ({grants})"


def _region(region: RegionPlan) -> list[str]:
    lines = [f"{region.region} ({region.prefill_nodes} prefill : {region.decode_nodes} decode)"]
    lines.append(f"  {'would convert' if region.to_prefill else 'would convert nothing'}: {region.why}")
    if region.plan is not None:
        plan = region.plan
        lines.append(
            f"  plan: {plan.n_prefill} : {plan.n_decode} carries {plan.requests_per_s:.3g} requests/s, bounded by"
            f" {plan.bottleneck}; {plan.share_offloaded:.0%} offloaded to {plan.n_prfaas} nodes,"
            f" {plan.egress_bytes_per_s * 8 / 1e9:.3g} Gbit/s ({plan.link_utilisation:.0%} of the links)"
        )
    lines.append(
        f"  threshold: {_tokens(region.threshold_tokens)} now, {_tokens(region.planned_threshold_tokens)} planned;"
        f" {region.requests_per_s:.3g} requests/s come to this router"
    )
    lines += [f"  {node.node} is draining: {node.role} becomes {node.next_role}" for node in region.changing]
    waits = f"  next plan in {region.next_plan_in_s:.0f} s"
    if region.cool_down_left_s > 0:
        waits += f", next conversion in {region.cool_down_left_s:.0f} s at the earliest"
    return [*lines, waits]


def _tokens(threshold: float | None) -> str:
    return "none (nothing is offloaded)" if threshold is None else f"{threshold:,.0f} tokens"
