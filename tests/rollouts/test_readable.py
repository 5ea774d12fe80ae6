"""What graders and readers get of a completion: its text, or its turns as messages."""

import copy

from accelerate import Accelerator

from trl_selfplay.generation.sampler import SampledCompletion
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rollouts.collection import Collector
from trl_selfplay.rollouts.prompts import PromptRow
from trl_selfplay.rollouts.readable import completion_text, find_tag_ids
from trl_selfplay.rollouts.record import hash_prompt, load_rollouts, save_rollouts


def sampled(tokenizer, *texts):
    """Return a completion of turns of the policy, with what a tool answered between them."""
    ids = [tokenizer(text)["input_ids"] for text in texts]
    mask = [turn % 2 == 0 for turn, of_turn in enumerate(ids) for _ in of_turn]
    whole = tuple(i for of_turn in ids for i in of_turn)
    finish = "eos" if whole[-1] == tokenizer.eos_token_id else "stop"
    return SampledCompletion(
        whole, finish, completion_mask=None if len(texts) == 1 else tuple(mask)
    )


def test_the_text_of_a_trajectory_is_what_the_policy_wrote(byte_tokenizer) -> None:
    """A tool's "42" is no answer of the policy's."""
    found = sampled(byte_tokenizer, "Action: add[1]\nObservation:", " 42\n", "So 7é.<eos>")
    text = completion_text(byte_tokenizer, found, frozenset())
    assert text == "Action: add[1]\nObservation:\nSo 7é."
    found = sampled(byte_tokenizer, "call<eos>\n", "42", "So<eos>", "43", "<eos>")
    assert completion_text(byte_tokenizer, found, frozenset()) == "call\nSo"
    cut = sampled(byte_tokenizer, "call<eos>", "42")
    assert completion_text(byte_tokenizer, cut, frozenset()) == "call"


def test_functions_get_a_trajectory_s_turns_as_copies(chat_tokenizer, make_rollout) -> None:
    """A function that changes what it gets changes nothing that is stored."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = (
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "2"},
        {"role": "assistant", "content": "So 2."},
    )
    seen = []

    def changes(completions, **kwargs):
        seen.append(copy.deepcopy(completions))
        completions[0][0]["tool_calls"][0]["function"]["arguments"]["a"] = 9
        return [1.0]

    rollout = make_rollout(prompt_id="p", messages=messages, completion="call\nSo 2.")
    collector = Collector(None, Scorer([changes] * 2), chat_tokenizer, Accelerator(cpu=True), 0)
    (graded,) = collector.grade(
        [rollout], {"p": PromptRow.of([{"role": "user", "content": "?"}], "d")}
    )
    assert seen == [[list(messages)]] * 2
    assert graded.messages == messages
    text_row = PromptRow.of("?", "d")
    given = collector.reward_arguments([rollout], {"p": text_row})
    assert given["completions"] == ["call\nSo 2."]  # of a prompt of text, what the policy wrote


def test_tags_that_are_special_tokens_stay_in_the_text(byte_tokenizer) -> None:
    """Reward functions read them; other special tokens are no text."""
    special = ["<answer>", "</answer>", "<|im_start|>", "<start_of_turn>", "</close>"]
    byte_tokenizer.add_special_tokens({"additional_special_tokens": special})
    tags = find_tag_ids(byte_tokenizer)
    assert byte_tokenizer.convert_ids_to_tokens(sorted(tags)) == special[:2]

    def decode(text):
        return completion_text(byte_tokenizer, sampled(byte_tokenizer, text), tags)

    assert decode("so <answer>é 5</answer><eos>") == "so <answer>é 5</answer>"
    assert decode("<|im_start|>so <answer>5</answer></close>") == "so <answer>5</answer>"
    assert decode("<|im_start|>so 5<eos>") == "so 5"


def test_half_a_surrogate_pair_is_neither_stored_nor_a_failure(tmp_path, make_rollout) -> None:
    class Cut:
        def decode(self, ids, **kwargs):
            return "a \ud800 b"

    text = completion_text(Cut(), SampledCompletion((1,), "stop"), frozenset())
    assert text == "a ? b"
    rollout = make_rollout(completion=text, prompt_id=hash_prompt("\ud800", "\udfff"))
    save_rollouts(tmp_path / "s.parquet", [rollout])
    assert load_rollouts(tmp_path / "s.parquet") == [rollout]
    assert hash_prompt("\ud800", "1") != hash_prompt("\ud801", "1")
