"""The dataset's prompts, kept beside a run."""

import datetime

import pytest

from trl_selfplay.disk import DamagedFileError
from trl_selfplay.rollouts.kept_prompts import KeptPrompt, keep_prompts, load_prompts
from trl_selfplay.rollouts.prompts import collect_rows

DAY = datetime.date(2020, 2, 29)
RECORDS = [
    {"prompt": "two\nlines, é\x00|", "solution": 3},
    {"prompt": "text", "solution": ["3", "three"]},
    {"prompt": "no solution"},
    {"prompt": "a day", "solution": DAY},
    {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "1 + 2"}]}],
        "solution": "3",
        "chat_template_kwargs": {"enable_thinking": False},
        "tools": [{"type": "function", "function": {"name": "add"}}],
    },
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: str(record["prompt"])[:8])
def test_a_prompt_is_read_as_the_dataset_has_it(record, tmp_path) -> None:
    (row,) = collect_rows([(0, record, {})], "train_dataset")
    keep_prompts(tmp_path / "prompts.parquet", [row])
    kept = load_prompts(tmp_path / "prompts.parquet")
    solution = record.get("solution")
    arguments = {k: v for k, v in record.items() if k in ("tools", "chat_template_kwargs")}
    expected = KeptPrompt(
        record["prompt"], "2020-02-29" if solution == DAY else solution, arguments
    )
    assert [kept[prompt_id] for prompt_id in kept] == [expected]
    assert row.prompt_id in kept
    assert "0" * 32 not in kept


def test_what_prompts_show_of_tools_is_kept_once_for_all(tmp_path) -> None:
    schemas = [{"function": {"name": "add", "description": "x" * 4000}}]
    records = [{"prompt": f"Q {i}"} for i in range(2000)]
    rows = collect_rows(((i, r, {}) for i, r in enumerate(records)), "train_dataset")
    shown = {"Q 0": None, "Q 1": "You can add."}
    keep_prompts(tmp_path / "tools.parquet", rows, lambda row: shown.get(row.prompt, schemas))
    keep_prompts(tmp_path / "plain.parquet", rows)
    kept = load_prompts(tmp_path / "tools.parquet")
    found = {kept[prompt_id].prompt: kept[prompt_id].tools for prompt_id in kept}
    assert found == {record["prompt"]: shown.get(record["prompt"], schemas) for record in records}
    sizes = [(tmp_path / f"{name}.parquet").stat().st_size for name in ("plain", "tools")]
    assert sizes[1] < sizes[0] + 20_000


def test_prompts_are_written_once(tmp_path) -> None:
    path = tmp_path / "prompts.parquet"
    for record in RECORDS[:2]:
        keep_prompts(path, collect_rows([(0, record, {})], "train_dataset"))
    kept = load_prompts(path)
    assert [kept[prompt_id].prompt for prompt_id in kept] == [RECORDS[0]["prompt"]]


def test_a_damaged_file_is_named(tmp_path) -> None:
    (tmp_path / "prompts.parquet").write_text("no table")
    with pytest.raises(DamagedFileError, match=r"prompts\.parquet can't be read"):
        load_prompts(tmp_path / "prompts.parquet")
