"""Count how trainers end on bad data: clear errors, correct runs, and faults.

In: the strategies of `tests/bad_data`. Out: a table by method, and each distinct fault with the
smallest example of it.

    python benchmarks/bad_data.py --examples 10000 --out results.json
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.extend(str(Path(__file__).parents[1] / "tests" / name) for name in ("", "bad_data"))
import strategies as data
from attempts import Attempts, Outcome
from datasets import Dataset
from hypothesis import strategies as st
from tiny_trainers import METHODS

KINDS = ("run", "nothing", "ready", "clear", "late", "vague", "raw", "wrong")
_DATA_NAMES = ("train_dataset", "row", "Dataset.with_transform", "max_length")


class Counts:
    """What became of the attempts."""

    def __init__(self) -> None:
        self.by_method: dict[str, Counter[str]] = {name: Counter() for name in METHODS}
        self.faults: dict[str, list[Any]] = {}

    def add(self, method: str, what: str, outcome: Outcome, example: Any) -> None:
        """Count an outcome, and keep the shortest example of a fault."""
        self.by_method[method][f"{what} {outcome.kind}"] += 1
        if outcome.is_fault:
            key = f"{what} {outcome.kind} {outcome.place} {outcome.text[:70]}"
            if key not in self.faults:
                print(f"{method}: {key}", file=sys.stderr, flush=True)
            known = self.faults.setdefault(key, [0, "", "", method])
            known[0] += 1
            try:
                shown = repr(example)[:1500]
            except Exception as error:  # it holds itself, or is too deep
                shown = f"no repr: {error!r}"
            if not known[1] or len(shown) < len(known[1]):
                known[1], known[2] = shown, outcome.text[:600]


def show(dataset: Any) -> Any:
    """Return what an example shows of a dataset."""
    if isinstance(dataset, Dataset):
        try:
            return dataset[:2]
        except Exception as error:
            return repr(error)
    return dataset


def try_all(
    examples: int, whole_share: int, number: int, methods: list[str], only: str | None
) -> Counts:
    """Try datasets and configs, half of the examples each."""
    counts, attempts = Counts(), Attempts()
    how = settings(
        max_examples=examples // 2, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    done = 0

    @seed(number)
    @how
    @given(st.sampled_from(methods), data.DATASETS)
    def try_dataset(method: str, dataset: Any) -> None:
        nonlocal done
        done += 1
        whole = done % whole_share == 0
        names = (*_DATA_NAMES, *(getattr(dataset, "column_names", None) or ()))
        names = tuple(n for n in names if n)
        counts.add(
            method,
            "data",
            attempts.attempt(method, dataset, names=names, whole=whole),
            show(dataset),
        )

    sound = Dataset.from_list(data.sound_rows(3, chat=False))
    of_method = {m: data.configs(METHODS[m][1]) for m in methods}

    @seed(number)
    @how
    @given(st.sampled_from(methods).flatmap(lambda m: st.tuples(st.just(m), of_method[m])))
    def try_config(drawn: tuple[str, dict[str, Any]]) -> None:
        nonlocal done
        done += 1
        method, fields = drawn
        whole = done % whole_share == 0
        outcome = attempts.attempt(method, sound, names=tuple(fields), whole=whole, **fields)
        counts.add(method, "config", outcome, fields)

    for name, attempt in (("data", try_dataset), ("config", try_config)):
        if only in (None, name):
            attempt()
    return counts


def main() -> None:
    """Run the attempts and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--whole", type=int, default=8, help="every n-th attempt trains to its end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--only", choices=("data", "config"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    started = time.process_time()
    counts = try_all(args.examples, args.whole, args.seed, args.methods, args.only)
    print(f"{time.process_time() - started:.0f} s of CPU")
    for method, found in counts.by_method.items():
        print(method, dict(sorted(found.items())))
    for key, (count, example, text, method) in sorted(
        counts.faults.items(), key=lambda f: -f[1][0]
    ):
        print(f"\n[{count}] {method} {key}\n   {text}\n   {example}")
    if args.out is not None:
        args.out.write_text(json.dumps({m: dict(c) for m, c in counts.by_method.items()}, indent=1))


if __name__ == "__main__":
    main()
