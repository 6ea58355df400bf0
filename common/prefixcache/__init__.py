"""Prefix reuse, in numbers only: what prefix blocks are called, who holds which, and what a node's pool keeps.

    hashes.py    token ids -> block keys: chained, seeded with model and tenant
    sizes.py     KV layout -> bytes of a block and of a snapshot
    pool.py      one node's (or region's) pool: leases, LRU under a byte bound, what came and went
    events.py    what came and went, numbered, on its way to an index that may miss some of it
    index.py     which holders have how much of a prompt

The simulator and the live services call the same objects. Nothing here holds KV: an engine maps the pool's block ids to
its memory. All lengths are in blocks unless a name says otherwise.

Three rules stand behind all of it:

- A *key* names a whole prefix, not only its last block (hash chains do, and so do the block ids of public traces). So
  who holds a key's block, and those before it, can serve every prompt whose chain has that key.
- Only *complete blocks of the first n−1 prompt tokens* are named: decode recomputes the last prompt token itself, so a
  state after n tokens would be of no use, and what is behind the last complete block lives for one transfer only.
- A *snapshot* (recurrent state, and the windows of sliding attention) is reusable at exactly its length. It is named by
  the key of the block that it ends with, so its length is a whole number of blocks.

What the paper leaves open, and where it is a setting: the block size (`CacheSizes.block_tokens`), how blocks and
snapshots share memory (`CacheSizes.page_bytes`), where snapshots are taken (`snapshot_points`), what the pool evicts
(`PrefixPool`: least recently used, tips before the blocks below them; a model that needs snapshots keeps no block that
no snapshot can use), what an index forgets at its bound (`IndexSettings`).
"""
