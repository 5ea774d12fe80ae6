"""What a run publishes, by pushes to a stand-in of the Hub."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hub_server import OWNER, serving_hub
from huggingface_hub import DatasetCard, ModelCard

TOKEN = "hf_" + "Secret" * 5


def push(hub, tmp_path, model):
    script = Path(__file__).with_name("push_process.py")
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run"), str(model), TOKEN],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_push_takes_model_and_samples_with_their_cards_and_no_token(
    tmp_path, saved_tiny_model
) -> None:
    with serving_hub() as hub:
        hub.refusals = 1
        done = push(hub, tmp_path, saved_tiny_model)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "403 Forbidden" in done.stderr  # of the first push
    assert hub.private == {f"models/{OWNER}/run": True, f"datasets/{OWNER}/samples": True}
    assert f"Bearer {TOKEN}" in hub.tokens
    model, samples = hub.files[f"models/{OWNER}/run"], hub.files[f"datasets/{OWNER}/samples"]
    assert "model.safetensors" in model
    assert samples.keys() == {"README.md", "data/train.parquet", "rounds.jsonl"}
    assert samples["rounds.jsonl"] == (tmp_path / "run/_rounds/rounds.jsonl").read_bytes()
    viewed = DatasetCard(samples["README.md"].decode()).data.configs
    assert viewed == [{"config_name": "default", "data_files": "data/train.parquet"}]
    assert not [path for path in model if path.startswith("_rounds") or "checkpoint" in path]
    written = [*model.values(), *samples.values(), done.stdout.encode(), done.stderr.encode()]
    written += [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in written)

    rows = pq.read_table(io.BytesIO(samples["data/train.parquet"])).to_pylist()
    assert len(rows) == 10 * 4 + sum(row["hinted"] for row in rows)
    assert {row["prompt"][:4] for row in rows} == {f"Q {i} " for i in range(10)}

    for card_class, files in ((ModelCard, model), (DatasetCard, samples)):
        text = files["README.md"].decode()
        card = card_class(text)
        assert {"trl", "trl-selfplay", "star"} <= set(card.data.tags)
        assert "evil" not in card.data.tags
        assert "<script>" not in text
        assert r"\| &lt;script&gt;alert(1)&lt;/script&gt;" in text
    card = ModelCard(model["README.md"].decode())
    assert card.data.datasets == "someone/sums"
    assert {"sft", "generated_from_trainer"} <= set(card.data.tags)
    for where in ("fine-tuned version of", "| Base model |"):
        assert f"{where} a model in a local folder, tiny-model" in card.text
    assert str(tmp_path) not in card.text
    assert card.data.base_model is None  # it would be a link to the hub
    for heading in ("## Lineage", "## Rounds", "### What became of the completions"):
        assert heading in card.text
    assert re.search(r"\| Rounds \| 1 of 1 \|", card.text)
    assert "Cite TRL as" in card.text
    assert "zelikman2022star" in card.text
    assert "trl_selfplay," in card.text


def test_saved_arguments_hold_no_token_and_the_trainer_keeps_it(build_star, tmp_path) -> None:
    trainer = build_star(hub_token=TOKEN, chat_template_kwargs={"a": 1, "of": {"api_key": TOKEN}})
    loading = {"token": TOKEN, "use_safetensors": True}  # a model's name is needed to give it
    trainer.args.model_init_kwargs = loading
    trainer.save_model()
    path = tmp_path / "run" / "training_args.bin"
    assert TOKEN.encode() not in path.read_bytes()
    saved = torch.load(path, weights_only=False)
    assert saved.model_init_kwargs == {"use_safetensors": True}
    assert saved.chat_template_kwargs == {"a": 1, "of": {}}
    assert trainer.args.hub_token == TOKEN
    assert trainer.args.model_init_kwargs is loading


def test_samples_are_not_pushed_without_the_model(build_star) -> None:
    with pytest.raises(ValueError, match="log_completions_hub_repo='samples' without push_to_hub"):
        build_star(log_completions_hub_repo="samples")
