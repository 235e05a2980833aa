"""Finds the sequence that makes steps fail: suspects are tried in groups, and a group that fails is halved. Pure.

    accuse(all of a failed step) ─► two groups ─► the first runs with nobody else ─┬─ a step succeeds ─► acquit
                                                                                   └─ it fails ─► accuse again
A sequence that failed with nobody beside it is the culprit; the engine fails it instead of accusing it.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from workers.engine.sequence import Sequence


class Trials:
    """Groups still to be tried, the one on trial first; empty nearly always."""

    def __init__(self) -> None:
        self._groups: list[list[Sequence]] = []

    def __bool__(self) -> bool:
        return bool(self._groups)

    @property
    def current(self) -> list[Sequence]:
        """Who may run now."""
        return self._groups[0]

    def accuse(self, suspects: Items[Sequence]) -> None:
        """One of these made a step fail: try each half of them by itself, before all others."""
        for suspect in suspects:
            self.acquit(suspect)
        middle = (len(suspects) + 1) // 2
        halves = [list(half) for half in (suspects[:middle], suspects[middle:]) if half]
        self._groups = halves + self._groups

    def acquit(self, sequence: Sequence) -> None:
        """It took part in a step that succeeded, or left; unknown ones are fine."""
        if self._groups:
            groups = [[member for member in group if member is not sequence] for group in self._groups]
            self._groups = [group for group in groups if group]
