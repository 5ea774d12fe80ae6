"""The scanner against decoding the whole completion again after every token."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_selfplay.generation.stop_strings import StopStringScanner


def first_completion(tokenizer, ids, stop_strings) -> int | None:
    """Return the length at which the decoded text first contains a stop string."""
    for length in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False)
        if any(string in text for string in stop_strings):
            return length
    return None


def scanned_completion(tokenizer, ids, stop_strings) -> int | None:
    scanner = StopStringScanner(tokenizer, stop_strings)
    for length in range(1, len(ids) + 1):
        if scanner.is_complete(ids[:length]):
            return length
    return None


@pytest.mark.parametrize(
    ("text", "stop_strings"),
    [
        ("one two three", ["two"]),
        ("one two three", ["e t", "three"]),
        ("Q: 1\nA: 2\n\nQ: 3", ["\n\nQ:"]),
        ("aaab", ["aab"]),
        ("price: 5 € or so", ["€"]),
        ("x 👩‍🚀 y", ["🚀 y"]),
        ("nothing here", ["absent"]),
        ("a", ["a"]),
        ("stop at <end> now", ["<end>"]),
    ],
)
def test_a_stop_string_is_found_at_the_token_that_completes_it(
    tokenizer, text, stop_strings
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = first_completion(tokenizer, ids, stop_strings)
    assert scanned_completion(tokenizer, ids, stop_strings) == expected
    assert (expected is None) == ("absent" in stop_strings)


def test_a_stop_string_that_begins_inside_a_token_is_found(tokenizer) -> None:
    """A token that ends a stop string and holds the first byte of the next character."""
    ids = tokenizer.encode("stop€", add_special_tokens=False)
    assert scanned_completion(tokenizer, ids, ["p€"]) == len(ids)
    # the cut character after "stop" doesn't hide it
    assert scanned_completion(tokenizer, ids[:5], ["op"]) == 4


def test_random_bytes_give_what_decoding_everything_gives(tokenizer) -> None:
    generator = random.Random(0)
    stop_strings = ["ab", "é", "ba€", "<end>b"]
    alphabet = tokenizer.encode("ab€é<end>", add_special_tokens=False)
    num_found = 0
    for _ in range(300):
        ids = [generator.choice(alphabet) for _ in range(generator.randrange(1, 25))]
        expected = first_completion(tokenizer, ids, stop_strings)
        assert scanned_completion(tokenizer, ids, stop_strings) == expected, ids
        num_found += expected is not None
    assert 50 < num_found < 300


def merged_tokenizer(byte_level: bool) -> PreTrainedTokenizerFast:
    """A BPE whose tokens hold several characters, as the two kinds of public ones have them."""
    text = ["stopped stopping at the end\n\nQ: what\n\nAnswer: 1 2 € é 👩‍🚀 rocket"] * 9
    if byte_level:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        special = ["<eos>"]
    else:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
        special = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.mark.parametrize("byte_level", [True, False], ids=["byte level", "metaspace"])
def test_a_stop_string_may_begin_and_end_inside_a_token_or_a_character(byte_level) -> None:
    tokenizer, rng, found = merged_tokenizer(byte_level), random.Random(0), 0
    texts = ["a stopped € the end\n\nQ: x", "at the 👩‍🚀 rocket 1 2 Answer: é"]
    strings = ["stop", "opp", "\n\nQ", "nd", "é", "€", "Answer:", " the", "🚀 r", "1 2", " end"]
    inside = [t for t in tokenizer.get_vocab() if "opp" in t and not t.startswith("opp")]
    assert inside  # such as "stopp": the string begins within it
    for _ in range(200):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(8))]
        ids += tokenizer.encode(rng.choice(texts), add_special_tokens=False)
        chosen = rng.sample(strings, rng.randint(1, 3))
        expected = first_completion(tokenizer, ids, chosen)
        assert scanned_completion(tokenizer, ids, chosen) == expected, (ids, chosen)
        found += expected is not None
    assert found > 100
