"""KV throughput of models whose prefill time isn't known: what one instance sends at each length (equation 1).

It answers what equation 2 asks, the egress of a region; it is no profile, since KV bytes and prefill time can't be had
from their quotient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources

import msgspec
import numpy as np
from prfaas.common.errors import ConfigError
from prfaas.common.perfmodel.curves import check_axis
from prfaas.common.perfmodel.links import BYTES_PER_S_PER_GBPS
from prfaas.common.perfmodel.profiles import FORMAT, Provenance
from prfaas.common.perfmodel.throughput import egress_needed


@dataclass(frozen=True)
class KvRate:
    """One model on one kind of instance of `gpus` GPUs. It need not rise: with a fixed-size state the KV grows slower
    than prefill time."""

    name: str
    title: str
    layers: str
    hardware: str
    gpus: int
    lengths: tuple[float, ...]
    gbps: tuple[float, ...]
    provenance: Provenance
    source: str

    def gbps_at(self, length: float) -> float:
        """10⁹ bits/s of one instance, straight between the points over log length; the ends hold beyond them."""
        return float(np.interp(math.log(max(length, 1.0)), np.log(self.lengths), self.gbps))

    def egress_bytes_per_s(self, gpus: float, length: float) -> float:
        """Equation 2: what a region of `gpus` GPUs sends when all its requests have this uncached length."""
        return egress_needed(gpus, self.gpus, self.gbps_at(length) * BYTES_PER_S_PER_GBPS)


class _Model(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    title: str
    layers: str
    gbps: list[float]


class _Table(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    hardware: str
    gpus: int
    provenance: Provenance
    source: str
    lengths: list[float]
    models: list[_Model]


def public_models() -> list[KvRate]:
    """The paper's six, 8×H200 an instance."""
    name = "public-models.json"
    data = resources.files("prfaas.common.perfmodel").joinpath("tables", name).read_bytes()
    return parse(data, name)


def parse(data: bytes, where: str) -> list[KvRate]:
    """Raises ConfigError that names `where` and what is wrong."""
    try:
        table = msgspec.json.decode(data, type=_Table)
        lengths = check_axis("lengths", table.lengths, least=1.0)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError([f"{where}: {error}"]) from None
    if table.format != FORMAT or table.gpus < 1:
        raise ConfigError([f"{where}: format must be {FORMAT} and gpus at least 1"])
    for model in table.models:
        if len(model.gbps) != lengths.size or not all(0 < rate < math.inf for rate in model.gbps):
            raise ConfigError([f"{where}: {model.name}: gbps must be {lengths.size} numbers above 0, one a length"])
    points = tuple(lengths.tolist())
    common = (table.hardware, table.gpus, points)
    return [
        KvRate(m.name, m.title, m.layers, *common, tuple(m.gbps), table.provenance, table.source) for m in table.models
    ]
