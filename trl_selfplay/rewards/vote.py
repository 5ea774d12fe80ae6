"""Grade completions by the majority of their prompt's own samples, without solutions.

In: all samples of each prompt, in one call. Out: 1.0 for those that have the answer of the majority,
0.0 for the others, or None for all samples of a prompt without a clear majority.

Sources: self-consistency, arXiv 2203.11171; training on its answers, "Large Language Models Can
Self-Improve", arXiv 2210.11610.
"""

import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_selfplay.rewards.answer import extract_answer, normalise_answer, text_of
from trl_selfplay.rewards.functions import is_async
from trl_selfplay.rewards.quantities import Quantity, read_quantity
from trl_selfplay.rewards.scores import Scores

TIE = "tie"
BELOW_THRESHOLD = "below the threshold"
NO_VOTES = "no answer to vote for"


def answer_form(completion: str) -> Hashable | None:
    """Return the normal form of a completion's marked answer; None without one.

    >>> answer_form("The answer is 1,000.") == answer_form("#### 1000")
    True
    """
    answer = extract_answer(completion)
    return None if answer is None else normalise_answer(answer) or None


@dataclass(frozen=True, slots=True)
class Vote:
    """The outcome of a vote.

    Attributes:
        label: The form of most votes; None if there isn't one.
        confidence: Its votes, or those of each that is tied, as a share of all votes and of the
            samples that had no answer.
        cause: Why there is no label; "" if there is one.
    """

    label: Hashable | None
    confidence: float
    cause: str = ""


def count_votes(
    forms: Sequence[Hashable | None],
    weights: Sequence[float] | None = None,
    threshold: float = 0.0,
) -> Vote:
    """Return which form has most votes.

    Args:
        forms: The normal form of each sample's answer; None doesn't vote.
        weights: Of each sample, not negative; None gives all the same weight.
        threshold: Minimum confidence of a label.
    """
    given = [1.0] * len(forms) if weights is None else weights
    votes: dict[Hashable, list[float]] = {}
    for form, weight in zip(forms, given, strict=True):
        if form is not None and weight > 0.0:
            votes.setdefault(form, []).append(weight)
    if not votes:
        return Vote(None, 0.0, NO_VOTES)
    # Exact sums, so that a vote doesn't depend on the order of the samples.
    totals = {form: math.fsum(weights) for form, weights in votes.items()}
    most = max(totals.values())
    confidence = most / math.fsum(given)
    first, *others = [form for form, total in totals.items() if math.isclose(total, most)]
    if others:
        return Vote(None, confidence, TIE)
    if confidence < threshold:
        return Vote(None, confidence, BELOW_THRESHOLD)
    return Vote(first, confidence)


class VoteReward:
    """The reward function of agreement with the majority; `vote_reward` is one.

    A completion scores 1.0 if its answer is the one that most samples of its prompt have, else 0.0. A
    completion without an answer doesn't vote and scores 0.0. All samples of a prompt abstain at a
    tie, if the majority is smaller than the threshold, and if none has an answer. It never sees a
    solution: a wrong answer on which the samples agree is taken for right.

    It compares samples, so it can't grade held-out prompts, whose one greedy completion agrees with
    itself: give trainers `eval_reward_funcs`. In GRPOTrainer, each process has to have all samples of
    its prompts: with several processes, `num_generations` divides
    `per_device_train_batch_size * steps_per_generation`. There, abstentions get the reward 0.0.

    For each prompt it logs `vote_confidence`, and `vote_decided`: 1.0 if there is a label, else 0.0.

    Args:
        threshold: Minimum share of a prompt's samples, 0 to 1, that the majority must have.
        normal_form: `f(text) -> form` of a completion. Completions with equal forms vote together;
            None doesn't vote. By default it is that of the marked answer, see `answer_form`:
            numbers are compared by value, other answers as text. With it, `5 km` votes with `5`, and
            `0.333333` with `1/3`, where all answers so joined agree with each other.
        weigh_by: A reward function whose score is the weight of a sample's vote: not negative; None
            doesn't vote.
        check_by: A reward function that knows the solutions, such as `exact_reward`. It doesn't
            change any score: of each prompt with a label, it grades one completion that has it, and
            `vote_label_accuracy` is logged, the share of labels to which it gives at least 1.0.

    Raises:
        ValueError: The threshold is not from 0 to 1, or a function asks the policy.
        TypeError: A function isn't callable, or is async.
    """

    compares_samples = True

    def __init__(
        self,
        threshold: float = 0.5,
        normal_form: Callable[[str], Hashable | None] = answer_form,
        weigh_by: Callable[..., Any] | None = None,
        check_by: Callable[..., Any] | None = None,
    ) -> None:
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold={threshold}; give a share of the samples, from 0 to 1.")
        functions = {"normal_form": normal_form, "weigh_by": weigh_by, "check_by": check_by}
        for name, function in functions.items():
            if function is None and name != "normal_form":
                continue
            if not callable(function) or is_async(function):
                raise TypeError(f"{name} is {function!r:.100}; give a function that isn't async.")
            if getattr(function, "asks_policy", False):
                raise ValueError(
                    f"{name} is a judge that asks the policy, which only works among the reward "
                    "functions themselves. Give a judge with a model of its own."
                )
        self.threshold = threshold
        self._normal_form = normal_form
        self._weigh_by = weigh_by
        self._check_by = check_by
        self.__name__ = "vote_reward"

    @property
    def identity(self) -> dict[str, Any]:
        """What the scores depend on."""
        weigh_by = None if self._weigh_by is None else _name(self._weigh_by)
        form = _name(self._normal_form)
        return {"threshold": self.threshold, "normal_form": form, "weigh_by": weigh_by}

    @property
    def answer_form(self) -> Callable[[str], Hashable | None]:
        """Reads the answer of a completion, for the detectors of collapse."""
        return self._normal_form

    @property
    def grading_model(self) -> Any:
        """The model that weighs votes, if there is one."""
        return getattr(self._weigh_by, "grading_model", None)

    @property
    def called_functions(self) -> list[Callable[..., Any]]:
        """The functions that weigh votes and check labels; they read columns, the vote doesn't."""
        return [f for f in (self._weigh_by, self._check_by) if f is not None]

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        groups: Sequence[Hashable] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> Scores:
        """Return a score per completion.

        Args:
            prompts: The prompt of each completion.
            completions: Text, or messages, the last of which counts.
            groups: What the samples of one prompt have in common; None: equal prompts.
            log_metric: Gets the numbers that are logged.
            **kwargs: For the functions that weigh votes and check labels.

        Raises:
            ValueError: A weight is negative, or their number isn't that of the completions.
        """
        texts = [text_of(completion) for completion in completions]
        forms = [self._normal_form(text) for text in texts]
        given = {"prompts": prompts, "completions": completions, **kwargs}
        weights = self._weights(given)
        scores: list[float | None] = [None] * len(forms)
        causes: dict[int, str] = {}
        logged: dict[str, list[float]] = {"vote_confidence": [], "vote_decided": []}
        labelled: list[int] = []  # of each prompt with a label, a completion that has it
        for members in _members(prompts, groups):
            of_members = [forms[i] for i in members]
            if self._normal_form is answer_form:
                of_members = _join(of_members, [texts[i] for i in members])
            vote = count_votes(of_members, [weights[i] for i in members], self.threshold)
            logged["vote_confidence"].append(vote.confidence)
            logged["vote_decided"].append(float(vote.label is not None))
            if vote.label is None:
                causes |= dict.fromkeys(members, vote.cause)
                continue
            labelled.append(members[of_members.index(vote.label)])
            for i, form in zip(members, of_members, strict=True):
                scores[i] = float(form == vote.label)
        if self._check_by is not None and labelled:
            verdicts = self._check_by(**_only(labelled, given, len(forms)))
            known = [float(v >= 1.0) for v in verdicts if v is not None]
            logged["vote_label_accuracy"] = known
        if log_metric is not None:
            for name, values in logged.items():
                for value in values:
                    log_metric(name, value)
        return Scores(scores, causes)

    def _weights(self, given: Mapping[str, Any]) -> list[float]:
        if self._weigh_by is None:
            return [1.0] * len(given["completions"])
        answer = self._weigh_by(**given)
        if len(answer) != len(given["completions"]):
            raise ValueError(
                f"{_name(self._weigh_by)} gave {len(answer)} weights for {len(given['completions'])} "
                "completions. Return one number or None per completion."
            )
        weights = [0.0 if w is None or math.isnan(w) else float(w) for w in answer]
        for index, weight in enumerate(weights):
            if not 0.0 <= weight < math.inf:
                raise ValueError(
                    f"{_name(self._weigh_by)} gave {weight} as the weight of completion {index}. The "
                    "weight of a vote is finite and not negative: pass a function that returns, for "
                    "example, a probability in place of its logarithm."
                )
        return weights


def _join(forms: Sequence[Hashable | None], completions: Sequence[str]) -> list[Hashable | None]:
    """Return forms that are also equal for quantities that agree, as `exact_reward` compares them.

    `5` agrees with `5 km` and with `5 m`, which don't agree with each other. Such answers stay apart.
    """
    quantities: dict[Hashable, set[Quantity]] = {}
    for form, completion in zip(forms, completions, strict=True):
        quantity = None if form is None else read_quantity(extract_answer(completion) or "")
        if quantity is not None:
            quantities.setdefault(form, set()).add(quantity)
    near = {
        form: frozenset(
            other
            for other, others in quantities.items()
            if form == other or all(q.agrees(o) for q in mine for o in others)
        )
        for form, mine in quantities.items()
    }
    return [
        near[form]
        if form in near and all(near[other] == near[form] for other in near[form])
        else form
        for form in forms
    ]


def _members(prompts: Sequence[Any], groups: Sequence[Hashable] | None) -> list[list[int]]:
    """Return the indices of each prompt's samples, in their order."""
    if groups is None:
        groups = [json.dumps(prompt, sort_keys=True, default=str) for prompt in prompts]
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    return list(members.values())


def _only(indices: Sequence[int], given: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the arguments of a call on some of its completions."""
    return {
        name: [value[i] for i in indices]
        if isinstance(value, list | tuple) and len(value) == count
        else value
        for name, value in given.items()
    }


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", getattr(function, "__name__", type(function))))


vote_reward = VoteReward()
