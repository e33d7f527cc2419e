"""What is made ahead comes in order, one at a time, and fails in its turn."""

import pytest

from opensoraplan.ahead import map_ahead


def test_one_is_made_while_the_one_before_it_is_used() -> None:
    made: list[int] = []

    def double(number: int) -> int:
        made.append(number)
        return 2 * number

    results = map_ahead(double, iter(range(4)))
    assert next(results) == 0
    assert list(results) == [2, 4, 6]
    assert made == [0, 1, 2, 3]
    begun: list[int] = []
    first = map_ahead(lambda number: number, (begun.append(n) or n for n in range(9)))
    assert next(first) == 0
    assert begun == [0, 1]


def test_what_fails_ahead_is_raised_in_its_turn() -> None:
    results = map_ahead(lambda number: 6 // number, iter([3, 2, 0]))
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)
