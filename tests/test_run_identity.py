import pytest

from trl_selfplay.run_identity import check_identity, describe_run

CONFIG = {"num_rounds": 2, "temperature": 0.7, "per_device_train_batch_size": 8,
          "round_max_steps": [10, 20], "logging_steps": 5, "output_dir": "a"}  # fmt: skip


def describe(ids=("b", "a"), model="m", **changes):
    return describe_run({**CONFIG, **changes}, {"train_dataset": ids}, {"model": model})


def test_what_computes_the_same_goes_on(tmp_path) -> None:
    path = tmp_path / "_rounds" / "config.json"
    check_identity(describe(), path, 0)
    check_identity(
        describe(
            ids=("a", "b"),
            num_rounds=3,
            round_max_steps=[10, 20, 30],
            per_device_train_batch_size=1,
            logging_steps=1,
            output_dir="moved",
        ),
        path,
        num_finished=2,
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": 1.0}, "temperature: 0.7 on disk, 1.0 now"),
        ({"num_rounds": 1}, "num_rounds: 2 on disk, 1 now"),
        ({"round_max_steps": [11, 20]}, "round_max_steps"),
        ({"ids": ("a", "c")}, "train_dataset: '2 prompts"),
        ({"model": "other"}, "model: 'm' on disk, 'other' now"),
    ],
)
def test_another_configuration_is_refused_by_name(tmp_path, changes, named) -> None:
    path = tmp_path / "_rounds" / "config.json"
    check_identity(describe(), path, 0)
    with pytest.raises(ValueError, match="another output_dir") as raised:
        check_identity(describe(**changes), path, num_finished=1)
    assert named in str(raised.value)


def test_steps_of_rounds_that_have_not_begun_may_change(tmp_path) -> None:
    path = tmp_path / "_rounds" / "config.json"
    check_identity(describe(), path, 0)
    check_identity(describe(round_max_steps=[10, 25]), path, num_finished=1)
