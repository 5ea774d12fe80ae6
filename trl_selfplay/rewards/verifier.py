"""A language model's likelihood of completions as a reward: V-STaR's verifier.

In: prompts and completions, by their tokens where these are given. Out: the log-likelihood that the
verifier gives each completion, for choosing the best of several, or as a reward.

Source: V-STaR, arXiv 2402.06457, section 3: completions are ranked by the verifier's likelihood.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional

from trl_selfplay.generation.generation_options import without_added_eos
from trl_selfplay.rewards.answer import text_of
from trl_selfplay.rewards.grading_model import GradingModel, pad_rows, score_in_batches
from trl_selfplay.rewards.scores import Scores

Kind = Literal["sum", "mean", "ratio"]


class VerifierReward:
    """A reward function over a causal language model, such as one that VSTaRTrainer trained.

    A completion is scored with its end: EOS is added where it has none. Scores of different prompts
    can't be compared.

    Args:
        model: A Hub id, a folder (of an adapter too), or a loaded model, which is put into eval
            mode.
        reference: With `score="ratio"`, the model that the verifier was trained from, given like
            `model`. None: `model` with its adapters switched off.
        tokenizer: The model's tokenizer; None loads it from the model's source.
        score: "sum", the log-likelihood of the completion, as in the paper; "mean", per token; or
            "ratio", the log-likelihood minus the reference's, which is what DPO trains.
        device: Where it grades. None: on the trainer's device, or where the model is, if there is
            no trainer over rounds.
        model_init_kwargs: Keywords of `from_pretrained` for models given by id or folder.
        chat_template_kwargs: Keyword arguments for the chat template, as in the trainer's config.
        max_tokens_per_batch: Maximum number of tokens scored together, padding included. A longer
            row is scored alone. A batch needs memory for as many rows of the vocabulary.

    Raises:
        ValueError: An unknown `score`, or one that doesn't go with `reference`.
    """

    def __init__(
        self,
        model: str | nn.Module,
        reference: str | nn.Module | None = None,
        tokenizer: Any = None,
        *,
        score: Kind = "sum",
        device: Any = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_tokens_per_batch: int = 4096,
    ) -> None:
        from transformers import AutoTokenizer

        if score not in get_args(Kind):
            raise ValueError(f"score={score!r}; choose one of {get_args(Kind)}.")
        if reference is not None and score != "ratio":
            raise ValueError(f"score={score!r} reads no `reference`: leave it out, or set 'ratio'.")
        if max_tokens_per_batch < 1:
            raise ValueError(f"max_tokens_per_batch={max_tokens_per_batch}; give at least 1.")
        verifier = _load(model, model_init_kwargs or {})
        source = model if isinstance(model, str) else verifier.config.name_or_path
        if score == "ratio" and reference is None and not hasattr(verifier, "disable_adapter"):
            raise ValueError(
                "score='ratio' needs a `reference`, the model that the verifier was trained from: "
                f"{source!r} has no adapters to switch off."
            )
        models, sources = [verifier], [source]
        if reference is not None:
            models.append(_load(reference, model_init_kwargs or {}))
            is_named = isinstance(reference, str)
            sources.append(reference if is_named else models[1].config.name_or_path)
        self.score = score
        self.max_tokens_per_batch = max_tokens_per_batch
        self.grading_model = GradingModel(nn.ModuleList(models), device)
        self._tokenizer: Any = tokenizer or AutoTokenizer.from_pretrained(source)
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {source!r} has no end-of-sequence token.")
        self._chat_template_kwargs = dict(chat_template_kwargs or {})
        config = verifier.config.get_text_config()
        self._context_length = getattr(config, "max_position_embeddings", None)
        self._num_embeddings = verifier.get_input_embeddings().weight.shape[0]
        self._sources = sources
        self.__name__ = f"verifier_{score}"

    @property
    def identity(self) -> dict[str, Any]:
        """What the scores depend on, but for the weights."""
        return {
            "models": [str(source) for source in self._sources],
            "chat_template_kwargs": self._chat_template_kwargs,
        }

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> Scores:
        """Score each completion; higher is better.

        Args:
            prompts: Text, or messages, each with its completion.
            completions: Text, or messages. Read only without `completion_ids`.
            completion_ids: Tokens of the completions, of a policy with the verifier's tokenizer.
            tools: Those of each prompt, for the chat template.
            chat_template_kwargs: Those of each prompt.
            **kwargs: Other columns, which aren't read.

        Raises:
            ValueError: A token that the verifier doesn't know, or tokens of other completions.
        """
        if completion_ids is not None and len(completion_ids) != len(completions):
            raise ValueError(
                f"{len(completion_ids)} completion_ids were given for {len(completions)} completions; "
                "give one list of tokens each."
            )
        rows = []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if isinstance(prompt, str):
                asked = self._text_ids(prompt)
            else:
                asked = self._tokenizer.apply_chat_template(
                    prompt,
                    tools=tools[index] if tools else None,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=False,
                    **self._chat_template_kwargs,
                    **((chat_template_kwargs[index] if chat_template_kwargs else None) or {}),
                )
            if completion_ids is None:
                answered = self._answer_ids(prompt, completion, asked)
            else:
                answered = list(completion_ids[index])
            rows.append((asked, self._with_end(answered)))
        self._check_tokens(rows)
        lengths = [len(asked) + len(answered) for asked, answered in rows]
        limit = self._context_length
        causes = {
            index: "prompt and completion are longer than the verifier's context"
            for index, length in enumerate(lengths)
            if limit is not None and length > limit
        }
        return score_in_batches(
            lengths,
            self.max_tokens_per_batch,
            causes,
            lambda batch: self._score([rows[i] for i in batch]),
        )

    def _score(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        models = self.grading_model.ready()
        likelihoods = self._log_likelihoods(models[0], rows)
        if self.score == "sum":
            return likelihoods
        if self.score == "mean":
            return [v / len(ids) for v, (_, ids) in zip(likelihoods, rows, strict=True)]
        if len(models) == 2:
            before = self._log_likelihoods(models[1], rows)
        else:
            with models[0].disable_adapter():
                before = self._log_likelihoods(models[0], rows)
        return [v - b for v, b in zip(likelihoods, before, strict=True)]

    def _log_likelihoods(
        self, model: Any, rows: Sequence[tuple[list[int], list[int]]]
    ) -> list[float]:
        """Return the log-likelihood of each completion, in nats."""
        both = [asked + answered for asked, answered in rows]
        device = self.grading_model.device
        input_ids, attention_mask = pad_rows(both, self._tokenizer.eos_token_id)
        input_ids = input_ids.to(device)
        with torch.inference_mode():
            logits = model(input_ids=input_ids, attention_mask=attention_mask.to(device)).logits
            sums = []
            for place, (asked, answered) in enumerate(rows):
                start, end = len(asked), len(asked) + len(answered)
                # Row by row: a copy of all logits in float32 would double the memory.
                losses = functional.cross_entropy(
                    logits[place, start - 1 : end - 1].float(),
                    input_ids[place, start:end],
                    reduction="sum",
                )
                sums.append(-losses)
            return torch.stack(sums).tolist()

    def _text_ids(self, text: str) -> list[int]:
        ids = without_added_eos(self._tokenizer(text)["input_ids"], self._tokenizer)
        # Without a prompt and a start token, nothing would predict the first token.
        return ids or [self._tokenizer.eos_token_id]

    def _answer_ids(self, prompt: Any, completion: Any, asked: Sequence[int]) -> list[int]:
        """Return the tokens of a completion that is given as text, as after its prompt if possible."""
        if isinstance(prompt, str):
            both = self._text_ids(prompt + completion)
            if both[: len(asked)] == list(asked):
                return both[len(asked) :]
        return list(self._tokenizer(text_of(completion), add_special_tokens=False)["input_ids"])

    def _with_end(self, answered: list[int]) -> list[int]:
        eos = self._tokenizer.eos_token_id
        return answered if answered and answered[-1] == eos else [*answered, eos]

    def _check_tokens(self, rows: Sequence[tuple[list[int], list[int]]]) -> None:
        largest = max((max(asked + answered) for asked, answered in rows), default=0)
        if largest >= self._num_embeddings:
            raise ValueError(
                f"a completion has the token {largest}, and the verifier has {self._num_embeddings} "
                "embeddings: the policy must have the verifier's tokenizer."
            )


def _load(model: str | nn.Module, model_init_kwargs: Mapping[str, Any]) -> Any:
    if not isinstance(model, str):
        return model
    if (Path(model) / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(model, **model_init_kwargs)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, **model_init_kwargs)
