from __future__ import annotations

import pytest

from lightning_spectral.text.arguments import require_choice, require_count


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", None])
def test_what_is_no_count_is_refused_with_its_name_and_value(value):
    with pytest.raises(ValueError, match=rf"^`steps` must be an integer >= 1, got {value!r}\.$"):
        require_count("steps", value)
    with pytest.raises(ValueError, match=rf"got {value!r}: leave it out\.$"):
        require_count("steps", value, "leave it out")


def test_counts_and_choices_pass():
    require_count("steps", 1)
    require_choice("kind", "b", (name for name in "ab"))


def test_what_is_no_choice_is_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"^`kind` must be one of \['a', 'b'\], got 'c'\.$"):
        require_choice("kind", "c", {"a": 1, "b": 2})
