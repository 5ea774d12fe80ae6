"""What a run asks beside its own process goes away: what is told, what is kept, and that it goes on.

An engine, a server of vLLM's, a judge and a tracker, each in the middle of a run; real runs of tiny models.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import send, serving
from engines import StandIn
from lora_server import serving_adapters
from tiny_rewards import contains_solution
from tiny_runs import build, outcome_of, samples_of
from transformers import AutoTokenizer
from transformers.integrations import TensorBoardCallback

from trl_selfplay.disk import RESUME
from trl_selfplay.generation import vllm_sampler
from trl_selfplay.generation.vllm_process import EngineProcess
from trl_selfplay.rewards import JudgeReward

FULL = pytest.mark.full


def check_stops_and_goes_on(run: Callable[[str], Any], says: str, mend: Callable[[], None]) -> None:
    """Check that a run stops with these words and samples kept, and goes on like a whole one.

    Args:
        run: Builds the run in a folder; there is a whole one in "whole".
        says: Pattern of the error.
        mend: Brings back what went away.
    """
    trainer = run("run")
    folder, whole = trainer.run.root.parent, trainer.run.root.parents[1] / "whole"
    with pytest.raises(Exception, match=says) as raised:
        trainer.train()
    assert RESUME in "\n".join([str(raised.value), *getattr(raised.value, "__notes__", ())])
    before = sampled_in(folder)
    assert before
    mend()
    run("run").train(resume_from_checkpoint=True)
    assert come_to(folder) == come_to(whole)
    assert before <= sampled_in(folder)


def come_to(folder: Path) -> dict[str, Any]:
    """Return a run's outcome but for how far the engine agrees, which is of the tokens seen last."""
    outcome = outcome_of(folder)
    for line in outcome["lines"]:
        line.get("engine", {}).pop("agreement", None)
    return outcome


def sampled_in(folder: Path) -> set[tuple[str, tuple[int, ...]]]:
    return {(r.prompt_id, r.completion_ids) for shard in samples_of(folder).values() for r in shard}


# --- a judge's server ------------------------------------------------------------------------------


def refuse(request: Any) -> None:
    send(request, b"the model is gone", 503)


def break_off(request: Any) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")


def hang(request: Any) -> None:
    request.rfile.read()  # until the client has left


class Judge:
    """Answers by the question's letters; from a number of questions on as `then` does."""

    def __init__(self, then: Callable[[Any], None]) -> None:
        self.count, self.most, self.then = 0, math.inf, then

    def __call__(self, question: str) -> Any:
        self.count += 1
        return self.then if self.count > self.most else f"so {sum(map(ord, question)) % 10}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "then", [break_off, pytest.param(refuse, marks=FULL), pytest.param(hang, marks=FULL)]
)
def test_a_judge_that_goes_away_stops_a_run_and_costs_no_score(
    then, source, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("trl_selfplay.rewards.endpoint._FIRST_WAIT_S", 0.01)
    judge = Judge(then)
    with serving(judge) as server:

        def run(name: str) -> Any:
            judged = JudgeReward(
                "judge", base_url=server.url, deadline=5.0 if then is hang else 60.0, verdict=r".*?(\d).*", scale=(0, 9),
                template="{prompt} {completion} so", max_completion_length=8,
            )  # fmt: skip
            return build(
                "STaR", tmp_path / name, source, reward_funcs=[contains_solution, judged],
                reward_weights=[1.0, 0.5], reward_threshold=0.4, num_rounds=1,
            )  # fmt: skip

        run("whole").train()
        judge.most, judge.count = judge.count // 2, 0
        check_stops_and_goes_on(
            run, "'judge_reward' raised EndpointError", lambda: setattr(judge, "most", math.inf)
        )


# --- a server of vLLM's ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("goes", "says"),
    [
        ("away", "vLLM server at .* can't be reached"),
        pytest.param("back to its start", "/v1/completions answers 400", marks=FULL),
    ],
)
def test_a_vllm_server_that_goes_away_stops_a_run(goes, says, source, tmp_path) -> None:
    with serving_adapters(source, AutoTokenizer.from_pretrained(source)) as server:

        def run(name: str) -> Any:
            return build(
                "STaR", tmp_path / name, source, num_rounds=1, use_vllm=True, vllm_mode="server",
                vllm_server_base_url=server.url,
            )  # fmt: skip

        run("whole").train()
        asked = [path for path, _ in server.asked].count("/v1/completions")
        is_gone = False

        def fail(path: str, body: Any) -> None:
            nonlocal is_gone, asked
            asked -= 2 * (path == "/v1/completions")
            if asked > 0:
                return
            if goes == "away":
                raise ConnectionError  # closes the connection
            if not is_gone:
                is_gone = True
                server.forget()

        server.fail = fail
        check_stops_and_goes_on(run, says, lambda: setattr(server, "fail", lambda path, body: None))


# --- an engine of its own --------------------------------------------------------------------------


def has_digit(completions: Any, **kwargs: Any) -> list[float]:
    return [float(any(c.isdigit() for c in text)) for text in completions]


@pytest.fixture
def engine_run(tmp_path, monkeypatch, tiny_model, byte_tokenizer) -> Callable[[str], Any]:
    """Build runs over a stand-in of vLLM, whose tokens are uniform, with a policy that is uniform too."""
    model = tiny_model(byte_tokenizer)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "source")
    byte_tokenizer.save_pretrained(tmp_path / "source")
    stand_in = StandIn(tmp_path, monkeypatch)

    def process(*arguments: Any) -> EngineProcess:
        # Seconds in which it must say something: few where one is to hang.
        return EngineProcess(*arguments[:-1], 3.0 if '"hang"' in os.environ["STAND_IN"] else 120.0)

    monkeypatch.setattr(vllm_sampler, "EngineProcess", process)

    def run(name: str) -> Any:
        trainer = build(
            "STaR", tmp_path / name, tmp_path / "source", use_vllm=True, vllm_python=stand_in.python,
            peft_config=None, reward_funcs=has_digit, rationalize=False, num_rounds=1,
            max_completion_length=200,
        )  # fmt: skip
        for name, weight in trainer.model.named_parameters():
            weight.requires_grad_("q_proj" in name)  # whose gradient is 0
        return trainer

    run.plan = stand_in.plan
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "then", ["die", pytest.param("hang", marks=FULL), pytest.param("memory", marks=FULL)]
)
def test_an_engine_that_fails_is_replaced_once_and_then_stops_a_run(
    then, engine_run, tmp_path
) -> None:
    engine_run("whole").train()
    engine_run.plan(at=150, then=then, times=1)
    engine_run("replaced").train()
    assert come_to(tmp_path / "replaced") == come_to(tmp_path / "whole")
    engine_run.plan(at=150, then=then, times=3)  # with the one before
    check_stops_and_goes_on(engine_run, "vLLM", engine_run.plan)


# --- a tracker -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tracker_that_fails_stops_a_run(source, tmp_path, monkeypatch) -> None:
    def run(name: str) -> Any:
        return build("STaR", tmp_path / name, source, report_to=["tensorboard"], num_rounds=1)

    log, count = TensorBoardCallback.on_log, 0

    def failing(self: Any, *arguments: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise ConnectionError("the tracker is gone")
        log(self, *arguments, **kwargs)

    run("whole").train()
    monkeypatch.setattr(TensorBoardCallback, "on_log", failing)
    check_stops_and_goes_on(run, "the tracker is gone", lambda: None)
