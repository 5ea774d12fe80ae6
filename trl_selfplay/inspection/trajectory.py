"""The steps of a trajectory: what the policy wrote, and what a tool or an environment answered.

In: a rollout with a `completion_mask`, and the run's tokenizer from its folder. Out: texts in turn.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.rollouts.record import Rollout

Decode = Callable[[Sequence[int]], str]


def load_decoder(run: RunFolder) -> Decode | None:
    """Return a function from token ids to text, or None if the run has left no tokenizer on disk."""
    found = [run.output_dir / "tokenizer.json", *sorted(run.root.glob("**/tokenizer.json"))]
    path = next((path for path in found if path.exists()), None)
    if path is None:
        return None
    from tokenizers import Tokenizer  # only trajectories need it

    tokenizer = Tokenizer.from_file(str(path))
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)


def split_steps(rollout: Rollout, decode: Decode | None) -> list[tuple[str, str]]:
    """Return (writer, text) of each step, the writer "policy" or "environment", in order.

    Without a tokenizer the text is the number of tokens. Empty if the policy wrote everything.
    """
    if rollout.completion_mask is None:
        return []
    steps = []
    marked = zip(rollout.completion_mask, rollout.completion_ids, strict=True)
    for is_own, tokens in groupby(marked, key=lambda pair: pair[0]):
        ids = [token for _, token in tokens]
        text = f"({len(ids)} tokens)" if decode is None else decode(ids)
        steps.append(("policy" if is_own else "environment", text))
    return steps
