"""Distributions of lengths from text; see `GRAMMAR`."""

from __future__ import annotations

import numpy as np
from prfaas.common.errors import ConfigError
from prfaas.loadgen.workloads.lengths import MAX_VALUES, Empirical, Fixed, Lengths, TruncatedLogNormal, Uniform
from prfaas.loadgen.workloads.lines import read_lines
from prfaas.loadgen.workloads.tables import shown, whole_cell

GRAMMAR = "N, uniform:LOW:HIGH, lognormal:MU:SIGMA:LOW:HIGH, empirical:FILE or paper"
MAX_LENGTH_LINE_BYTES = 64


def parse_lengths(text: str, paper: Lengths) -> Lengths:
    """`paper`: what the word stands for here. A file has a length a line, and may be gzip. Raises ConfigError."""
    kind, _, rest = text.partition(":")
    parts = rest.split(":")
    try:
        if text == "paper":
            return paper
        if kind == "empirical" and rest:
            return _empirical(rest)
        if kind == "uniform" and len(parts) == 2:
            return Uniform(_whole(parts[0]), _whole(parts[1]))
        if kind == "lognormal" and len(parts) == 4:
            return TruncatedLogNormal(float(parts[0]), float(parts[1]), _whole(parts[2]), _whole(parts[3]))
        return Fixed(_whole(text))
    except ValueError:
        raise ConfigError([f"{shown(text)} is no distribution of lengths; it is {GRAMMAR}"]) from None


def _whole(text: str) -> int:
    return int(text.replace(",", ""))


def _empirical(file_name: str) -> Empirical:
    values = []
    lines = read_lines(file_name, max_line_bytes=MAX_LENGTH_LINE_BYTES, max_lines=MAX_VALUES)
    for number, text in lines:
        length = whole_cell(file_name, number, "the length", text)
        if length < 1:
            raise ConfigError([f"{file_name} line {number}: the length is {length}; it is 1 or above"])
        values.append(min(length, 2**62))
    try:
        return Empirical(np.array(values, np.int64))
    except ConfigError as error:
        raise ConfigError([f"{file_name}: {problem}" for problem in error.problems]) from None
