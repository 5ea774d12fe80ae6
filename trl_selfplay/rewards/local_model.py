"""A causal language model of one's own that replies to questions.

In: questions as text. Out: a `Reply` to each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from trl_selfplay.generation.control_tokens import split_control_tokens
from trl_selfplay.generation.generation_options import without_added_eos
from trl_selfplay.generation.model_traits import describe_model
from trl_selfplay.generation.random_streams import stream_key
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler, collect_eos_token_ids
from trl_selfplay.rewards.endpoint import Reply
from trl_selfplay.rewards.grading_model import GradingModel

TOO_LONG = "the question is too long for the judge"


class LocalModel:
    """A causal language model in this process, beside the one that is being trained.

    Args:
        model: A Hub id, a folder, or a loaded model, which is put into eval mode.
        tokenizer: The model's tokenizer; None loads it from the model's source.
        device: Where it replies. None: on the trainer's device, or where the model is, if there is
            no trainer over rounds.
        model_init_kwargs: Keywords of `from_pretrained`, for the model and its tokenizer.
    """

    def __init__(
        self,
        model: str | nn.Module,
        tokenizer: Any = None,
        device: Any = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        loaded: Any = model
        kwargs = dict(model_init_kwargs or {})
        if isinstance(model, str):
            loaded = AutoModelForCausalLM.from_pretrained(model, **kwargs)
        self.name = str(loaded.config.name_or_path)
        self.grading_model = GradingModel(loaded, device)
        self.tokenizer: Any = tokenizer or AutoTokenizer.from_pretrained(self.name, **kwargs)
        self._eos_token_ids = collect_eos_token_ids(loaded, self.tokenizer)
        self._sampler = TransformersSampler(self.grading_model.ready, self.tokenizer)
        self._context_length = describe_model(loaded).context_length

    def ask(
        self, questions: Sequence[str], *, max_completion_length: int, temperature: float
    ) -> list[Reply]:
        """Return a reply to each question; the same question always gets the same one.

        Args:
            questions: Each is the user's message if the tokenizer has a chat template, else a text
                to be continued.
            max_completion_length: Maximum tokens per reply.
            temperature: 0.0 is greedy.
        """
        replies = [Reply(None, TOO_LONG)] * len(questions)
        requests, places = [], []
        for place, question in enumerate(questions):
            ids = self._token_ids(question)
            if fits(len(ids), max_completion_length, self._context_length):
                key = stream_key(0, 0, "judge", question, 0)
                requests.append(SampleRequest(ids, key))
                places.append(place)
        if not requests:
            return replies
        options = SamplingOptions(
            max_completion_length, temperature, eos_token_ids=self._eos_token_ids
        )
        longest = max(len(request.prompt_ids) for request in requests)
        batch_size = self._sampler.suggest_batch_size(longest, max_completion_length)
        for index, sampled in self._sampler.sample(requests, options, batch_size):
            text = self.tokenizer.decode(list(sampled.completion_ids), skip_special_tokens=True)
            replies[places[index]] = Reply(text, is_cut_off=sampled.finish == "length")
        self._sampler.release()  # the policy's sampler has use for the memory
        return replies

    def check_room(self, question: str, max_completion_length: int) -> None:
        """Raise ValueError if not even this question fits, with a reply, into the context."""
        check_room(
            len(self._token_ids(question)), max_completion_length, self._context_length, self.name
        )

    def _token_ids(self, question: str) -> tuple[int, ...]:
        text = split_control_tokens(question, self.tokenizer)
        if getattr(self.tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": text}]
            rendered = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            return tuple(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])
        return tuple(without_added_eos(self.tokenizer(text)["input_ids"], self.tokenizer))


def fits(num_tokens: int, max_completion_length: int, context_length: int | None) -> bool:
    """Return whether a question and its reply fit into the model's positions."""
    return context_length is None or num_tokens + max_completion_length <= context_length


def check_room(
    num_tokens: int, max_completion_length: int, context_length: int | None, name: str
) -> None:
    """Raise ValueError if the judge's shortest question leaves no room for a reply."""
    if not fits(num_tokens, max_completion_length, context_length):
        raise ValueError(
            f"the judge {name!r} has a context of {context_length} tokens, and a question about "
            f"nothing takes {num_tokens} of them besides max_completion_length="
            f"{max_completion_length} of the reply. Lower that, shorten rubric or template, or "
            "choose another model."
        )
