"""Saved runs: JSONL with a request a line, read back as columns; the summary as JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from prfaas.common.errors import ConfigError, UsageError
from prfaas.loadgen.records import (
    BYTES_COLUMNS,
    FLOAT_COLUMNS,
    INTEGER_COLUMNS,
    MAX_RECORDS,
    STATUSES,
    Records,
    RecordsBuilder,
)
from prfaas.loadgen.records import RequestRecord as Record
from prfaas.loadgen.report.summary import Summary, as_rows
from prfaas.loadgen.workloads.lines import read_lines

MAX_LINE_BYTES = 4 << 20
"""A request with as many gaps as are kept of one is 600 KB."""
DIGITS = 6
"""Microseconds."""
MAX_SECONDS = 1e12
"""No run lasts as long: what lies above was spoilt."""
LEAST = dict.fromkeys(INTEGER_COLUMNS, 0) | dict.fromkeys(("cached_tokens", *BYTES_COLUMNS), -1)
_ENCODER = msgspec.json.Encoder()


def jsonl_lines(records: Records) -> Iterator[bytes]:
    """One line a request, by index; what is not known is left out. Times in seconds, to the microsecond."""
    for record in records.in_order():
        for name in FLOAT_COLUMNS:
            value = getattr(record, name)
            if value is not None:
                setattr(record, name, round(value, DIGITS))
        record.itl_s = [round(gap_s, DIGITS) for gap_s in record.itl_s]
        yield _ENCODER.encode(record) + b"\n"


def read_jsonl(path: str) -> Records:
    """What `jsonl_lines` wrote; may be gzip. Raises ConfigError that names the first line that is wrong."""
    builder = RecordsBuilder()
    decoder = msgspec.json.Decoder(Record)
    for number, text in read_lines(path, max_line_bytes=MAX_LINE_BYTES, max_lines=MAX_RECORDS):
        try:
            record = decoder.decode(text)
        except msgspec.DecodeError as error:
            raise ConfigError([f"{path} line {number} is no request of prfaas-loadgen's: {error}"]) from None
        if (problem := _problem(record)) is not None:
            raise ConfigError([f"{path} line {number}: {problem}"])
        builder.add(record)
    if not len(builder):
        raise ConfigError([f"{path} holds no request"])
    return builder.records()


def _problem(record: Record) -> str | None:
    if record.status not in STATUSES:
        return f"status is {record.status[:40]!r}; it is one of {', '.join(STATUSES)}"
    for name, least in LEAST.items():
        if not least <= getattr(record, name) < 1 << 62:
            return f"{name} is {getattr(record, name)}; it is {least} or above"
    for name in FLOAT_COLUMNS:
        value = getattr(record, name)
        if value is not None and not 0 <= value <= MAX_SECONDS:
            return f"{name} is {value:g}; it is from 0 to {MAX_SECONDS:g}"
    # A request can have 65,536 of them.
    if record.itl_s and not 0 <= min(record.itl_s) <= max(record.itl_s) <= MAX_SECONDS:
        number, gap_s = next((i, gap) for i, gap in enumerate(record.itl_s, 1) if not 0 <= gap <= MAX_SECONDS)
        return f"itl_s, gap {number}, is {gap_s:g}; it is from 0 to {MAX_SECONDS:g}"
    return None


def as_json(summaries: Sequence[Summary], **more: Any) -> bytes:
    """One object: `runs`, a list of summaries, and what is given besides."""
    return msgspec.json.format(msgspec.json.encode({"runs": summaries, **more}), indent=1) + b"\n"


def as_csv(summaries: Sequence[Summary]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(as_rows(summaries))
    return out.getvalue()


def write(path: str, parts: Iterator[bytes] | bytes | str) -> None:
    """Raises UsageError when the file can't be written."""
    try:
        with Path(path).open("wb") as file:
            if isinstance(parts, str):
                file.write(parts.encode())
            elif isinstance(parts, bytes):
                file.write(parts)
            else:
                file.writelines(parts)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
