"""Export what a run sampled, as rows that other trainers read.

In: the folder of a run. Out: JSON lines or Parquet. A row holds the prompt as the dataset has it, without
few-shot examples, hint and chat template, but with the tools that it showed, and says where the completion comes
from: round, prompt, sample, reward. The same folder always gives the same file.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from trl_selfplay.disk import save_file_with
from trl_selfplay.generation.valid_text import valid_text
from trl_selfplay.inspection.leading_space import leading_spaces
from trl_selfplay.inspection.row_forms import Example, to_row
from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.rollouts.kept_prompts import KeptPrompt, KeptPrompts
from trl_selfplay.rollouts.record import SCHEMA, Rollout, to_stored
from trl_selfplay.rounds.run import name_of_weights
from trl_selfplay.tools.offer import with_words

SUFFIXES = (".jsonl", ".parquet")

# Outcomes of completions that are right, whether or not the round had a place for them.
_RIGHT = ("kept", "duplicate", "capped", "unpaired", "too_long")
_BATCH = 1000  # rows that are written together
# Types of columns that the first rows alone may not tell, because they hold None.
_TYPES = {
    **{f.name: f.type for f in SCHEMA if f.name not in ("prompt", "completion")},  # may be messages
    "round": pa.int32(),
    "chosen_reward": pa.float64(),
    "rejected_reward": pa.float64(),
    "chosen_sample_index": pa.int32(),
    "rejected_sample_index": pa.int32(),
}

Rows = Callable[[], Iterator[dict[str, Any]]]
Lead = Callable[[Rollout], str]


def export_run(
    run: RunFolder,
    kind: str,
    path: Path,
    *,
    form: str = "trl",
    rounds: Sequence[int] | None = None,
    overwrite: bool = False,
) -> int:
    """Write rows of a kind to a file and return their number.

    Args:
        run: The run.
        kind: "sft": what was trained on; "dpo": right against wrong; "kto": right or wrong; "parquet":
            every sample, with all that is known of it.
        path: A file that ends in .jsonl or .parquet. It is there whole or not at all.
        form: One of `row_forms.FORMS`; "parquet" has one form of its own.
        rounds: The rounds whose samples are exported; None takes all.
        overwrite: Replace the file if it is there.

    Raises:
        FileExistsError: The file is there.
        FileNotFoundError: The run kept no prompts.
        ValueError: There is nothing to export, or the run, a prompt or the suffix has no place in that
            kind or form.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{str(path)!r} must end in {' or '.join(SUFFIXES)}, which says the format."
        )
    if path.exists() and not overwrite:
        raise FileExistsError(f"{str(path)!r} is there already. Pass --force to replace it.")
    chosen = _check_rounds(run, rounds)
    prompts = run.read_prompts()
    if kind == "parquet":

        def rows() -> Iterator[dict[str, Any]]:
            return _every_sample(run, prompts, chosen)

    else:
        examples = {"sft": _sft, "dpo": _dpo, "kto": _kto}[kind]
        lead = leading_spaces(run)

        def rows() -> Iterator[dict[str, Any]]:
            found = _without_repeats(examples(run, prompts, chosen, lead))
            return (to_row(example, form) for example in found)

    if next(rows(), None) is None:
        where = ", ".join(map(str, chosen))
        raise ValueError(
            f"{run.output_dir} has nothing to export as {kind} in round {where}: "
            + (
                "no prompt has a right and a wrong completion."
                if kind == "dpo"
                else "no completion was selected."
            )
        )
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        try:
            count = (_write_parquet if path.suffix == ".parquet" else _write_lines)(temporary, rows)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    save_file_with(path, write)
    return count


def _check_rounds(run: RunFolder, rounds: Sequence[int] | None) -> list[int]:
    found = run.rounds
    if not found:
        raise ValueError(
            f"{run.output_dir} has no samples of its own to export. A verifier's run (V-STaR) trains on "
            "those of another run: export that one."
        )
    if rounds is None:
        return found
    if missing := sorted(set(rounds) - set(found)):
        raise ValueError(
            f"{run.output_dir} has no samples of round {', '.join(map(str, missing))}; it has those of "
            f"{', '.join(map(str, found))}."
        )
    return sorted(set(rounds))


def _sft(
    run: RunFolder, prompts: KeptPrompts, rounds: Sequence[int], lead: Lead
) -> Iterator[Example]:
    """Yield the completions that the rounds trained on: their own, then those of earlier rounds."""
    own = ((r, outcome) for r, outcome in _graded(run, rounds, "sft") if outcome == "kept")
    earlier = chain.from_iterable(map(run.history, rounds))
    for rollout, outcome in chain(own, earlier):
        columns = {**_origin(run, rollout), **_facts(rollout), "outcome": outcome}
        yield _example(_prompt_of(prompts, rollout), {"completion": rollout}, columns, lead)


def _kto(
    run: RunFolder, prompts: KeptPrompts, rounds: Sequence[int], lead: Lead
) -> Iterator[Example]:
    """Yield right completions, and wrong ones without a hint, with a label."""
    for rollout, outcome in _graded(run, rounds, "kto"):
        if outcome in _RIGHT or (outcome == "failed" and not rollout.hinted):
            columns = {
                "label": outcome in _RIGHT,
                **_origin(run, rollout),
                **_facts(rollout),
                "outcome": outcome,
            }
            yield _example(_prompt_of(prompts, rollout), {"completion": rollout}, columns, lead)


def _dpo(
    run: RunFolder, prompts: KeptPrompts, rounds: Sequence[int], lead: Lead
) -> Iterator[Example]:
    """Yield pairs of a prompt's completions in one round, each completion in at most one pair.

    The first right one is paired with the first wrong one, and so on. An opponent's completion, which
    nothing has graded, is paired with the data's.
    """
    for round_index in rounds:
        unhinted = ((r, outcome) for r, outcome in run.rollouts(round_index) if not r.hinted)
        for _, group in groupby(unhinted, key=lambda item: item[0].prompt_id):
            same_prompt = list(group)
            prompt = _prompt_of(prompts, same_prompt[0][0])
            right = _distinct(r for r, outcome in same_prompt if outcome in _RIGHT and r.is_graded)
            wrong = _distinct(
                r for r, outcome in same_prompt if outcome == ("failed" if r.is_graded else "kept")
            )
            pairs: list[tuple[Rollout | None, Rollout]]
            pairs = list(zip(right, wrong, strict=False))
            if not same_prompt[0][0].is_graded:
                if _is_of_agent(run):
                    _refuse_ungraded(run, "dpo")
                pairs = [(None, rollout) for rollout in wrong]
            for chosen, rejected in pairs:
                best = _data_completion(prompt) if chosen is None else chosen
                columns = {
                    **_origin(run, rejected),
                    "chosen_sample_index": None if chosen is None else chosen.sample_index,
                    "rejected_sample_index": rejected.sample_index,
                    "chosen_reward": None if chosen is None else chosen.reward,
                    "rejected_reward": rejected.reward,
                }
                yield _example(prompt, {"chosen": best, "rejected": rejected}, columns, lead)


def _every_sample(
    run: RunFolder, prompts: KeptPrompts, rounds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yield every sample with its outcome, tokens, prompt and solution."""
    for round_index in rounds:
        for rollout, outcome in run.rollouts(round_index):
            row = to_row(Example(_prompt_of(prompts, rollout), {}), "trl")
            solution = _prompt_of(prompts, rollout).solution
            fields = {n: to_stored(n, getattr(rollout, n)) for n in SCHEMA.names if n != "prompt"}
            yield {
                **row,
                "solution": solution if isinstance(solution, str | None) else json.dumps(solution),
                "outcome": outcome,
                **_origin(run, rollout),
                "rendered_prompt": rollout.prompt,
                **fields,
            }


def _graded(run: RunFolder, rounds: Sequence[int], kind: str) -> Iterator[tuple[Rollout, str]]:
    """Yield the samples of rounds.

    Raises:
        ValueError: Nothing graded them, and they aren't an agent's, which trains on unranked ones too.
    """
    needs_grades = kind != "sft" or not _is_of_agent(run)
    for round_index in rounds:
        for rollout, outcome in run.rollouts(round_index):
            if needs_grades and not rollout.is_graded and outcome != "unfinished":
                _refuse_ungraded(run, kind)
            yield rollout, outcome


def _is_of_agent(run: RunFolder) -> bool:
    return bool(run.config.get("agent"))


def _refuse_ungraded(run: RunFolder, kind: str) -> NoReturn:
    if _is_of_agent(run):
        raise ValueError(
            f"nothing graded the samples of the agent's steps in {run.output_dir}, so none is right or wrong to "
            f"export as {kind}. Export those that were trained on as sft, or all as parquet."
        )
    raise ValueError(
        f"nothing graded the completions in {run.output_dir}: they are an opponent's, so "
        f"there is no right one to export as {kind}. Export them as dpo, against the data's "
        "completions, or as parquet."
    )


def _example(
    prompt: KeptPrompt,
    completions: Mapping[str, Rollout | str],
    columns: Mapping[str, Any],
    lead: Lead,
) -> Example:
    """Return completions, sampled or of the data, as an example."""
    texts = {n: c if isinstance(c, str) else c.completion for n, c in completions.items()}
    sampled = {n: c for n, c in completions.items() if not isinstance(c, str)}
    leads = {n: lead(c) for n, c in sampled.items()}
    trajectories = {n: c.messages for n, c in sampled.items() if c.completion_mask and c.messages}
    return Example(prompt, texts, columns, leads, trajectories)


def _prompt_of(prompts: KeptPrompts, rollout: Rollout) -> KeptPrompt:
    """Return the prompt of a rollout; where it told of tools in words, it begins with them."""
    kept = prompts[rollout.prompt_id]
    return (
        replace(kept, prompt=with_words(kept.prompt, kept.tools))
        if isinstance(kept.tools, str)
        else kept
    )


def _origin(run: RunFolder, rollout: Rollout) -> dict[str, Any]:
    """Return where a sample comes from: round, prompt, and the model that wrote it."""
    index = rollout.round_index
    if index < len(run.lines):
        sampled_from = run.lines[index]["sampled_from"]
    else:
        is_warm = index == 0 and (run.root / "warm-up").exists()
        sampled_from = "warm-up" if is_warm else name_of_weights(index - 1)
    model = str(run.config.get("model") or "")
    return {
        "round": index,
        "prompt_id": rollout.prompt_id,
        "base_model": Path(model).name if Path(model).is_dir() else model,
        "sampled_from": sampled_from,
    }


def _facts(rollout: Rollout) -> dict[str, Any]:
    return {
        "sample_index": rollout.sample_index,
        "reward": rollout.reward,
        "hinted": rollout.hinted,
    }


def _data_completion(prompt: KeptPrompt) -> str:
    """Return the data's completion of a prompt: text, or a list with one message."""
    if isinstance(prompt.solution, str):
        return prompt.solution
    content = prompt.solution[0].get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _distinct(rollouts: Iterator[Rollout]) -> list[Rollout]:
    """Return the first of the rollouts with each text."""
    return list({r.completion: r for r in reversed(list(rollouts))}.values())[::-1]


def _without_repeats(examples: Iterator[Example]) -> Iterator[Example]:
    """Yield examples, but the same completions of the same prompt once, from their first round."""
    seen: set[bytes] = set()
    for example in examples:
        key = "\0".join((example.columns["prompt_id"], *example.completions.values()))
        digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield example


def _write_lines(path: Path, rows: Rows) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows():
            file.write(valid_text(json.dumps(row, ensure_ascii=False)) + "\n")
            count += 1
    return count


def _write_parquet(path: Path, rows: Rows) -> int:
    """Write rows whose types are those of all of them: they are made twice.

    Raises:
        ValueError: Rows differ so that one column can't hold them.
    """
    schema = pa.schema([])
    count = 0
    try:
        for table in _tables(rows):
            schema = pa.unify_schemas([schema, table.schema], promote_options="permissive")
        with pq.ParquetWriter(path, schema) as writer:
            for table in _tables(rows, schema):
                writer.write_table(table)
                count += len(table)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(
            f"the rows don't fit into one Parquet table ({error}): write them to a .jsonl file."
        ) from error
    return count


def _messages_of(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the messages of completions in a row, whatever its form."""
    for name in ("completion", "chosen", "rejected", "messages"):
        value = row.get(name)
        yield from value if isinstance(value, list) else ()


def _tables(rows: Rows, schema: pa.Schema | None = None) -> Iterator[pa.Table]:
    """Yield rows as tables; without a schema each with what its own rows show."""
    remaining = rows()
    while batch := list(islice(remaining, _BATCH)):
        if schema is not None:
            yield pa.Table.from_pylist(batch, schema)
            continue
        if any("tool_calls" in message for row in batch for message in _messages_of(row)):
            raise ValueError(
                "calls of tools have arguments of different names, and one Parquet column would give each "
                "call those of all: write them to a .jsonl file, which `datasets` reads as they are."
            )
        names = list(dict.fromkeys(name for row in batch for name in row))
        arrays = [pa.array([row.get(n) for row in batch], _TYPES.get(n)) for n in names]
        yield pa.table(arrays, names)
