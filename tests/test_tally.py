"""What the forwarder knows after a kill: from a file, and without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from agent.forward.tally import TALLY_BYTES, Tally, open_tally
from agent.outbox.files import tally_of


def test_what_was_sent_and_not_settled_is_in_doubt_in_the_next_life(tmp_path: Path) -> None:
    path = tally_of(tmp_path / "outbox.db", "")
    with open_tally(path) as tally:
        assert tally.sending([1, 2, 3]) == 0
        tally.clear([2])
    with open_tally(path) as tally:
        assert sorted(tally.doubtful) == [1, 3]
        assert tally.sending([1, 2]) == 1
        assert tally.resent == 1
    with open_tally(path) as tally:
        assert tally.resent == 1


def test_the_bytes_of_a_day_are_counted_until_the_next_one(tmp_path: Path) -> None:
    with open_tally(tmp_path / "tally") as tally:
        tally.spend(20_000, 10)
        tally.spend(20_000, 5)
        assert tally.bytes_of(20_000) == 15
        tally.spend(20_001, 1)
        assert (tally.bytes_of(20_001), tally.bytes_of(20_000)) == (1, 0)


@pytest.mark.parametrize("content", [b"", b"something else", b"\xff" * TALLY_BYTES])
def test_a_file_of_anything_else_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tally"
    path.write_bytes(content)
    with open_tally(path) as tally:
        assert (tally.doubtful, tally.resent) == ([], 0)


def test_without_a_place_for_the_file_the_books_are_kept_in_memory(tmp_path: Path) -> None:
    with open_tally(tmp_path / "missing" / "tally") as tally:
        tally.sending([1])
        assert tally.doubtful == [1]


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"as it was")
    (tmp_path / "tally").symlink_to(precious)
    with open_tally(tmp_path / "tally") as tally:
        tally.sending([1])
    assert precious.read_bytes() == b"as it was"


def test_what_does_not_fit_is_sent_uncounted() -> None:
    tally = Tally(bytearray(TALLY_BYTES))
    many = range(1, TALLY_BYTES)
    assert tally.sending(many) == 0
    assert 0 < tally.sending(many) < len(many)
    tally.clear(many)
    assert tally.doubtful == []


def test_to_settle_writes_nothing_and_makes_room() -> None:
    pieces: list[bytes] = []
    tally = Tally(bytearray(TALLY_BYTES), lambda _at, piece: pieces.append(piece))
    for first in range(1, 3 * TALLY_BYTES, 1000):
        seqs = range(first, first + 1000)
        tally.sending(seqs)
        written = len(pieces)
        tally.settled(seqs)
        assert len(pieces) == written
        assert tally.doubtful == []
    tally.sending([0xABCD])
    assert tally.doubtful == [0xABCD]


class AnyLife(RuleBasedStateMachine):
    """Sends, answers, settlements and kills in any order, beside plain sets."""

    @initialize()
    def begin(self) -> None:
        self.file = bytearray(TALLY_BYTES)
        self.kill()
        self.doubtful: set[int] = set()
        self.settled: set[int] = set()
        self.resent = 0

    @rule(seqs=st.sets(st.integers(1, 200)))
    def send(self, seqs: set[int]) -> None:
        seqs -= self.settled
        again = len(seqs & self.doubtful)
        assert self.tally.sending(seqs) == again
        self.resent += again
        self.doubtful |= seqs

    @rule(seqs=st.sets(st.integers(1, 200)))
    def clear(self, seqs: set[int]) -> None:
        self.tally.clear(seqs)
        self.doubtful -= seqs

    @rule(seqs=st.sets(st.integers(1, 200)))
    def settle(self, seqs: set[int]) -> None:
        self.tally.settled(seqs)
        self.doubtful -= seqs
        self.settled |= seqs

    def keep(self, at: int, piece: bytes) -> None:
        self.file[at : at + len(piece)] = piece

    @rule()
    def kill(self) -> None:
        """The memory dies with the process; what was written stays."""
        self.tally = Tally(bytearray(self.file), self.keep)
        if hasattr(self, "settled"):  # as the forwarder does, by what is still pending
            self.tally.clear([seq for seq in self.tally.doubtful if seq in self.settled])

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "tally"):
            assert set(self.tally.doubtful) == self.doubtful
            assert self.tally.resent == self.resent


AnyLife.TestCase.settings = settings(max_examples=50, deadline=None)
TestAnyLife = AnyLife.TestCase
