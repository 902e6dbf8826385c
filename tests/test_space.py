"""The syntax of a search space."""

import pytest

from safecl.base import Json
from safecl.space import space_check

SPACE: dict[str, Json] = {
    "weight": {"low": 0.001, "high": 10.0, "log": True},
    "rows": {"low": 8, "high": 64, "step": 8},
    "centre": [True, 1, 1.0, None, "one"],
}
DEFAULTS: dict[str, Json] = {"weight": 0.5, "rows": 16, "centre": 1.0, "not_searched": 3}


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ([], "empty"),
        ([1, 2, 1], "more than once"),
        ("1e-4", "expected a list"),
        ({"low": 0}, "no 'high'"),
        ({"low": 0, "high": 1, "hgih": 2}, "'hgih'"),
        ({"low": "1e-4", "high": 1}, "expected a number"),
        ({"low": 2, "high": 1}, "above"),
        ({"low": 0, "high": 1, "log": True}, "low > 0"),
        ({"low": 1, "high": 9, "log": True, "step": 2}, "both"),
        ({"low": 0, "high": 9, "step": 2}, "does not lead"),
        ({"low": 0, "high": 9, "step": 0}, "does not lead"),
        ({"low": 0.5, "high": 9, "step": 1}, "an int"),
        ({"low": float("nan"), "high": 1}, "a number"),
    ],
)
def test_a_wrong_space_is_named_in_one_line(form: Json, says: str) -> None:
    (error,) = space_check({"weight": form})
    assert error.startswith("search.weight: ") and says in error


def test_the_default_must_lie_in_the_space() -> None:
    assert space_check(SPACE, DEFAULTS) == []
    outside: dict[str, Json] = {"weight": 11.0, "rows": 17}
    errors = space_check(SPACE, outside)
    assert len(errors) == 3 and "11.0" in errors[0] and "17" in errors[1] and "no default" in errors[2]
