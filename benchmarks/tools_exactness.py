"""Where rendering a trajectory's messages again would give other tokens than were sampled.

For chat templates that TRL ships, scripted policies write trajectories of one to three calls and an answer, in the
forms below. The sampler of trajectories plays them with a real tool. The context before the last turn is then
compared with what a loop would have fed that parses each turn and renders all messages anew. Tokens are those of
the demo's tokenizer, which divides text as Llama's and Qwen's do, with each template's control tokens added: which trajectories change doesn't depend on it, how
many tokens do. Nothing here says how often a model writes in these forms; in a run that is the metric
`tools/rerendered_frequency`.

    OMP_NUM_THREADS=1 python benchmarks/tools_exactness.py
"""

import argparse
import datetime
import json
import platform
import random
import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from importlib.metadata import version
from pathlib import Path
from typing import Any

import trl
from jinja2 import TemplateError
from tokenizers import Regex, pre_tokenizers
from transformers import AddedToken, AutoTokenizer
from trl import add_response_schema, get_training_chat_template

from trl_selfplay.demos.words import load_demo_model_path
from trl_selfplay.generation.sampler import SampledCompletion, SampleRequest, SamplingOptions
from trl_selfplay.tools.chat import ChatDialogue
from trl_selfplay.tools.record import ToolResult
from trl_selfplay.tools.tool_set import ToolSet
from trl_selfplay.tools.trajectories import Trajectories

RESULTS = Path(__file__).parent / "results" / "tools_exactness.md"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# What ends a turn in each family.
FAMILIES = {
    "gemma4_v5": "<turn|>", "glm4moe": "<|user|>", "gptoss": "<|return|>", "lfm2_v2": "<|im_end|>",
    "llama3_1": "<|eot_id|>", "llama3_2": "<|eot_id|>", "nemotron_3_nano": "<|im_end|>",
    "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>", "qwen3_5_think": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
}  # fmt: skip
FORMS = ("as rendered", "thoughts", "dense JSON", "white space", "other tokens")
COUNT = 16
USER = {"role": "user", "content": "Add the numbers in these lines, two at a time."}
THOUGHT = "Two numbers are left."
# How the tokenizers of Llama 3, Qwen and GLM divide text before they merge: line breaks stay together.
_PARTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL = re.compile(
    r"<\|[^<>|\s]+\|>|<\|[a-z_]+>|<[a-z_]+\|>|</?(?:tool_call|think|arg_key|arg_value)>"
)


def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return str(a + b)


class Script:
    """A policy that writes given turns, as a `Sampler`."""

    def __init__(self, turns: Sequence[Sequence[int]]) -> None:
        self._turns = turns
        self.prompts: list[tuple[int, ...]] = []

    def sample(
        self, requests: Any, options: Any, batch_size: int, on_tokens: Any = None
    ) -> Iterator[tuple[int, SampledCompletion]]:
        """Yield the turns."""
        for number, turn in enumerate(self._turns):
            self.prompts.append(next(requests).prompt_ids)
            yield number, SampledCompletion(tuple(turn), "eos")


class Family:
    """A chat template with its tokenizer and its form of calls."""

    def __init__(self, name: str) -> None:
        template = (TEMPLATES / f"{name}.jinja").read_text()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(load_demo_model_path())
        self.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PARTS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        control = sorted({*_CONTROL.findall(template), FAMILIES[name]})
        self.tokenizer.add_tokens([AddedToken(token, normalized=False) for token in control])
        self.tokenizer.eos_token = FAMILIES[name]
        self.tokenizer.chat_template = template
        add_response_schema(self.tokenizer)
        own = get_training_chat_template(self.tokenizer) if name == "qwen3" else None
        self.eos = self.tokenizer.eos_token_id
        self.dialogue = ChatDialogue(self.tokenizer, {self.eos}, own)
        self.tools = ToolSet([add], 30.0)
        self._how = {"tools": self.tools.schemas, "return_dict": False}
        self._how |= {} if own is None else {"chat_template": own}
        self.prompt = self.render([USER])

    def render(self, messages: Sequence[Any]) -> list[int]:
        """Return the tokens before the next turn."""
        return list(
            self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, **self._how
            )
        )

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, control tokens among them."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def turn(self, a: int, b: int, form: str, chance: random.Random) -> list[int] | None:
        """Return a turn that calls `add` in a form, or None if the template has no such form."""
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": a, "b": b}}}
        message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
        if form == "thoughts":
            message |= {"reasoning_content": THOUGHT, "thinking": THOUGHT}
        told = {"role": "tool", "name": "add", "content": "?"}
        whole = self.render([USER, message, told])
        shown = self.dialogue.observation_ids([self.eos], [ToolResult("add", "?")])
        ids = whole[len(self.prompt) : len(whole) - len(shown)]
        text = self.tokenizer.decode(ids)
        if form == "thoughts" and THOUGHT not in text:
            ids = [*self.encode(f"<think>\n{THOUGHT}\n</think>\n\n"), *ids]
        elif form == "dense JSON":
            arguments = {"a": a, "b": b}
            spaced, dense = json.dumps(arguments), json.dumps(arguments, separators=(",", ":"))
            if spaced not in text:
                return None
            ids = self.encode(text.replace(spaced, dense))
        elif form == "white space":
            ids = [*self.encode("\n"), *ids]
        elif form == "other tokens":
            return self._split_token(ids, chance)
        return ids

    def _split_token(self, ids: list[int], chance: random.Random) -> list[int] | None:
        """Return other tokens of the same text: one of them is written as two."""
        places = [i for i, token in enumerate(ids) if len(self.tokenizer.decode([token])) > 2]
        chance.shuffle(places)
        for place in places:
            text = self.tokenizer.decode([ids[place]])
            parts = [self.encode(text[:1]), self.encode(text[1:])]
            changed = [*ids[:place], *parts[0], *parts[1], *ids[place + 1 :]]
            if changed != ids and self.tokenizer.decode(changed) == self.tokenizer.decode(ids):
                return changed
        return None

    def play(self, turns: Sequence[list[int]]) -> tuple[int, bool, int]:
        """Play a trajectory; return the tokens that rendering anew changes, and what the run counts.

        The second says whether it counts as changed, and the third how many calls were read.
        """
        policy = Script(turns)
        sampler = Trajectories(self.tools, self.dialogue).over(policy)  # type: ignore[arg-type]
        options = SamplingOptions(10_000, eos_token_ids=(self.eos,))
        [(_, found)] = sampler.sample([SampleRequest(tuple(self.prompt), 1)], options, 1)
        mask = found.completion_mask or (True,) * len(found.completion_ids)
        own = [i for i, mine in zip(found.completion_ids, mask, strict=True) if mine]
        played = [token for turn in turns[: len(policy.prompts)] for token in turn]
        assert own == played, "the masked ids aren't what was sampled"
        num_calls = sum(message["role"] == "tool" for message in found.messages)
        if num_calls == 0:
            return 0, False, 0
        context = list(policy.prompts[-1])
        try:
            naive = self.render([USER, *found.messages[:-1]])
        except TemplateError:
            naive = []
        changed = sum(
            max(end - start, other_end - other)
            for kind, start, end, other, other_end in SequenceMatcher(
                a=context, b=naive, autojunk=False
            ).get_opcodes()
            if kind != "equal"
        )
        return changed, found.num_rerendered_turns > 0, num_calls


def measure(family: Family, form: str) -> dict[str, float] | None:
    """Play the trajectories of a form."""
    changed, counted, tokens, sampled = 0, 0, 0, 0
    for number in range(COUNT):
        chance = random.Random(f"{form}/{number}")
        answer = [*family.encode("That is all."), family.eos]
        turns = [
            family.turn(chance.randint(10, 99), chance.randint(10, 99), form, chance)
            for _ in range(1 + number % 3)
        ]
        known = [turn for turn in turns if turn is not None]
        if len(known) < len(turns):
            return None
        by, is_counted, num_calls = family.play([*known, answer])
        if num_calls < len(turns):  # a call in this form isn't read as one
            return None
        changed += by > 0
        counted += is_counted
        tokens += by
        sampled += sum(map(len, known))
    return {"changed": changed, "counted": counted, "tokens": tokens, "sampled": sampled}


def main() -> None:
    """Play all forms in all families, and write the table."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    lines = [
        "# Exact tokens of trajectories",
        "",
        f"Chat templates of TRL {version('trl')}, the merges of SmolLM2-135M-Instruct's tokenizer after the "
        f"division into words of Llama's and Qwen's, with each template's control tokens; transformers {version('transformers')}; {platform.machine()}; seeds 0 to {COUNT - 1}; "
        f"{datetime.date.today().isoformat()}. Script: `benchmarks/tools_exactness.py`.",
        "",
        f"Each cell: of {COUNT} trajectories, those whose context before the last turn a loop would feed with other "
        "tokens if it parsed each turn and rendered the messages again; and how many tokens that changes, of all of "
        "theirs. In every one of the trajectories the masked ids equal what was sampled. –: the template has no such "
        "form, or calls in it aren't read as calls.",
        "",
        "| template | " + " | ".join(FORMS) + " |",
        "|---|" + "---|" * len(FORMS),
    ]
    missed = 0
    for name in FAMILIES:
        family = Family(name)
        cells = []
        for form in FORMS:
            found = measure(family, form)
            print(name, form, found, flush=True)
            if found is None:
                cells.append("–")
                continue
            missed += abs(int(found["changed"] - found["counted"]))
            cells.append(
                f"{found['changed']:.0f}, {found['tokens']:.0f} tokens" if found["changed"] else "0"
            )
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Forms: *as rendered*, as the template itself writes a call; *thoughts*, a thought before the call; *dense "
        "JSON*, arguments without spaces; *white space*, a line break before all else; *other tokens*, the same text "
        "with a token written as two. Where the prompt of a turn opens a thought (`nemotron_3_nano`, "
        "`qwen3_5_think`), a turn without one is rendered otherwise.",
        "",
        f"`tools/rerendered_frequency` judges a turn by itself, without the conversation before it. It differs from "
        f"this comparison in {missed} of the trajectories.",
    ]
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
