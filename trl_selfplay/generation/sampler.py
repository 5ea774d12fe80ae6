"""The interface of a sampler: prompts as token ids in, completions as token ids out.

In: `SampleRequest`s (the tokens and the key of the sample's own random stream) and options for all of
them. Out: `(request index, SampledCompletion)` pairs in the order in which they finish.
Implementations: transformers_sampler.py, vllm_sampler.py, ray_sampler.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from trl_selfplay.confidential import shown

Finish = Literal["eos", "stop", "length"]
# Why a trajectory ended before the policy gave an answer.
Halt = Literal["malformed", "tool_limit"]
# What a completion is sampled for; part of the key of its random stream.
Phase = Literal["train", "hint", "eval", "gold", "judge"]


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One completion to draw.

    Attributes:
        prompt_ids: Tokens of the prompt, at least one.
        stream_key: 64-bit key of this sample's random stream, see `random_streams.stream_key`. In
            float32, the same key, prompt and weights give the same completion in any batch.
        max_completion_length: Most tokens of this completion, if fewer than the options say; None:
            as they say.
    """

    prompt_ids: tuple[int, ...]
    stream_key: int
    max_completion_length: int | None = None

    def longest(self, options: "SamplingOptions") -> int:
        """Return the most tokens of prompt and completion, whatever the model's context."""
        most = options.max_completion_length
        if self.max_completion_length is not None:
            most = min(most, self.max_completion_length)
        return len(self.prompt_ids) + most


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Options with the names and meanings of GRPOConfig's fields.

    Attributes:
        max_completion_length: Maximum tokens per completion, at least 1.
        temperature: 0.0 is greedy.
        top_p: Sample from the smallest set of tokens with at least this mass; 1.0 disables it.
        top_k: Sample from this many most likely tokens; 0 disables it.
        min_p: Sample from tokens with at least this share of the highest probability; None disables
            it.
        repetition_penalty: Divide positive logits of tokens that already occur in prompt or
            completion, and multiply negative ones, as transformers does; 1.0 disables it.
        eos_token_ids: Ids that end a completion and are part of it.
        stop_strings: A completion ends with the token that completes one of these strings.
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
    """The completion of one request.

    Attributes:
        completion_ids: The sampled tokens, with EOS at the end only if EOS was sampled.
        finish: Why it ended: "eos", "stop" (a stop string) or "length" (truncated).
        logprob: Sum of the tokens' log-probs under the distribution sampled from, that is after
            penalty, temperature and filters; None unless requested.
        completion_mask: For each token whether the policy wrote it; None: it wrote all of them.
        messages: The turns of a trajectory as chat messages, those of tools among them; empty for
            a single turn without tools.
        environment_reward: What the trajectory's environment gave for it, or None.
        halt: Why the trajectory ended before the policy gave an answer: "malformed" (a call that
            can't be read) or "tool_limit" (a call after the last one allowed); None if it didn't.
        num_failed_calls: How many of the calls whose results the policy read failed.
        num_rerendered_turns: How many of the turns with calls would have other tokens if their messages
            were rendered again.
    """

    completion_ids: tuple[int, ...]
    finish: Finish
    logprob: float | None = None
    completion_mask: tuple[bool, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    environment_reward: float | None = None
    halt: Halt | None = None
    num_failed_calls: int = 0
    num_rerendered_turns: int = 0


# The keys of `generation_kwargs`, and the options that they set.
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
    """Return the sampling options of a config; `generation_kwargs` override its fields.

    Args:
        config: A config with the sampling fields of `SelfPlayConfig`.
        eos_token_ids: Ids that end a completion.
        **changes: Options that override the config, such as the temperature of evaluation.

    Raises:
        ValueError: `generation_kwargs` has an unsupported key.
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
                f"generation_kwargs has {key!r}={shown(value, key)}, which the sampler doesn't support. It "
                f"takes {sorted(_OPTION_OF_KEYWORD)}."
            )
        if key == "eos_token_id":
            value = (value,) if isinstance(value, int) else tuple(value)
        options[_OPTION_OF_KEYWORD[key]] = value
    return SamplingOptions(**{**options, **changes})


# Those of an iterator may follow from earlier completions; None: no request for now.
Requests = Sequence[SampleRequest] | Iterator[SampleRequest | None]


class Sampler(Protocol):
    """Draws completions from the current policy."""

    def suggest_batch_size(self, longest_prompt: int, max_completion_length: int) -> int:
        """Return how many sequences of this length in tokens fit in memory at once, at least 1."""
        ...

    def sample(
        self,
        requests: Requests,
        options: SamplingOptions,
        batch_size: int,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, SampledCompletion]]:
        """Yield `(request index, completion)` as completions finish, each request once.

        Requests may come from an iterator, which is pulled as places become free, after the
        completions that freed them were yielded. So a request can follow from an earlier completion
        while others are still being decoded. None in place of a request says that there is none
        now; while a place is free, the iterator is asked again after every step, or every few
        hundredths of a second. So it has to answer at once. The index of a request is its place among
        those given. The iterator runs in the thread that iterates over the completions.

        Weights, train mode, gradient checkpointing and the global random state are restored, even
        when the iterator is closed early or an exception passes through.

        Args:
            requests: A sequence, or an iterator of requests and None.
            options: The same for all of them.
            batch_size: Maximum sequences decoded together.
            on_tokens: Called with the number of tokens decoded since its last call, also of
                completions that aren't finished, in the thread that iterates. A sampler that gets
                completions as a whole calls it when they are finished.
        """
        ...

    def release(self) -> None:
        """Free what sampling holds besides the model; the next `sample` begins anew.

        Called before training and at the end of a run. Does nothing where nothing is held.
        """
        ...
