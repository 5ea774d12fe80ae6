"""Push all samples of a run to a dataset repository on the Hub, with a card.

In: the folder of a run, and the repository's name. Out: one Parquet file as `trl-selfplay export --as parquet`
writes it, the lines of the rounds, and a card that says where the samples come from.
"""

import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trl_selfplay.evaluation.markdown import escape
from trl_selfplay.inspection.export import export_run
from trl_selfplay.inspection.run_folder import RunFolder

_COLUMNS = {
    "prompt": "the prompt as the run's dataset has it",
    "solution": "the ground truth, where the dataset has one",
    "completion": "what the model wrote",
    "outcome": "what the run did with it: `kept` ones were trained on",
    "reward": "weighted sum of `rewards`, one for each reward function",
    "round": "the round that sampled it, counted from 0",
    "sampled_from": "the weights that wrote it: `base`, or those after a round",
    "hinted": "whether the answer was in the prompt as a hint",
    "rendered_prompt": "the prompt as sampled from, with template, few-shot examples and hint",
}


def push_samples(
    run: RunFolder,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    model: str = "",
) -> None:
    """Push the samples of all rounds and the rounds' lines, replacing those of an earlier push.

    Args:
        run: The run.
        repo_id: A dataset repository, made if it isn't there; without an owner, the user's own.
        private: Whether a new repository is private; None: as the owner's settings say.
        token: For the Hub; None takes the one of `hf auth login`.
        model: The repository of the model that was trained on these samples.

    Raises:
        FileNotFoundError, ValueError: As `export_run`.
    """
    import huggingface_hub

    with TemporaryDirectory() as folder:
        export_run(run, "parquet", Path(folder) / "data" / "train.parquet")
        metadata = huggingface_hub.DatasetCardData(
            pretty_name=f"Samples of a {run.method} run",
            # Without this, the viewer would take the lines of the rounds for samples as well.
            configs=[{"config_name": "default", "data_files": "data/train.parquet"}],
            tags=[
                "trl",
                "trl-selfplay",
                "completions",
                *([run.method.lower()] if run.method else []),
            ],
        )
        if run.lines:
            lines = "".join(json.dumps(line) + "\n" for line in run.lines)
            (Path(folder) / "rounds.jsonl").write_text(lines, encoding="utf-8")
        text = f"---\n{metadata.to_yaml()}\n---\n\n{_card(run, model)}\n"
        (Path(folder) / "README.md").write_text(text, encoding="utf-8")
        api = huggingface_hub.HfApi(token=token)
        made = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            repo_type="dataset",
            folder_path=folder,
            commit_message="Samples of all rounds",
        )


def _card(run: RunFolder, model: str) -> str:
    config: dict[str, Any] = run.config
    base = str(config.get("model") or "")
    base = f"a local folder, {Path(base).name}" if Path(base).exists() else base
    facts = {
        "Method": run.method,
        "Base model": base,
        "Trained model": model,
        "Reward functions": config.get("reward_funcs") or "",
        "Rounds": ", ".join(map(str, run.rounds)),
    }
    names: list[str] = []
    counts: dict[int, Counter[str]] = {}
    for index in run.rounds:
        counts[index] = Counter(outcome for _, outcome in run.rollouts(index))
        names += [name for name in counts[index] if name not in names]
    return "\n".join(
        [
            f"# Samples of a {escape(run.method)} run",
            "",
            "Completions that a model sampled and trained on, round after round, with trl-selfplay. Each "
            "row is one completion. The licences of the prompts and of the model that wrote the "
            "completions apply.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {escape(value)} |" for name, value in facts.items() if value),
            "",
            "## Outcomes",
            "",
            f"| round | {' | '.join(map(escape, names))} |",
            "|" + "---:|" * (1 + len(names)),
            *(
                f"| {' | '.join([str(index), *(f'{count[name]:,}' for name in names)])} |"
                for index, count in counts.items()
            ),
            "",
            "## Columns",
            "",
            *(f"- `{name}`: {what}" for name, what in _COLUMNS.items()),
            "",
            "The others are the fields of `trl_selfplay.rollouts.record.Rollout`.",
            "",
            "`rounds.jsonl` has a line per finished round: what was kept, rewards, held-out scores, alarms, "
            "tokens and seconds.",
        ]
    )
