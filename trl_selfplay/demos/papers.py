"""The experiments of the papers, as `--preset` of the recipes: settings, dataset, prompts, rewards.

In: rows of a public dataset, as published. Out: rows with the columns that the trainers read, and the
flags that a preset sets in place of the demo's. Flags and YAML files override them. The papers'
models and datasets are on the Hugging Face Hub; a folder with the same columns, given as
`--dataset_name`, is prepared in the same way.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import Dataset, DatasetDict

from trl_selfplay.trainers.irpo.config import IRPOConfig
from trl_selfplay.trainers.quiet_star.config import QuietSTaRConfig
from trl_selfplay.trainers.rest_em.config import ReSTEMConfig
from trl_selfplay.trainers.spin.config import SPINConfig
from trl_selfplay.trainers.star.config import STaRConfig

Row = Mapping[str, Any]


# --- rows ----------------------------------------------------------------------------------------


def question_row(row: Row) -> dict[str, Any]:
    r"""Return a row of GSM8K: the number after "####" is the solution, the worked answer a completion.

    >>> question_row({"question": "2 + 2?", "answer": "2+2=<<2+2=4>>4\n#### 4"})["solution"]
    '4'
    """
    solution = row["answer"].rsplit("####", 1)[-1].strip().replace(",", "")
    return {
        "prompt": row["question"].strip(),
        "completion": row["answer"].strip(),
        "solution": solution,
    }


def choice_row(row: Row) -> dict[str, Any]:
    r"""Return a row of CommonsenseQA or ARC: lettered choices, and the right letter in parentheses.

    Where the choices are numbered, as in some questions of ARC, they get letters.

    >>> choices = {"label": ["A", "B"], "text": ["bank", "library"]}
    >>> row = choice_row({"question": "Where are books?", "choices": choices, "answerKey": "B"})
    >>> row["prompt"], row["solution"]
    ('Where are books?\nAnswer choices:\n(a) bank\n(b) library', '(b)')
    """
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    letters = "abcdefghij"[: len(labels)]
    shown = "".join(f"\n({letter}) {text}" for letter, text in zip(letters, texts, strict=True))
    return {
        "prompt": f"{row['question'].strip()}\nAnswer choices:{shown}",
        "solution": f"({letters[labels.index(row['answerKey'])]})",
    }


def problem_row(row: Row) -> dict[str, Any]:
    r"""Return a row of MATH: its worked solution is the solution, whose last \boxed{} is graded."""
    return {
        "prompt": row["problem"].strip(),
        "completion": row["solution"].strip(),
        "solution": row["solution"],
    }


def program_row(row: Row) -> dict[str, Any]:
    """Return a row of APPS: the statement, and pairs of input and output as tests."""
    return {
        "prompt": f"{row['question'].strip()}\n\nWrite a Python program.\n{row['starter_code']}",
        "tests": row["input_output"],
    }


def translation_row(row: Row) -> dict[str, Any]:
    """Return a row of IWSLT 2014, German to English."""
    pair = row["translation"]
    return {
        "prompt": f"Translate to English.\nGerman: {pair['de']}",
        "completion": pair["en"],
        "solution": pair["en"],
    }


def first_turn_row(row: Row) -> dict[str, Any]:
    """Return a row of UltraChat: the first user turn and its answer, as the paper uses them."""
    return {"messages": row["messages"][:2]}


def text_row(row: Row) -> dict[str, Any]:
    """Return a row of OpenWebMath: its text."""
    return {"text": row["text"]}


def lookup_row(row: Row) -> dict[str, Any]:
    """Return a row of HotpotQA: question and answer, without the texts that hold it."""
    return {"prompt": row["question"].strip(), "solution": row["answer"]}


def addition_row(a: int, b: int) -> dict[str, Any]:
    r"""Return a sum with its scratchpad as the completion, in the paper's form but for the last line.

    >>> print(addition_row(24, 59)["completion"])
    <scratch>
    2 4 + 5 9 , C: 0
    2 + 5 , 3 C: 1
    , 8 3 C: 0
    0 8 3
    </scratch>
    Answer: 8 3
    """
    row = _sum_row(a, b)
    lines, carry, digits = [f"{row['prompt'].splitlines()[1]} , C: 0"], 0, ""
    for position in range(-1, -len(str(a)) - 1, -1):
        total = int(str(a)[position]) + int(str(b)[position]) + carry
        carry, digits = total // 10, f"{total % 10} {digits}".strip()
        left = (
            f"{str(a)[position - 1]} + {str(b)[position - 1]} " if -position < len(str(a)) else ""
        )
        lines.append(f"{left}, {digits} C: {carry}")
    end = [f"{carry} {digits}", "</scratch>", f"Answer: {row['solution']}"]
    return {**row, "completion": "\n".join(["<scratch>", *lines, *end])}


def _sum_row(a: int, b: int) -> dict[str, str]:
    x, y, answer = (" ".join(str(number)) for number in (a, b, a + b))
    return {"prompt": f"Input:\n{x} + {y}\nTarget:\n", "solution": answer}


def addition_rows(num_train: int = 50_000, num_test: int = 1_000, seed: int = 0) -> DatasetDict:
    """Return different sums of two numbers with as many digits, 1 to 5, without scratchpads.

    There are only a hundred sums of one digit, so fewer than a fifth of the rows have one.
    """
    rng = random.Random(seed)
    sums: dict[tuple[int, int], None] = {}
    while len(sums) < num_train + num_test:
        digits = rng.randint(1, 5)
        first = 0 if digits == 1 else 10 ** (digits - 1)
        sums[rng.randint(first, 10**digits - 1), rng.randint(first, 10**digits - 1)] = None
    rows = [_sum_row(a, b) for a, b in sums]
    return DatasetDict(
        train=Dataset.from_list(rows[num_test:]), test=Dataset.from_list(rows[:num_test])
    )


# --- worked examples, shown before each prompt ---------------------------------------------------


def _choice_example(
    question: str, texts: Sequence[str], rationale: str, right: str
) -> dict[str, Any]:
    choices = {"label": list("ABCDE")[: len(texts)], "text": list(texts)}
    row = choice_row({"question": question, "choices": choices, "answerKey": right})
    return {**row, "completion": f"{rationale} So the answer is {row['solution']}."}


_CHOICE_EXAMPLES = (
    _choice_example(
        "Where would a family keep milk so that it stays fresh?",
        ("garage", "refrigerator", "bookshelf", "mailbox", "garden"),
        "Milk stays fresh if it is cold. Of these places only a refrigerator is cold all year.",
        "B",
    ),
    _choice_example(
        "What does a person who has not slept for two days most want?",
        ("exercise", "argue", "travel", "rest", "sing"),
        "Someone who has not slept for two days is tired. A tired person wants to rest.",
        "D",
    ),
    _choice_example(
        "Sam left the tap of the bathtub open and went out. What did he find when he came back?",
        ("flooded floor", "dry towel", "new tap", "clean window", "warm bed"),
        "Water runs while a tap is open. A full bathtub overflows, and the water covers the floor.",
        "A",
    ),
    _choice_example(
        "What do people use to see small stars at night?",
        ("microscope", "mirror", "telescope", "lamp", "umbrella"),
        "Stars are far away. A telescope makes far things look larger.",
        "C",
    ),
)
_QUESTION_EXAMPLES = tuple(
    question_row({"question": question, "answer": answer})
    for question, answer in (
        (
            "A box holds 6 eggs. Mia buys 4 boxes and breaks 3 eggs on the way home. How many whole "
            "eggs does she have?",
            "Mia buys 4*6=<<4*6=24>>24 eggs. After breaking 3 she has 24-3=<<24-3=21>>21 whole "
            "eggs.\n#### 21",
        ),
        (
            "A train ticket costs $12, and children pay half. How much do 2 adults and 3 children pay?",
            "A child pays 12/2=$<<12/2=6>>6. The adults pay 2*12=$<<2*12=24>>24 and the children "
            "3*6=$<<3*6=18>>18. Together they pay 24+18=$<<24+18=42>>42.\n#### 42",
        ),
        (
            "Leo reads 15 pages on Monday and twice as many on Tuesday. His book has 80 pages. How "
            "many are left?",
            "On Tuesday he reads 2*15=<<2*15=30>>30 pages. He has read 15+30=<<15+30=45>>45 pages, "
            "so 80-45=<<80-45=35>>35 are left.\n#### 35",
        ),
    )
)
_PROBLEM_EXAMPLES = tuple(
    problem_row({"problem": problem, "solution": solution})
    for problem, solution in (
        (
            "What is the remainder when $7^3$ is divided by $5$?",
            "We have $7^3 = 343 = 5 \\cdot 68 + 3$, so the remainder is $\\boxed{3}$.",
        ),
        (
            "If $3x - 4 = 2x + 7$, what is $x$?",
            "Subtracting $2x$ and adding $4$ on both sides gives $x = \\boxed{11}$.",
        ),
    )
)
_ADDITION_EXAMPLES = tuple(
    addition_row(a, b)
    for a, b in (
        *((3, 5), (9, 4), (17, 32), (58, 67), (624, 259)),
        *((805, 391), (4027, 1965), (7386, 8954), (31204, 25617), (90475, 48638)),
    )
)


# --- the presets ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Preset:
    """One experiment of a paper.

    Attributes:
        settings: `f(**overrides)` returns the trainer's fields by name, as its `from_paper` sets them.
        model: Hub id of the paper's model; None if it is not public.
        dataset_name: Hub id of its dataset; None if `rows` builds it.
        to_row: Turns a row of the dataset into one that the trainer reads.
        differs: What the paper does otherwise, apart from `settings`.
        dataset_config, dataset_revision, train_split, test_split: Of the dataset on the Hub.
        flags: Further flags of the recipe.
        template: Text around a prompt that isn't chat.
        few_shot: Worked examples before each prompt.
        with_gold: Whether the dataset's completions are trained on too.
        rows: Builds the dataset.
    """

    settings: Callable[..., dict[str, Any]]
    model: str | None
    dataset_name: str | None
    to_row: Callable[[Row], dict[str, Any]] | None
    differs: str
    dataset_config: str | None = None
    dataset_revision: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    flags: Mapping[str, Any] = field(default_factory=dict)
    template: str = "{}"
    few_shot: tuple[dict[str, Any], ...] = ()
    with_gold: bool = False
    rows: Callable[[], DatasetDict] | None = None

    def defaults(self, overrides: Mapping[str, Any], dataset_name: str | None) -> dict[str, Any]:
        """Return the flags that the preset sets.

        Args:
            overrides: The trainer's fields that are set otherwise; others follow from some of them.
            dataset_name: The dataset that was named in place of the paper's, if any.
        """
        names = {
            "dataset_name": dataset_name or self.dataset_name,
            "dataset_config": None if dataset_name else self.dataset_config,
            "dataset_train_split": self.train_split,
            "dataset_test_split": self.test_split,
            "model_name_or_path": self.model,
        }
        return {**names, **self.flags, **self.settings(**overrides)}

    def revision_of(self, dataset_name: str) -> str | None:
        """Return the revision to load: the paper's dataset may have one, another has none."""
        return self.dataset_revision if dataset_name == self.dataset_name else None

    def convert(self, dataset: Dataset, chat: bool = False) -> Dataset:
        """Return a split of the dataset with the columns that the trainer reads, and no others.

        Raises:
            ValueError: A column that the dataset on the Hub has is missing.
        """
        if self.to_row is None and not chat:
            return dataset
        to_row = self.to_row or dict
        try:
            return dataset.map(
                lambda row: self._framed(to_row(row), chat), remove_columns=dataset.column_names
            )
        except KeyError as error:
            raise ValueError(
                f"the preset reads {self.dataset_name} or a dataset with the same columns, and this "
                f"one has no column {error} among {dataset.column_names}."
            ) from error

    def _framed(self, row: Row, chat: bool) -> dict[str, Any]:
        """Return a row as chat, or as text in the template."""
        if "prompt" not in row:
            return dict(row)
        completion = row.get("completion")
        if chat:
            framed: dict[str, Any] = {"prompt": [{"role": "user", "content": row["prompt"]}]}
            if completion is not None:
                framed["completion"] = [{"role": "assistant", "content": completion}]
        else:
            framed = {"prompt": self.template.format(row["prompt"])}
            if completion is not None:
                framed["completion"] = " " * framed["prompt"].endswith(":") + completion
        return {**row, **framed}

    def as_arguments(self, train: Dataset, test: Dataset | None, chat: bool) -> dict[str, Any]:
        """Return the trainer's arguments that hold data."""
        rows = self.convert(train, chat)
        sets: dict[str, Any] = {"train_dataset": rows}
        sets["eval_dataset"] = None if test is None else self.convert(test, chat)
        if self.few_shot:
            sets["few_shot_examples"] = [self._framed(row, chat) for row in self.few_shot]
        if self.with_gold:
            sets["gold_dataset"] = rows
        return sets


def describe(name: str, preset: Preset, training_args: Any) -> str:
    """Return what a run takes from the paper, what its flags changed, and what else differs."""
    paper = preset.settings()
    values = {field: getattr(training_args, field) for field in paper}
    same = ", ".join(f"{n}={_short(v)}" for n, v in values.items() if v == paper[n])
    other = ", ".join(
        f"{n}={_short(v)} (paper: {_short(paper[n])})" for n, v in values.items() if v != paper[n]
    )
    lines = [f"Preset {name}, from the paper: {same or 'nothing'}."]
    lines += [f"Set otherwise: {other}."] if other else []
    return "\n".join([*lines, f"The paper differs from this recipe: {preset.differs}"])


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 6:
        return f"[{', '.join(map(str, value[:3]))}, … {value[-1]}]"
    return str(getattr(value, "value", value))  # a schedule's name, not its enum


_GPT_J = "EleutherAI/gpt-j-6b"
_QUESTION = "Q: {}\nA:"
_END_OF_EXAMPLE = {"stop_strings": ["\n\n"]}
_STAR = (
    "It appends EOS also to truncated completions, packs sequences of 1,536 tokens in its code, and "
    "takes Adam's state from pre-training. The worked examples are this package's own."
)
STAR: dict[str, Preset] = {
    "addition": Preset(
        partial(STaRConfig.paper_settings, "addition"), _GPT_J, None, None,
        "the answer is the last line, here after 'Answer:'. " + _STAR,
        flags={"reward_funcs": ["exact_reward"], "max_completion_length": 160, **_END_OF_EXAMPLE},
        few_shot=_ADDITION_EXAMPLES, rows=addition_rows,
    ),
    "commonsense_qa": Preset(
        partial(STaRConfig.paper_settings, "commonsense_qa"), _GPT_J, "tau/commonsense_qa", choice_row,
        "it shows the worked examples in training prompts, which raised accuracy from 69.9 to 72.5 "
        "% (here: --few_shot_in_training), and reports the best round on the set that chose it. "
        + _STAR,
        test_split="validation",
        flags={"reward_funcs": ["choice_reward"], "max_completion_length": 96, **_END_OF_EXAMPLE},
        template=_QUESTION, few_shot=_CHOICE_EXAMPLES,
    ),
    "gsm8k": Preset(
        partial(STaRConfig.paper_settings, "gsm8k"), _GPT_J, "openai/gsm8k", question_row,
        "its code shows the whole human solution as the hint, here only the answer. "
        + _STAR,
        dataset_config="main",
        flags={"reward_funcs": ["exact_reward"], "max_completion_length": 256, **_END_OF_EXAMPLE},
        template=_QUESTION, few_shot=_QUESTION_EXAMPLES,
    ),
}  # fmt: skip
_PROBLEM = "Problem:\n{}\n\nSolution:"
_MATH = "DigitalLearningGmbH/MATH-lighteval"
REST_EM: dict[str, Preset] = {
    "math": Preset(
        partial(ReSTEMConfig.paper_settings, "math"), None, _MATH, problem_row,
        "it trains PaLM 2, and reports neither learning rate, batch nor epochs. The worked examples "
        "are this package's own.",
        flags={"reward_funcs": ["math_reward"], "max_completion_length": 512},
        template=_PROBLEM, few_shot=_PROBLEM_EXAMPLES,
    ),
    "apps": Preset(
        partial(ReSTEMConfig.paper_settings, "apps"), None, "codeparrot/apps", program_row,
        "it trains PaLM 2 on the 2,342 introductory problems with worked examples before each, and "
        "reports neither learning rate, batch nor epochs. This trains on all problems, without "
        "examples.",
        dataset_config="all", dataset_revision="refs/convert/parquet",
        flags={"reward_funcs": ["code_reward"], "max_completion_length": 512},
    ),
    "v_star": Preset(
        partial(ReSTEMConfig.paper_settings, "v_star"), "meta-llama/Llama-2-7b-hf", "openai/gsm8k",
        question_row, "it trains with LoRA and begins with a model fine-tuned on the human answers "
        "(here: --warm_up_on_gold). It does not report the learning rate.",
        dataset_config="main", template=_QUESTION, with_gold=True,
        flags={"reward_funcs": ["exact_reward"], "max_completion_length": 256},
    ),
}  # fmt: skip
REST_REACT: dict[str, Preset] = {
    "hotpot_qa": Preset(
        lambda **overrides: {
            "num_rounds": 2, "num_generations": 1, "temperature": 0.5, "top_k": 0, "few_shot_rounds": 1,
            "few_shot_in_training": False, **overrides,
        },
        None, "hotpotqa/hotpot_qa", lookup_row,
        "it trains PaLM 2 on 2,000 questions, a quarter of them from HotpotQA and the others from Eli5, "
        "with four trajectories per question in the second round (here one in each: "
        "--num_generations); an instructed PaLM 2 ranks the samples of each step (here: --reward_funcs; "
        "without, the most probable one is the target); steps, learning rate and batch aren't all "
        "reported. The worked examples are this package's own.",
        dataset_config="distractor", train_split="train[:2000]", test_split="validation[:125]",
        flags={"agent": True, "eval_reward_funcs": ["exact_reward"], "max_completion_length": 256},
    ),
}  # fmt: skip
REST: dict[str, Preset] = {
    "iwslt": Preset(
        partial(ReSTEMConfig.paper_settings, "rest"), None, "bbaaaa/iwslt14-de-en", translation_row,
        "its model is an encoder-decoder trained on the data, its reward a closed metric in 0..1: "
        "name one of yours with --reward_funcs. Each Improve step of the paper stops at the best "
        "held-out reward.",
        dataset_config="de-en", dataset_revision="refs/convert/parquet", test_split="validation",
        template="{}\nEnglish:", with_gold=True,
    ),
}  # fmt: skip
RFT: dict[str, Preset] = {
    "gsm8k": Preset(
        partial(ReSTEMConfig.paper_settings, "rft"), "meta-llama/Llama-2-7b-hf", "openai/gsm8k",
        question_row, "its prompts have the template of Alpaca, and of two paths with the same "
        "equations it keeps the one that differs most from the others kept.",
        dataset_config="main", template=_QUESTION, with_gold=True,
        flags={"reward_funcs": ["exact_reward", "equations_reward"]},
    ),
}  # fmt: skip
_LLAMA_CHAT = "meta-llama/Llama-2-70b-chat-hf"
_IRPO = (
    "its prompts ask for steps and a final answer in words of their own, and each round keeps its "
    "best checkpoint on held-out prompts (here: --eval_strategy steps --load_best_model_at_end)."
)
IRPO: dict[str, Preset] = {
    "gsm8k": Preset(
        partial(IRPOConfig.paper_settings, "gsm8k"), _LLAMA_CHAT, "openai/gsm8k", question_row, _IRPO,
        dataset_config="main", with_gold=True,
        flags={"reward_funcs": ["exact_reward"], "max_completion_length": 512, "chat": True},
    ),
    "arc": Preset(
        partial(IRPOConfig.paper_settings, "arc"), _LLAMA_CHAT, "allenai/ai2_arc", choice_row, _IRPO,
        dataset_config="ARC-Challenge",
        flags={"reward_funcs": ["choice_reward"], "max_completion_length": 512, "chat": True},
    ),
    "math": Preset(
        partial(IRPOConfig.paper_settings, "math"), _LLAMA_CHAT, _MATH, problem_row, _IRPO,
        flags={"reward_funcs": ["math_reward"], "max_completion_length": 512, "chat": True},
    ),
}  # fmt: skip
SPIN: dict[str, Preset] = {
    "ultrachat": Preset(
        SPINConfig.paper_settings, "alignment-handbook/zephyr-7b-sft-full",
        "HuggingFaceH4/ultrachat_200k", first_turn_row,
        "it draws 50,000 conversations at random, here the first ones. `SPINConfig.from_paper` "
        "names what the official code does otherwise.",
        train_split="train_sft[:50000]", test_split="test_sft[:500]",
    ),
}  # fmt: skip
QUIET_STAR: dict[str, Preset] = {
    "openwebmath": Preset(
        QuietSTaRConfig.paper_settings, "mistralai/Mistral-7B-v0.1", "open-web-math/open-web-math",
        text_row, "`QuietSTaRConfig.from_paper` names what the official code does otherwise.",
        train_split="train[:1000]", test_split="train[1000:1100]",
    ),
}  # fmt: skip
V_STAR: dict[str, Preset] = {
    "gsm8k": Preset(
        lambda **overrides: {"max_steps": 2000, **overrides}, None, "openai/gsm8k", question_row,
        "it reports the number of steps, and neither learning rate, beta nor pairs per prompt.",
        dataset_config="main", template=_QUESTION,
    ),
}  # fmt: skip
