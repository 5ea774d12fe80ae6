"""A language model that thinks before each token: score text, generate, save and load.

In: a model trained by QuietSTaRTrainer. Out: logits and text after thoughts, through the methods of
a Hugging Face model.
"""

from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import PushToHubMixin

from trl_selfplay.generation.model_traits import sampling_state
from trl_selfplay.trainers.quiet_star.decoding import (
    DecodingOptions,
    generate_with_thoughts,
    mixed_logits,
)
from trl_selfplay.trainers.quiet_star.generate_options import read_options, refuse_unknown
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE, unwrap_causal_lm
from trl_selfplay.trainers.quiet_star.storage import (
    SETTINGS_NAME,
    ThoughtSettings,
    load_thinking_model,
    local_folder,
    save_module,
    save_settings,
    strip_model_files,
)
from trl_selfplay.trainers.quiet_star.support import check_lengths


class QuietSTaRModel(nn.Module, PushToHubMixin):
    """A causal language model, its thought vectors and its mixing head.

    `forward` and `generate` compute no gradients; train with `QuietSTaRTrainer`.

    `QuietSTaRModel.from_pretrained(folder)` loads a saved model, and
    `model.generate(**tokenizer("2 + 2 =", return_tensors="pt"))` thinks before each token.

    Args:
        model: A causal language model or PEFT model with a thought module.
        settings: Length and temperature of the thoughts, and barred tokens.

    Raises:
        ValueError: The model has no thought module.
    """

    def __init__(self, model: Any, settings: ThoughtSettings) -> None:
        super().__init__()
        causal_lm = unwrap_causal_lm(model)
        if not hasattr(causal_lm, ATTRIBUTE):
            raise ValueError(
                f"{type(causal_lm).__name__} has no thought module. Train it with "
                "QuietSTaRTrainer, or load a trained one with QuietSTaRModel.from_pretrained."
            )
        self.model = model
        self.settings = settings
        self.eval()

    @property
    def causal_lm(self) -> Any:
        """The causal language model without wrappers."""
        return unwrap_causal_lm(self.model)

    @property
    def config(self) -> Any:
        """The causal language model's configuration."""
        return self.causal_lm.config

    @property
    def generation_config(self) -> Any:
        """The causal language model's generation configuration."""
        return self.causal_lm.generation_config

    @property
    def device(self) -> torch.device:
        """The device that inputs go to."""
        embeddings: Any = self.causal_lm.get_input_embeddings()
        return embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the causal language model."""
        return self.causal_lm.dtype

    def tie_weights(self) -> None:
        """Tie the embeddings if the model's configuration says so."""
        self.causal_lm.tie_weights()

    def can_generate(self) -> bool:
        """Return True."""
        return True

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        num_thoughts: int = 1,
        thought_temperature: float | None = None,
        seed: int = 0,
    ) -> CausalLMOutput:
        """Return the logits of the next token at every position, each after its own thought.

        Args:
            input_ids: Token ids, (B, S).
            attention_mask: 1 on text, 0 on padding, (B, S); None if there is no padding.
            labels: Token ids, or -100 for positions without loss, (B, S). The output then has a loss.
            num_thoughts: Thoughts per token. With several, logits are the log of the mean
                probability.
            thought_temperature: None uses the training temperature; 0.0 is greedy.
            seed: Seeds the thoughts.

        Raises:
            ValueError: Text and thought don't fit the model's positions.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._check_positions(int(mask.sum(1).max()))
        options = self._options(num_thoughts, thought_temperature, seed)
        with sampling_state(self.model, None):
            logits = mixed_logits(self.causal_lm, self.settings, options, input_ids, mask)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            )
        return CausalLMOutput(loss=loss, logits=logits)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        num_return_sequences: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        generation_config: GenerationConfig | None = None,
        stopping_criteria: Any = None,
        num_thoughts: int = 1,
        thought_temperature: float | None = None,
        seed: int = 0,
        use_cache: bool = True,
        **unknown: Any,
    ) -> torch.Tensor:
        """Continue texts, thinking before each token; return prompts and new tokens (B, S + new).

        A token costs thought_length + 2 forwards for its thought, and one of its own. Shorter
        prompts are padded on the left. Options that are None are taken from `generation_config`,
        then from the model's own generation config.

        With `do_sample`, rows and their thoughts are independent of each other, so equal prompts
        give independent samples. Without it, a row is the same alone and in a batch.

        Args:
            input_ids: Prompts, (B, S).
            attention_mask: 1 on text, 0 on padding, (B, S); None if there is no padding.
            max_new_tokens: Maximum number of new tokens; 20 by default.
            max_length: Maximum number of tokens of prompt and continuation.
            do_sample: Sample tokens instead of greedy decoding; False by default.
            temperature: Temperature of the text, with `do_sample`.
            top_k: Sample from this many most likely tokens; 0 (the default) disables it.
            top_p: Sample from the smallest set of tokens with this mass; 1.0 disables it.
            min_p: Sample from tokens with at least this share of the highest probability.
            repetition_penalty: Divides the logits of tokens that already occur in the row, after
                mixing; with several thoughts, their log-probs.
            num_return_sequences: Continuations per prompt, one after another, with `do_sample`.
            eos_token_id: Ids that end a row; an empty list for none.
            pad_token_id: Fills rows that have ended; EOS by default.
            generation_config: Defaults for this call.
            stopping_criteria: Functions of (ids, scores) that return which rows end.
            num_thoughts: Thoughts per token; the probabilities after them are averaged.
            thought_temperature: None uses the training temperature; 0.0 is greedy.
            seed: Seeds thoughts and text.
            use_cache: Has no effect: keys and values of the text are always kept.
            **unknown: Other keywords of transformers' `generate`, which must be switched off.

        Raises:
            TypeError: A keyword is not supported.
            ValueError: A prompt is padded on the right, an option is out of range, a generation
                config sets an unsupported option, or text and thought don't fit the model's
                positions.
        """
        refuse_unknown(unknown)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not mask[:, -1].all():
            raise ValueError(
                "attention_mask ends in 0, so a prompt is padded on the right, where its "
                "continuation belongs. Set tokenizer.padding_side='left'."
            )
        keywords = {
            "max_new_tokens": max_new_tokens,
            "max_length": max_length,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "num_return_sequences": num_return_sequences,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
        }
        how = read_options(keywords, generation_config, self.generation_config, input_ids.shape[1])
        # No thought follows the last new token.
        longest = int(mask.sum(1).max()) + how.sampling.max_completion_length - 1
        self._check_positions(longest)
        with sampling_state(self.model, None):
            return generate_with_thoughts(
                self.causal_lm,
                self.settings,
                self._options(num_thoughts, thought_temperature, seed),
                how.sampling,
                input_ids.repeat_interleave(how.num_return_sequences, dim=0),
                mask.repeat_interleave(how.num_return_sequences, dim=0),
                how.pad_token_id,
                None if not stopping_criteria else lambda ids: _any_stops(stopping_criteria, ids),
            )

    def _check_positions(self, num_text_tokens: int) -> None:
        check_lengths(self.causal_lm, num_text_tokens, self.settings.thought_length, 1)

    def _options(
        self, num_thoughts: int, thought_temperature: float | None, seed: int
    ) -> DecodingOptions:
        if num_thoughts < 1:
            raise ValueError(
                f"num_thoughts={num_thoughts}; at least 1. Without thoughts, use `model.model`."
            )
        if thought_temperature is None:
            thought_temperature = self.settings.thought_temperature
        return DecodingOptions(num_thoughts, thought_temperature, seed)

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save the model or adapter, thought vectors, mixing head and settings to a folder.

        transformers or PEFT alone can load the model files, without thoughts.

        Args:
            save_directory: The folder.
            push_to_hub: Also push it to a repository with the folder's name.
            **kwargs: Passed to the model's own `save_pretrained`.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder, **kwargs)
        save_module(self.causal_lm, folder)
        save_settings(folder, self.settings, self.causal_lm, {})
        strip_model_files(folder)
        if push_to_hub:
            self.push_to_hub(folder.name)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        base_model: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Load a model saved by QuietSTaRTrainer or `save_pretrained`.

        Args:
            pretrained_model_name_or_path: A folder, or a repository of the Hub.
            base_model: For adapters: the base model or its name; None uses the saved name.
            **kwargs: Passed to `AutoModelForCausalLM.from_pretrained`, such as `dtype` (float32 by
                default), `device_map` and `quantization_config`. `revision` applies to the first
                argument; the base of an adapter is loaded at the revision it was trained on.

        Raises:
            FileNotFoundError: The folder holds no thoughts.
            ValueError: The base is not the model that was trained.
        """
        hub = {name: kwargs.get(name) for name in ("revision", "token", "cache_dir")}
        folder = local_folder(pretrained_model_name_or_path, hub)
        kwargs = {"dtype": torch.float32, **kwargs}
        if not (folder / SETTINGS_NAME).exists():
            raise FileNotFoundError(
                f"{folder} has no {SETTINGS_NAME}: it was not saved by QuietSTaRTrainer or "
                "QuietSTaRModel."
            )
        kwargs.pop("revision", None)
        return cls(*load_thinking_model(folder, base_model, **kwargs))


def _any_stops(criteria: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the rows that end by transformers' stopping criteria (one function or a list)."""
    if callable(criteria):
        stops: torch.Tensor = torch.as_tensor(criteria(ids, None), device=ids.device)
        return stops.expand(len(ids)) if stops.ndim == 0 else stops.bool()
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for criterion in criteria:
        ended |= _any_stops(criterion, ids)
    return ended
