"""The scanner against decoding the whole completion again after every token."""

import random

import pytest

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
