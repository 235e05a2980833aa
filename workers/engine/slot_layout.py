"""Who sits in which row of which group of the working set, and when that is worth changing. Pure; engine thread only.

The layout in force is kept while it is nearly as cheap as the cheapest (slot_plan): who leaves leaves a hole, who joins
takes one, a row that outgrows its group moves alone or the group grows with it, whichever is cheaper. Only a layout
that must change and would cost too much more than the cheapest is replaced by that.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from workers.engine.sequence import Sequence
from workers.engine.slot_plan import GROUP_PRICE_TOKENS, Shape, capacity_bucket, cost, plan, row_bucket

_TOLERATED_GROWING = 1.25  # of the cheapest layout's cost; moving more rows than must be is work too
_TOLERATED_STANDING = 1.1
_CHECK_EVERY_STEPS = 8

Source = tuple[int, int]  # group and row in the layout before


@dataclass(slots=True)
class Group:
    """Rows of one capacity; None is an empty row."""

    capacity: int
    seats: list[Sequence | None]

    @property
    def shape(self) -> Shape:
        return Shape(len(self.seats), self.capacity)


@dataclass(frozen=True, slots=True)
class Change:
    """A layout that replaces another: per group its capacity, and per row where its KV was; None: nothing to keep."""

    shapes: tuple[Shape, ...]
    sources: tuple[tuple[Source | None, ...], ...]


@dataclass(slots=True)
class SlotLayout:
    """`budget_tokens` bounds rows x capacity over all groups where a cheaper layout exists."""

    most_groups: int
    budget_tokens: int
    groups: list[Group] = field(default_factory=list[Group])
    _steps: int = 0

    @property
    def rows(self) -> list[Sequence | None]:
        """All rows in batch order: group after group."""
        return [seat for group in self.groups for seat in group.seats]

    @property
    def seated(self) -> list[Sequence]:
        return [seat for seat in self.rows if seat is not None]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(group.shape for group in self.groups)

    def place(self, sequence: Sequence) -> Source:
        """Group and row of a seated sequence."""
        for at, group in enumerate(self.groups):
            if sequence in group.seats:
                return at, group.seats.index(sequence)
        raise KeyError(sequence.job_id)

    def leave(self, sequence: Sequence) -> None:
        at, row = self.place(sequence)
        self.groups[at].seats[row] = None

    def clear(self) -> None:
        self.groups = []
        self._steps = 0

    def join(self, sequences: Iterable[Sequence]) -> Change | None:
        """Give every sequence a row; what must change for that, None where there was room."""
        return self._settle(list(sequences))

    def step(self) -> Change | None:
        """Before each step: what must change because rows grew, or should because others left."""
        outgrown = [s for group in self.groups for s in group.seats if s is not None and s.length > group.capacity]
        if outgrown:
            return self._settle(outgrown)
        self._steps += 1
        if self._steps % _CHECK_EVERY_STEPS:
            return None
        cheapest = self._cheapest(self.seated)
        if cost(self.shapes) <= _TOLERATED_STANDING * cost(cheapest):
            return None
        return self._replace(_arranged(cheapest, self.groups, self.seated))

    def _settle(self, sequences: list[Sequence]) -> Change | None:
        """Seats for sequences that have none, or one in a group that is too small for them."""
        groups = [Group(group.capacity, list(group.seats)) for group in self.groups]
        for sequence in sorted(sequences, key=lambda s: -s.length):
            _seat(groups, sequence, self.most_groups)
        groups = [group for group in groups if any(seat is not None for seat in group.seats)]
        everyone = [seat for group in groups for seat in group.seats if seat is not None]
        cheapest = self._cheapest(everyone)
        shapes = [group.shape for group in groups]
        fits = sum(shape.tokens for shape in shapes) <= self.budget_tokens
        if not fits or cost(shapes) > _TOLERATED_GROWING * cost(cheapest):
            groups = _arranged(cheapest, self.groups, everyone)
        return self._replace(groups)

    def _cheapest(self, sequences: Items[Sequence]) -> tuple[Shape, ...]:
        return plan([sequence.length for sequence in sequences], self.most_groups)

    def _replace(self, groups: list[Group]) -> Change | None:
        before = {
            seat: (at, row)
            for at, group in enumerate(self.groups)
            for row, seat in enumerate(group.seats)
            if seat is not None
        }
        moved = any(
            seat in before and before[seat] != (at, row)
            for at, group in enumerate(groups)
            for row, seat in enumerate(group.seats)
        )
        same = not moved and self.shapes == tuple(group.shape for group in groups)
        self.groups = groups
        self._steps = 0
        if same:
            return None
        sources = tuple(tuple(None if seat is None else before.get(seat) for seat in group.seats) for group in groups)
        return Change(self.shapes, sources)


def _seat(groups: list[Group], sequence: Sequence, most_groups: int) -> None:
    """Seat the sequence where the layout becomes dearer by the least: in a group as it is, grown, or a new one."""
    own = next((group for group in groups if sequence in group.seats), None)
    row = None if own is None else own.seats.index(sequence)
    if own is not None and row is not None:
        if sequence.length <= own.capacity:
            return  # the group has grown with a longer row
        own.seats[row] = None
    needed = capacity_bucket(sequence.length)
    best, least = None, needed + GROUP_PRICE_TOKENS
    for group in groups:
        dearer = _grown(group, needed).tokens - group.shape.tokens
        if dearer < least or (best is None and len(groups) >= most_groups):
            best, least = group, dearer
    if best is None:
        best = Group(needed, [])
        groups.append(best)
    rows, best.capacity = _grown(best, needed)
    best.seats += [None] * (rows - len(best.seats))
    best.seats[row if best is own and row is not None else best.seats.index(None)] = sequence


def _grown(group: Group, needed: int) -> Shape:
    """The group's shape with one more row of `needed` columns."""
    taken = sum(seat is not None for seat in group.seats)
    rows = len(group.seats) if taken < len(group.seats) else row_bucket(taken + 1)
    return Shape(rows, max(group.capacity, needed))


def _arranged(shapes: Items[Shape], before: Items[Group], sequences: Items[Sequence]) -> list[Group]:
    """The planned groups, filled by length; who stays in the group that a planned one takes over keeps its row."""
    waiting = sorted(sequences, key=lambda s: s.length)
    groups: list[Group] = []
    for shape in shapes:
        members = [s for s in waiting if s.length <= shape.capacity]
        waiting = waiting[len(members) :]
        groups.append(_filled(shape, members, before))
    assert not waiting, "the plan has no room for a row"
    return groups


def _filled(shape: Shape, members: Items[Sequence], before: Items[Group]) -> Group:
    chosen = set(members)
    heirs = max(before, key=lambda group: sum(seat in chosen for seat in group.seats), default=None)
    seats: list[Sequence | None] = [None] * shape.rows
    if heirs is not None:
        kept = heirs.seats[: shape.rows]
        seats[: len(kept)] = [seat if seat in chosen else None for seat in kept]
    for sequence in members:
        if sequence not in seats:
            seats[seats.index(None)] = sequence
    return Group(shape.capacity, seats)
