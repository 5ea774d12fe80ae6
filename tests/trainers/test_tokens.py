"""How many tokens a round's phases handle, compared with what is on disk and what TRL counts."""

import pytest

from trl_selfplay.rollouts.record import load_rollouts
from trl_selfplay.rounds.run import UNTRAINED


def sampled_tokens(folder) -> int:
    return sum(len(r.completion_ids) for p in folder.glob("*.parquet") for r in load_rollouts(p))


def trained_tokens(trainer) -> list[int]:
    """TRL's own count by round; it goes on over rounds."""
    last = {e["round"]: e["num_tokens"] for e in trainer.state.log_history if "num_tokens" in e}
    counts = [last[index] for index in sorted(last)]
    return [count - before for count, before in zip(counts, [0, *counts], strict=False)]


@pytest.mark.parametrize(
    ("method", "num_rounds"), [("star", 2), pytest.param("irpo", 1, marks=pytest.mark.slow)]
)
def test_tokens_are_those_on_disk_and_those_that_trl_counts(
    method, num_rounds, request, sums
) -> None:
    trainer = request.getfixturevalue(f"build_{method}")(
        num_rounds=num_rounds, max_steps=-1, num_train_epochs=1, eval_dataset=sums(3, first=90),
        logging_steps=1,
    )  # fmt: skip
    trainer.train()
    lines = trainer.run.lines
    assert [line["tokens"]["train"] for line in lines] == trained_tokens(trainer)
    for line in lines:
        folder = trainer.run.folder(line["round"])
        assert line["tokens"]["sample"] == sampled_tokens(folder / "samples") > 0
        assert line["tokens"]["evaluate"] == sampled_tokens(folder / "evaluation") > 0
        assert line["tokens"].keys() == line["seconds"].keys()
    untrained = sampled_tokens(trainer.run.folder(UNTRAINED) / "evaluation")
    assert [line["tokens"].get("evaluate_before") for line in lines] == [untrained, None][
        :num_rounds
    ]


def test_a_round_on_an_earlier_rounds_samples_samples_no_tokens(build_rest) -> None:
    trainer = build_rest(num_rounds=1, improve_thresholds=[0.1, 0.2], max_steps=1)
    trainer.train()
    first, second = (line["tokens"] for line in trainer.run.lines)
    assert first["sample"] > 0
    assert (second["sample"], second["evaluate"]) == (0, 0)
    assert second["train"] > 0
