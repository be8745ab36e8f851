"""What is timed, how often and in which order."""

import time

from rigl_keras._timing import interleaved, rounds_within


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
    # Two calls of each to warm up, and then rounds.
    assert said[:6] == ["a", "a", "b", "b", "c", "c"]
    rounds = [tuple(said[i : i + 3]) for i in range(6, len(said), 3)]
    assert len(rounds) == 6
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    # Nobody always comes after the same one.
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
