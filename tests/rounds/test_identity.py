"""What may change when a run is resumed, when, and what is said of it."""

import dataclasses
import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainingArguments
from trl import DPOConfig, SFTConfig

from trl_selfplay import IRPOConfig, ReSTEMConfig, SPINConfig, STaRConfig
from trl_selfplay.disk import DamagedFileError, NewerFormatError
from trl_selfplay.rewards.code import CodeReward
from trl_selfplay.rewards.isolation import Limits
from trl_selfplay.rewards.reward_model import RewardModel
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rewards.verifier import VerifierReward
from trl_selfplay.rollouts.selection import reasoning_path
from trl_selfplay.rounds.identity import (
    FORMAT,
    GRADED_ANEW,
    PARENTS_FIELDS,
    _describe_graders,
    check_identity,
    describe_adapters,
    describe_run,
    digest_weights,
    name_function,
    resume_rules,
)
from trl_selfplay.rounds.plan import OnResume, declared_rules, per_round_lists

CONFIGS = (STaRConfig, ReSTEMConfig, SPINConfig, IRPOConfig)
# Of PEFT's configurations.
NOT_RECORDED = {"base_model_name_or_path", "revision", "inference_mode", "peft_version"}
PLAIN = {
    "num_rounds": 2, "temperature": 0.7, "per_device_train_batch_size": 8, "logging_steps": 5,
    "round_max_steps": [10, 20], "bf16": False, "use_cpu": True, "report_to": [],
}  # fmt: skip


def describe(ids=("b", "a"), other=None, output_dir="a", **changes):
    config = STaRConfig(output_dir, **{**PLAIN, **changes})
    return describe_run(config, {"train_dataset": ids}, {"model": "m", **(other or {})})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "_rounds" / "config.json"


@pytest.fixture
def check(path):
    """Write a first description down, and compare others with it."""
    check_identity(describe(), path, 0, is_trained=False)
    first = path.read_text()

    def check(described, num_finished=1, is_trained=True, num_sampled=0):
        path.write_text(first)
        return check_identity(
            described, path, num_finished, is_trained=is_trained, num_sampled=num_sampled
        )

    return check


def parents_fields(config):
    """Return the names of TRL's and transformers' fields."""
    (parent,) = {SFTConfig, DPOConfig} & set(config.__mro__)
    return {field.name for field in dataclasses.fields(parent)}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_says_when_it_may_change_on_resume(config) -> None:
    """Ours in their annotation, the parents' in one table, by exact name and once."""
    in_table = [name for names in PARENTS_FIELDS.values() for name in names]
    assert len(in_table) == len(set(in_table))
    names = {field.name for field in dataclasses.fields(config)}
    assert parents_fields(config) <= set(in_table)
    declared = declared_rules(config)
    assert declared.keys() == names - parents_fields(config)
    rules = resume_rules(config)
    assert {name: rules[name] for name in declared} == declared


def test_the_table_names_no_field_that_no_parent_has() -> None:
    known = set().union(*map(parents_fields, CONFIGS))
    known |= {"activation_checkpointing", "activation_checkpointing_kwargs"}  # transformers 5.23
    assert {name for names in PARENTS_FIELDS.values() for name in names} <= known


def test_a_field_declared_again_keeps_its_rule() -> None:
    assert resume_rules(ReSTEMConfig)["num_generations"] is OnResume.UNTIL_TRAINED
    assert resume_rules(ReSTEMConfig)["temperature"] is OnResume.FIXED


@pytest.mark.parametrize("config", CONFIGS)
def test_lists_with_a_value_per_round_replace_a_field(config) -> None:
    lists = per_round_lists(config)
    assert lists == {
        "round_learning_rates": "learning_rate",
        "round_max_steps": "max_steps",
        "round_temperatures": "temperature",
        **({"round_betas": "beta"} if config is SPINConfig else {}),
    }
    assert set(lists.values()) <= {field.name for field in dataclasses.fields(config)}


def test_what_decides_which_samples_there_are_may_never_change() -> None:
    """By another table: fields of ours that neither the sampler nor the reward functions read."""
    rest = {
        name
        for config in CONFIGS
        for name in {field.name for field in dataclasses.fields(config)} - parents_fields(config)
        if resume_rules(config)[name] not in (OnResume.FIXED, OnResume.MAY_GROW, OnResume.ENGINE)
    }
    assert rest == {
        "alarm_actions", "deduplicate", "deduplicate_against_gold", "dry_run", "gold_ratio", "history_rounds",
        "improve_learning_rate_factor",
        "improve_thresholds", "load_best_round_at_end", "log_completions",
        "log_completions_hub_repo", "log_unique_prompts",
        "loss_weighting",
        "max_per_prompt", "nll_coef", "num_completions_to_print", "num_generations",
        "on_empty_round",
        "reward_threshold", "round_betas", "round_learning_rates", "round_max_steps",
        "rounds_dir",
        "start_from", "stop_after_rounds_without_gain", "threshold_kind",
        "tool_deadline",  # which calls fail, as the machine's speed does

        # Where and how fast an engine runs, not what it computes.
        "allow_engine_change", "ray_address", "ray_cpus_per_worker", "ray_gpus_per_worker", "ray_num_workers",
        "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_mode",
        "vllm_python", "vllm_server_base_url", "vllm_server_host", "vllm_server_port",
        "vllm_server_timeout", "vllm_tensor_parallel_size",
    }  # fmt: skip
    parents = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert parents & PARENTS_FIELDS[OnResume.FIXED] == {"metric_for_best_model", "seed"}


def test_what_computes_the_same_goes_on_without_a_word(check, caplog) -> None:
    moved = describe(
        ids=("a", "b"), num_rounds=3, round_max_steps=[10, 20, 30], logging_steps=1,
        output_dir="moved",
    )  # fmt: skip
    assert check(moved, num_finished=2) == []
    assert not caplog.text


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": 1.0}, "temperature: 0.7 → 1.0"),
        ({"num_rounds": 1}, "num_rounds: 2 → 1"),
        ({"round_max_steps": [11, 20]}, "round_max_steps: 10 → 11 in round 0"),
        ({"ids": ("a", "c")}, "train_dataset: '2 prompts"),
        ({"other": {"model": "other"}}, "model: 'm' → 'other'"),
        ({"generation_kwargs": {"top_k": 3}}, "generation_kwargs.top_k: None → 3"),
    ],
)
def test_another_configuration_is_refused_by_name(check, changes, named, is_trained) -> None:
    with pytest.raises(ValueError, match="another output_dir") as raised:
        check(describe(**changes), is_trained=is_trained)
    assert str(raised.value).splitlines()[2].strip().startswith(named)


def test_fields_for_later_rounds_are_those_that_replace_what_changed(check) -> None:
    with pytest.raises(ValueError, match="and one has; round_learning_rates may for later rounds"):
        check(describe(learning_rate=1e-6), is_trained=True)
    with pytest.raises(ValueError, match=r"and one has:\n  weight_decay: 0\.0 → 0\.1"):
        check(describe(weight_decay=0.1), is_trained=True)


def test_many_changes_are_told_in_few_words_by_when_they_may_be(check, tmp_path) -> None:
    def adapted(r, names, **changes):
        lora = LoraConfig(r=r, target_modules=names, rank_pattern=dict.fromkeys(names, r))
        adapters = describe_adapters(SimpleNamespace(peft_config={"default": lora}))
        return describe(other={"peft_config": adapters}, **changes)

    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(30)]
    path = tmp_path / "run" / "_rounds" / "config.json"
    check_identity(adapted(4, names), path, 0, is_trained=False)
    changes = {
        "temperature": 1.0, "num_rounds": 1, "learning_rate": 1e-3, "weight_decay": 0.1,
        "round_max_steps": [11], "vllm_dtype": "float16", "per_device_train_batch_size": 4,
        "generation_kwargs": {"top_k": 3}, "logging_steps": 7,
    }  # fmt: skip
    with pytest.raises(ValueError, match="on disk → now") as raised:
        check_identity(adapted(8, [*names, "v_proj"], **changes), path, 1, is_trained=True)
    told = str(raised.value)
    for name in ("rank_pattern", "target_modules"):
        told = re.sub(rf"{name}: .{{1,200}}\n", f"{name}: in short\n", told)
    assert told.splitlines()[1:] == [
        "These may never change:",
        "  generation_kwargs.top_k: None → 3",
        "  peft_config.default.r: '4' → '8'",
        "  peft_config.default.rank_pattern: in short",
        "  peft_config.default.target_modules: in short",
        "These may only grow:",
        "  num_rounds: 2 → 1",
        "These may change until a round has been trained on, and one has:",
        "  weight_decay: 0.0 → 0.1",
        "These may change with allow_engine_change=True:",
        "  vllm_dtype: None → 'float16'",
        "These may change until a round has been trained on, and one has; round_learning_rates may "
        "for later rounds:",
        "  learning_rate: 2e-05 → 0.001",
        "These may change for later rounds alone:",
        "  round_max_steps: 10 → 11 in round 0",
        "These may never change; round_temperatures may for later rounds:",
        "  temperature: 0.7 → 1.0",
        "Restore these values to resume that run, or choose another output_dir.",
        "These may stay as they are now: per_device_train_batch_size: 8 → 4.",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1e-6}, {"reward_threshold": 0.5}, {"num_generations": 3},
        {"max_length": 77}, {"max_per_prompt": 2}, {"weight_decay": 0.1}, {"packing": True},
        {"history_rounds": 1}, {"start_from": "previous"}, {"lr_scheduler_type": "constant"},
    ],
)  # fmt: skip
def test_what_selection_and_training_read_may_change_until_a_round_was_trained(
    check, changes
) -> None:
    name = next(iter(changes))
    assert check(describe(**changes), num_finished=0, is_trained=False) == [name]
    with pytest.raises(ValueError, match=rf"(?s)until a round has been trained on.*\n  {name}: "):
        check(describe(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"per_device_train_batch_size": 1}, {"gradient_accumulation_steps": 7},
        {"dataloader_drop_last": True}, {"load_best_model_at_end": True, "save_strategy": "no"},
    ],
)  # fmt: skip
def test_what_changes_the_rounds_to_come_is_said_once(check, caplog, changes) -> None:
    name = next(iter(changes))
    check(describe(**changes), num_finished=0, is_trained=False)
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        check(describe(**changes))
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [name]


def test_steps_of_rounds_that_have_not_begun_may_change(check) -> None:
    check(describe(round_max_steps=[10, 25]), num_finished=1)


def test_rates_of_later_rounds_may_be_given_one_by_one(tmp_path) -> None:
    """What an error advises where a later round diverged."""
    path = tmp_path / "_rounds" / "config.json"
    check_identity(describe(learning_rate=1e-3), path, 0, is_trained=False)
    listed = {"learning_rate": 1e-3, "round_learning_rates": [1e-3, 1e-5]}
    check_identity(describe(**listed), path, 1, is_trained=True)
    with pytest.raises(ValueError, match="round_learning_rates"):
        check_identity(describe(**listed | {"round_learning_rates": [1e-4, 1e-5]}), path, 1,
                       is_trained=True)  # fmt: skip


@pytest.mark.parametrize(
    ("num_finished", "num_sampled", "temperatures", "is_kept"),
    [
        (1, 1, [0.7, 1.0, 1.0], True),  # the first round sampled at `temperature`
        (1, 2, [0.7, 0.7, 1.0], True),
        (1, 2, [0.7, 1.0, 1.0], False),  # the second one has begun to
        (2, 0, [0.7, 1.0, 1.0], False),
        (0, 0, [1.0, 1.0, 1.0], True),
    ],
)
def test_a_temperature_may_change_until_its_round_samples(
    check, num_finished, num_sampled, temperatures, is_kept
) -> None:
    described = describe(
        num_rounds=3, round_max_steps=[10, 20, 30], round_temperatures=temperatures
    )
    arguments = {"num_finished": num_finished, "num_sampled": num_sampled}
    if is_kept:
        assert check(described, **arguments) == []
    else:
        with pytest.raises(ValueError, match=r"round_temperatures: 0\.7 → 1\.0 in round 1"):
            check(described, **arguments)


def test_a_field_that_one_version_knows_counts_as_its_default(check, path) -> None:
    first = json.loads(path.read_text())
    older = {k: v for k, v in first.items() if k not in ("repetition_penalty", "min_p")}
    path.write_text(json.dumps(older | {"field_of_another_version": 3}))
    check_identity(describe(), path, 1, is_trained=True)
    path.write_text(json.dumps(older))
    with pytest.raises(ValueError, match=r"repetition_penalty: 1\.0 → 1\.2"):
        check_identity(describe(repetition_penalty=1.2), path, 1, is_trained=True)


def test_the_record_of_an_older_version_is_read(tmp_path, tiny_model, word_tokenizer) -> None:
    """PEFT's configuration was text, free fields were left out, and there were no digests."""
    path = tmp_path / "_rounds" / "config.json"
    path.parent.mkdir()
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    adapters = describe_adapters(get_peft_model(tiny_model(word_tokenizer), lora))
    other = {"peft_config": adapters, "weights": "3, abc", "eval_reward_funcs": None}
    now = describe(other=other)
    nested = {k: v for k, v in now.settings.items() if not k.startswith("peft_config.")}
    left_out = {k for k in nested if now.rule(k) in (OnResume.FREE, OnResume.WARNED)}
    old = {k: v for k, v in nested.items() if k not in {*left_out, "weights"}}
    recorded = {k: dict(v) for k, v in adapters.items()}
    del recorded["default"]["use_dora"]  # a field that only one version knows
    path.write_text(json.dumps(old | {"peft_config": str(recorded), "eval_reward_funcs": "None"}))
    check_identity(now, path, 1, is_trained=True)
    assert "weights" in json.loads(path.read_text())
    recorded["default"]["r"] = "8"
    path.write_text(json.dumps(old | {"peft_config": str(recorded)}))
    with pytest.raises(ValueError, match=r"peft_config\.default\.r: '8' → '4'"):
        check_identity(now, path, 1, is_trained=True)


def test_functions_of_the_package_are_known_wherever_they_are_defined(path) -> None:
    """Records of earlier versions name their module."""
    described = describe(other={"normal_form": name_function(reasoning_path)})
    check_identity(described, path, 1, is_trained=True)
    assert json.loads(path.read_text())["normal_form"] == "trl_selfplay.reasoning_path"
    for recorded, fits in (
        ("trl_selfplay.normal_forms.reasoning_path", True),
        ("trl_selfplay.normal_forms.default_normal_form", False),
        ("another.normal_forms.reasoning_path", False),
    ):
        path.write_text(json.dumps({**described.settings, "normal_form": recorded}))
        if fits:
            check_identity(described, path, 1, is_trained=True)
        else:
            with pytest.raises(ValueError, match=r"normal_form: '.*' → "):
                check_identity(described, path, 1, is_trained=True)


def test_functions_of_others_are_known_by_their_module() -> None:
    assert name_function(describe) == f"{__name__}.describe"
    assert name_function(str.upper) == "None.str.upper"


def test_any_kind_of_adapter_has_defaults_whatever_its_config_asks_for(path) -> None:
    """AdaLoRA's needs `total_step`, CPT's a task, AdaMSS's another package."""
    for kind, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        described = describe(other={"peft_config": {"default": {"peft_type": str(kind)}}})
        found = {name.split(".")[2] for name in described.defaults if name.startswith("peft_c")}
        names = {field.name for field in dataclasses.fields(config_class)}
        assert names - found == NOT_RECORDED & names
        assert described.defaults["peft_config.default.auto_mapping"] == "None"


def test_another_version_of_peft_may_go_on_with_a_run(path) -> None:
    model = SimpleNamespace(peft_config={"default": LoraConfig(r=4, peft_version="99.0")})
    now = describe_adapters(model)
    recorded = {"default": {**now["default"], "peft_version": "0.20.0"}}  # by an older one of ours
    path.parent.mkdir()
    path.write_text(json.dumps(describe(other={"peft_config": recorded}).settings))
    check_identity(describe(other={"peft_config": now}), path, 1, is_trained=True)
    assert "peft_version" not in path.read_text()


def test_rewards_of_two_versions_of_a_function_are_said(path, caplog) -> None:
    check_identity(describe(other={"reward_funcs_source": "a"}), path, 0, is_trained=False)
    assert not caplog.text
    check_identity(describe(other={"reward_funcs_source": "b"}), path, 0, is_trained=False)
    assert caplog.text.count("graded keep their rewards: see trl-selfplay regrade") == 1


def test_reward_functions_may_be_others_once_all_scores_were_taken_back(path, caplog) -> None:
    """The mended function may have another name, and weights beside others."""
    graded = {"reward_funcs": "('a',)", "reward_funcs_source": "a", "graders": {"a": {"scale": 5}}}
    check_identity(describe(other=graded), path, 0, is_trained=False)
    now = {"reward_funcs": "('b', 'c')", "reward_funcs_source": "b", "graders": {"b": {"scale": 9}}}
    others = describe(other=now, reward_weights=[1.0, 0.5])
    with pytest.raises(
        ValueError, match=r"These may never change:\n  reward_funcs: .*\n  reward_weights:"
    ):
        check_identity(others, path, 0, is_trained=False)
    path.write_text(json.dumps({**json.loads(path.read_text()), GRADED_ANEW: True}))
    check_identity(others, path, 0, is_trained=False)
    assert not caplog.text
    with pytest.raises(ValueError, match="reward_funcs"):  # once
        check_identity(describe(other=graded), path, 0, is_trained=False)


def test_options_of_a_function_that_a_record_doesn_t_know_are_no_change(path, caplog) -> None:
    """Earlier versions recorded those of fewer functions."""
    judge, code = {"judge_reward": {"scale": 5}}, {"code_reward": {"deadline_s": 5.0}}
    for earlier in ({}, judge):
        path.unlink(missing_ok=True)
        check_identity(describe(other={"graders": earlier}), path, 0, is_trained=False)
        now = describe(other={"graders": {**earlier, **code}})
        check_identity(now, path, 1, is_trained=True)
        assert not caplog.text
    code["code_reward"]["deadline_s"] = 9.0
    check_identity(describe(other={"graders": {**judge, **code}}), path, 1, is_trained=True)
    assert "graders.code_reward.deadline_s: 5.0 → 9.0" in caplog.text


@pytest.mark.parametrize("make", ["code", "verifier", "classifier"])
def test_what_scores_depend_on_is_recorded_of_each_function(
    make, tiny_model, word_tokenizer
) -> None:
    def described(function):
        scorer = Scorer([function], reward_processing_classes=[word_tokenizer])
        return describe(other={"graders": _describe_graders(scorer)}).settings

    model = tiny_model(word_tokenizer)
    if make == "code":
        one, same = CodeReward(), CodeReward(limits=Limits())
        others = [
            CodeReward(deadline_s=9.0),
            CodeReward(trusted_tests=True),
            CodeReward(limits=Limits(memory_bytes=2**30)),
        ]
    elif make == "verifier":
        one, same = (VerifierReward(model, tokenizer=word_tokenizer) for _ in range(2))
        kwargs = {"chat_template_kwargs": {"twice": True}}
        others = [
            VerifierReward(tiny_model(word_tokenizer, seed=1), tokenizer=word_tokenizer),
            VerifierReward(model, tokenizer=word_tokenizer, **kwargs),
        ]
    else:
        torch.manual_seed(0)
        models = [LlamaForSequenceClassification(LlamaConfig(
            vocab_size=len(word_tokenizer), hidden_size=8, intermediate_size=8,
            num_hidden_layers=1, num_attention_heads=2, num_labels=1,
        )) for _ in range(2)]  # fmt: skip
        one, same = (RewardModel(models[0], word_tokenizer) for _ in range(2))
        others = [RewardModel(models[1], word_tokenizer)]
    assert described(one) == described(same)
    for other in others:
        assert described(other) != described(one)


@pytest.mark.parametrize("name", ["eval_dataset", "eval_dataset hard"])
def test_a_held_out_set_is_neither_added_nor_dropped(tmp_path, name) -> None:
    path = tmp_path / "_rounds" / "config.json"
    without, with_set = describe(), describe(other={name: "4 prompts, abc"})
    for first, then in ((without, with_set), (with_set, without)):
        path.unlink(missing_ok=True)
        check_identity(first, path, 0, is_trained=False)
        with pytest.raises(ValueError, match=f"  {name}: "):
            check_identity(then, path, 1, is_trained=True)


def test_a_model_is_known_by_its_weights_not_by_its_path(tmp_path) -> None:
    path = tmp_path / "_rounds" / "config.json"
    check_identity(
        describe(other={"model": "/old/m", "weights": "2, aa"}), path, 0, is_trained=False
    )
    check_identity(
        describe(other={"model": "/new/m", "weights": "2, aa"}), path, 1, is_trained=True
    )
    with pytest.raises(ValueError, match="not those that the run began with"):
        check_identity(
            describe(other={"model": "/new/m", "weights": "2, bb"}), path, 1, is_trained=True
        )


def test_weights_are_told_apart_by_their_values(tmp_path, tiny_model, word_tokenizer) -> None:
    one, same, other = (tiny_model(word_tokenizer, seed=seed) for seed in (0, 0, 1))
    assert digest_weights(one, restored=False) == digest_weights(same, restored=False)
    assert digest_weights(one, restored=False) != digest_weights(other, restored=False)
    assert digest_weights(one, restored=True) is None  # a resumed run reads none of them
    one.save_pretrained(tmp_path / "here")
    moved = type(one).from_pretrained((tmp_path / "here").rename(tmp_path / "there"))
    assert digest_weights(moved, restored=False) == digest_weights(one, restored=False)
    torch.manual_seed(5)  # an adapter drawn anew, as a script without a seed does
    adapters = [get_peft_model(m, LoraConfig(r=4, target_modules=["q_proj"])) for m in (one, same)]
    digests = {digest_weights(model, restored=True) for model in adapters}
    assert len(digests) == 1
    assert digests != {None}


def test_secrets_are_neither_recorded_nor_printed(check, path) -> None:
    secret = "hf_" + "x" * 20
    kwargs = {"token": secret, "a": {"api_key": secret}, "revision": "r", "b": {"PASSWORD": secret}}
    with pytest.raises(ValueError, match=r"model_init_kwargs\.revision") as raised:
        check(describe(model_init_kwargs=kwargs))
    assert secret not in str(raised.value)
    path.unlink()
    check_identity(describe(model_init_kwargs=kwargs, hub_token=secret), path, 0, is_trained=False)
    assert secret not in path.read_text()
    renewed = {**kwargs, "token": secret + "y"}
    check_identity(describe(model_init_kwargs=renewed), path, 0, is_trained=True)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"[1]"])
def test_a_damaged_record_is_named(check, path, content) -> None:
    path.write_bytes(content)
    with pytest.raises(
        DamagedFileError, match=r"config\.json can't be read .* Delete it and go on"
    ):
        check_identity(describe(), path, 1, is_trained=True)


def test_a_record_that_is_gone_is_said(path, caplog) -> None:
    (path.parent / "round-000").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        check_identity(describe(), path, 1, is_trained=True)
    assert caplog.text.count("config.json is gone") == 1


def test_the_places_that_are_read_lie_within_a_large_weight() -> None:
    """One of 28,311,552 values: in float32 its last place is one too far."""
    model = torch.nn.Linear(28_311_552, 1, bias=False, dtype=torch.float16, device="meta")
    model.to_empty(device="cpu")
    torch.nn.init.zeros_(model.weight)
    before = digest_weights(model, restored=False)
    with torch.no_grad():
        model.weight[0, -1] = 1.0
    assert digest_weights(model, restored=False) != before


def test_a_run_of_a_later_format_is_refused_and_left_as_it_is(path) -> None:
    check_identity(describe(), path, 0, is_trained=False)
    record = json.loads(path.read_text())
    assert record["format"] == FORMAT
    path.write_text(json.dumps({**record, "format": FORMAT + 1}))
    before = path.read_bytes()
    with pytest.raises(NewerFormatError, match=rf"format {FORMAT + 1}, .* up to {FORMAT}.*upgrade"):
        check_identity(describe(), path, 1, is_trained=True)
    assert path.read_bytes() == before


def test_a_run_of_the_first_format_has_no_number_and_goes_on(path) -> None:
    check_identity(describe(), path, 0, is_trained=False)
    record = json.loads(path.read_text())
    del record["format"]
    path.write_text(json.dumps(record))
    assert check_identity(describe(), path, 1, is_trained=True) == []
    assert json.loads(path.read_text())["format"] == FORMAT
