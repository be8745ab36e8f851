"""The number and the order of timed calls."""

import time

import pytest

from rigl_keras._timing import interleaved, rounds_within, settled


def recorder(seconds=0.0):
    said = []

    def side(name):
        def call():
            said.append(name)
            time.sleep(seconds)

        return call

    return said, {name: side(name) for name in "abc"}


def test_each_side_has_a_turn_in_each_round():
    said, sides = recorder()
    seconds = interleaved(sides, rounds=6)
    assert set(seconds) == {"a", "b", "c"} and min(seconds.values()) > 0
    # Two calls of each to warm up, then rounds.
    assert said[:6] == ["a", "a", "b", "b", "c", "c"]
    rounds = [tuple(said[i : i + 3]) for i in range(6, len(said), 3)]
    assert len(rounds) == 6
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    # The order changes between rounds.
    assert len(set(rounds)) > 2


def test_short_calls_are_repeated_within_a_turn():
    said, sides = recorder(0.001)
    seconds = interleaved(sides, rounds=1, turn=0.02)
    # A call takes a millisecond or, on a busy machine, much more.
    assert all(s >= 0.001 for s in seconds.values())
    turns = said[6:]
    changes = sum(x != y for x, y in zip(turns, turns[1:], strict=False))
    assert changes == 2


def test_rounds_fit_into_the_time():
    _, sides = recorder(0.01)  # 0.03 s or more in a round
    assert rounds_within(0.001, sides, at_least=3, at_most=9) == 3
    assert rounds_within(1e6, sides, at_least=3, at_most=9) == 9
    assert 1 <= rounds_within(0.3, sides, at_least=1, at_most=99) <= 10
    assert rounds_within(1.0, sides, at_least=1, at_most=99, turn=0.1) <= 3


class Machine:
    """Sides that take given times on a fake clock.

    Args:
        seconds: `{name: function from the number of a call to seconds}`.
    """

    def __init__(self, **seconds):
        self.now, self.called = 0.0, {name: 0 for name in seconds}
        self.sides = {
            name: lambda name=name, takes=takes: self._call(name, takes)
            for name, takes in seconds.items()
        }

    def _call(self, name, takes):
        self.now += takes(self.called[name])
        self.called[name] += 1

    def settled(self, **options):
        return settled(self.sides, clock=lambda: self.now, **options)


def steady(seconds):
    return lambda call: seconds


def disturbed(seconds, most=2.0, every=3):
    """Returns times in which each third call takes up to twice as long."""
    return lambda call: (
        seconds * (most - call % 7 / 7 if call % every == 0 else 1)
    )


def test_what_is_certain_ends_early():
    machine = Machine(slow=steady(0.02), fast=steady(0.01))
    found = machine.settled(seconds=100)
    assert found.certain and not found.busy
    assert found.minima == pytest.approx({"slow": 0.02, "fast": 0.01})
    assert found.medians == pytest.approx(found.minima)
    assert found.spread == pytest.approx(0)
    # Three minima of five turns each, after two calls.
    assert machine.called == {"slow": 17, "fast": 17}


def test_minima_see_through_what_disturbs_some_turns():
    machine = Machine(slow=disturbed(0.011), fast=disturbed(0.01, most=4))
    found = machine.settled(seconds=100)
    assert found.certain and not found.busy
    assert found.minima == pytest.approx({"slow": 0.011, "fast": 0.01})


def test_what_is_never_certain_ends_when_time_is_up():
    """The faster side changes every few turns."""
    machine = Machine(
        one=lambda call: 0.01 * (1.5 if call // 10 % 2 else 1),
        two=lambda call: 0.01 * (1 if call // 10 % 2 else 1.5),
    )
    found = machine.settled(seconds=2)
    assert not found.certain
    assert 2 <= machine.now < 2.1
    assert found.minima == pytest.approx({"one": 0.01, "two": 0.01})
    assert found.busy and 0.1 < found.spread < 0.5


def test_a_tie_within_the_margin_is_certain():
    machine = Machine(one=steady(0.0100), two=disturbed(0.0102, most=1.1))
    assert machine.settled(seconds=100, margin=0.05).certain
    assert machine.called["one"] == 17
    # Three sides: two are equally fast, and the third is much slower.
    sides = dict(one=steady(0.01), two=steady(0.01), three=steady(0.03))
    assert Machine(**sides).settled(seconds=9, margin=0.05).certain
    assert not Machine(**sides).settled(seconds=9).certain


def test_a_busy_machine_is_told_by_its_minima():
    """Sometimes all turns of some seconds take longer."""
    machine = Machine(
        one=lambda call: 0.01 * (1, 1.5, 1.7)[call // 12 % 3],
        two=steady(0.1),
    )
    found = machine.settled(seconds=5)
    assert found.certain and found.busy
    assert found.minima["one"] == pytest.approx(0.01)


def test_long_calls_have_three_turns():
    machine = Machine(one=steady(5.0), two=steady(7.0))
    found = machine.settled(seconds=1)
    assert machine.called == {"one": 5, "two": 5}
    assert found.minima == pytest.approx({"one": 5, "two": 7})
    assert not found.certain  # three turns are too few


def test_short_calls_fill_a_turn():
    machine = Machine(one=steady(0.0005), two=steady(0.002))
    found = machine.settled(seconds=100, turn=0.002)
    assert machine.called == {"one": 2 + 4 * 15, "two": 2 + 15}
    assert found.minima == pytest.approx({"one": 0.0005, "two": 0.002})


def test_sides_take_turns_in_random_order():
    said = []
    machine = Machine(
        **{
            name: lambda call, name=name: said.append(name) or 0.01
            for name in "abc"
        }
    )
    machine.settled(seconds=1)
    turns = said[6:]  # after two calls of each
    orders = [tuple(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 2
