"""Digests of what a run leaves on disk, read by the documented layout of its folder alone."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import load_from_disk

# Digested by name, so that a column which a later version adds changes nothing.
ROLLOUT_KEY = ("round_index", "phase", "prompt_id", "sample_index")
ROLLOUT_COLUMNS = (
    "prompt_ids", "completion_ids", "prompt", "completion", "finish", "hinted", "logprob",
    "reward", "rewards",
)  # fmt: skip
SELECTION_COLUMNS = ("prompt_id", "hinted", "sample_index", "outcome")


def trainable(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of the trainable weights by name, in the order of their names."""
    return {
        name: weight.detach().cpu().clone()
        for name, weight in sorted(model.named_parameters())
        if weight.requires_grad
    }


def digest_json(value: Any) -> str:
    """Return the digest of plain values; a float's repr tells its every bit."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_rows(root: Path) -> dict[str, dict[str, Any]]:
    """Return the digests of rollouts, selections and datasets below `_rounds`, by folder.

    Each is a dict: how many rows there are, and the digest of each column.
    """
    found: dict[str, dict[str, Any]] = {}
    rollouts: dict[Path, list[Any]] = {}  # those of all shards of a folder together
    for path in sorted(root.rglob("*.parquet")):
        rows = pq.read_table(path).to_pylist()
        folder = path.parent.relative_to(root)
        if path.name == "selection.parquet":
            rows.sort(key=lambda row: [str(row[name]) for name in SELECTION_COLUMNS])
            found[f"selection {folder}"] = _digest_columns(rows, SELECTION_COLUMNS)
        elif rows and "completion_ids" in rows[0]:
            rollouts.setdefault(folder, []).extend(rows)
    for folder, rows in rollouts.items():
        rows.sort(key=lambda row: [str(row[k]).rjust(4) for k in ROLLOUT_KEY] + [row["prompt"]])
        found[f"rollouts {folder}"] = _digest_columns(rows, (*ROLLOUT_KEY, *ROLLOUT_COLUMNS))
    for path in sorted(root.rglob("dataset_info.json")):
        data = load_from_disk(str(path.parent))
        name = f"dataset {path.parent.relative_to(root)}"
        found[name] = _digest_columns(data.to_list(), sorted(data.column_names))
    return found


def _digest_columns(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, Any]:
    return {
        "rows": len(rows),
        **{name: digest_json([row.get(name) for row in rows]) for name in columns},
    }
