"""The learning rate: a linear warm-up in steps or as a share of them, then a cosine."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilrec_dist.config.load import load_config
from ilrec_dist.training.config import TrainConfig
from ilrec_dist.training.schedule import learning_rate, warmup_steps, warmup_warning

CONFIGS = Path(__file__).parents[2] / "configs"


def config_with(warmup: int | float) -> TrainConfig:
    return dataclasses.replace(TrainConfig(), warmup=warmup, min_learning_rate_ratio=0.1)


@given(
    st.one_of(st.integers(0, 500), st.floats(0, 1, exclude_min=True, exclude_max=True)),
    st.integers(1, 2000),
)
def test_rates_rise_to_the_peak_and_fall_to_the_end(warmup, total):
    config = config_with(warmup)
    rates = [learning_rate(config, step, total) for step in range(total)]
    steps = warmup_steps(config, total)
    assert 0 <= steps <= total
    assert rates[:steps] == sorted(rates[:steps]) and rates[steps:] == sorted(rates[steps:])[::-1]
    assert max(rates) == pytest.approx(config.learning_rate)
    assert all(0 < rate <= config.learning_rate * (1 + 1e-9) for rate in rates)
    if isinstance(warmup, float):
        assert abs(steps - warmup * total) <= max(0.5, 1 - warmup * total)
    else:
        assert steps == min(warmup, total)


@pytest.mark.parametrize(("warmup", "total"), [(300, 196), (300, 899), (0.4, 10_000)])
def test_a_warmup_of_more_than_a_third_of_the_steps_is_warned_about(warmup, total):
    warning = warmup_warning(config_with(warmup), total)
    assert warning is not None and "train.warmup" in warning and "peak" in warning


@pytest.mark.parametrize(("warmup", "total"), [(300, 901), (0, 1), (0.03, 2), (0.33, 10)])
def test_a_shorter_warmup_is_not(warmup, total):
    assert warmup_warning(config_with(warmup), total) is None


@pytest.mark.parametrize(
    ("name", "steps", "total"), [("quickstart", 50, 392), ("instruments-small", 300, 1212)]
)
def test_shipped_configurations_hold_on_data_of_any_size(name, steps, total):
    train = load_config(CONFIGS / f"{name}.yaml").train
    assert warmup_steps(train, total) == steps
    assert all(warmup_warning(train, size) is None for size in range(1, 5000))
