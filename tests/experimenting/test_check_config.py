"""A run that was trained with other settings is refused, with the key that differs."""

import pytest

from vlal_dist.errors import ConfigError
from vlal_dist.experimenting.jobs import check_config

OLD = {"training": {"epochs": 3, "threads": 1, "log_steps": 2}, "data": {"image_size": 64}}


def test_execution_settings_may_differ() -> None:
    now = {"training": {"epochs": 3, "threads": 2, "log_steps": 9}, "data": {"image_size": 64}}
    check_config(OLD, now, where="x")


def test_the_first_difference_is_named_with_both_values_and_the_remedy() -> None:
    now = {"training": {"epochs": 4, "threads": 1, "log_steps": 2}, "data": {"image_size": 32}}
    with pytest.raises(
        ConfigError, match=r"root/a was trained with training\.epochs 3, now it is 4; .*experiments"
    ):
        check_config(OLD, now, where="root/a")
