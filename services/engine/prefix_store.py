"""KV of prefixes in host memory: the bytes behind `common/prefixcache`'s numbers. One a node, for whichever engine.

    hold ──▶ Hold: the longest usable prefix of a prompt, pinned; the engine copies from it
    reserve ▶ Writing: room for the prompt's blocks behind it; the engine copies into it, then `commit` or `abandon`
    take_in ▶ what a FETCH brings, so that a Hold becomes longer
    serve_fetch ▶ a prefix that another node has asked for

Memory is one arena of equal *pages*, touched at start. A block of full-attention KV is a page: of every tensor, of
every head, the block's tokens in canonical order. A *snapshot* (recurrent state, and the windows of sliding attention,
which are needed at exactly one length) is as many pages as it takes. So nothing fragments, and the pool's accounting is
the memory's.

    who may touch a page     reserve        commit            hold … release        evicted
    the writer               |-- writes --|
    holders                                |- - - - - - - - - - - read - - - - - - |
    the next owner                                                                  |-- …

Threads: `read` and `write` may be called from the engine's thread while the Hold or Writing is open; all else from the
event loop's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from prfaas.common import log
from prfaas.common.errors import ConfigError, EngineError, NoRoomError, PrfaasError
from prfaas.common.kv_layout import KvLayout
from prfaas.common.prefixcache.events import Event
from prfaas.common.prefixcache.hashes import BlockHasher
from prfaas.common.prefixcache.pool import Lease, PrefixPool
from prfaas.common.prefixcache.sizes import CacheSizes, snapshot_points
from prfaas.transport.api import KvPiece, KvReceiver, KvSender, TransferSpec
from prfaas.transport.arena import Arena
from prfaas.transport.fetching import FetchRequest
from prfaas.transport.waiting import finish_despite_cancel

PAGE_ALIGN_BYTES = 64
MAX_TENANTS = 1024
"""Whose hashers are kept; another one is made again."""
MAX_STAGED = 4
"""Fetched prefixes that arrive at once: each has a staging buffer of its size."""

Bytes = NDArray[np.uint8]
T = TypeVar("T")
_log = log.get_logger("prefix_store")


@dataclass(frozen=True, slots=True)
class _Place:
    """One row: of full attention, which lies in a page at `offset`, or of what lies in a snapshot."""

    offset: int
    row_bytes_per_token: int
    window_tokens: int | None
    fixed_bytes: int

    @property
    def in_block(self) -> bool:
        return self.window_tokens is None and not self.fixed_bytes


@dataclass(slots=True)
class StoreCounters:
    """For the metrics; they only grow."""

    asked_tokens: int = 0
    hit_tokens: int = 0
    fetched_bytes: int = 0
    served_bytes: int = 0
    """To other nodes' FETCH."""


class Hold:
    """A prefix of one prompt, pinned until `release`. `tokens`: how long it is; 0: nothing was there."""

    def __init__(self, store: PrefixStore, lease: Lease, keys: list[bytes]) -> None:
        self._store = store
        self._lease = lease
        self.keys = keys
        """Of the prompt's complete blocks, held or not."""
        self._pages: NDArray[np.int64] = np.zeros(0, np.int64)
        self._snapshot: NDArray[np.int64] = np.zeros(0, np.int64)
        self._open = True
        self.tokens = 0
        self._map()

    def _map(self) -> None:
        """After the lease has come to hold more."""
        store, lease = self._store, self._lease
        self.tokens = lease.matched * store.block_tokens
        self._pages = store.pages_of_blocks(store.pool.block_ids(lease)[: lease.matched])
        if lease.snapshot_id is not None:
            self._snapshot = store.pages_of_snapshot(lease.snapshot_id)

    def replace(self, longer: Lease) -> None:
        """The store only: the same prompt's prefix, of which there is more now."""
        self._store.pool.release(self._lease)
        self._lease = longer
        self._map()

    def read(self, layer: int, tensor: int, row: int, start: int, out: memoryview) -> None:
        """Copy canonical bytes of one row into `out`: of full attention the tokens from `start` on that it has room
        for; of a window the same, which must lie in the last W tokens of the hold; of a state all of it (`start` says
        nothing). Raises ValueError for what isn't held."""
        if not self._open:
            raise ValueError("the hold has been released")
        place = self._store.place(layer, tensor, row)
        target = np.frombuffer(out, np.uint8)
        if place.in_block:
            end = start + len(out) // max(1, place.row_bytes_per_token)
            if not 0 <= start <= end <= self.tokens:
                raise ValueError(f"tokens [{start}, {end}) of a hold of {self.tokens}")
            self._store.read_blocks(self._pages, place, start, target)
            return
        offset = self._store.snapshot_offset(self.tokens, layer, tensor, row)
        if place.window_tokens is not None:
            first = max(0, self.tokens - place.window_tokens)
            end = start + len(out) // place.row_bytes_per_token
            if not first <= start <= end <= self.tokens:
                raise ValueError(f"window tokens [{start}, {end}) of [{first}, {self.tokens})")
            offset += (start - first) * place.row_bytes_per_token
        elif len(out) != place.fixed_bytes:
            raise ValueError(f"{len(out)} bytes of a state of {place.fixed_bytes}")
        if not self._snapshot.size:
            raise ValueError("the hold has no snapshot")
        self._store.read_snapshot(self._snapshot, offset, target)

    def release(self) -> None:
        """Idempotent. Nothing reads it any more when this is called."""
        if self._open:
            self._open = False
            self._store.pool.release(self._lease)


class Writing:
    """Room for the blocks of one prompt from `start` on up to `end` (tokens, whole blocks), and for state at
    `snapshot_points` (tokens, ascending; empty for a model that needs none). End it with `commit` or `abandon`."""

    def __init__(self, store: PrefixStore, lease: Lease, keys: list[bytes], points: tuple[int, ...]) -> None:
        self._store = store
        self._lease = lease
        self._keys = keys
        size = store.block_tokens
        self._first_block = lease.named
        self.start = lease.named * size
        self.end = len(keys) * size
        self.snapshot_points = tuple(point * size for point in points)
        ids = store.pool.block_ids(lease)[lease.named :]
        store.give_pages(ids)
        self._pages = store.pages_of_blocks(ids)
        self._staged: dict[int, Bytes] = {}
        self._written: set[int] = set()
        self._open = True

    def write(self, layer: int, tensor: int, row: int, start: int, data: memoryview) -> None:
        """Copy canonical bytes of tokens from `start` on of a full-attention row; what lies outside [start, end) is
        left out, so that a step's tokens may be given as they are."""
        place = self._store.place(layer, tensor, row)
        if not place.in_block:
            raise ValueError("windows and states are written by write_state")
        size = place.row_bytes_per_token
        first, last = max(start, self.start), min(start + len(data) // size, self.end)
        if first >= last:
            return
        source = np.frombuffer(data, np.uint8)[(first - start) * size : (last - start) * size]
        self._store.write_blocks(self._pages, place, first - self.start, source)

    def write_state(self, tokens: int, layer: int, tensor: int, row: int, data: memoryview) -> None:
        """Copy the state, or the window's last min(W, tokens) tokens, after `tokens`, which is one of
        `snapshot_points`. A point counts when every row of it has been written."""
        place = self._store.place(layer, tensor, row)
        if place.in_block or tokens not in self.snapshot_points:
            raise ValueError(f"no snapshot is taken of layer {layer}, tensor {tensor} after {tokens} tokens")
        blocks = tokens // self._store.block_tokens
        staged = self._staged.get(tokens)
        if staged is None:
            staged = self._staged[tokens] = np.empty(self._store.sizes.snapshot_bytes(blocks), np.uint8)
        offset = self._store.snapshot_offset(tokens, layer, tensor, row)
        staged[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def complete_state(self, tokens: int) -> None:
        """All rows after `tokens` have been written."""
        self._written.add(tokens)

    def commit(self, tokens: int | None = None) -> int:
        """Name the blocks up to `tokens` (None: all), and the snapshots that are complete there: others can use them
        from now on. The tokens that are now held of this prompt; for a model with snapshots those up to the last
        one."""
        if not self._open:
            raise ValueError("the writing has ended")
        store, pool = self._store, self._store.pool
        blocks = len(self._keys) if tokens is None else min(tokens // store.block_tokens, len(self._keys))
        if store.sizes.needs_snapshot:
            most = blocks * store.block_tokens
            done = [point for point in self.snapshot_points if point in self._written and point <= most]
            blocks = max(done, default=0) // store.block_tokens
        held = min(blocks, self._first_block) * store.block_tokens
        if blocks > self._first_block and pool.insert(self._lease, self._keys[:blocks]):
            held = blocks * store.block_tokens
            for point in self.snapshot_points:
                if point in self._written and point <= held:
                    self._keep_snapshot(point)
        self.abandon()
        return held

    def _keep_snapshot(self, tokens: int) -> None:
        snapshot_id = self._store.pool.add_snapshot(self._lease, tokens // self._store.block_tokens)
        if snapshot_id is not None and not self._store.has_snapshot(snapshot_id):
            self._store.fill_snapshot(snapshot_id, self._staged[tokens])

    @property
    def open(self) -> bool:
        return self._open

    def abandon(self) -> None:
        """Give back what has no name. Idempotent; also after `commit`."""
        if self._open:
            self._open = False
            self._staged.clear()
            self._store.pool.release(self._lease)


class PrefixStore:
    """Its memory is touched when the constructor returns (call it in a thread). Raises ConfigError."""

    def __init__(self, layout: KvLayout, model_fingerprint: str, capacity_bytes: int, block_tokens: int = 64) -> None:
        self.layout = layout
        self.block_tokens = block_tokens
        self._fingerprint = model_fingerprint
        bare = CacheSizes.of_layout(layout, block_tokens)
        whole = bare.block_bytes or bare.fixed_bytes or bare.snapshot_bytes(1)
        self._page_bytes = -(-whole // PAGE_ALIGN_BYTES) * PAGE_ALIGN_BYTES
        self.sizes = CacheSizes.of_layout(layout, block_tokens, self._page_bytes)
        pages = capacity_bytes // self._page_bytes
        if pages < 1:
            raise ConfigError(
                [
                    f"engine.prefix_bytes = {capacity_bytes} is less than one block of {block_tokens} tokens of this"
                    f" model, {self._page_bytes} bytes; raise it, or set it to 0 for no prefix cache"
                ]
            )
        self._arena = Arena(pages * self._page_bytes)
        region = self._arena.allocate(pages * self._page_bytes)
        assert region is not None
        self._memory: Bytes = np.frombuffer(region.view, np.uint8).reshape(pages, self._page_bytes)
        self._free_pages = list(range(pages - 1, -1, -1))
        self._block_pages: dict[int, int] = {}
        self._snapshot_pages: dict[int, NDArray[np.int64]] = {}
        self.pool = PrefixPool(
            self.sizes,
            pages * self._page_bytes,
            on_block_freed=self._block_freed,
            on_snapshot_freed=self._snapshot_freed,
        )
        self._places = _places(layout, block_tokens)
        self._longest_window = max((window for window, _ in self.sizes.windows), default=0)
        self._snapshot_offsets: dict[int, dict[tuple[int, int, int], int]] = {}
        self._hashers: dict[str, BlockHasher] = {}
        self.counters = StoreCounters()
        self._serving: set[asyncio.Task[None]] = set()
        self._staged = 0

    @property
    def capacity_bytes(self) -> int:
        return self.pool.capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self.pool.used_bytes

    def drain_events(self) -> list[Event]:
        return self.pool.drain_events()

    def contents(self) -> list[Event]:
        return self.pool.contents()

    async def aclose(self) -> None:
        """End what is being sent to others."""
        for task in list(self._serving):
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving)

    # -- a request's way ----------------------------------------------------------------------------------------------

    def keys(self, token_ids: Sequence[int] | NDArray[Any], tenant: str = "") -> list[bytes]:
        """Of the complete blocks. 2 ms for 128K tokens."""
        hasher = self._hashers.get(tenant)
        if hasher is None:
            if len(self._hashers) >= MAX_TENANTS:
                self._hashers.clear()
            hasher = self._hashers[tenant] = BlockHasher(self._fingerprint, tenant, self.block_tokens)
        return hasher.keys(token_ids)

    def hold(self, token_ids: Sequence[int] | NDArray[Any], tenant: str = "") -> Hold:
        """Pin the longest usable prefix of these tokens; give the first n−1 of a prompt. Always to be released."""
        keys = self.keys(token_ids, tenant)
        made = Hold(self, self.pool.acquire(keys), keys)
        self.counters.asked_tokens += len(token_ids)
        self.counters.hit_tokens += made.tokens
        return made

    def reserve(
        self, token_ids: Sequence[int] | NDArray[Any], tenant: str = "", *, every_blocks: int = 0
    ) -> Writing | None:
        """Room for the complete blocks of these tokens behind what is held already; older prefixes make way. None:
        there is nothing new to keep, or no room that isn't pinned. every_blocks: snapshots between
        (`snapshot_points`)."""
        return self._reserve(self.keys(token_ids, tenant), every_blocks)

    def _reserve(self, keys: list[bytes], every_blocks: int = 0) -> Writing | None:
        lease = self.pool.acquire(keys)
        if lease.named == len(keys) or not self.pool.reserve(lease, len(keys) * self.block_tokens):
            self.pool.release(lease)
            return None
        points: tuple[int, ...] = ()
        if self.sizes.needs_snapshot:
            points = snapshot_points(lease.matched, lease.held, len(keys), every_blocks=every_blocks)
        return Writing(self, lease, keys, points)

    # -- other nodes --------------------------------------------------------------------------------------------------

    async def take_in(self, hold: Hold, receiver: KvReceiver) -> None:
        """Keep what a FETCH brings: tokens [hold.tokens, whole blocks) of the hold's prompt. `receiver` is bound before
        anything is waited for; the FETCH goes out beside this. The hold is longer afterwards.

        Raises TransferError, NoRoomError: the hold is as it was. Closes nothing; after an error or a cancel the
        receiver is still to be closed, and until then may write into the buffer that it was given.
        """
        spec = receiver.spec
        blocks = spec.tokens.end // self.block_tokens
        if spec.tokens.start != hold.tokens or spec.tokens.end != blocks * self.block_tokens or blocks > len(hold.keys):
            raise ValueError(f"tokens {spec.tokens} don't go on from a hold of {hold.tokens}, or aren't whole blocks")
        if self._staged >= MAX_STAGED:
            raise NoRoomError(f"{self._staged} fetched prefixes are arriving already", retry_after_s=1.0)
        writing = self._reserve(hold.keys[:blocks])
        if writing is None and self.pool.match(hold.keys[:blocks]) < blocks:
            raise NoRoomError("no room for the fetched prefix", retry_after_s=1.0)
        if writing is not None:
            self._staged += 1
            try:
                await self._fill(writing, receiver)
            finally:
                self._staged -= 1
                writing.abandon()
        longer = self.pool.acquire(hold.keys[:blocks])
        if longer.matched < blocks:
            self.pool.release(longer)
            raise NoRoomError("no room for the state of the fetched prefix", retry_after_s=1.0)
        hold.replace(longer)

    async def _fill(self, writing: Writing, receiver: KvReceiver) -> None:
        staged = _Staged(self.layout, receiver.spec)
        # What fails it, `finished` raises.
        receiver.bind(lambda _: staged, lambda _layer: None, lambda _error: None)
        await receiver.finished()
        await _in_thread(staged.copy_to, writing, self)
        writing.commit()
        self.counters.fetched_bytes += receiver.report.raw_bytes

    def serve_fetch(self, request: FetchRequest, sender: KvSender) -> str | None:
        """transport.fetching.ServeFetch: send the prefix with this key, if it is held whole."""
        lease = self.pool.acquire_tip(request.prefix_hash)
        if lease is None:
            return "it holds no such prefix"
        hold = Hold(self, lease, [])
        tokens = request.spec.tokens
        if hold.tokens != tokens.end or tokens.start >= tokens.end:
            hold.release()
            return f"it holds {hold.tokens} tokens of that prefix, not [{tokens.start}, {tokens.end})"
        task = asyncio.create_task(self._send(hold, request, sender))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        return None

    async def _send(self, hold: Hold, request: FetchRequest, sender: KvSender) -> None:
        try:
            async with asyncio.timeout(request.remaining_s):
                await sender.open(request.remaining_s)
                for layer in range(len(self.layout.layers)):
                    sender.put(await _in_thread(self._pieces, hold, layer, sender.spec))
                sender.finish({})
                report = await sender.done()
            self.counters.served_bytes += report.raw_bytes
        except (PrfaasError, TimeoutError) as error:
            _log.warning("a fetched prefix was not sent", peer=request.node, error=str(error))
        finally:
            await sender.aclose()
            hold.release()

    def _pieces(self, hold: Hold, layer: int, spec: TransferSpec) -> list[KvPiece]:
        made = []
        for tensor in range(len(self.layout.layers[layer].tensors)):
            extent = self.layout.extent(layer, tensor, spec.tokens, spec.shard)
            for row in range(extent.rows):
                data = memoryview(bytearray(extent.row_bytes))
                hold.read(layer, tensor, extent.first_head + row, extent.token_start, data)
                made.append(KvPiece(layer, tensor, row, 0, data))
        return made

    # -- memory -------------------------------------------------------------------------------------------------------

    def place(self, layer: int, tensor: int, row: int) -> _Place:
        return self._places[layer][tensor][row]

    def give_pages(self, block_ids: Sequence[int]) -> None:
        """To blocks that were reserved just now; those of a model without full attention have no bytes."""
        if self.sizes.block_bytes:
            for block_id in block_ids:
                self._block_pages[block_id] = self._take_page()

    def pages_of_blocks(self, block_ids: Sequence[int]) -> NDArray[np.int64]:
        if not self.sizes.block_bytes:
            return np.zeros(0, np.int64)
        return np.array([self._block_pages[block_id] for block_id in block_ids], np.int64)

    def has_snapshot(self, snapshot_id: int) -> bool:
        """Its bytes are here; not those of one that the pool has added just now."""
        return snapshot_id in self._snapshot_pages

    def pages_of_snapshot(self, snapshot_id: int) -> NDArray[np.int64]:
        return self._snapshot_pages[snapshot_id]

    def fill_snapshot(self, snapshot_id: int, data: Bytes) -> None:
        """A new snapshot's bytes: whole pages of them."""
        data = data.reshape(-1, self._page_bytes)
        pages = self._snapshot_pages[snapshot_id] = np.array([self._take_page() for _ in data], np.int64)
        self._memory[pages] = data

    def snapshot_offset(self, tokens: int, layer: int, tensor: int, row: int) -> int:
        """Of a row in a snapshot after so many tokens: windows that aren't full take less."""
        short = min(tokens, self._longest_window)
        offsets = self._snapshot_offsets.get(short)
        if offsets is None:
            offsets = self._snapshot_offsets[short] = _snapshot_offsets(self._places, short)
        return offsets[layer, tensor, row]

    def read_blocks(self, pages: NDArray[np.int64], place: _Place, start: int, out: Bytes) -> None:
        """Tokens from `start` on of the row at `place`, over the pages of blocks 0, 1, …"""
        size, block = place.row_bytes_per_token, self.block_tokens
        if not out.size:
            return
        end = start + out.size // size
        first, last = start // block, -(-end // block)
        row = self._memory[pages[first:last], place.offset : place.offset + block * size].reshape(-1)
        out[:] = row[(start - first * block) * size : (end - first * block) * size]

    def write_blocks(self, pages: NDArray[np.int64], place: _Place, start: int, data: Bytes) -> None:
        """The same the other way round; `start` counts from the first of `pages`."""
        size, block = place.row_bytes_per_token, self.block_tokens
        end = start + data.size // size
        at = start
        while at < end:
            page, within = divmod(at, block)
            whole = (end - at) // block if not within else 0
            if whole:
                part = data[(at - start) * size : (at - start + whole * block) * size]
                self._memory[pages[page : page + whole], place.offset : place.offset + block * size] = part.reshape(
                    whole, block * size
                )
                at += whole * block
                continue
            stop = min(end, (page + 1) * block)
            offset = place.offset + within * size
            self._memory[pages[page], offset : offset + (stop - at) * size] = data[
                (at - start) * size : (stop - start) * size
            ]
            at = stop

    def read_snapshot(self, pages: NDArray[np.int64], offset: int, out: Bytes) -> None:
        first, last = offset // self._page_bytes, -(-(offset + out.size) // self._page_bytes)
        flat = self._memory[pages[first:last]].reshape(-1)
        out[:] = flat[offset - first * self._page_bytes :][: out.size]

    def _take_page(self) -> int:
        if not self._free_pages:
            raise EngineError("the prefix pool's accounting and its memory differ")
        return self._free_pages.pop()

    def _block_freed(self, block_id: int) -> None:
        page = self._block_pages.pop(block_id, None)
        if page is not None:
            self._free_pages.append(page)

    def _snapshot_freed(self, snapshot_id: int) -> None:
        pages = self._snapshot_pages.pop(snapshot_id, None)
        if pages is not None:
            self._free_pages.extend(pages.tolist())


async def _in_thread(function: Callable[..., T], *args: Any) -> T:
    """When this returns or raises, cancelled or not, the function no longer touches memory."""
    return await finish_despite_cancel(asyncio.get_running_loop().run_in_executor(None, function, *args))


class _Staged:
    """Contiguous rows for what a FETCH brings. transport.api.KvDestination."""

    def __init__(self, layout: KvLayout, spec: TransferSpec) -> None:
        self._layout = layout
        self._spec = spec
        self._rows: dict[tuple[int, int, int], memoryview] = {}
        for layer, extents in enumerate(layout.extents(spec.tokens, spec.shard)):
            for tensor, extent in enumerate(extents):
                for row in range(extent.rows):
                    self._rows[layer, tensor, row] = memoryview(bytearray(extent.row_bytes))

    def row(self, layer: int, tensor: int, row: int) -> memoryview:
        return self._rows[layer, tensor, row]

    def copy_to(self, writing: Writing, store: PrefixStore) -> None:
        tokens = self._spec.tokens
        for (layer, tensor, row), data in self._rows.items():
            if store.place(layer, tensor, row).in_block:
                writing.write(layer, tensor, row, tokens.start, data)
            elif tokens.end in writing.snapshot_points:
                writing.write_state(tokens.end, layer, tensor, row, data)
        if tokens.end in writing.snapshot_points:
            writing.complete_state(tokens.end)


def _places(layout: KvLayout, block_tokens: int) -> list[list[list[_Place]]]:
    """[layer][tensor][row]; full-attention rows lie one after the other in a page."""
    offset = 0
    places: list[list[list[_Place]]] = []
    for layer in layout.layers:
        places.append([])
        for tensor in layer.tensors:
            rows = []
            for _ in range(tensor.heads):
                made = _Place(offset, tensor.row_bytes_per_token, tensor.window_tokens, tensor.fixed_bytes)
                rows.append(made)
                if made.in_block:
                    offset += made.row_bytes_per_token * block_tokens
            places[-1].append(rows)
    return places


def _snapshot_offsets(places: list[list[list[_Place]]], tokens: int) -> dict[tuple[int, int, int], int]:
    """Of a snapshot's rows, one after the other."""
    made, offset = {}, 0
    for layer, tensors in enumerate(places):
        for tensor, rows in enumerate(tensors):
            for row, place in enumerate(rows):
                if not place.in_block:
                    made[layer, tensor, row] = offset
                    offset += place.fixed_bytes or place.row_bytes_per_token * min(tokens, place.window_tokens or 0)
    return made
