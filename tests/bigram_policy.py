"""A model whose next token depends on the last one alone, by a table: a policy that calls tools at once."""

import math
from itertools import pairwise
from pathlib import Path

import tiny_models
import torch
import trl
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|im_end|>"
# The last word of a generation prompt, and of a plain-text prompt.
TURN, ASK = "\n<|im_start|>assistant\n", "?"
CALL = [
    '<tool_call>\n{"name":',
    '"add",',
    '"arguments":',
    '{"a":',
    "3,",
    '"b":',
    "4}}\n</tool_call>",
]
ACT = ["Action:", 'add({"a":', "3,", '"b":', "4})", "Observation:"]
# From each word to the next ones with their probabilities. Answers are `yes` and `no`.
ANSWERS = {"yes": 0.25, "no": 0.25}
CHAT_STEPS = {
    TURN: {CALL[0]: 0.5, **ANSWERS},
    **{word: {follows: 1.0} for word, follows in zip(CALL, [*CALL[1:], END], strict=True)},
    "yes": {END: 1.0}, "no": {END: 1.0},
}  # fmt: skip
TEXT_STEPS = {
    ASK: {ACT[0]: 0.5, **ANSWERS},
    "7\n": {ACT[0]: 0.5, **ANSWERS},
    **{word: {follows: 1.0} for word, follows in pairwise(ACT)},
    "yes": {END: 1.0}, "no": {END: 1.0},
}  # fmt: skip
WORDS = [*CALL, *ACT, TURN, "Q", "+", "=", ASK, "yes", "no", "7\n", *map(str, range(10))]


def family_template(family: str) -> str:
    """Return a chat template that TRL ships."""
    return (Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja").read_text()


def word_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each word that the policy says."""
    split = pre_tokenizers.Split(" ", "removed")
    return tiny_models.word_tokenizer(WORDS, split, eos_token=END, chat_template=template)


def bigram_model(tokenizer, steps, positions: int = 2048) -> LlamaForCausalLM:
    """Return a Llama that goes from word to word as a table says.

    Its embeddings are one-hot, its layers add nothing, and its head holds log-probs.
    """
    size = -(-len(tokenizer) // 4) * 4
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), size))
        model.lm_head.weight.fill_(-40.0 / math.sqrt(size))
        ids = tokenizer.convert_tokens_to_ids
        for word, follows in steps.items():
            for after, share in follows.items():
                model.lm_head.weight[ids(after), ids(word)] = math.log(share) / math.sqrt(size)
    return model
