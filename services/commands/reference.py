"""`python -m prfaas.services.commands.reference [DIR]`: the pages of every setting and every metric, from the code."""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from prfaas.common import config
from prfaas.common.config import GIB, MIB, Between, Config
from prfaas.common.metrics import Metrics, SharedGauge
from prfaas.services.commands.flags import long_flag

FLAGS = {key: flag for flag, key in config.FLAG_ALIASES.items()} | {
    key: flag for flag, key in config.ROUTER_FLAG_ALIASES.items() if key.startswith("router.")
}
NUMBERS = {int: "whole number", float: "number"}
SECTIONS = {
    "cluster": "What all services of a cluster share.",
    "log": "",
    "router": "",
    "planner": "The slow planner in the router: [scheduling.md](scheduling.md#the-slow-planner-in-the-router).",
    "node": "Prefill and decode nodes.",
    "transport": "KV lanes: [PROTOCOL.md](../transport/PROTOCOL.md), [performance.md](performance.md).",
    "tls": "Between services and on KV lanes.",
    "engine": "",
    "vllm": 'With `engine.kind = "vllm"`: [vllm.md](vllm.md).',
}


def settings() -> str:
    """docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Made by `make reference` from `common/config.py`.",
        "",
        "A setting `section.name` stands in a TOML file (`[section]`, `name = ...`; `--config FILE`), in the",
        "environment (`PRFAAS_SECTION_NAME`) or is a flag (`--section-name`, or the short one below). A flag wins over",
        "the environment, that over the file. Sizes may end in K, M or G; lists are comma-separated in flags and in",
        "the environment. All mistakes are told at once.",
    ]
    for section in dataclasses.fields(Config):
        lines += ["", f"## [{section.name}]", ""]
        if intro := SECTIONS.get(section.name, ""):
            lines += [intro, ""]
        lines += ["| setting | default | value | what it decides |", "|---|---|---|---|"]
        own = {key: spec for key, spec in config.keys().items() if key.startswith(f"{section.name}.")}
        lines += [_setting(key, spec) for key, spec in own.items()]
    return "\n".join(lines) + "\n"


def _setting(key: str, spec: dataclasses.Field[Any]) -> str:
    name = key.partition(".")[2]
    flag = f"<br>`{FLAGS[key]}`" if key in FLAGS and FLAGS[key] != long_flag(key) else ""
    return f"| `{name}`{flag} | {_default(spec)} | {_value(key, spec)} | {_cell(spec.metadata['help'])} |"


def _default(spec: dataclasses.Field[Any]) -> str:
    value = spec.default if spec.default is not dataclasses.MISSING else ()
    if value in ("", ()) or value is None:
        return ""
    if isinstance(value, tuple):
        value = ",".join(value)
    for size, unit in ((GIB, "G"), (MIB, "M")):
        if isinstance(value, int) and value >= size and value % size == 0:
            value = f"{value // size}{unit}"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _value(key: str, spec: dataclasses.Field[Any]) -> str:
    kind, check = config.field_type(key), spec.metadata.get("check")
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{each}`" for each in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "list"
    word = NUMBERS.get(kind, "text")
    return f"{word}, {_plain(check.low)} to {_plain(check.high)}" if isinstance(check, Between) else word


def _plain(number: float) -> str:
    return f"{number:,.0f}" if number == int(number) and abs(number) < 1e15 else f"{number:g}"


# -- metrics ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class MetricFacts:
    """One family as `/metrics` shows it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


def metric_facts() -> Mapping[str, list[MetricFacts]]:
    """By who has them."""
    made = Metrics()
    groups: dict[str, list[MetricFacts]] = {
        "Router": list(_of(made.router)),
        "Nodes": list(_of(made.node)),
        "KV transport (nodes)": list(_of(made.transport)),
    }
    known = {facts.name for group in groups.values() for facts in group}
    rest = [_facts(family, ()) for family in made.registry.collect()]
    groups["Every service"] = [facts for facts in rest if facts.name not in known]
    return groups


def _of(part: Any) -> Iterator[MetricFacts]:
    for metric in vars(part).values():
        collector = metric.gauge if isinstance(metric, SharedGauge) else metric
        for family in collector.describe():
            yield _facts(family, collector._labelnames)


def _facts(family: Any, labels: tuple[str, ...]) -> MetricFacts:
    name = family.name + ("_total" if family.type == "counter" else "")
    return MetricFacts(name, family.type, tuple(labels), family.documentation)


def metrics() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Made by `make reference` from `common/metrics.py`.",
        "",
        "Every service answers `GET /metrics` in Prometheus' text format. A histogram has the series `_bucket`, `_sum`",
        "and `_count`.",
    ]
    for title, group in metric_facts().items():
        lines += ["", f"## {title}", "", "| metric | kind | labels | what it counts |", "|---|---|---|---|"]
        for facts in group:
            labels = ", ".join(f"`{label}`" for label in facts.labels)
            lines.append(f"| `{facts.name}` | {facts.kind} | {labels} | {_cell(facts.help)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|")


PAGES = {"settings.md": settings, "metrics.md": metrics}


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0] if arguments else "docs")
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")
        print(folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
