"""Try a trainer on data or settings, and say how it ended.

In: a method's name, a dataset, fields of its config. Out: an `Outcome`: a correct run, a clear error
before anything was sampled, or a fault. Everything is real but small: models of one layer, a round.
"""

import contextlib
import copy
import gc
import io
import linecache
import logging
import math
import re
import shutil
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from strategies import sound_rows
from tiny_models import CHAT_TEMPLATE, byte_tokenizer, tiny_model
from tiny_trainers import GRADED, QUIET, build_trainer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import trl_selfplay
from trl_selfplay import EmptyRoundError
from trl_selfplay.rollouts.prompts import load_prompt_rows
from trl_selfplay.rollouts.record import Rollout

_SMALL: dict[str, Any] = {
    "num_rounds": 1,
    "num_generations": 3,
    "temperature": 1.0,
    "max_completion_length": 6,
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    **QUIET,
    "bf16": False,
    "num_ahead_tokens": 2,
    "thought_length": 2,
}
_OF_SAMPLING = ("num_rounds", "num_generations", "temperature", "max_completion_length")
# With these, rows are trained on that `_check_rows` doesn't compute.
_OTHER_ROWS = {
    "packing", "history_rounds", "completion_only_loss", "loss_weighting", "improve_thresholds", "deduplicate",
    "max_length", "stop_strings", "eos_token", "chat_template_path", "generation_kwargs",
}  # fmt: skip
_PACKAGE = str(Path(trl_selfplay.__file__).parent)
# Types with which the package, or its parents, may say what is wrong.
_SPOKEN = (ValueError, TypeError, RuntimeError, OSError, ImportError, NotImplementedError)
_NEVER = (KeyError, IndexError, AttributeError, RecursionError, StopIteration, AssertionError,
          ZeroDivisionError, UnicodeError, OverflowError, MemoryError)  # fmt: skip


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a random model of one layer that ends a completion after a few tokens."""
    model = tiny_model(
        tokenizer, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    with torch.no_grad():
        # One dimension is the same for all tokens; the logit of EOS follows it.
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 1.2
    return model


def even_length(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Reward completions with an even number of characters."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(text) % 2 == 0) for text in texts]


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        kind: "run", "nothing" (a round that kept nothing, and said so), "ready" (it would have
            sampled), "clear" (an error in words of the package's or its parent's, before anything
            was sampled), or a fault: "late" (an error after sampling), "raw", "vague" (names
            nothing that was given), "wrong" (a run that did something else).
        text: The error, or what was wrong.
        place: Where it was raised.
    """

    kind: str
    text: str = ""
    place: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether it is none of the endings that a run may have."""
        return self.kind in ("late", "raw", "vague", "wrong")


class _Sampled(BaseException):
    """Sampling was about to begin."""


class Attempts:
    """Tries trainers, with one model and tokenizer for all of them.

    Every attempt gets a copy of the model and a folder of its own.
    """

    def __init__(self) -> None:
        self.tokenizer = byte_tokenizer(CHAT_TEMPLATE)
        self._template = self.tokenizer.chat_template
        self._pristine = build_model(self.tokenizer)
        self.model = self._pristine
        gc.collect()
        gc.freeze()  # a run collects garbage several times, past all that imports made

    def trainer(self, method: str, folder: Path, dataset: Any, **changes: Any) -> Any:
        """Build a trainer; keywords that are fields go to its config."""
        settings = dict(_SMALL)
        if method == "STaR":
            settings["rationalize"] = False
        if method == "V-STaR":
            settings = {k: v for k, v in settings.items() if k not in _OF_SAMPLING}
        if method in GRADED:
            changes.setdefault("reward_funcs", even_length)
        if method == "V-STaR" and "samples" not in changes:
            changes["samples"] = _samples_of(dataset)
        return build_trainer(
            method, self.model, folder, settings, train_dataset=dataset,
            processing_class=self.tokenizer, **changes,
        )  # fmt: skip

    def attempt(
        self, method: str, dataset: Any = None, *, names: Sequence[str] = (), whole: bool = False,
        **changes: Any,
    ) -> Outcome:  # fmt: skip
        """Build a trainer and train; without `whole` up to the first sample.

        Args:
            method: A key of `METHODS`.
            dataset: Its `train_dataset`.
            names: What an error has to name at least one of.
            whole: Train to the end, and check what was trained on.
            **changes: Fields of the config, and arguments of the trainer.
        """
        self._restore()
        whole = whole and changes.get("num_rounds") != 100  # one more of the same takes long
        folder = Path(tempfile.mkdtemp(prefix="bad-data-"))
        state = {"sampled": False}
        try:
            with _quiet() as said:
                try:
                    trainer = self.trainer(method, folder / "run", dataset, **changes)
                    self._watch(trainer, method, state, whole)
                    trainer.train()
                except _Sampled:
                    return Outcome("ready", said())
                if wrong := check_run(trainer, method, self.tokenizer):
                    return Outcome("wrong", wrong)
                return Outcome("run", said())
        except EmptyRoundError as error:
            return Outcome("nothing", str(error))
        except Exception as error:
            return judge(error, names, state["sampled"])
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _restore(self) -> None:
        """Undo what the last attempt did to model and tokenizer."""
        self.model = copy.deepcopy(self._pristine)
        self.tokenizer.chat_template = self._template
        self.tokenizer.padding_side = "left"

    def _watch(self, trainer: Any, method: str, state: dict[str, bool], whole: bool) -> None:
        def begin(*args: Any, **kwargs: Any) -> None:
            state["sampled"] = True
            if not whole:
                raise _Sampled

        if method in ("V-STaR", "Quiet-STaR"):  # sample nothing: what counts is the first step
            trainer.add_callback(_OnStep(begin))
            return
        sampler = trainer.self_play.collector.sampler
        sample = sampler.sample

        def sample_watched(*args: Any, **kwargs: Any) -> Iterator[Any]:
            begin()
            return sample(*args, **kwargs)

        sampler.sample = sample_watched


class _OnStep(TrainerCallback):
    def __init__(self, begin: Callable[..., None]) -> None:
        self.begin = begin

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.begin()


def _samples_of(dataset: Any) -> list[Rollout]:
    """Return a right and a wrong sample of each prompt of a dataset, if it can be read."""
    try:
        rows = load_prompt_rows(dataset, "train_dataset")
    except Exception:
        rows = load_prompt_rows(Dataset.from_list(sound_rows(2, chat=False)), "train_dataset")
    return [
        Rollout(
            round_index=0, phase="train", prompt_id=row.prompt_id, sample_index=i, prompt_ids=(5, 6),
            completion_ids=(7 + i, 1), prompt="Q", completion="ab"[i], finish="eos",
            reward=float(i), rewards=(float(i),),
        )
        for row in rows[:20] for i in (0, 1)
    ]  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[Callable[[], str]]:
    """Keep what is logged, warned and printed; the context's value returns it."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    root = logging.getLogger()
    ours = logging.getLogger("trl_selfplay")
    level = ours.level
    root.addHandler(handler)
    ours.setLevel(logging.WARNING)
    theirs = logging.getLogger("transformers")
    theirs.addHandler(handler)
    try:
        with (
            contextlib.redirect_stdout(log), contextlib.redirect_stderr(log),
            warnings.catch_warnings(),
        ):  # fmt: skip
            warnings.simplefilter("ignore")
            yield log.getvalue
    finally:
        root.removeHandler(handler)
        theirs.removeHandler(handler)
        ours.setLevel(level)


def judge(error: BaseException, names: Sequence[str], sampled: bool) -> Outcome:
    """Say what kind of error this is."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    ours = [f for f in frames if f.filename.startswith(_PACKAGE)]
    nearest = ours[-1] if ours else last
    place = f"{Path(nearest.filename).name}:{nearest.lineno}"
    if nearest is not last:
        place += f" -> {Path(last.filename).name}:{last.lineno}"
    text = f"{type(error).__name__}: {error}"
    if sampled:
        return Outcome("late", text, place)
    said = linecache.getline(last.filename, last.lineno or 0).strip().startswith("raise")
    if isinstance(error, _NEVER) or not isinstance(error, _SPOKEN) or not said:
        return Outcome("raw", text, place)
    said_in = "\n".join([str(error), *getattr(error, "__notes__", ())])
    if names and not any(re.search(rf"(?<!\w){re.escape(n)}(?!\w)", said_in) for n in names):
        return Outcome("vague", text, place)
    return Outcome("clear", text, place)


# --- what a run did ------------------------------------------------------------------------------


def check_run(trainer: Any, method: str, tokenizer: Any) -> str:
    """Return what the last round of a finished run did wrong, or "".

    What was kept is computed anew from the samples on disk, and what was trained on compared with
    their tokens and with the prompts as the tokenizer renders them.
    """
    if method == "Quiet-STaR":
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return "" if all(map(math.isfinite, losses)) else f"losses {losses}"
    if method == "V-STaR":
        return ""
    trained = trainer.train_dataset.to_list()
    folder = trainer.run.folder(len(trainer.run.lines) - 1)
    prompts = {row.prompt_id: _prompt_ids(row, tokenizer) for row in trainer.self_play.rows}
    samples = [
        sample
        for path in sorted((folder / "samples").glob("0*.parquet"))
        for sample in pq.read_table(path).to_pylist()
    ]
    for sample in samples:
        if sample["prompt_ids"] != prompts[sample["prompt_id"]]:
            return f"sampled from {sample['prompt_ids']}, not {prompts[sample['prompt_id']]}"
    finished = [s for s in samples if s["finish"] != "length"]
    if method in ("STaR", "ReST^EM"):
        return _check_rows(trained, trainer.args, finished, prompts)
    return _check_pairs(trained, trainer, finished, prompts)


def _prompt_ids(row: Any, tokenizer: Any) -> list[int]:
    if isinstance(row.prompt, str):
        return list(tokenizer(row.prompt)["input_ids"])
    continues = row.prompt[-1]["role"] == "assistant"
    return list(
        tokenizer.apply_chat_template(
            row.prompt, tokenize=True, return_dict=False, add_generation_prompt=not continues,
            continue_final_message=continues,
        )
    )  # fmt: skip


def _check_rows(
    trained: list[dict[str, Any]], args: Any, finished: Sequence[Mapping[str, Any]], prompts: Any
) -> str:
    if any(
        getattr(args, n) != f.default
        for n, f in args.__dataclass_fields__.items()
        if n in _OTHER_ROWS
    ):
        return ""
    right = [
        s for s in finished if s["reward"] is not None and s["reward"] >= args.reward_threshold
    ]
    forms: dict[Any, set[Any]] = {}  # several rows may have the same prompt
    for s in right:
        prompt, completion = prompts[s["prompt_id"]], s["completion_ids"]
        key = (*prompt, *completion), (*[-100] * len(prompt), *completion)
        forms.setdefault(key, set()).add(_form(s))
    kept: Counter[str] = Counter()
    for row in trained:
        left = forms.get((tuple(row["input_ids"]), tuple(row["labels"])))
        if not left:
            return f"trained on {row}, which is no right sample, or was trained on before"
        kept[left.pop()[0]] += 1
    of_prompts: dict[str, set[Any]] = {}
    for s in right:
        of_prompts.setdefault(s["prompt_id"], set()).add(_form(s))
    most = args.max_per_prompt or math.inf
    expected = {p: min(len(forms), most) for p, forms in of_prompts.items()}
    return "" if kept == expected else f"kept {kept} per prompt, not {expected}"


def _form(sample: Mapping[str, Any]) -> tuple[str, str]:
    return sample["prompt_id"], " ".join(sample["completion"].lower().split())


def _check_pairs(
    trained: list[dict[str, Any]], trainer: Any, finished: Sequence[Mapping[str, Any]], prompts: Any
) -> str:
    threshold = getattr(trainer.args, "reward_threshold", None)
    sides: dict[bool, set[Any]] = {True: set(), False: set()}
    for s in finished:
        if threshold is None or s["reward"] is not None:
            is_right = threshold is not None and s["reward"] >= threshold
            sides[is_right].add((s["prompt_id"], tuple(s["completion_ids"])))
    if threshold is None:
        sides[True] = {(i, t.chosen_ids) for i, t in trainer.chosen.items()}
    if trainer.args.stop_strings or trainer.args.generation_kwargs:  # EOS is added, or another ends
        return ""
    for row in trained:
        name = row["prompt_id"]
        if list(row["prompt_ids"]) != prompts[name]:
            return f"a pair's prompt is {row['prompt_ids']}, not {prompts[name]}"
        for side, column in ((True, "chosen_ids"), (False, "rejected_ids")):
            if (name, tuple(row[column])) not in sides[side]:
                return f"{column} {row[column]} of {name} is none of its samples"
    return ""
