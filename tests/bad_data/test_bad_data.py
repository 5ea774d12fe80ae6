"""Bad data ends in a clear error before anything is sampled, or in a correct run."""

import pytest
import strategies as data
from attempts import Attempts, Outcome
from datasets import Dataset
from hypothesis import HealthCheck, Phase, given, settings
from tiny_trainers import METHODS

settings.register_profile(
    "bad data",
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # a failure is shown as it was found: shrinking takes long
    suppress_health_check=list(HealthCheck),
)
PROFILE = settings.get_profile("bad data")
NAMES = ("train_dataset", "row", "Dataset.with_transform", "max_length")


@pytest.fixture(scope="module")
def attempts() -> Attempts:
    return Attempts()


def expect_no_fault(outcome: Outcome) -> None:
    assert not outcome.is_fault, f"{outcome.kind} at {outcome.place}: {outcome.text}"


@pytest.mark.parametrize("method", METHODS)
def test_sound_rows_train(attempts, method) -> None:
    """What the other tests change is a run that keeps and trains on what it should."""
    outcome = attempts.attempt(
        method, Dataset.from_list(data.sound_rows(3, chat=False)), whole=True
    )
    assert outcome.kind == "run", outcome


def try_datasets(attempts, method: str, examples: int, whole: bool) -> None:
    @settings(PROFILE, max_examples=examples)
    @given(data.DATASETS)
    def attempt(dataset) -> None:
        columns = [name for name in getattr(dataset, "column_names", None) or () if name]
        names = (*NAMES, *columns)
        expect_no_fault(attempts.attempt(method, dataset, names=names, whole=whole))

    attempt()


def try_configs(attempts, method: str, examples: int, whole: bool) -> None:
    sound = Dataset.from_list(data.sound_rows(3, chat=False))

    @settings(PROFILE, max_examples=examples)
    @given(data.configs(METHODS[method][1]))
    def attempt(fields) -> None:
        expect_no_fault(attempts.attempt(method, sound, names=tuple(fields), whole=whole, **fields))

    attempt()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_bad_dataset_is_refused_or_trains(attempts, method) -> None:
    try_datasets(attempts, method, examples=40, whole=False)
    try_datasets(attempts, method, examples=8, whole=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_bad_config_is_refused_or_trains(attempts, method) -> None:
    try_configs(attempts, method, examples=60, whole=False)
    try_configs(attempts, method, examples=8, whole=True)


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_many_bad_datasets(attempts, method) -> None:
    try_datasets(attempts, method, examples=900, whole=True)


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_many_bad_configs(attempts, method) -> None:
    try_configs(attempts, method, examples=900, whole=True)
