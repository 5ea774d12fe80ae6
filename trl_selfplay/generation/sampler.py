"""What a sampler is: prompts as token ids in, completions as token ids out, as they finish.

In: `SampleRequest`s (the tokens and the key of the sample's own random stream) and the options
that hold for all of them. Out: `(index of the request, SampledCompletion)` pairs in the order in
which they finish. Implementations: transformers_sampler.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One completion to draw.

    Attributes:
        prompt_ids: Tokens to condition on, at least one.
        stream_key: 64-bit key of this sample's random stream, see `random_streams.stream_key`.
            The same key, prompt and weights give the same completion in any batch (float32).
    """

    prompt_ids: tuple[int, ...]
    stream_key: int


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Options with the names and meanings of GRPOConfig's fields.

    Attributes:
        max_completion_length: Most tokens of a completion, at least 1.
        temperature: 0.0 is greedy.
        top_p: Keep the smallest set of tokens with at least this mass; 1.0 is off.
        top_k: Keep this many tokens; 0 is off.
        min_p: Keep tokens with at least this share of the likeliest one's probability; None is off.
        repetition_penalty: Divide (multiply, if negative) the logits of tokens that already occur
            in prompt or completion, as transformers does; 1.0 is off.
        eos_token_ids: Each of them ends a completion and is part of it.
        stop_strings: A completion ends with the token that completes one of these in its text.
        return_logprobs: Fill `SampledCompletion.logprob`.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    return_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class SampledCompletion:
    """What the policy produced for one request.

    Attributes:
        completion_ids: The sampled tokens; ends with EOS only if EOS was sampled.
        finish: "eos", "stop" or "length".
        logprob: Sum of the log-probabilities under the distribution really sampled from (after
            penalty, temperature and filters), or None if not asked for.
    """

    completion_ids: tuple[int, ...]
    finish: Finish
    logprob: float | None = None


# What `generation_kwargs` may set, and the option that it sets.
_OPTION_OF_KEYWORD = {
    "max_new_tokens": "max_completion_length",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "eos_token_id": "eos_token_ids",
}


def build_sampling_options(
    config: Any, eos_token_ids: tuple[int, ...], **changes: Any
) -> SamplingOptions:
    """Return the sampling options of a config, with `generation_kwargs` laid over its fields.

    Args:
        config: With the sampling fields of `SelfPlayConfig`.
        eos_token_ids: Of the model and its tokenizer.
        **changes: Options that hold whatever the config says, such as `temperature` of evaluation.

    Raises:
        ValueError: `generation_kwargs` has a key that the sampler doesn't know.
    """
    options: dict[str, Any] = {
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "min_p": config.min_p,
        "repetition_penalty": config.repetition_penalty,
        "eos_token_ids": eos_token_ids,
        "stop_strings": tuple(config.stop_strings or ()),
    }
    for key, value in (config.generation_kwargs or {}).items():
        if key not in _OPTION_OF_KEYWORD:
            raise ValueError(
                f"generation_kwargs has {key!r}={value!r}, which the sampler doesn't know. It "
                f"takes {sorted(_OPTION_OF_KEYWORD)}."
            )
        if key == "eos_token_id":
            value = (value,) if isinstance(value, int) else tuple(value)
        options[_OPTION_OF_KEYWORD[key]] = value
    return SamplingOptions(**{**options, **changes})


class Sampler(Protocol):
    """Draws completions from the current policy."""

    def suggest_batch_size(self, longest_prompt: int, max_completion_length: int) -> int:
        """Return how many sequences of this length (tokens) fit in memory at once, at least 1."""
        ...

    def sample(
        self, requests: Sequence[SampleRequest], options: SamplingOptions, batch_size: int
    ) -> Iterator[tuple[int, SampledCompletion]]:
        """Yield `(request index, completion)` as completions finish, each request once.

        `batch_size` is the most sequences decoded together. Weights, train mode, gradient
        checkpointing and the global random state are afterwards as they were before, also when
        the iterator is closed early or an exception passes through.
        """
        ...
