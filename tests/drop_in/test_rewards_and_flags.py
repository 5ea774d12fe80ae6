"""Reward functions get what GRPOTrainer gives them; flags and files are read as TRL's configs read them."""

import pytest
import torch
import yaml
from datasets import Dataset
from drop_in_classes import CLASSES
from transformers import LlamaForSequenceClassification
from trl import DPOConfig, GRPOConfig, GRPOTrainer, SFTConfig, TrlParser


class Spy:
    """A reward function that keeps the arguments of its first call."""

    def __init__(self) -> None:
        self.given = None
        self.__name__ = "spy"

    def __call__(self, prompts, completions, **kwargs):
        if self.given is None:
            self.given = {"prompts": prompts, "completions": completions, **kwargs}
        return [1.0] * len(completions)


def shape(value):
    """Return the form of a value: types inside lists and mappings, without their lengths."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in sorted(value.items())}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "a function" if callable(value) else type(value).__name__


@pytest.mark.parametrize("chat", [False, True])
def test_reward_functions_get_what_grpo_gives_them(
    build, parts, chat_tokenizer, tiny_model, tmp_path, chat
) -> None:
    rows = parts.rows.remove_columns("completion").add_column("level", list(range(8)))
    if chat:
        parts.tokenizer = chat_tokenizer
        rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    theirs, own = Spy(), Spy()
    GRPOTrainer(
        tiny_model(parts.tokenizer), reward_funcs=theirs, train_dataset=rows,
        processing_class=parts.tokenizer,
        args=GRPOConfig(
            str(tmp_path / "grpo"), num_generations=2, per_device_train_batch_size=4, max_steps=1,
            max_completion_length=4, report_to=[], disable_tqdm=True, use_cpu=True, bf16=False,
            gradient_checkpointing=False, save_strategy="no",
        ),
    ).train()  # fmt: skip
    build("STaR", reward_funcs=own, train_dataset=rows, max_completion_length=32).train()
    assert {k: shape(v) for k, v in theirs.given.items()}.items() <= {
        k: shape(v) for k, v in own.given.items()
    }.items()
    assert set(own.given) == set(theirs.given)
    for given in (theirs.given, own.given):  # a row's columns stay together
        level = {row["level"]: row for row in rows}
        for prompt, solution, which in zip(
            given["prompts"], given["solution"], given["level"], strict=True
        ):
            assert (level[which]["prompt"], level[which]["solution"]) == (prompt, solution)


def test_sync_and_async_functions_and_reward_models_are_weighed_as_in_grpo(
    build, parts, tiny_model
) -> None:
    async def long(completions, **kwargs):
        return [None if not c else float(len(c)) for c in completions]

    def empty(completions, **kwargs):
        return [float(not c) for c in completions]

    config = tiny_model(parts.tokenizer).config
    config.num_labels = 1
    torch.manual_seed(0)
    scorer = LlamaForSequenceClassification(config)
    ours = build("STaR", reward_funcs=[empty, long, scorer], reward_weights=[0.5, 2.0, 1.0],
                 reward_processing_classes=[None, None, parts.tokenizer], reward_threshold=-100.0,
                 max_completion_length=32)  # fmt: skip
    ours.train()
    rollouts = ours.self_play.sample(ours.self_play.rows, 0, "train", ours.run.folder(0))
    for r in rollouts:
        assert r.rewards[0] == float(not r.completion)
        assert r.rewards[1] == (len(r.completion) or None)
        weighted = [w * s for w, s in zip((0.5, 2.0, 1.0), r.rewards, strict=True) if s is not None]
        assert r.reward == pytest.approx(sum(weighted))
    assert len({r.rewards[2] for r in rollouts}) > 8  # the model's scores


def test_prompts_alone_are_enough_if_nothing_reads_a_solution(build, parts) -> None:
    """As GRPOTrainer's prompt-only form."""
    trainer = build("STaR", train_dataset=parts.rows.select_columns(["prompt"]),
                    reward_funcs=Spy(), max_completion_length=32)  # fmt: skip
    assert trainer.train().global_step == 2


FLAGS = {
    "SFT": [
        "--learning_rate", "3e-4", "--packing", "--max_length", "99", "--loss_type", "dft",
        "--model_init_kwargs", '{"dtype": "bfloat16"}', "--eos_token", "<eos>",
        "--gradient_checkpointing_kwargs", '{"use_reentrant": false}', "--optim", "sgd",
        "--lr_scheduler_kwargs", '{"num_cycles": 2}', "--logging_steps", "0.5", "--report_to", "none",
    ],
    "DPO": [
        "--beta", "0.3", "--loss_type", "sigmoid", "sft", "--loss_weights", "1.0", "0.2",
        "--max_length", "99", "--pad_to_multiple_of", "8", "--warmup_steps", "0.1",
    ],
    "GRPO": [
        "--num_generations", "4", "--max_completion_length", "33", "--temperature", "0.7", "--top_k",
        "5", "--min_p", "0.1", "--generation_kwargs", '{"max_new_tokens": 20}', "--reward_weights",
        "1.0", "0.5", "--chat_template_kwargs", '{"enable_thinking": false}', "--log_completions",
        "--num_completions_to_print", "3", "--repetition_penalty", "1.1", "--top_p", "0.9",
    ],
}  # fmt: skip
PARENTS = {"SFT": SFTConfig, "DPO": DPOConfig, "GRPO": GRPOConfig}


@pytest.mark.parametrize(
    ("parent", "method"),
    [("SFT", "STaR"), ("SFT", "ReST^EM"), ("SFT", "Quiet-STaR"), ("DPO", "SPIN"), ("GRPO", "STaR"),
     ("GRPO", "ReST^EM"), ("GRPO", "IRPO")],
)  # fmt: skip
def test_flags_and_files_are_read_as_trl_reads_them(tmp_path, parent, method) -> None:
    flags = [*FLAGS[parent], "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    if method == "Quiet-STaR":
        flags = [flag for flag in flags if flag not in ("--packing", "--loss_type", "dft")]
    [theirs] = TrlParser((PARENTS[parent],)).parse_args_and_config(flags)
    read = {
        flag[2:]: getattr(theirs, flag[2:]) for flag in flags if flag.startswith("--") and flag[2:]
    }
    read["optim"] = str(theirs.optim.value)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(read))
    for given in (flags, ["--config", str(tmp_path / "run.yaml")]):
        [own] = TrlParser((CLASSES[method][1],)).parse_args_and_config(given)
        assert {name: getattr(own, name) for name in read} == read


def test_several_held_out_sets_are_named_as_in_the_parent(build, parts) -> None:
    sets = {name: parts.rows.select([i]) for i, name in enumerate(("easy", "hard"))}
    train = parts.rows.select(range(2, 8))
    metrics = build("STaR", train_dataset=train, eval_dataset=sets).evaluate()
    assert {"eval_easy_accuracy", "eval_hard_accuracy"} <= set(metrics)
    texts = {name: Dataset.from_dict({"text": ["Q 1 + 2 = ? so 3"]}) for name in sets}
    parent = build("SFT", "sft", train_dataset=texts["easy"], eval_dataset=texts).evaluate()
    quiet = build("Quiet-STaR", train_dataset=texts["easy"], eval_dataset=texts).evaluate()
    assert {"eval_easy_loss", "eval_hard_loss"} <= set(parent) & set(quiet)
