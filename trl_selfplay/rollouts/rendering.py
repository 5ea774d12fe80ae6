"""Turn prompts into the token ids that a model is conditioned on.

In: `PromptRow`s, few-shot examples, a hint formatter, the tokenizer and the start time of the run. Out:
token ids, with or without few-shot examples and hint (STaR, arXiv 2203.14465, sections 3.1 and 3.3), and
errors or warnings if the chat template omits parts of a row. Rendering is constant over a run:
`Rendering` is recorded on disk.
"""

import json
import logging
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_selfplay.confidential import shown
from trl_selfplay.disk import save_text
from trl_selfplay.generation.control_tokens import continuation_ids
from trl_selfplay.generation.generation_options import without_added_eos
from trl_selfplay.rollouts.control_tokens import control_token_finder, warn_of_examples
from trl_selfplay.rollouts.prompts import (
    HintFormatter,
    Messages,
    Prompt,
    PromptRow,
    check_embedded,
    check_message,
    check_prompt,
    message_text,
    plain_prompt,
)
from trl_selfplay.tools.offer import ACTION, ToolForm, describe, with_words

logger = logging.getLogger(__name__)

# The function that chat templates call for the time.
_CLOCK = "strftime_now"
# How a template that doesn't support content in parts writes them, without white space.
_PART_AS_CODE = ("'type':'text'", '"type":"text"')


@dataclass(frozen=True, slots=True)
class FewShotExample:
    """A worked example that precedes the prompt during sampling."""

    prompt: Prompt
    completion: str | Messages  # messages where it calls tools
    solution: Any


def load_few_shot_examples(
    examples: Sequence[Mapping[str, Any]] | None,
    conversational: bool,
    *,
    needs_solution: bool = False,
) -> tuple[FewShotExample, ...]:
    """Check few-shot examples and convert them to the dataset's form.

    Args:
        examples: Mappings with `prompt`, `completion` and optionally `solution`.
        conversational: Whether the dataset's prompts are chat messages. Plain-text examples are then
            converted to a user turn and an assistant turn.
        needs_solution: Whether hints show the solutions of examples as well.

    Raises:
        ValueError: A key is missing, or an example is chat messages but the dataset is text.
        TypeError: A completion is neither text nor messages.
    """
    checked = []
    for index, example in enumerate(examples or ()):
        where = f"few_shot_examples[{index}]"
        needed = {"prompt", "completion", *(["solution"] if needs_solution else ())}
        if missing := needed - set(example):
            raise ValueError(
                f"{where} lacks {sorted(missing)}; each example needs `prompt`, `completion` (the "
                "rationale with its answer), and with rationalize=True the `solution` for its hint."
            )
        prompt = example["prompt"]
        check_prompt(prompt, where)
        completion = _completion(example["completion"], where, conversational)
        if conversational and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if not conversational and not isinstance(prompt, str):
            raise ValueError(
                f"{where} is a list of chat messages, but the dataset's prompts are plain text. "
                "Give the example's prompt as text."
            )
        checked.append(FewShotExample(prompt, completion, example.get("solution")))
    return tuple(checked)


def _completion(completion: Any, where: str, conversational: bool) -> str | Messages:
    """Return an example's completion: text, or all of its messages where they call tools."""
    if isinstance(completion, list) and completion and isinstance(completion[-1], Mapping):
        for message in completion:
            check_message(message, f"{where}: `completion`")
        if any(m["role"] == "tool" or m.get("tool_calls") for m in completion):
            if not conversational:
                raise ValueError(
                    f"{where}: the completion has messages with calls of tools, but the dataset's prompts "
                    "are plain text. Write calls and results as text, as `docs/tools.md` shows."
                )
            return completion
        completion = message_text(completion[-1])
    if not isinstance(completion, str) or not completion.strip():
        raise TypeError(
            f"{where}: the completion is {completion!r:.200}; expected the text of a rationale with "
            "its answer, or assistant messages with it."
        )
    return completion


@dataclass(frozen=True, slots=True)
class Rendering:
    """What the prompts of a run depend on besides its configuration and its rows.

    Attributes:
        time: The time that chat templates get: when the run began, in ISO 8601.
        chat_template: The template's text, or texts by name; None for plain-text prompts.
    """

    time: str
    chat_template: Any


def read_start(path: Path, text: str | None = None) -> datetime:
    """Return when the run of this file, or with this text of it, began; now if there is neither.

    Raises:
        ValueError: The file can't be read.
    """
    if text is None and not path.exists():
        return datetime.now().replace(microsecond=0)
    return datetime.fromisoformat(_read(path, text).time)


def keep_rendering(rendering: Rendering, path: Path) -> None:
    """Save a run's rendering, or compare it with the one on disk.

    Raises:
        ValueError: The run was begun with another chat template.
    """
    if path.exists():
        recorded = _read(path).chat_template
        if None not in (recorded, rendering.chat_template) and recorded != rendering.chat_template:
            raise ValueError(
                f"the chat template is not the one that this run began with, so its prompts would "
                f"differ. Set `tokenizer.chat_template` to the `chat_template` in {path} to go "
                "on with that run, or choose another output_dir."
            )
        return
    save_text(path, json.dumps(asdict(rendering), indent=1))


def _read(path: Path, text: str | None = None) -> Rendering:
    try:
        return Rendering(**json.loads(path.read_text() if text is None else text))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} can't be read ({error}). It holds the time that the run's prompts were rendered "
            "with: restore it, or delete it to use the current time."
        ) from error


class PromptFormatter:
    """Renders prompts as token ids.

    Plain text: the examples' `prompt + completion`, each followed by a blank line, then the
    prompt. Chat: the examples as user and assistant turns after a leading system message, then
    the conversation, through the model's chat template, which gets the row's `tools` and
    `chat_template_kwargs` as in TRL. An example whose prompt is the row's own is left out for that
    row.

    Args:
        tokenizer: Its chat template renders messages.
        few_shot_examples: From `load_few_shot_examples`.
        hint_formatter: Shows the answer in a prompt.
        chat_template_kwargs: For all rows; a row's own take precedence.
        sanitize_control_tokens: Read special tokens in the rows' text as plain text.
        start: The time that the chat template gets; None is now.
        num_embeddings: The model's; a token id beyond them is an error. None skips the check.
        tool_form: How prompts tell of the run's tools; None: it has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        few_shot_examples: Sequence[FewShotExample] = (),
        hint_formatter: HintFormatter | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        *,
        sanitize_control_tokens: bool = False,
        start: datetime | None = None,
        num_embeddings: int | None = None,
        tool_form: ToolForm | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.tool_form = tool_form
        self.num_embeddings = num_embeddings
        self.few_shot_examples = tuple(few_shot_examples)
        # Examples that call tools show which there are, and how they are called.
        is_shown = any(ACTION in str(example.completion) for example in self.few_shot_examples)
        self._tells_tools = tool_form is not None and tool_form.in_words and not is_shown
        self.hint_formatter = hint_formatter
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.sanitize_control_tokens = sanitize_control_tokens
        self.start = start or datetime.now()
        self._bos: list[int] | None = None
        self._ints: dict[int, int] = {}  # one object per token id, not per token

    def token_ids(self, row: PromptRow, *, few_shot: bool, hinted: bool = False) -> tuple[int, ...]:
        """Return the prompt's token ids, with the generation prompt of a chat template.

        Args:
            row: The prompt.
            few_shot: Put the few-shot examples before it.
            hinted: Show the answer, also in the examples.

        Raises:
            ValueError: A chat prompt that can't be rendered, or no chat template.
        """
        examples = self._examples(row) if few_shot else []
        prompt = plain_prompt(row, self.tokenizer)
        if hinted:
            prompt = self._with_hint(prompt, row.solution)
        shown = [
            (self._with_hint(e.prompt, e.solution) if hinted else e.prompt, e.completion)
            for e in examples
        ]
        if isinstance(prompt, str):
            text = "".join(f"{before}{after}\n\n" for before, after in shown) + prompt
            ids = self.text_ids(self.with_tools(text, row))
        else:
            ids = self.chat_ids(_turns(prompt, shown), row)
        return tuple(map(self._ints.setdefault, ids, ids))

    def _examples(self, row: PromptRow) -> list[FewShotExample]:
        """Return the few-shot examples for a row, without one that asks the same question."""
        return [e for e in self.few_shot_examples if e.prompt != row.prompt]

    def _with_hint(self, prompt: Prompt, solution: Any) -> Prompt:
        if self.hint_formatter is None:
            raise ValueError("a hinted prompt needs a hint_formatter")
        return self.hint_formatter(prompt, solution)

    def with_tools(self, text: str, row: PromptRow) -> str:
        """Return a plain-text prompt behind what tells of the tools that its row may call."""
        return str(with_words(text, self._told(row)))

    def _told(self, row: PromptRow) -> str:
        """Return what the prompt says of tools in words."""
        return describe(self._tools_of(row) or ()) if self._tells_tools else ""

    def tools_shown(self, row: PromptRow) -> list[Any] | str | None:
        """Return what a row's prompt shows of the run's tools: schemas, or words; None for nothing."""
        if self.tool_form is None:
            return None
        return (self._told(row) or None) if self.tool_form.in_words else self._tools_of(row)

    def _tools_of(self, row: PromptRow) -> list[Any] | None:
        """Return the tools that a row's prompt shows: its own, or those of the run."""
        own: list[Any] | None = row.template_arguments.get("tools")
        if own is None and self.tool_form is not None:
            own = self.tool_form.toolbox.schemas_of(row.columns)
        return own or None  # some templates announce tools if they get an empty list

    def _template_tools(self, row: PromptRow) -> list[Any] | None:
        """Return the tools that the chat template gets."""
        in_words = self.tool_form is not None and self.tool_form.in_words
        return None if in_words else self._tools_of(row)

    def text_ids(self, text: str) -> list[int]:
        """Return the tokens of plain text as a prompt, with start tokens but without EOS."""
        ids = self._encode(text)
        # A text that was rendered before already has start tokens.
        if self._bos is None:
            self._bos = without_added_eos(self._encode(""), self.tokenizer)
        if self._bos and ids[: 2 * len(self._bos)] == 2 * self._bos:
            ids = ids[len(self._bos) :]
        return without_added_eos(ids, self.tokenizer)

    def continuation_ids(self, text: str) -> list[int]:
        """Return the tokens of plain text that follows other text, as a model would sample them."""
        return continuation_ids(lambda each: self._encode(each, False), text)

    def _encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        how = {"split_special_tokens": True} if self.sanitize_control_tokens else {}
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens, **how)["input_ids"]
        if self.sanitize_control_tokens:
            self._refuse_unsplit(text)
        return check_embedded(list(ids), self.tokenizer, self.num_embeddings, repr(text[:200]))

    def _refuse_unsplit(self, text: str) -> None:
        bare = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        control = {*self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id}
        if unsplit := control & {*bare["input_ids"]}:
            raise ValueError(
                "sanitize_control_tokens=True, but the tokenizer's vocabulary of plain text has "
                f"{self.tokenizer.decode([*unsplit])!r} too, which is in {text[:200]!r}. Remove it "
                "from the data."
            )

    def chat_ids(self, messages: Messages, row: PromptRow, *, complete: bool = False) -> list[int]:
        """Return the tokens of messages that belong to a row, rendered like its prompt.

        Args:
            messages: The conversation.
            row: Whose `tools` and `chat_template_kwargs` the template gets.
            complete: The last message is the completion, and the generation prompt is left out.

        Raises:
            ValueError: They can't be rendered; the error names the row.
        """
        if self._template_tools(row) and self.tool_form is not None and self._row_kwargs(row):
            raise ValueError(
                f"{row.where} has `chat_template_kwargs` of its own, and tools that are called in the chat "
                "template's form: results are shown alike in all rows. Set the config's "
                "`chat_template_kwargs`, remove the column, or set tool_format='react'."
            )
        sanitize = {"sanitize_control_tokens": True} if self.sanitize_control_tokens else {}
        ids = self._render(messages, row, complete, tokenize=True, return_dict=False, **sanitize)
        return check_embedded(ids, self.tokenizer, self.num_embeddings, row.where)

    def _render(self, messages: Messages, row: PromptRow, complete: bool, **how: Any) -> Any:
        continues = not complete and messages[-1]["role"] == "assistant"
        arguments = {**self.chat_template_kwargs, **self._row_kwargs(row)}
        tokenizer: Any = self.tokenizer  # its stubs don't follow `tokenize` and `return_dict`
        template = self.template_text(row)
        if template is not None:
            has_clock = _CLOCK in template
            if has_clock or self.own_template is not None:
                how["chat_template"] = (_stopped_clock(self.start) if has_clock else "") + template
        try:
            return tokenizer.apply_chat_template(
                with_words(messages, self._told(row)),
                tools=self._template_tools(row),
                add_generation_prompt=not complete and not continues,
                continue_final_message=continues,
                **how,
                **arguments,
            )
        except Exception as error:
            raise ValueError(
                f"{row.where}: the chat template can't render this prompt "
                f"({type(error).__name__}: {error}). The messages are {messages!r:.400}. Change the "
                "row, or use a chat template that knows such messages."
            ) from error

    def _row_kwargs(self, row: PromptRow) -> Mapping[str, Any]:
        return row.template_arguments.get("chat_template_kwargs", {})

    @property
    def own_template(self) -> str | None:
        """The chat template that takes the place of the tokenizer's, or None."""
        return None if self.tool_form is None else self.tool_form.chat_template

    def template_text(self, row: PromptRow) -> str | None:
        """Return the chat template for a row; None if the tokenizer renders without one.

        Raises:
            ValueError: The tokenizer has no chat template.
        """
        if self.own_template is not None:
            return self.own_template
        try:
            return self.tokenizer.get_chat_template(tools=self._template_tools(row))
        except NotImplementedError:  # renders in code, as Mistral's own tokenizer class does
            return None
        except ValueError as error:
            if _renders_in_code(self.tokenizer):
                return None
            raise ValueError(
                "the prompts are chat messages, but the tokenizer of "
                f"{self.tokenizer.name_or_path!r} has no chat template. Use an instruct model, set "
                "`chat_template_path`, or give the prompts as plain text."
            ) from error

    def rendering(self, conversational: bool) -> Rendering:
        """Return the rendering to save with a run."""
        own = self.own_template
        template = (own or self.tokenizer.chat_template) if conversational else None
        return Rendering(self.start.isoformat(), template)

    def check_rows(self, rows: Sequence[PromptRow], few_shot: bool) -> None:
        """Raise or warn if the chat template omits parts of rows.

        Args:
            rows: Rows to check; the longest ones and a few of each kind are enough.
            few_shot: Whether prompts have the few-shot examples.

        Raises:
            ValueError: A user turn or an example's completion is not in the rendered prompt.
        """
        if not rows:
            return
        if not rows[0].is_conversational:
            self._warn_unread_columns(rows)
            return
        dropped: dict[str, PromptRow] = {}
        for row in rows:
            for what in self._dropped(row, few_shot):
                dropped.setdefault(what, row)
        for what, row in dropped.items():
            logger.warning(
                "the chat template doesn't use %s (%s is the first such row): prompts are "
                "rendered without. Use a chat template that does, or remove it.",
                what,
                row.where,
            )

    def _warn_unread_columns(self, rows: Sequence[PromptRow]) -> None:
        unread = ("chat_template_kwargs", *(() if self.tool_form is not None else ("tools",)))
        for name in unread:
            if any(row.columns.get(name) for row in rows):
                logger.warning(
                    "`%s` has a column `%s`, which is for chat templates, and its prompts are plain "
                    "text: the prompts are rendered without it.",
                    rows[0].source,
                    name,
                )
        if self.chat_template_kwargs:
            logger.warning(
                "chat_template_kwargs=%s has no effect: the prompts are plain text.",
                shown(self.chat_template_kwargs),
            )

    def _dropped(self, row: PromptRow, few_shot: bool) -> list[str]:
        """Return descriptions of what the chat template omits from a row."""
        prompt: Any = row.prompt
        examples = self._examples(row) if few_shot else []
        turns = _turns(prompt, [(e.prompt, e.completion) for e in examples])
        template = self.template_text(row)
        rendered = self._visible(turns, row, template)
        dropped = []
        for message in prompt:
            texts = _texts(message)
            lost = [text for text in texts if _squeezed(text) not in rendered]
            has_parts = isinstance(message.get("content"), list)
            if has_parts and any(code in rendered for code in _PART_AS_CODE):
                lost = texts
            if lost and message["role"] == "user":
                raise ValueError(
                    f"{row.where}: the chat template leaves out what the user says, or writes it "
                    f"as code: {lost[0]!r:.200}. Give the message's content as "
                    f"{'text' if has_parts else 'a list of parts'}, or use another chat template."
                )
            if lost and message["role"] != "assistant":  # thoughts of earlier turns go by design
                dropped.append(f"messages with the role {message['role']!r}")
        self._check_examples(row, rendered, examples)
        if row.template_arguments.get("tools") and self.tool_form is None:
            others = {k: v for k, v in row.template_arguments.items() if k != "tools"}
            bare = replace(row, template_arguments=others)
            if self._visible(turns, bare, self.template_text(bare)) == rendered:
                dropped.append("the column `tools`")
        if template is not None:
            given = {*self.chat_template_kwargs, *self._row_kwargs(row)}
            unread = (n for n in sorted(given) if not re.search(rf"\b{re.escape(n)}\b", template))
            dropped += [f"chat_template_kwargs {name!r}" for name in unread]
        return dropped

    def _check_examples(
        self, row: PromptRow, rendered: str, examples: Sequence[FewShotExample]
    ) -> None:
        for example in examples:
            if any(_squeezed(text) not in rendered for text in _example_texts(example)):
                raise ValueError(
                    f"few_shot_examples[{self.few_shot_examples.index(example)}]: the chat template "
                    f"leaves out part of the completion {example.completion!r:.200} in the prompt "
                    f"of {row.where}, so the example would teach to leave it out. Many "
                    "templates remove thoughts (<think>) from earlier turns: write the rationale "
                    "without such tags, or set a `tokenizer.chat_template` that keeps them (for "
                    "Qwen3, trl.get_training_chat_template(tokenizer) returns one)."
                )

    def _visible(self, messages: Messages, row: PromptRow, template: str | None) -> str:
        """Return what is rendered as text without white space."""
        if template is not None:
            return _squeezed(self._render(messages, row, False, tokenize=False))
        decoded: Any = self.tokenizer.decode(self.chat_ids(messages, row))
        return _squeezed(decoded)

    def warn_control_tokens(self, rows: Sequence[PromptRow], with_solutions: bool) -> None:
        """Warn of rows with special tokens in their own text.

        Args:
            rows: Rows of one dataset.
            with_solutions: Whether the model reads the solutions too, as hints or data.
        """
        find = self._finder()
        found: list[tuple[PromptRow, str]] = []
        for row in rows:
            solution = row.solution if with_solutions else None
            own = [plain_prompt(row, self.tokenizer), row.template_arguments, solution]
            if token := find(own):
                found.append((row, token))
        if found:
            row, token = found[0]
            logger.warning(
                "`%s`: %d of %d rows have special tokens in their text (row %d: %r), which the model "
                "reads as control tokens, as in TRL. That is right if prompts were rendered "
                "before; if users wrote them, set sanitize_control_tokens=True to read them as "
                "plain text, or remove them.",
                row.source,
                len(found),
                len(rows),
                row.row_index,
                token,
            )

    def warn_control_tokens_of_examples(self) -> None:
        """Warn of few-shot examples with special tokens in their text."""
        texts = [(e.prompt, e.completion, e.solution) for e in self.few_shot_examples]
        warn_of_examples(texts, self._finder())

    def _finder(self) -> Callable[[Any], str | None]:
        if self.sanitize_control_tokens or _renders_in_code(self.tokenizer):
            return lambda _: None
        return control_token_finder(self.tokenizer)


def _renders_in_code(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer's class renders messages itself, without a Jinja template."""
    own = type(tokenizer).apply_chat_template
    return (
        tokenizer.chat_template is None and own is not PreTrainedTokenizerBase.apply_chat_template
    )


def _turns(prompt: Messages, shown: Sequence[tuple[Prompt, str | Messages]]) -> Messages:
    """Return a conversation: the system message, the examples as turns, then the prompt."""
    system = prompt[:1] if prompt[0]["role"] == "system" else []
    turns: Messages = list(system)
    for before, after in shown:
        assert not isinstance(before, str)  # `load_few_shot_examples` has made it chat
        turns += [m for m in before if m["role"] != "system"]
        turns += [{"role": "assistant", "content": after}] if isinstance(after, str) else after
    return turns + prompt[len(system) :]


def _example_texts(example: FewShotExample) -> list[str]:
    """Return the texts of an example's completion, with the names of the tools that it calls."""
    if isinstance(example.completion, str):
        return [example.completion]
    calls = [call for m in example.completion for call in m.get("tool_calls") or ()]
    names = [str(call.get("function", call).get("name")) for call in calls]
    return [text for m in example.completion for text in _texts(m)] + names


def _texts(message: Mapping[str, Any]) -> list[str]:
    """Return a message's content as texts, one for each part."""
    content = message.get("content")
    return [content] if isinstance(content, str) else [part["text"] for part in content or ()]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _stopped_clock(now: datetime) -> str:
    """Return a Jinja macro that replaces the template's clock and always shows the same time.

    A variable of the same name can't do that: transformers passes only plain data to a template.
    """
    shown = {}
    for letter in string.ascii_letters:
        for directive in (f"%{letter}", f"%-{letter}"):
            try:
                text = now.strftime(directive)
            except ValueError:  # unknown to this system
                continue
            if text.lstrip("%") != directive.lstrip("%"):
                shown[directive] = text
    return (
        f"{{%- macro {_CLOCK}(format) -%}}"
        '{%- set shown = namespace(text=format | replace("%%", "\\0")) -%}'
        f"{{%- for directive, text in {json.dumps(shown)}.items() -%}}"
        "{%- set shown.text = shown.text | replace(directive, text) -%}{%- endfor -%}"
        '{{- shown.text | replace("\\0", "%") -}}'
        "{%- endmacro -%}"
    )
