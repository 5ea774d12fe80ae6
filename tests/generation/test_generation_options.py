"""Options that would be ignored are errors that name them; all others pass."""

import pytest
from transformers import GenerationConfig

from trl_selfplay.generation.generation_options import (
    check_generation_config,
    check_sampling_options,
    collect_eos_token_ids,
)
from trl_selfplay.generation.sampler import SamplingOptions


def test_the_generation_config_of_a_usual_chat_model_passes() -> None:
    config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
        min_p=0.1,
        repetition_penalty=1.05,
        eos_token_id=[3, 4],
        pad_token_id=3,
        bos_token_id=1,
        max_new_tokens=100,
        use_cache=True,
    )
    check_generation_config(config)
    check_generation_config(GenerationConfig())
    check_generation_config(None)
    check_generation_config({"eos_token_id": 3, "max_new_tokens": 5, "top_k": 3})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("typical_p", 0.9),
        ("no_repeat_ngram_size", 3),
        ("bad_words_ids", [[5]]),
        ("suppress_tokens", [7]),
        ("begin_suppress_tokens", [7]),
        ("forced_eos_token_id", 2),
        ("forced_bos_token_id", 2),
        ("min_new_tokens", 4),
        ("min_length", 4),
        ("penalty_alpha", 0.6),
        ("epsilon_cutoff", 0.0003),
        ("guidance_scale", 1.5),
        ("sequence_bias", [[[5], -1.0]]),
        ("exponential_decay_length_penalty", (5, 1.1)),
        ("stop_strings", ["x"]),
        ("max_time", 3.0),
        ("num_return_sequences", 2),
    ],
)
def test_an_option_that_would_be_ignored_is_named(name, value) -> None:
    config = GenerationConfig()
    setattr(config, name, value)
    with pytest.raises(ValueError, match=rf"generation config sets .*{name}="):
        check_generation_config(config)
    with pytest.raises(ValueError, match=rf"generation_kwargs holds .*{name}="):
        check_generation_config({"top_p": 0.9, name: value})


def test_all_ignored_options_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"num_beams=2, typical_p=0\.5"):
        check_generation_config({"typical_p": 0.5, "num_beams": 2})


@pytest.mark.parametrize(
    ("name", "value"), [("num_beams", 1), ("typical_p", 1.0), ("suppress_tokens", [])]
)
def test_a_neutral_value_in_the_models_config_passes(name, value) -> None:
    config = GenerationConfig()
    setattr(config, name, value)
    check_generation_config(config)


def test_asking_for_greedy_decoding_by_do_sample_names_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"do_sample=False.*temperature=0\.0"):
        check_generation_config({"do_sample": False})


def test_eos_ids_are_those_of_model_and_tokenizer(build_model, tokenizer) -> None:
    model = build_model()
    assert collect_eos_token_ids(model, tokenizer) == (1,)
    model.generation_config.eos_token_id = [7, 2]
    assert collect_eos_token_ids(model, tokenizer) == (1, 2, 7)
    model.generation_config.eos_token_id = None
    assert collect_eos_token_ids(model, tokenizer) == (1,)


def test_a_model_without_any_eos_is_an_error_with_the_remedy(build_model, tokenizer) -> None:
    model = build_model(eos_token_id=None)
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=r"Set tokenizer\.eos_token"):
        collect_eos_token_ids(model, tokenizer)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_completion_length": 0},
        {"temperature": -0.1},
        {"temperature": 1e-40},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"stop_strings": ("a", "")},
    ],
)
def test_an_option_out_of_range_is_named(wrong) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        check_sampling_options(SamplingOptions(**{"max_completion_length": 5, **wrong}))
