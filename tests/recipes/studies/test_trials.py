"""Values of a hyper-parameter that are tried."""

import json
import math

import pytest

from recipes.studies.trials import Range, count_of, trial_values


def best_at(place):
    return lambda value: -abs(math.log(value / place))


class TestGrid:
    @pytest.mark.parametrize("grid", [(0.0, 0.5), (0.3, 0.1, 0.2), (1, 2, 3, 4, 5, 6, 7, 8, 9)])
    def test_is_tried_completely_and_in_its_order(self, grid):
        assert trial_values(grid, lambda value: None) == list(grid)
        assert trial_values(grid, lambda value: 1.0) == list(grid)
        assert count_of(grid) == len(grid)

    def test_of_anything(self):
        grid = ({"rate": 0.1, "decay": 0.0}, {"rate": 0.2, "decay": 1.0})
        assert trial_values(grid, lambda value: None) == list(grid)

    def test_single_value_needs_no_trial(self):
        assert count_of((0.5,)) == 0
        assert trial_values((0.5,), lambda value: None) == [0.5]
        assert count_of(Range(0.1, 1.0, 1)) == 0


class TestRange:
    SPACE = Range(0.001, 1.0, 12)

    def test_same_scores_same_values(self):
        one, same = (trial_values(self.SPACE, best_at(0.05)) for _ in range(2))
        assert one == same
        assert len(one) == len(set(one)) == count_of(self.SPACE) == 12
        assert all(0.001 <= value <= 1.0 for value in one)

    def test_goes_on_with_what_was_tried(self):
        """As a study does: one more value after each score, in processes that may end in between."""
        known: dict[float, float] = {}
        order: list[float] = []
        for count in range(1, 13):
            values = trial_values(self.SPACE, known.get)
            assert len(values) == count
            assert values[:-1] == order
            order.append(values[-1])
            known[values[-1]] = best_at(0.05)(values[-1])
        assert trial_values(self.SPACE, known.get) == order == trial_values(self.SPACE, best_at(0.05))

    def test_scores_lead_it(self):
        """The second half is nearer to the best value than the first one."""
        for place in (0.003, 0.4):
            values = trial_values(Range(0.001, 1.0, 40), best_at(place))
            distances = [abs(math.log(value / place)) for value in values]
            assert sum(distances[20:]) < 0.7 * sum(distances[:20])

    def test_values_are_spread_over_the_logarithm(self):
        values = trial_values(Range(1e-4, 1.0, 40), lambda value: 0.0)
        assert 5 < sum(value < 1e-2 for value in values) < 35

    def test_diverged_trainings_count(self):
        values = trial_values(self.SPACE, lambda value: -math.inf if value > 0.1 else -value)
        assert len(values) == 12

    def test_values_survive_json(self):

        values = trial_values(self.SPACE, best_at(0.05))
        assert json.loads(json.dumps(values)) == values
