"""Copies between a request's KV memory and the prefix store. All of it runs on a thread that may block for a while: the
engine's, layer by layer, or a pool's.

    hold ──── HeldKv.copy_layer ───▶ KV memory ──── keep_tokens, keep_state ───▶ writing (prefill, as it computes)
                                              └──── StateStash ── keep_all ───▶ writing (decode, when it has ended)
"""

from __future__ import annotations

from dataclasses import dataclass

from prfaas.common.kv_layout import KvLayout
from prfaas.services.engine.prefix_store import Hold, Writing
from prfaas.services.engine.transformers.kv_memory import RequestKv

COPY_BYTES_A_TURN = 16 << 20
"""What the engine's thread copies before others get their turn: some 10 ms of them."""


@dataclass(slots=True)
class HeldKv:
    """What a request starts from. `copied_layers` of its layers are in KV memory already; the thread's own."""

    hold: Hold
    kv: RequestKv
    with_states: bool
    """Not where the state after the prompt comes over the wire."""
    copied_layers: int = 0

    @property
    def tokens(self) -> int:
        return self.hold.tokens

    @property
    def is_complete(self) -> bool:
        return self.copied_layers == len(self.kv.layout.layers)

    def copy_layer(self) -> int:
        """The next one; its bytes."""
        copied = 0
        layer = self.copied_layers
        for tensor, spec in enumerate(self.kv.layout.layers[layer].tensors):
            if spec.kind.is_state and not self.with_states:
                continue
            start = self.kv.first_token(layer, tensor)
            if not spec.kind.is_state and start >= self.tokens:
                continue
            for head in range(spec.heads):
                target = self.kv.head_tokens(layer, tensor, head, start, self.tokens)
                self.hold.read(layer, tensor, head, start, target)
                copied += target.nbytes
        self.copied_layers = layer + 1
        return copied


def keep_tokens(writing: Writing, kv: RequestKv, layer: int, start: int, end: int) -> None:
    """Full-attention KV of tokens [start, end) of a layer, as far as the writing wants it."""
    start, end = max(start, writing.start), min(end, writing.end)
    if start >= end:
        return
    for tensor, spec in enumerate(kv.layout.layers[layer].tensors):
        if spec.kind.is_state or spec.window_tokens is not None:
            continue
        for head in range(spec.heads):
            writing.write(layer, tensor, head, start, kv.head_tokens(layer, tensor, head, start, end))


def keep_state(writing: Writing, kv: RequestKv, layer: int, tokens: int) -> None:
    """State and windows of a layer after `tokens`, which KV memory has now. Of all layers: `complete_state` follows."""
    for tensor, spec in enumerate(kv.layout.layers[layer].tensors):
        if spec.kind.is_state:
            writing.write_state(tokens, layer, tensor, 0, kv.head_tokens(layer, tensor, 0, 0, 0))
        elif spec.window_tokens is not None:
            start = max(0, tokens - spec.window_tokens)
            for head in range(spec.heads):
                data = kv.head_tokens(layer, tensor, head, start, tokens)
                writing.write_state(tokens, layer, tensor, head, data)


class StateStash:
    """The states of a request in decode, as they were at the last block's end: where it will end isn't known before,
    and by then they have moved on. Windows stay in KV memory."""

    def __init__(self, layout: KvLayout, block_tokens: int) -> None:
        self._layout = layout
        self._block_tokens = block_tokens
        self._states: dict[tuple[int, int], bytearray] = {}
        self.tokens = 0
        """After which they were taken; 0: nowhere yet."""

    def passed(self, kv: RequestKv, tokens: int) -> None:
        """All layers have computed `tokens` tokens."""
        if tokens % self._block_tokens:
            return
        for layer, spec in enumerate(self._layout.layers):
            for tensor, each in enumerate(spec.tensors):
                if each.kind.is_state:
                    state = self._states.setdefault((layer, tensor), bytearray(each.fixed_bytes))
                    state[:] = kv.head_tokens(layer, tensor, 0, 0, 0)
        self.tokens = tokens

    def state(self, layer: int, tensor: int) -> memoryview:
        return memoryview(self._states[layer, tensor])


def keep_all(writing: Writing, kv: RequestKv, stash: StateStash | None) -> None:
    """Everything that the writing wants of a request that computes no more: KV memory has the tokens [0, writing.end),
    the stash, of a model that needs one, the states after writing.end."""
    for layer, spec in enumerate(kv.layout.layers):
        keep_tokens(writing, kv, layer, writing.start, writing.end)
        if stash is None or writing.end not in writing.snapshot_points:
            continue
        for tensor, each in enumerate(spec.tensors):
            if each.kind.is_state:
                writing.write_state(writing.end, layer, tensor, 0, stash.state(layer, tensor))
            elif each.window_tokens is not None:
                start = max(0, writing.end - each.window_tokens)
                for head in range(each.heads):
                    data = kv.head_tokens(layer, tensor, head, start, writing.end)
                    writing.write_state(writing.end, layer, tensor, head, data)
    if stash is not None and writing.end in writing.snapshot_points:
        writing.complete_state(writing.end)
