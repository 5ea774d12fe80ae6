"""What people are shown holds the numbers of rounds.jsonl and nothing else."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from run_folders import HOSTILE

from trl_selfplay.evaluation.report import (
    plot_rounds,
    print_completions,
    print_round_table,
    round_table,
    rounds_markdown,
)
from trl_selfplay.inspection.plain_text import visible
from trl_selfplay.rollouts.funnel import Funnel, OutcomeCounts, describe_funnel


def evaluation(accuracy: float, pass_at_8: float, prefix: str = "eval") -> dict[str, float]:
    metrics = {}
    for name, value in (("accuracy", accuracy), ("pass@8", pass_at_8)):
        metrics |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1}
    return {f"{prefix}_{n}": v for n, v in (metrics | {"pass@1": 0.2, "pass@2": 0.3}).items()}


def make_line(round_index: int, accuracy: float | None, **changes: Any) -> dict[str, Any]:
    funnel = Funnel(
        prompts=96,
        prompts_solved=40,
        unhinted=OutcomeCounts(truncated=8, failed=560, duplicate=20, kept=180 + round_index),
        hinted=OutcomeCounts(failed=400, leaked=38, kept=10),
        leak_reasons=(("answer_only", 38),),
    )
    line = {
        "round": round_index,
        "sampled_from": "base",
        "trained_from": "base",
        "funnel": funnel.to_dict(),
        "rewards": {"mean": 0.3},
        "eval": {} if accuracy is None else evaluation(accuracy, accuracy + 0.15),
        "gain": None if accuracy is None else accuracy - 0.125,
        "gain_standard_error": None if accuracy is None else 0.052,
        "seconds": {"sample": 81.4, "train": 45.6, "evaluate": 12.0},
        "examples": 190 + round_index,
        "steps": 1234,
        "learning_rate": 1e-4,
    }
    return json.loads(json.dumps({**line, **changes}))


def run_lines() -> list[dict[str, Any]]:
    before = evaluation(0.13, 0.25) | evaluation(0.2, 0.3, "eval_few_shot")
    return [
        make_line(0, 0.45, eval_before=before),
        make_line(1, 0.64),
        make_line(2, 0.61),
    ]


def test_the_table_has_a_row_for_each_round_and_the_baselines() -> None:
    header, before, few_shot, *rounds, caption = map(cells, round_table(run_lines()).splitlines())
    assert header == [
        "round", "gain ± s.e.", "funnel", "steps", "accuracy", "pass@8", "seconds"
    ]  # fmt: skip
    assert before == ["before", "–", "–", "–", "0.130 [0.03, 0.23]", "0.250 [0.15, 0.35]", "–"]
    assert few_shot[0] == "before, few-shot"
    assert few_shot[4] == "0.200 [0.10, 0.30]"
    assert len(rounds) == 3
    assert rounds[1] == [
        "1", "+0.515 ± 0.052", "769 → 761 → 201 + 10 → 191 → 191", "1,234",
        "0.640 [0.54, 0.74]", "0.790 [0.69, 0.89]", "81/46/12",
    ]  # fmt: skip
    assert "sampled → finished → correct + rationalized → kept → trained" in caption[0]
    assert "sample/train/evaluate" in caption[0]


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_the_columns_of_the_table_line_up() -> None:
    *lines, _ = round_table([*run_lines(), make_line(10, 0.5)]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_without_heldout_prompts_the_table_shows_the_funnel_alone() -> None:
    header, row, _ = round_table([make_line(0, None)]).splitlines()
    assert row.split()[:2] == ["0", "–"]
    assert "before" not in header
    assert "pass@" not in header


def test_scores_that_were_measured_are_shown_whatever_the_method() -> None:
    measured = {"eval_logps": -1.0, "eval_win_rate": 0.7, "eval_margin": 0.2, "eval_loss": 0.6}
    pairs = make_line(0, None, eval=measured, rewards={})
    header, row, caption = map(cells, round_table([pairs], "eval_logps").splitlines())
    assert header[4:-1] == ["logps", "win_rate", "margin"]
    assert row[4:-1] == ["-1.000", "0.700", "0.200"]
    assert "correct" not in caption[0]
    graded = make_line(0, None, eval=measured | evaluation(0.4, 0.5), rewards={})
    header, *_ = map(cells, round_table([graded], "eval_accuracy").splitlines())
    assert header[4:-1] == ["accuracy", "pass@8", "logps", "win_rate", "margin"]


def test_of_several_heldout_sets_the_chosen_ones_scores_are_shown() -> None:
    scores = evaluation(0.3, 0.4, "eval_easy") | evaluation(0.1, 0.2, "eval_hard")
    lines = [make_line(0, None, eval=scores)]
    assert "0.300 [" in round_table(lines)
    assert "0.100 [" in round_table(lines, metric="eval_hard_accuracy")
    assert "0.100 [" in round_table(lines, metric="eval_hard_pass@1")


def test_plain_lines_are_printed_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_round_table(run_lines())
    assert capsys.readouterr().out == f"{round_table(run_lines())}\n"


@pytest.mark.parametrize("width", [80, 200])
def test_a_terminal_gets_every_number_of_the_plain_table_whole(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    print_round_table(run_lines())
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)  # bold and the like
    assert "…" not in shown
    assert all(len(line) <= width for line in shown.splitlines())
    *table, _ = round_table(run_lines()).splitlines()
    for part in " ".join(table).split():
        assert part in shown


def test_the_model_card_names_the_best_and_the_last_round() -> None:
    text = rounds_markdown(run_lines())
    assert "Best round by `eval_accuracy`: 1 (0.640). Last round: 2 (0.610)." in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2 + 3
    assert len({line.count("|") for line in table}) == 1


def test_the_model_card_says_when_training_made_it_worse() -> None:
    lines = [make_line(0, 0.1, eval_before=evaluation(0.125, 0.25))]
    assert "Best round by `eval_accuracy`: before training (0.125)" in rounds_markdown(lines)


def test_the_model_card_names_the_best_round_as_the_run_chose_it() -> None:
    """Whether smaller is better is the run's to know; a metric's name doesn't tell."""
    text = rounds_markdown(run_lines(), "eval_accuracy", greater_is_better=False)
    assert "Best round by `eval_accuracy`: before training (0.130). Last round: 2" in text
    lines = [make_line(i, None, eval={"eval_mean_loss": 1.0 - i}) for i in range(2)]
    assert "Best round by `eval_mean_loss`: 0 (1.000)" in rounds_markdown(lines, "eval_mean_loss")


def test_a_method_without_hints_shows_none() -> None:
    funnel = Funnel(10, 6, OutcomeCounts(failed=4, kept=11))
    lines = [make_line(i, 0.5, funnel=funnel.to_dict()) for i in range(2)]
    text = round_table(lines)
    assert "15 → 15 → 11 → 11 → 190" in text
    assert "finished → correct → kept → trained" in text
    assert " + " not in text
    assert describe_funnel(funnel) == (
        "15 sampled → 15 finished → 11 correct → 11 kept; dropped: 4 failed; 6 of 10 prompts solved"
    )
    assert describe_funnel(funnel, graded=False) == (
        "15 sampled → 15 finished → 11 kept; dropped: 4 failed; 6 of 10 prompts with a pair"
    )
    # one round with hints, and all rows have the column
    hinted = [*lines, make_line(2, 0.5)]
    assert "11 + 0" in round_table(hinted)


def test_a_metric_that_is_no_share_is_shown_itself() -> None:
    scores = {"eval_mean_reward": 0.7, "eval_mean_reward_low": 0.6, "eval_mean_reward_high": 0.8}
    header, row, _ = round_table([make_line(0, None, eval=scores)], "eval_mean_reward").splitlines()
    assert "mean_reward" in header
    assert "accuracy" not in header
    assert "0.700 [0.60, 0.80]" in row
    both = round_table([make_line(0, 0.5, eval=scores | evaluation(0.5, 0.6))], "eval_mean_reward")
    assert {"mean_reward", "accuracy", "pass@8"} <= set(both.splitlines()[0].split())


def test_the_model_card_can_be_written_without_heldout_prompts() -> None:
    assert "no held-out prompts" in rounds_markdown([make_line(0, None)])


@pytest.mark.parametrize("lines", [run_lines(), [make_line(0, None)], [make_line(0, 0.5)]])
def test_the_plot_is_a_png(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "plots" / "rounds.png"
    had_pyplot = "matplotlib.pyplot" in sys.modules
    plot_rounds(lines, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert path.stat().st_size > 5_000
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_hostile_texts_cant_act_on_a_terminal(capsys, monkeypatch, make_rollout) -> None:
    """Neither of completions, nor in causes of abstentions, which a reward function may take from them."""
    for text in HOSTILE:
        print_completions([make_rollout(prompt=text, completion=text)])
    shown = capsys.readouterr().out
    assert visible(shown) == shown
    assert all(repr(text) in shown for text in HOSTILE)
    funnel = {**make_line(0, None)["funnel"], "abstained: [/red] [b]x": 2}
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_round_table([make_line(0, None, funnel=funnel)])
    assert "2 [/red] [b]x" in " ".join(capsys.readouterr().out.split())
