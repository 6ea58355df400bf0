"""What a node can do, as functions of length and batch: `NodeProfile`, its JSON file, and those that ship.

A *node* here is an instance: what computes one prefill or one decode batch at a time, `gpus` GPUs of it.

The file (format 1; the same for a shipped profile and for one that `prfaas profile` has measured):

    {"format": 1, "name": "lab", "model": "...", "hardware": "8×H200", "gpus": 8, "max_batch": 20,
     "prefill_s":     {"lengths": [1024, 8192], "values": [0.44, 0.72], "provenance": "measured", "source": "..."},
     "kv_bytes":      {"lengths": [0, 1], "values": [0, 17280], "provenance": "fitted", "source": "..."},
     "decode_step_s": {"batches": [20], "contexts": [0], "values": [[0.025]], "provenance": "fitted", "source": "..."}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib import resources
from pathlib import Path
from typing import Literal

import msgspec
from prfaas.common.errors import ConfigError
from prfaas.common.perfmodel.curves import Curve, Interpolation, Surface

Provenance = Literal["measured", "fitted"]
"""measured: the points were; fitted: they come from a formula or were chosen so that other figures come out."""

FORMAT = 1
MAX_FILE_BYTES = 4 << 20
MAX_TEXT = 1000


@dataclass(frozen=True)
class NodeProfile:
    """One kind of node with one model.

    prefill_s: seconds of one prefill alone on the node, over the uncached length. kv_bytes: KV of one request that
    crosses the link, over the length. decode_step_s: seconds of one decode step by (batch, context tokens a request);
    None: this kind of node doesn't decode. max_batch: most requests in one decode batch. kv_capacity_bytes: memory for
    KV, 0 = not known, which then limits no batch. provenance and sources: by the names of the three.
    """

    name: str
    model: str
    hardware: str
    gpus: int
    prefill_s: Curve
    kv_bytes: Curve
    decode_step_s: Surface | None = None
    max_batch: int = 1
    kv_capacity_bytes: int = 0
    provenance: Mapping[str, Provenance] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def step_s(self, batch: float, context_tokens: float) -> float:
        """Seconds of one decode step. Raises ConfigError when the profile has no decode step."""
        if self.decode_step_s is None:
            raise ConfigError([f"profile {self.name} has no decode_step_s, so its nodes can't decode"])
        return self.decode_step_s.at(batch, context_tokens)

    def fits(self, context_tokens: float) -> int:
        """Requests of so many tokens that one node can decode at once: max_batch, or fewer where memory ends."""
        if not self.kv_capacity_bytes:
            return self.max_batch
        return min(self.max_batch, int(self.kv_capacity_bytes // max(self.kv_bytes.at(context_tokens), 1.0)))


# -- the file ---------------------------------------------------------------------------------------------------------


class _CurveFile(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    lengths: list[float]
    values: list[float]
    provenance: Provenance
    source: str = ""
    interpolation: Interpolation = "monotone_cubic"


class _SurfaceFile(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    batches: list[float]
    contexts: list[float]
    values: list[list[float]]
    provenance: Provenance
    source: str = ""


class _ProfileFile(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    format: int
    name: str
    model: str
    hardware: str
    gpus: int
    prefill_s: _CurveFile
    kv_bytes: _CurveFile
    decode_step_s: _SurfaceFile | None = None
    max_batch: int = 1
    kv_capacity_bytes: int = 0


def load(path: Path) -> NodeProfile:
    """Read a profile's file. Raises ConfigError with every problem, each with the file's name and what is wrong."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigError([f"{path}: {size} bytes; a profile has at most {MAX_FILE_BYTES}"])
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from None
    return parse(data, str(path))


def parse(data: bytes, where: str) -> NodeProfile:
    """The same from its bytes; `where` names it in messages."""
    try:
        given = msgspec.json.decode(data, type=_ProfileFile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{where}: not a profile: {error}"]) from None
    if given.format != FORMAT:
        raise ConfigError([f"{where}: format {given.format}; this version reads format {FORMAT}"])
    problems = _problems_of_fields(given)
    curves: dict[str, Curve] = {}
    for name in ("prefill_s", "kv_bytes"):
        points: _CurveFile = getattr(given, name)
        try:
            curves[name] = Curve(tuple(points.lengths), tuple(points.values), points.interpolation)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if "prefill_s" in curves and curves["prefill_s"].values[0] <= 0:
        problems.append("prefill_s: values must be above 0")
    steps = _surface(given.decode_step_s, problems)
    if problems:
        raise ConfigError([f"{where}: {problem}" for problem in problems])
    parts = {"prefill_s": given.prefill_s, "kv_bytes": given.kv_bytes, "decode_step_s": given.decode_step_s}
    return NodeProfile(
        given.name,
        given.model,
        given.hardware,
        given.gpus,
        curves["prefill_s"],
        curves["kv_bytes"],
        steps,
        given.max_batch,
        given.kv_capacity_bytes,
        {name: part.provenance for name, part in parts.items() if part is not None},
        {name: part.source for name, part in parts.items() if part is not None},
    )


def _problems_of_fields(given: _ProfileFile) -> list[str]:
    problems = []
    for name in ("name", "model", "hardware"):
        text: str = getattr(given, name)
        if not text or len(text) > MAX_TEXT:
            problems.append(f"{name} must have 1 to {MAX_TEXT} characters")
    for name, most in (("gpus", 1 << 20), ("max_batch", 1 << 20), ("kv_capacity_bytes", 1 << 60)):
        value: int = getattr(given, name)
        least = 0 if name == "kv_capacity_bytes" else 1
        if not least <= value <= most:
            problems.append(f"{name} = {value} must be a whole number from {least} to {most}")
    return problems


def _surface(given: _SurfaceFile | None, problems: list[str]) -> Surface | None:
    if given is None:
        return None
    try:
        made = Surface(tuple(given.batches), tuple(given.contexts), tuple(tuple(row) for row in given.values))
    except ValueError as error:
        problems.append(f"decode_step_s: {error}")
        return None
    if made.values[0][0] <= 0:
        problems.append("decode_step_s: values must be above 0")
    return made


def profile_id(data: bytes) -> str:
    """Of a profile's file: 32 hex digits, the same for the same bytes."""
    return blake2b(data, digest_size=16, person=b"prfaas-profile").hexdigest()


def dumps(profile: NodeProfile) -> bytes:
    """The file's bytes: `parse` gives an equal profile back."""

    def curve(name: str, points: Curve) -> _CurveFile:
        return _CurveFile(
            list(points.lengths),
            list(points.values),
            profile.provenance.get(name, "fitted"),
            profile.sources.get(name, ""),
            points.interpolation,
        )

    steps = profile.decode_step_s
    made = _ProfileFile(
        format=FORMAT,
        name=profile.name,
        model=profile.model,
        hardware=profile.hardware,
        gpus=profile.gpus,
        prefill_s=curve("prefill_s", profile.prefill_s),
        kv_bytes=curve("kv_bytes", profile.kv_bytes),
        decode_step_s=None
        if steps is None
        else _SurfaceFile(
            list(steps.batches),
            list(steps.contexts),
            [list(row) for row in steps.values],
            profile.provenance.get("decode_step_s", "fitted"),
            profile.sources.get("decode_step_s", ""),
        ),
        max_batch=profile.max_batch,
        kv_capacity_bytes=profile.kv_capacity_bytes,
    )
    return msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n"


def save(profile: NodeProfile, path: Path) -> None:
    """Write the file. Raises ConfigError where it can't be written."""
    try:
        path.write_bytes(dumps(profile))
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from None


# -- those that ship --------------------------------------------------------------------------------------------------


def shipped_names() -> list[str]:
    """What `shipped` takes."""
    files = resources.files("prfaas.common.perfmodel").joinpath("profiles").iterdir()
    return sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json"))


def shipped(name: str) -> NodeProfile:
    """A profile that comes with PrfaaS. Raises ConfigError that lists them for another name."""
    known = shipped_names()
    if name not in known:
        raise ConfigError([f"no shipped profile {name!r}; there are {', '.join(known)}, or name a file"])
    data = resources.files("prfaas.common.perfmodel").joinpath("profiles", f"{name}.json").read_bytes()
    return parse(data, f"profile {name}")


def named(text: str) -> NodeProfile:
    """A shipped profile's name, or the path of a file. A shipped one goes first; a file with its name is `./name`."""
    if "/" in text or text.endswith(".json") or (text not in shipped_names() and _is_there(Path(text))):
        return load(Path(text))
    return shipped(text)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long for one
        return False
