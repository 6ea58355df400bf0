"""Stop strings, found in text that comes in pieces. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on, but for what may be the beginning of a stop string: that is held back until it is certain.

    The stop string that is complete first ends the output (of several that end at the same character the longest), so
    the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, strings: Sequence[str], include_in_output: bool = False) -> None:
        self._strings = tuple(s for s in strings if s)
        self._include = include_in_output
        self._held = ""
        self.stopped = False

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def push(self, text: str, *, counts: bool = True) -> str:
        """The text that may be shown now. When `stopped` is set by it, what follows belongs to no output.

        `counts`: False: a stop string that is complete in `text` is text like any other; one that begins in it and is
        complete later ends the output (of which nothing was shown).
        """
        if not self._strings:
            return text
        before = len(self._held)
        text = self._held + text
        self._held = ""
        if counts:
            # What is complete in the text before was judged there.
            starts = ((s, text.find(s, max(0, before - len(s) + 1))) for s in self._strings)
            found = [(start + len(s), start) for s, start in starts if start >= 0]
            if found:
                self.stopped = True
                end, start = min(found)
                return text[: end if self._include else start]
        held = max(_overlap(text, s) for s in self._strings)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What is still held back: the output has ended, so it was no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of `text` that `string` begins with, less than the whole of it."""
    start = text.find(string[0], max(0, len(text) - len(string) + 1))
    while start >= 0:
        if string.startswith(text[start:]):
            return len(text) - start
        start = text.find(string[0], start + 1)
    return 0
