"""Scripts of other TRL trainers: what they set and these trainers lack is named, with the remedy."""

import dataclasses
import inspect
from pathlib import Path

import pytest
from trl import DPOConfig, GRPOConfig, KTOConfig, RLOOConfig, SFTConfig, SFTTrainer

from trl_selfplay import (
    IRPOConfig,
    QuietSTaRConfig,
    QuietSTaRTrainer,
    ReSTEMConfig,
    SPINConfig,
    SPINTrainer,
    STaRConfig,
    STaRTrainer,
    VSTaRConfig,
    VSTaRTrainer,
)
from trl_selfplay.trainers.ported_scripts import _ARGUMENTS, _FIELDS, _advice

CONFIGS = (STaRConfig, ReSTEMConfig, SPINConfig, IRPOConfig, VSTaRConfig, QuietSTaRConfig)
TRL_CONFIGS = (GRPOConfig, RLOOConfig, SFTConfig, DPOConfig, KTOConfig)


@pytest.fixture(autouse=True)
def _where_default_folders_are_made(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"beta": 0.04}, "no reference model"),
        ({"num_iterations": 2}, "set `num_train_epochs`"),
        ({"epsilon": 0.3}, "no ratio of policies"),
        ({"scale_rewards": "batch"}, "loss_weighting='reward'"),
        ({"mask_truncated_completions": True}, "never trained on"),
        ({"vllm_enable_sleep_mode": True}, "ends before training"),
        ({"vllm_group_port": 1}, "loads each round's adapter from disk"),
        ({"vllm_importance_sampling_cap": 2.0}, "no ratio of policies"),
        ({"steps_per_generation": 4}, "num_prompts_per_round"),
        ({"generation_batch_size": 64}, "num_prompts_per_round"),
        ({"cache_implementation": "static"}, "sampled by the trainer itself"),
        ({"max_prompt_length": 128}, "never truncated"),
        ({"max_seq_length": 128}, "set `max_length`"),
        ({"warmup_ratio": 0.1}, "set `warmup_steps`"),
        ({"desirable_weight": 2.0}, "no labelled completions"),
        ({"no_such_field": 1}, "no_such_field=1: leave it out; it is unknown"),
        ({"num_round": 1}, "num_round=1: it is unknown; did you mean 'num_rounds'?"),
    ],
)
def test_a_field_of_another_config_is_named_with_what_becomes_of_it(
    tmp_path, setting, message
) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        STaRConfig(str(tmp_path), **setting)
    [name] = setting
    assert f"{name}=" in str(caught.value)


def test_a_subclass_may_have_a_constructor_of_its_own(tmp_path) -> None:
    class Mine(STaRConfig):
        def __init__(self, *args, mine=1, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.mine = mine

    config = Mine(str(tmp_path), mine=2, num_rounds=4, use_cpu=True)
    assert (config.mine, config.num_rounds) == (2, 4)


def test_all_fields_are_named_at_once(tmp_path) -> None:
    with pytest.raises(TypeError) as caught:
        STaRConfig(str(tmp_path), beta=0.1, vllm_enable_sleep_mode=True, num_iterations=3)
    assert len(str(caught.value).splitlines()) == 4


def test_thoughts_are_not_sampled_by_an_engine(tmp_path) -> None:
    with pytest.raises(TypeError, match="inside the forward pass that trains, at every token"):
        QuietSTaRConfig(str(tmp_path), use_vllm=True)


def test_thoughts_have_no_rounds_to_try_out(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"dry_run=True: leave it out; .* run with max_steps=1"):
        QuietSTaRConfig(str(tmp_path), dry_run=True)


def test_a_loss_of_grpo_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="'dapo' is one of GRPOConfig's"):
        STaRConfig(str(tmp_path), loss_type="dapo")


@pytest.mark.parametrize(
    ("config_class", "theirs"),
    [(STaRConfig, GRPOConfig), (ReSTEMConfig, GRPOConfig), (SPINConfig, SFTConfig)],
)
def test_fields_at_trl_s_defaults_are_dropped_with_a_line(
    tmp_path, caplog, config_class, theirs
) -> None:
    own = {f.name for f in dataclasses.fields(config_class)}
    foreign = {
        f.name: f.default
        for f in dataclasses.fields(theirs)
        if f.name not in {*own, "shuffle_dataset"} and f.default is not dataclasses.MISSING
    }
    config = config_class(str(tmp_path), use_cpu=True, report_to=[], bf16=False, **foreign)
    assert not any(hasattr(config, name) for name in foreign)
    lines = [r.message for r in caplog.records if "has no use for" in r.message]
    assert len(lines) == bool(foreign)
    assert all(name in lines[0] for name in foreign)


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize("theirs", TRL_CONFIGS)
def test_every_field_that_is_lacking_has_a_reason(config_class, theirs) -> None:
    own = {f.name for f in dataclasses.fields(config_class)}
    for each in dataclasses.fields(theirs):
        if each.name not in own:
            assert "is unknown" not in _advice(each.name, _FIELDS, ())


@pytest.mark.parametrize(
    "build", [STaRTrainer, SPINTrainer, QuietSTaRTrainer], ids=lambda c: c.__name__
)
def test_another_trainer_s_config_is_refused_with_its_settings(tmp_path, build) -> None:
    settings = {"use_cpu": True, "bf16": False, "report_to": []}
    args = GRPOConfig(str(tmp_path), epsilon=0.3, use_vllm=False, num_generations=4, **settings)
    with pytest.raises(TypeError) as caught:
        build("no-model", args=args)
    assert "args is of type GRPOConfig" in str(caught.value)
    assert "epsilon=0.3: leave it out" in str(caught.value)
    assert "use_vllm" not in str(caught.value)  # its default asks for nothing
    assert "generation_batch_size" not in str(caught.value)
    for theirs in (SFTConfig, DPOConfig):
        with pytest.raises(
            TypeError, match=r"change the class name .* has all fields that are set"
        ):
            build("no-model", args=theirs(str(tmp_path), **settings))


@pytest.mark.parametrize("model", [None, 5, Path("no-model")])
@pytest.mark.parametrize(
    "build", [STaRTrainer, SPINTrainer, QuietSTaRTrainer], ids=lambda c: c.__name__
)
def test_what_is_no_model_is_refused(build, model) -> None:
    with pytest.raises(TypeError, match=r"^model is .*; it must be a model's id or folder as text"):
        build(model)


@pytest.mark.parametrize("build", [SPINTrainer, QuietSTaRTrainer], ids=lambda c: c.__name__)
def test_reward_functions_have_no_place_where_nothing_is_graded(build) -> None:
    with pytest.raises(TypeError, match="nothing is graded: the data's own text or completions"):
        build("no-model", reward_funcs=len)


def test_fields_of_rounds_and_rewards_have_a_reason(tmp_path) -> None:
    with pytest.raises(TypeError, match="num_rounds=3: leave it out; there are no rounds"):
        QuietSTaRConfig(str(tmp_path), num_rounds=3)
    with pytest.raises(TypeError, match=r"reward_threshold=0\.5: leave it out; nothing is graded"):
        SPINConfig(str(tmp_path), reward_threshold=0.5)


def test_misspelt_arguments_are_named_with_the_right_ones() -> None:
    with pytest.raises(
        TypeError, match=r"reward_function=.*: leave it out; pass it as `reward_funcs`"
    ):
        STaRTrainer("no-model", reward_function=len)
    with pytest.raises(
        TypeError, match="train_datasets=1: it is unknown; did you mean 'train_dataset'"
    ):
        STaRTrainer("no-model", train_datasets=1)


def test_grpo_s_arguments_by_position_are_explained(tmp_path, sums) -> None:
    with pytest.raises(TypeError, match="second parameter is `reward_funcs`"):
        STaRTrainer("no-model", len, STaRConfig(str(tmp_path)), sums(4))
    with pytest.raises(TypeError, match="second parameter is `reward_funcs`"):
        STaRTrainer("no-model", [len])


def test_a_config_in_the_place_of_the_reference_model_is_explained(tmp_path, answers) -> None:
    with pytest.raises(TypeError, match="Pass the config by name"):
        SPINTrainer("no-model", SPINConfig(str(tmp_path)), train_dataset=answers(4))


@pytest.mark.parametrize("name", ["rollout_func", "tokenizer"])
def test_arguments_of_other_trainers_are_named_with_what_becomes_of_them(tmp_path, name) -> None:
    with pytest.raises(TypeError, match=f"{name}=.*: leave it out; ") as caught:
        STaRTrainer("no-model", STaRConfig(str(tmp_path)), reward_funcs=len, **{name: [len]})
    assert _ARGUMENTS[name] in str(caught.value)


@pytest.mark.parametrize("name", ["tools", "environment_factory"])
@pytest.mark.parametrize(
    "build", [SPINTrainer, VSTaRTrainer, QuietSTaRTrainer], ids=lambda c: c.__name__
)
def test_tools_are_refused_where_no_completion_could_call_them(build, name) -> None:
    with pytest.raises(TypeError, match=f"{name}=.*IRPOTrainer take it"):
        build("no-model", **{name: [len]})


@pytest.mark.parametrize("build", [SPINTrainer, QuietSTaRTrainer], ids=lambda c: c.__name__)
def test_rewards_have_no_place_where_nothing_is_graded(build) -> None:
    with pytest.raises(TypeError, match=r"reward_funcs=.*nothing is graded"):
        build("no-model", reward_funcs=len)


def test_the_constructor_still_shows_its_parameters() -> None:
    for trainer in (STaRTrainer, QuietSTaRTrainer):
        assert inspect.signature(SFTTrainer).parameters.keys() <= {
            *inspect.signature(trainer).parameters
        }
    assert "ref_model" in inspect.signature(SPINTrainer).parameters
    assert "num_rounds" in inspect.signature(STaRConfig).parameters
