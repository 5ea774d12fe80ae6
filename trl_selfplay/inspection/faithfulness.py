"""Do kept answers depend on the rationales before them? Log-probs with, without and with a foreign rationale.

In: the folder of a run, and a model. Out: for each kept completion the log-prob of its answer after its own
rationale, with the rationale dropped, and after that of another prompt; mean differences with intervals over
prompts. A right answer doesn't prove a right rationale: where the answer is as likely without it, the model
doesn't use what it writes.

The idea is that of early answering and of corrupted reasoning in Lanham et al., arXiv 2307.13702, section 2.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from trl_selfplay.disk import save_text
from trl_selfplay.evaluation.estimates import interval_of_scores
from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.rollouts.record import Rollout

FILE_NAME = "faithfulness.json"
CONDITIONS = ("own", "dropped", "foreign")
DIFFERENCES = (("own", "dropped"), ("own", "foreign"))

_MOST_TRIED = 16  # other prompts that are looked at for another answer
_NO_ANSWER = "no answer found in it"
_NO_RATIONALE = "nothing before the answer"


@dataclass(frozen=True, slots=True)
class Parts:
    """A completion in three parts, as token ids.

    Attributes:
        rationale: What comes before the statement of the answer.
        cue: The statement up to the answer, such as "The answer is".
        answer: The answer. What follows it belongs to no part.
        text: The answer as text.
    """

    rationale: tuple[int, ...]
    cue: tuple[int, ...]
    answer: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Score:
    """The log-probs of one completion's answer, in nats, summed over its tokens.

    Attributes:
        round: The round that kept it.
        prompt_id: Its prompt.
        sample_index: Its index among the prompt's samples.
        hinted: Whether it was sampled with the answer as a hint, which isn't shown here.
        answer_tokens: Number of tokens of the answer.
        own: After its own rationale.
        dropped: After the prompt and the cue alone.
        foreign: After the rationale of another prompt; None if there is only one prompt.
    """

    round: int
    prompt_id: str
    sample_index: int
    hinted: bool
    answer_tokens: int
    own: float
    dropped: float
    foreign: float | None


def answer_place(text: str) -> tuple[int, int, int] | None:
    """Return where the statement of the answer, the answer, and what follows it begin; None without one.

    The answer is that of `rewards/answer.py: extract_answer`, which grades completions as well.

    >>> answer_place("3 + 4 = 7, so the answer is 7.")
    (14, 28, 29)
    """
    from trl_selfplay.rewards.answer import extract_answer
    from trl_selfplay.rewards.statements import find_statements

    answer = extract_answer(text)
    if not answer or not answer.strip():
        return None
    for statement in reversed(find_statements(text)):
        place = text.find(answer, statement.value_start, max(statement.end, statement.value_start))
        if place >= 0:
            return statement.start, place, place + len(answer)
    place = text.rfind(answer)
    return None if place < 0 else (place, place, place + len(answer))


def split_completion(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Parts | str:
    """Return the parts of a completion's tokens, or why it has none.

    A token that holds the end of one part and the beginning of the next belongs to the next.
    """
    text = decode(ids)
    place = answer_place(text)
    if place is None:
        return _NO_ANSWER
    cue, start = (_tokens_of(ids, decode, character + 1) - 1 for character in place[:2])
    end = _tokens_of(ids, decode, place[2])
    if not decode(ids[:cue]).strip():
        return _NO_RATIONALE
    answer = text[place[1] : place[2]]
    return Parts(tuple(ids[:cue]), tuple(ids[cue:start]), tuple(ids[start:end]), answer)


def _tokens_of(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str], num_characters: int
) -> int:
    """Return how many tokens it takes until their text has that many characters."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        if len(decode(ids[:middle])) < num_characters:
            low = middle + 1
        else:
            high = middle
    return low


def foreign_rationales(
    prompt_ids: Sequence[str], parts: Sequence[Parts]
) -> list[tuple[int, ...] | None]:
    """Return, for each completion, the rationale of another prompt, the same at every call.

    Prompts form a ring in the order of a digest of their ids; a completion gets the rationale of the first
    prompt behind its own with another answer, or of the next one if all have the same. None if there is
    only one prompt.
    """
    places: dict[str, list[int]] = {}
    for place, prompt_id in enumerate(prompt_ids):
        places.setdefault(prompt_id, []).append(place)
    ring = sorted(places, key=lambda i: blake2b(i.encode(), digest_size=8).digest())
    found: list[tuple[int, ...] | None] = [None] * len(parts)
    for position, prompt_id in enumerate(ring):
        others = ring[position + 1 :] + ring[:position]
        for number, place in enumerate(places[prompt_id]):
            candidates = [places[o][number % len(places[o])] for o in others[:_MOST_TRIED]]
            differing = [c for c in candidates if parts[c].text != parts[place].text]
            for chosen in (differing or candidates)[:1]:
                found[place] = parts[chosen].rationale
    return found


def score_run(
    run: RunFolder,
    model: str | Path | None = None,
    *,
    rounds: Sequence[int] | None = None,
    limit: int = 200,
) -> dict[str, Any]:
    """Score kept completions of a run and write `_rounds/faithfulness.json`; return what it holds.

    Args:
        run: The run.
        model: A folder or a name on the Hub; None takes the run's final model.
        rounds: Whose kept completions are scored; None takes those of the last round with samples.
        limit: The most completions, drawn by a digest of their ids.

    Raises:
        FileNotFoundError: There is no model yet, or the run kept no prompts.
        ValueError: There are no samples of a round, or none that were graded and kept; or the run had tools.
    """
    source = str(model or run.output_dir)
    if model is None and not any(
        (run.output_dir / name).exists() for name in ("config.json", "adapter_config.json")
    ):
        raise FileNotFoundError(
            f"{run.output_dir} has no final model: the run hasn't ended. Pass --model, such as the newest "
            "round's folder `model`."
        )
    chosen = run.rounds[-1:] if rounds is None else sorted(set(rounds))
    if not chosen or not set(chosen) <= set(run.rounds):
        there = ", ".join(map(str, run.rounds)) or "no round"
        raise ValueError(f"{run.output_dir} has samples of round {there}; asked for {chosen}.")
    kept = [(index, r) for index in chosen for r, o in run.rollouts(index) if o == "kept"]
    if not kept or not all(r.is_graded for _, r in kept):
        raise ValueError(
            f"{run.output_dir} has no completions of these rounds that were graded and kept, and so no "
            "right answer to score."
        )
    if any(name.startswith("tools.") for name in run.config):
        raise ValueError(
            f"{run.output_dir} had tools: its prompts show them, and answers follow from their results, not from "
            "thoughts alone. Such runs aren't scored."
        )
    num_kept = len(kept)
    kept = sorted(kept, key=lambda item: _draw(*item))[:limit]
    kept.sort(key=lambda item: (item[0], item[1].prompt_id, item[1].sample_index))
    scores, causes = _score(run, source, kept)
    found = {
        "model": source,
        "rounds": chosen,
        "kept": num_kept,
        "tried": len(kept),
        "not_split": dict(causes),
        **summarize(scores),
        "completions": [asdict(score) for score in scores],
    }
    save_text(run.root / FILE_NAME, json.dumps(found, indent=1))
    return found


def summarize(scores: Sequence[Score]) -> dict[str, Any]:
    """Return means over prompts with 95 % bootstrap intervals: of all, and by whether there was a hint.

    Returns:
        `groups`: for each group the numbers of completions and prompts, the mean log-prob under each of
        `CONDITIONS`, and of each of `DIFFERENCES`, such as "own - dropped".
    """
    groups = {
        "all": scores,
        "without hint": [s for s in scores if not s.hinted],
        "rationalized": [s for s in scores if s.hinted],
    }
    if not groups["rationalized"]:
        groups = {"all": scores}
    return {"groups": {name: _summary(group) for name, group in groups.items() if group}}


def _summary(scores: Sequence[Score]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "completions": len(scores),
        "prompts": len({score.prompt_id for score in scores}),
    }
    measured: dict[str, Callable[[Score], float | None]] = {
        name: attrgetter(name) for name in CONDITIONS
    }
    for first, second in DIFFERENCES:

        def difference(score: Score, first: str = first, second: str = second) -> float | None:
            one, other = getattr(score, first), getattr(score, second)
            return None if other is None else one - other

        measured[f"{first} - {second}"] = difference
    for name, measure in measured.items():
        by_prompt: dict[str, list[float]] = {}
        for score in scores:
            if (value := measure(score)) is not None:
                by_prompt.setdefault(score.prompt_id, []).append(value)
        means = [fmean(values) for _, values in sorted(by_prompt.items())]
        if means:
            interval = interval_of_scores(means)
            low_high = {} if interval is None else {"low": interval[0], "high": interval[1]}
            found[name] = {"mean": fmean(means), **low_high}
    return found


def _draw(round_index: int, rollout: Rollout) -> bytes:
    key = f"{round_index}/{rollout.prompt_id}/{rollout.sample_index}"
    return blake2b(key.encode(), digest_size=8).digest()


def _score(
    run: RunFolder, source: str, kept: Sequence[tuple[int, Rollout]]
) -> tuple[list[Score], Counter[str]]:
    """Return the scores of completions that can be split, and how many can't, by cause."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_selfplay.generation.completion_scores import score_completions
    from trl_selfplay.generation.model_traits import describe_model
    from trl_selfplay.generation.sampler import SamplingOptions
    from trl_selfplay.rollouts.prompts import PromptRow
    from trl_selfplay.rollouts.rendering import PromptFormatter, read_start

    is_adapter = (Path(source) / "adapter_config.json").exists()
    loader: Any = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    how = {} if device == "cuda" else {"dtype": torch.float32}  # bfloat16 is slow on most CPUs
    model: Any = loader.from_pretrained(source, **how).to(device).eval()
    has_tokenizer = (Path(source) / "tokenizer_config.json").exists() or not Path(source).exists()
    tokenizer: Any = AutoTokenizer.from_pretrained(source if has_tokenizer else run.output_dir)
    prompts = run.read_prompts()
    prefix = "chat_template_kwargs."
    kwargs = {k.removeprefix(prefix): v for k, v in run.config.items() if k.startswith(prefix)}
    formatter = PromptFormatter(
        tokenizer,
        chat_template_kwargs=kwargs,
        sanitize_control_tokens=bool(run.config.get("sanitize_control_tokens")),
        start=read_start(run.root / "rendering.json"),
    )

    def decode(ids: Sequence[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    # Training shows the examples before a hinted completion too, as before the prompt's other samples.
    trained: dict[str, tuple[int, ...]] = {}
    if run.config.get("few_shot_in_training"):
        for index in {index for index, _ in kept}:
            trained |= {r.prompt_id: r.prompt_ids for r, _ in run.rollouts(index) if not r.hinted}

    def prompt_ids(rollout: Rollout) -> tuple[int, ...]:
        if rollout.prompt_id in trained:
            return trained[rollout.prompt_id]
        row = prompts[rollout.prompt_id]
        return formatter.token_ids(
            PromptRow(
                rollout.prompt_id,
                row.prompt,
                row.solution,
                {},
                0,
                template_arguments=row.template_arguments,
            ),
            few_shot=False,
        )

    causes: Counter[str] = Counter()
    found: list[tuple[int, Rollout, Parts]] = []
    for round_index, rollout in kept:
        if (
            rollout.completion_mask is not None
        ):  # its answer follows from results, not from thoughts alone
            causes["has results of tools"] += 1
            continue
        ids = rollout.completion_ids[:-1] if rollout.finish == "eos" else rollout.completion_ids
        parts = split_completion(ids, decode)
        if isinstance(parts, str):
            causes[parts] += 1
        else:
            found.append((round_index, rollout, parts))
    foreign = foreign_rationales([r.prompt_id for _, r, _ in found], [parts for *_, parts in found])
    traits = describe_model(model)
    longest = traits.context_length
    options = SamplingOptions(max_completion_length=1)  # log-probs of the model as it is
    vocabulary = range(model.get_input_embeddings().weight.shape[0])
    scores = []
    for (round_index, rollout, parts), other in zip(found, foreign, strict=True):
        before = prompt_ids(rollout)
        contexts = {
            "own": (*before, *parts.rationale, *parts.cue),
            "dropped": (*before, *parts.cue),
            "foreign": None if other is None else (*before, *other, *parts.cue),
        }
        size = max(len(c) for c in contexts.values() if c is not None) + len(parts.answer)
        if longest is not None and size > longest:
            causes["longer than the model's context"] += 1
            continue
        given = {name: context for name, context in contexts.items() if context is not None}
        pairs = [(context, parts.answer) for context in given.values()]
        logps = score_completions(model, None, traits, pairs, options, vocabulary)
        by_name: Mapping[str, float] = dict(zip(given, logps, strict=True))
        scores.append(
            Score(
                round_index,
                rollout.prompt_id,
                rollout.sample_index,
                rollout.hinted,
                len(parts.answer),
                by_name["own"],
                by_name["dropped"],
                by_name.get("foreign"),
            )
        )
    return scores, causes
