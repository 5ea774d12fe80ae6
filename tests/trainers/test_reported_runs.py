"""Every method's run, as its trainer leaves it, has a report and samples to show."""

import json
import re

import pytest

from trl_selfplay.commands.dispatch import main
from trl_selfplay.inspection.html_report import write_report
from trl_selfplay.inspection.run_folder import RunFolder


@pytest.mark.parametrize(
    "method", ["spin", *(pytest.param(m, marks=pytest.mark.slow) for m in ("star", "rest", "irpo"))]
)
def test_the_run_of_a_method_is_shown(method, request, sums, answers, capsys) -> None:
    heldout = answers(3, first=20) if method == "spin" else sums(3, first=90)
    trainer = request.getfixturevalue(f"build_{method}")(
        num_rounds=1, max_steps=1, eval_dataset=heldout, hub_token="hf_secret"
    )
    trainer.train()
    page = write_report(trainer.args.output_dir).read_text()
    assert "Finished after" in page
    assert "hf_secret" not in page
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])
    run = RunFolder.open(trainer.args.output_dir)
    shown = {sample["completion"] for sample in data["samples"]}
    assert shown & {rollout.completion for rollout, _ in run.rollouts(0)}
    assert {"Outcomes", "Seconds", "Tokens"} <= {chart["title"] for chart in data["charts"]}
    capsys.readouterr()
    assert main(["samples", trainer.args.output_dir]) == 0
    assert "round" in capsys.readouterr().out
