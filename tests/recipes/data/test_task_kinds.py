"""Kinds of tasks."""

import pytest

from recipes.data.task_kinds import TaskKind, columns_of
from recipes.runtime.errors import DataError

from ..support.mixed_tasks import MIXED, NAN


class TestKinds:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("text",), "Use one of binary, classes, number"),
            (("classes", 1), "Use 2 or more for 'classes'"),
            (("binary", 2), "Use 2 or more for 'classes', and 1 for the others"),
            (("number", 1, 0.0, 0.0), "the latter two above 0"),
            (("number", 1, NAN, 1.0), "must be finite"),
        ],
    )
    def test_wrong_ones_are_refused(self, arguments, message):
        with pytest.raises(DataError, match=message):
            TaskKind(*arguments)

    def test_outputs_are_side_by_side(self):
        assert columns_of(MIXED) == columns_of(list(MIXED.values())) == [slice(0, 1), slice(1, 4), slice(4, 5)]
