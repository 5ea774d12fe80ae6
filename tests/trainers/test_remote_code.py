"""Models whose folder holds code: it runs only where trust_remote_code=True asks for it."""

import json
import shutil
from contextlib import suppress

import pytest

from trl_selfplay import QuietSTaRConfig, QuietSTaRTrainer
from trl_selfplay.commands import estimate, score
from trl_selfplay.rewards import JudgeReward
from trl_selfplay.rewards.reward_model import RewardModel
from trl_selfplay.rewards.verifier import VerifierReward

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast
Path({mark!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = {kind!r}

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnClassifier(LlamaForSequenceClassification):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(params=["unknown-kind", pytest.param("llama", marks=pytest.mark.slow)])
def coded_model(request, saved_tiny_model, tmp_path):
    """A folder whose configuration names classes of its own module, which leaves a mark."""
    folder, mark = tmp_path / "coded", tmp_path / "mark"
    shutil.copytree(saved_tiny_model, folder)
    (folder / "own.py").write_text(CODE.format(mark=str(mark), kind=request.param))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {
        "model_type": request.param,
        "auto_map": {
            "AutoConfig": "own.OwnConfig",
            "AutoModelForCausalLM": "own.OwnModel",
            "AutoModelForSequenceClassification": "own.OwnClassifier",
        },
    }
    path.write_text(json.dumps(config))
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
    }
    path.write_text(json.dumps(tokenizer))
    return str(folder), mark


def trainer_door(build, **changes):
    return lambda request, folder: request.getfixturevalue(build)(
        model=folder, processing_class=None, **changes
    )


def quiet_star(request, folder):
    rows = request.getfixturevalue("sums")(4).rename_column("prompt", "text").select_columns("text")
    args = QuietSTaRConfig(
        str(request.getfixturevalue("tmp_path") / "run"), use_cpu=True, bf16=False, report_to=[]
    )
    return QuietSTaRTrainer(folder, args, train_dataset=rows)


def estimate_command(request, folder):
    if estimate.run(["star", "--model_name_or_path", folder]):
        raise ValueError("the command ends with an error")


def score_command(request, folder):
    make = request.getfixturevalue("make_rollout")
    run = request.getfixturevalue("write_folder")(
        [[(make(completion="so The answer is 7", reward=1.0), "kept")]], config={"model": folder}
    )
    for name in ("own.py", "config.json", "tokenizer_config.json", "tokenizer.json"):
        shutil.copy(f"{folder}/{name}", run)
    if score.run([str(run)]):
        raise ValueError("the command ends with an error")


DOORS = {
    "STaR": trainer_door("build_star"),
    "SPIN": trainer_door("build_spin"),
    "IRPO": trainer_door("build_irpo"),
    "ReSTEM": trainer_door("build_rest_em"),
    "STaR, with a tokenizer": lambda request, folder: request.getfixturevalue("build_star")(
        model=folder
    ),
    "Quiet-STaR": quiet_star,
    "reward model": lambda request, folder: RewardModel(folder),
    "reward_funcs": lambda request, folder: request.getfixturevalue("build_star")(
        reward_funcs=folder
    ),
    "judge": lambda request, folder: JudgeReward(folder),
    "verifier": lambda request, folder: VerifierReward(folder),
    "reference of a verifier": lambda request, folder: VerifierReward(
        str(request.getfixturevalue("saved_tiny_model")), folder, score="ratio"
    ),
    "estimate": estimate_command,
    "score": score_command,
}


@pytest.mark.parametrize("door", DOORS)
def test_code_beside_a_model_runs_only_if_asked_for(request, coded_model, door) -> None:
    folder, mark = coded_model
    with suppress(ValueError, OSError):  # no class of transformers' own fits
        DOORS[door](request, folder)
    assert not mark.exists()


def test_code_beside_a_model_runs_if_asked_for(coded_model, build_star) -> None:
    folder, mark = coded_model
    build_star(model=folder, processing_class=None, trust_remote_code=True)
    assert mark.exists()
