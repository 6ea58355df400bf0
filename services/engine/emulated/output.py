"""Output tokens that are a function of (prompt, seed, output position): a request that is run again, or resumed on
another node, says the same. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

# Letters as often as in English, so that the text looks like words.
_ALPHABET = b"      eeeeetttaaaoooiiinnnsssrrhhlldducmfywgpbv"


class OutputTokens:
    """`token(position)` is the output token at that position, a printable byte; never the end of the sequence."""

    def __init__(self, prompt_token_ids: Sequence[int], seed: int | None) -> None:
        prompt = np.asarray(prompt_token_ids, dtype=np.uint32).tobytes()
        self._key = hashlib.blake2b(
            prompt, digest_size=32, salt=(seed or 0).to_bytes(16, "little", signed=True)
        ).digest()

    def token(self, position: int) -> int:
        digest = hashlib.blake2b(position.to_bytes(8, "little"), key=self._key, digest_size=4).digest()
        return _ALPHABET[int.from_bytes(digest, "little") % len(_ALPHABET)]
