"""What the project's commands have in common: argparse with mistakes for people."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn

EXIT_USAGE = 2


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line with a mend."""

    def error(self, message: str) -> NoReturn:
        words = [w for w in message.split() if w.startswith("--")]
        known = [flag for action in self._actions for flag in action.option_strings]
        wrong = words[0].split("=")[0].rstrip(":,") if words else ""
        close = [] if wrong in known else difflib.get_close_matches(wrong, known, n=1)
        mend = f"did you mean {close[0]}?" if close else f"try {self.prog} --help"
        self.exit(EXIT_USAGE, f"{self.prog}: {message}; {mend}\n")
