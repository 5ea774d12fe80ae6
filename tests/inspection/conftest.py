"""A run's folder written by hand: prompts, samples and outcomes as a test needs them."""

import json

import pyarrow as pa
import pytest

from trl_selfplay.disk import save_table, save_text
from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.rollouts.kept_prompts import keep_prompts
from trl_selfplay.rollouts.prompts import collect_rows
from trl_selfplay.rollouts.record import save_rollouts
from trl_selfplay.rollouts.shards import Shard, save_plan


@pytest.fixture
def write_run(tmp_path, make_rollout):
    """Return a function that writes a finished run.

    Its arguments: the dataset's records, and for each round the samples as dicts: `row`, the record's
    place, `outcome`, and what differs from the rollout of the fixture `make_rollout`. `tools_shown` is what
    the prompts show of tools.
    """

    def write(records, rounds, name="run", tools_shown=None, **config):
        root = tmp_path / name / "_rounds"
        ids = []  # of each record
        for record in records:
            ids += [row.prompt_id for row in collect_rows([(0, record, {})], "train_dataset")]
        keep_prompts(
            root / "prompts.parquet",
            collect_rows(((i, record, {}) for i, record in enumerate(records)), "train_dataset"),
            lambda row: tools_shown,
        )
        save_text(root / "config.json", json.dumps({"method": "STaR", "model": "tiny", **config}))
        lines = []
        for index, samples in enumerate(rounds):
            folder = root / f"round-{index:03d}"
            rollouts, outcomes = [], []
            for sample in samples:
                fields = {k: v for k, v in sample.items() if k not in ("row", "outcome")}
                outcomes.append(sample["outcome"])
                rollouts.append(
                    make_rollout(
                        **{
                            "round_index": index,
                            "prompt_id": ids[sample["row"]],
                            "phase": "hint" if fields.get("hinted") else "train",
                            **fields,
                        }
                    )
                )
            for prefix, is_hinted in (("", False), ("hint-", True)):
                shard = [r for r in rollouts if r.hinted == is_hinted]
                prompt_ids = tuple(dict.fromkeys(r.prompt_id for r in shard))
                save_plan(folder / "samples" / f"{prefix}plan.json", [Shard(prompt_ids, 1)])
                save_rollouts(folder / "samples" / f"{prefix}00000.parquet", shard)
            columns = {
                "prompt_id": [r.prompt_id for r in rollouts],
                "sample_index": pa.array([r.sample_index for r in rollouts], pa.int32()),
                "hinted": [r.hinted for r in rollouts],
                "outcome": outcomes,
            }
            save_table(folder / "selection.parquet", pa.table(columns))
            source = "base" if index == 0 else f"round {index - 1}"
            lines.append({"round": index, "sampled_from": source, "steps": 1})
        save_text(root / "rounds.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        return RunFolder.open(tmp_path / name)

    return write
