"""What an engine has found of its own speed while serving, as a profile for routers and planner. Pure.

Samples fall into buckets: prefills by powers of two of the uncached length, decode passes by those of the batch.
A bucket's point is the median length (or batch) at the median time of its last samples; so one slow step says nothing,
and a node that has become slower is found out after some requests. Both curves are made monotone, since both are. What
was not measured yet is nominal.
"""

from __future__ import annotations

from collections import deque
from itertools import accumulate
from statistics import median

from prfaas.common.kv_layout import KvLayout, TokenRange
from prfaas.common.perfmodel.curves import Curve, Surface
from prfaas.common.perfmodel.profiles import NodeProfile, Provenance

SAMPLES = 15
"""Of a bucket: the median of so many."""
CHANGE = 0.1
"""A point that has moved by less is no news: each new profile is sent to every router."""
NOMINAL_PREFILL_TOKENS_PER_S = 10_000.0
NOMINAL_STEP_S = 0.02
LEAST_S = 1e-9

_Points = tuple[tuple[float, float], ...]
"""(length or batch, seconds), rising in both."""


class _Buckets:
    def __init__(self) -> None:
        self._samples: dict[int, deque[tuple[float, float]]] = {}

    def add(self, size: int, seconds: float) -> None:
        bucket = self._samples.setdefault(size.bit_length(), deque(maxlen=SAMPLES))
        bucket.append((float(size), max(LEAST_S, seconds)))

    def points(self) -> _Points:
        found = [self._samples[key] for key in sorted(self._samples)]
        sizes = [median(size for size, _ in samples) for samples in found]
        times = accumulate((median(seconds for _, seconds in samples) for samples in found), max)
        return tuple(zip(sizes, times, strict=True))


class MeasuredProfile:
    """Not for several threads at once."""

    def __init__(self, model: str, hardware: str, layout: KvLayout, max_batch: int, kv_capacity_bytes: int) -> None:
        self._model = model
        self._hardware = hardware
        self._layout = layout
        self._max_batch = max_batch
        self._kv_capacity_bytes = kv_capacity_bytes
        self._prefills = _Buckets()
        self._passes = _Buckets()
        self._told: tuple[_Points, _Points] = ((), ())
        self._profile = self._made()

    def prefilled(self, uncached_tokens: int, seconds: float) -> None:
        """A prefill that computed so many tokens took the engine so long, without what others had of it meanwhile."""
        if uncached_tokens > 0:
            self._prefills.add(uncached_tokens, seconds)

    def stepped(self, batch: int, context_tokens: float, seconds: float) -> None:
        """A decode pass of so many rows. context_tokens: their mean; a bucket has whatever contexts are served."""
        if batch > 0:
            self._passes.add(batch, seconds)

    @property
    def profile(self) -> NodeProfile:
        """The same object until a point is new or has moved by more than CHANGE."""
        points = (self._prefills.points(), self._passes.points())
        if any(_differ(old, new) for old, new in zip(self._told, points, strict=True)):
            self._told = points
            self._profile = self._made()
        return self._profile

    def _made(self) -> NodeProfile:
        prefills, passes = self._told
        nominal = "nominal: nothing has been measured yet"
        measured = f"medians of the last {SAMPLES} of each power of two, while serving"
        provenance: dict[str, Provenance] = {
            "prefill_s": "measured" if prefills else "fitted",
            "kv_bytes": "fitted",
            "decode_step_s": "measured" if passes else "fitted",
        }
        return NodeProfile(
            name="serving",
            model=self._model,
            hardware=self._hardware,
            gpus=1,
            prefill_s=_curve(prefills or ((1000.0, 1000.0 / NOMINAL_PREFILL_TOKENS_PER_S),)),
            kv_bytes=_kv_bytes(self._layout),
            decode_step_s=_surface(passes or ((1.0, NOMINAL_STEP_S),)),
            max_batch=self._max_batch,
            kv_capacity_bytes=self._kv_capacity_bytes,
            provenance=provenance,
            sources={
                "prefill_s": measured if prefills else nominal,
                "kv_bytes": "the model's KV layout",
                "decode_step_s": measured if passes else nominal,
            },
        )


def _kv_bytes(layout: KvLayout) -> Curve:
    """Exactly: straight between the lengths at which a window is full."""
    windows = {tensor.window_tokens or 1 for layer in layout.layers for tensor in layer.tensors}
    lengths = sorted({1, *windows, max(windows, default=1) + 1000})
    values = tuple(float(layout.total_bytes(TokenRange(0, length))) for length in lengths)
    return Curve(tuple(float(length) for length in lengths), values, "linear")


def _curve(points: _Points) -> Curve:
    """One point is made two, or the curve would be a constant: time in proportion to the length."""
    if len(points) == 1:
        ((length, seconds),) = points
        points = ((length, seconds), (2 * length, 2 * seconds))
    return Curve(tuple(length for length, _ in points), tuple(seconds for _, seconds in points))


def _surface(points: _Points) -> Surface:
    return Surface(tuple(batch for batch, _ in points), (0.0,), tuple((seconds,) for _, seconds in points))


def _differ(old: _Points, new: _Points) -> bool:
    if len(old) != len(new):
        return True
    return any(
        abs(after - before) > CHANGE * before
        for a, b in zip(old, new, strict=True)
        for before, after in zip(a, b, strict=True)
    )
