"""Who sits where: every row keeps its KV through any changes, fits its group, and changes move little."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.request import SamplingParams
from workers.engine.sequence import Sequence
from workers.engine.slot_layout import Change, SlotLayout
from workers.engine.slot_plan import Shape, cost, plan

BUDGET = 1 << 20


class Silent:
    stopped = False

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def _sequence(name: str, length: int) -> Sequence:
    return Sequence(name, 1, 0, tuple(range(length)), SamplingParams(), Silent(), 10_000, frozenset())


def _grow(sequence: Sequence, tokens: int) -> None:
    sequence.emitted.extend([1] * tokens)


class Rows:
    """What lies in which group and row, moved about as a SlotCache would."""

    def __init__(self) -> None:
        self.held: list[list[Sequence | None]] = []

    def apply(self, change: Change | None) -> None:
        if change is not None:
            old = self.held
            self.held = [
                [None if source is None else old[source[0]][source[1]] for source in sources]
                for sources in change.sources
            ]
            assert [len(rows) for rows in self.held] == [shape.rows for shape in change.shapes]

    def put(self, layout: SlotLayout, sequence: Sequence) -> None:
        group, row = layout.place(sequence)
        self.held[group][row] = sequence


def _joined(layout: SlotLayout, *sequences: Sequence) -> Change | None:
    return layout.join(sequences)


def test_a_row_takes_a_free_place_and_nothing_else_changes() -> None:
    layout = SlotLayout(4, BUDGET)
    first, *others = (_sequence(str(at), 100) for at in range(4))
    _joined(layout, first, *others)
    layout.leave(first)
    assert _joined(layout, _sequence("late", 80)) is None
    assert layout.shapes == (Shape(4, 112),)


def test_a_short_row_that_joins_leaves_the_long_rows_group_as_it_is() -> None:
    layout = SlotLayout(4, BUDGET)
    long = _sequence("long", 4000)
    _joined(layout, long)
    change = _joined(layout, *(_sequence(str(at), 60) for at in range(8)))
    assert change is not None and layout.shapes == (Shape(1, 4096), Shape(8, 64))
    assert change.sources[0] == ((0, 0),)
    change = _joined(layout, _sequence("late", 60))
    assert change is not None and layout.shapes == (Shape(1, 4096), Shape(12, 64))
    assert change.sources[0] == ((0, 0),)
    assert change.sources[1][:8] == tuple((1, row) for row in range(8))


def test_a_row_that_outgrows_its_group_by_far_moves_alone() -> None:
    layout = SlotLayout(4, BUDGET)
    rows = [_sequence(str(at), 60) for at in range(32)]
    _joined(layout, *rows, _sequence("long", 2000))
    grows = rows[5]
    _grow(grows, 1000)
    change = layout.step()
    assert change is not None
    assert layout.groups[layout.place(grows)[0]].capacity >= 1060
    assert [layout.place(row) for row in rows if row is not grows] == [(1, at) for at in range(32) if at != 5]


def test_rows_that_grow_together_stay_together_in_their_places() -> None:
    layout = SlotLayout(4, BUDGET)
    rows = [_sequence(str(at), 64) for at in range(8)]
    _joined(layout, *rows)
    for row in rows:
        _grow(row, 1)
    change = layout.step()
    assert change is not None and layout.shapes == (Shape(8, 80),)
    assert change.sources == (tuple((0, row) for row in range(8)),)


def test_what_is_empty_for_a_while_is_given_back() -> None:
    layout = SlotLayout(4, BUDGET)
    rows = [_sequence(str(at), 4000 if at == 7 else 60) for at in range(8)]
    _joined(layout, *rows)
    for row in rows[1:]:
        layout.leave(row)
    changes = [layout.step() for _ in range(8)]
    assert sum(change is not None for change in changes) == 1
    assert layout.shapes == (Shape(1, 64),)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), most_groups=st.sampled_from([1, 2, 4]))
def test_every_row_keeps_its_kv_and_fits_its_group(data: st.DataObject, most_groups: int) -> None:
    layout, rows = SlotLayout(most_groups, BUDGET), Rows()
    for number in range(data.draw(st.integers(1, 30))):
        act = data.draw(st.sampled_from(["join", "leave", "grow", "grow"]))
        if act == "join" and len(layout.seated) < 16:
            new = [
                _sequence(f"{number}-{at}", data.draw(st.integers(1, 3000)))
                for at in range(data.draw(st.integers(1, 3)))
            ]
            rows.apply(layout.join(new))
            for sequence in new:
                rows.put(layout, sequence)
            assert cost(layout.shapes) <= 1.25 * cost(plan([s.length for s in layout.seated], most_groups))
        elif act == "leave" and layout.seated:
            layout.leave(data.draw(st.sampled_from(layout.seated)))
        elif act == "grow" and layout.seated:
            for sequence in layout.seated:
                _grow(sequence, data.draw(st.sampled_from([1, 1, 40, 700])))
            rows.apply(layout.step())
        _check(layout, rows, most_groups)


def _check(layout: SlotLayout, rows: Rows, most_groups: int) -> None:
    assert len(layout.groups) <= most_groups
    for sequence in layout.seated:
        group, row = layout.place(sequence)
        assert rows.held[group][row] is sequence, "a row lost its KV"
        assert sequence.length <= layout.groups[group].capacity
