"""Every field of every config with values that mostly can't work: refused by name, or a run ends."""

import logging
import math
import random
from collections import Counter
from dataclasses import MISSING, fields, replace

import numpy as np
import pytest

from trl_selfplay import (
    EmptyRoundError,
    IRPOConfig,
    QuietSTaRConfig,
    ReSTEMConfig,
    SPINConfig,
    STaRConfig,
    VSTaRConfig,
)
from trl_selfplay.trainers.field_checks import bounds_of

CONFIGS = (STaRConfig, ReSTEMConfig, SPINConfig, IRPOConfig, VSTaRConfig, QuietSTaRConfig)
VALUES = (0, -1, 1.5, math.nan, math.inf, 1e308, 2**63, "", "abc", [], None)
SWEEP = [(c, f.name, v) for c in CONFIGS for f in fields(c) for v in VALUES]
SHARE = 10


def make(config_class, tmp_path, **changes):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], **changes}
    if config_class is ReSTEMConfig:
        settings = {"num_generations": 4, **settings}
    return config_class(**settings)


def construct(tmp_path, cases):
    """Return which cases are accepted, and those whose error doesn't name its field."""
    accepted, unnamed = [], []
    for config_class, name, value in cases:
        try:
            make(config_class, tmp_path, **{name: value})
        except ValueError as error:
            if name not in str(error):
                unnamed.append((config_class.__name__, name, value, error))
        except Exception as error:
            unnamed.append((config_class.__name__, name, value, error))
        else:
            accepted.append((config_class, name, value))
    return accepted, unnamed


IGNORED = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@IGNORED
def test_a_value_that_cannot_work_is_refused_by_the_name_of_its_field(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some of them name folders
    cases = random.Random(0).sample(SWEEP, len(SWEEP) // SHARE)
    _, unnamed = construct(tmp_path, cases)
    assert unnamed == []


def stands_in_an_earlier_one(config_class, name, value, tmp_path):
    """Return whether a config before this one has the field with its default, and takes the value."""
    default = repr(config_class.__dataclass_fields__[name].default)
    earlier = [
        (c, name, value)
        for c in CONFIGS[: CONFIGS.index(config_class)]
        if name in c.__dataclass_fields__ and repr(c.__dataclass_fields__[name].default) == default
    ]
    return bool(construct(tmp_path, earlier)[0])


@IGNORED
@pytest.mark.full
@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_value_is_refused_or_a_run_with_it_ends(
    tmp_path, monkeypatch, build_star, build_rest_em, build_spin, build_irpo, config_class
) -> None:
    """What the constructors of the config and the trainer accept runs, or fails before sampling."""
    monkeypatch.chdir(tmp_path)
    accepted, unnamed = construct(tmp_path, [case for case in SWEEP if case[0] is config_class])
    assert unnamed == []
    builders = {STaRConfig: build_star, ReSTEMConfig: build_rest_em, SPINConfig: build_spin,
                IRPOConfig: build_irpo}  # fmt: skip
    became, late = Counter(accepted=len(accepted)), []
    for index, (_, name, value) in enumerate(accepted):
        if config_class not in builders:
            break  # Quiet-STaR's are constructed and not run
        default = config_class.__dataclass_fields__[name].default
        is_default = default is not MISSING and type(value) is type(default) and value == default
        if is_default or name == "output_dir":
            continue
        if stands_in_an_earlier_one(config_class, name, value, tmp_path):
            continue
        settings = {"num_rounds": 1, "max_steps": 1, "num_generations": 2, "report_to": []}
        if config_class is not SPINConfig:
            settings["reward_funcs"] = lambda completions, **_: [1.0] * len(completions)
        settings |= {"max_completion_length": 4 if config_class is not SPINConfig else 32}
        try:
            trainer = builders[config_class](f"run-{index}", **{**settings, name: value})
        except Exception:
            became["refused by the trainer"] += 1
            continue
        try:
            trainer.train()
            became["ran to the end"] += 1
        except EmptyRoundError:
            became["kept nothing"] += 1  # a threshold that this reward doesn't reach
        except Exception as error:
            became["refused by the trial step"] += 1
            if not getattr(error, "__notes__", None):  # not from the trial step
                late.append((name, value, error))
    print(config_class.__name__, dict(became))  # noqa: T201
    assert late == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation_steps": -1}, "an integer of at least 1"),
        ({"temperature": math.nan}, "a number of at least 1e-06, or 0"),
        ({"top_p": math.nan}, "a number above 0 and at most 1"),
        ({"repetition_penalty": "1.1"}, "a number above 0"),
        ({"learning_rate": "1e-5"}, "a number of at least 0"),
        ({"num_rounds": True}, "an integer of at least 1"),
        ({"max_per_prompt": 1.5}, "an integer of at least 1, or None"),
        ({"round_max_steps": [1.5, 1]}, "each element an integer of at least 1, or None"),
        ({"round_max_steps": [0, 1]}, "each element an integer of at least 1"),
        ({"round_learning_rates": [1e-5, math.nan]}, "each element a number of at least 0"),
        ({"max_length": 0}, "an integer of at least 2, or None"),
        ({"max_length": 1}, "an integer of at least 2, or None"),
        ({"seed": 2**32 - 1}, "each round adds its index"),
        ({"seed": -1}, "an integer of at least 0"),
        ({"chat_template_kwargs": {"tokenize": False}}, "rendering decides itself"),
        ({"chat_template_kwargs": "thinking"}, "a dict"),
        ({"generation_kwargs": {"top_k": 1.5}}, "an integer"),
        ({"generation_kwargs": {"temperature": math.nan}}, "a number of at least 1e-06, or 0"),
        ({"generation_kwargs": {"eos_token_id": "</s>"}}, "an integer"),
        ({"generation_kwargs": {"max_tokens": 5}}, "the field `max_completion_length`"),
        ({"generation_kwargs": {"do_sample": True}}, "do_sample=True with temperature=0.0"),
        (
            {"generation_kwargs": {"do_sample": False}, "temperature": 1.0},
            "do_sample=False with temperature=1.0",
        ),
        ({"reward_threshold": math.nan}, "a finite number"),
        ({"reward_weights": []}, "one for each reward function"),
        ({"stop_strings": [""]}, "an empty string"),
        ({"eval_strategy": "sometimes"}, "one of"),
        ({"include_num_input_tokens_seen": "most"}, "choose one of"),
        ({"torch_compile_mode": "fast"}, "choose one of"),
        ({"adam_epsilon": 0.0}, "a number above 0"),
        ({"max_grad_norm": None}, "a number of at least 0"),
        ({"accelerator_config": "nowhere.json"}, "a dict"),
        ({"bf16_full_eval": True}, "the precision of training"),
        ({"dataset_text_field": "question"}, "from the column `prompt`"),
        ({"dataset_kwargs": {"add_special_tokens": False}}, "made in each round"),
        ({"eval_packing": True}, "nothing is packed"),
        ({"optim": "galore_adamw_layerwise"}, "outlive a round's optimizer"),
        ({"push_to_hub": True, "hub_strategy": "checkpoint"}, "aren't pushed"),
        ({"enable_jit_checkpoint": True}, "ends at SIGTERM by itself"),
    ],
)  # fmt: skip
def test_a_field_is_refused_with_what_it_must_be(tmp_path, changes, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(STaRConfig, tmp_path, **{"num_rounds": 2, **changes})
    assert next(iter(changes)) in str(caught.value)


def test_what_means_the_same_in_another_form_is_accepted(tmp_path) -> None:
    config = make(
        STaRConfig, tmp_path, stop_strings="\n\n", num_rounds=np.int64(2), temperature=1,
        round_learning_rates=["1e-5", 2e-5], max_grad_norm=math.inf, packing=1, top_p=np.float64(0.5),
        generation_kwargs={"do_sample": True, "num_beams": 1, "use_cache": True, "top_k": 5},
    )  # fmt: skip
    assert config.stop_strings == ["\n\n"]
    assert (config.num_rounds, type(config.num_rounds)) == (2, int)
    assert config.round_learning_rates == [1e-5, 2e-5]
    assert config.generation_kwargs == {"top_k": 5}
    rest = make(ReSTEMConfig, tmp_path, improve_thresholds=[-math.inf, 0.5], start_from="previous")
    assert rest.improve_thresholds[0] == -math.inf


@pytest.mark.parametrize("config_class", CONFIGS)
def test_activations_are_offloaded_from_an_accelerator_only(tmp_path, config_class) -> None:
    """TRL's own error says that None has no type, or nothing is offloaded in silence."""
    with pytest.raises(ValueError, match="activation_offloading=True moves activations"):
        make(config_class, tmp_path, activation_offloading=True)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_what_the_parent_takes_beside_its_annotations_is_accepted(tmp_path, config_class) -> None:
    config = make(
        config_class, tmp_path, output_dir=tmp_path, resume_from_checkpoint=True, save_steps=0
    )
    assert config.output_dir == str(tmp_path)
    assert config.resume_from_checkpoint is True
    for fsdp in (False, True, ["full_shard"]):
        assert replace(replace(config, fsdp=fsdp), seed=3).seed == 3
    with pytest.raises(ValueError, match="fsdp=3"):
        make(config_class, tmp_path, fsdp=3)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_config_may_be_copied_with_changes(tmp_path, config_class) -> None:
    """The parent has turned text into enums and dicts into objects by then."""
    config = make(config_class, tmp_path, accelerator_config={"split_batches": False})
    assert replace(config, seed=3).seed == 3


@pytest.mark.parametrize("config_class", CONFIGS)
def test_bounds_are_of_numbers_that_exist(config_class) -> None:
    every = {f.name for c in CONFIGS for f in fields(c)}
    assert bounds_of(config_class).keys() <= every


def test_fields_without_use_are_named_in_one_line(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        make(STaRConfig, tmp_path, per_device_eval_batch_size=2, label_names=["a"], bf16=False)
    [message] = [r.message for r in caplog.records if "without effect here" in r.message]
    assert "per_device_eval_batch_size=2" in message
    assert "label_names=['a']" in message


def test_workers_that_do_not_exist_cannot_be_started_in_a_way(tmp_path) -> None:
    with pytest.raises(ValueError, match="dataloader_multiprocessing_context='fork' says how"):
        STaRConfig(str(tmp_path), dataloader_multiprocessing_context="fork")


def test_a_beta_of_the_optimizer_may_be_an_integer(tmp_path) -> None:
    """Torch refuses one integer beside a float, once training begins."""
    assert type(STaRConfig(str(tmp_path), adam_beta1=0).adam_beta1) is float


def test_an_error_of_the_parent_s_config_names_the_settings(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"argument 'a'.*accelerator_config=\{'a': 1\}"):
        STaRConfig(str(tmp_path), accelerator_config={"a": 1})


def test_a_path_in_the_place_of_a_dict_has_to_be_a_file(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"accelerator_config=.*it must be a dict"):
        STaRConfig(str(tmp_path), accelerator_config=tmp_path / "absent.json")


def test_an_integer_beyond_floats_is_out_of_range(tmp_path) -> None:
    with pytest.raises(ValueError, match="num_generations=1000"):
        STaRConfig(str(tmp_path), num_generations=10**400)
