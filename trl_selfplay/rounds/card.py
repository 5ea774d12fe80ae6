"""The model card of a run: TRL's, with where the model comes from and how each round went.

In: a trainer over rounds whose parent has written its card, and the lines of the finished rounds. Out: more
sections in that card. Text that a user, a dataset or a model wrote stands there as text: it can't add links,
HTML, rows of a table or metadata.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from trl_selfplay.disk import save_text
from trl_selfplay.evaluation.markdown import escape
from trl_selfplay.evaluation.report import rounds_markdown
from trl_selfplay.rollouts.funnel import Funnel, Outcome
from trl_selfplay.rounds.run import UNTRAINED, Run
from trl_selfplay.rounds.watch import round_at_end
from trl_selfplay.tools.offer import name_of_schema

_NO_BASE = "[None](https://huggingface.co/None)"  # in TRL's card
_CITATION = """\
Cite trl-selfplay as:

```bibtex
@software{{trl_selfplay,
    title   = {{{{trl-selfplay: self-play trainers on TRL}}}},
    author  = {{{{The trl-selfplay contributors}}}},
    license = {{Apache-2.0}},
    version = {{{version}}}
}}
```"""


def add_rounds_to_card(trainer: Any) -> None:
    """Append lineage, rounds, alarms and citation to the card that TRL wrote into the output directory."""
    path = Path(trainer.args.output_dir) / "README.md"
    if not (trainer.is_world_process_zero() and path.exists()):
        return
    run: Run = trainer.run
    lines = run.lines
    sections = [_with_base(trainer, path.read_text()).rstrip(), _lineage(trainer, lines)]
    if lines:
        sections += [
            rounds_markdown(lines, run.chosen_metric, run.greater_is_better),
            _dropped(lines),
            _alarms(lines),
        ]
    sections.append(_CITATION.format(version=version("trl-selfplay")))
    save_text(path, "\n\n".join(section for section in sections if section) + "\n")


def name_base(trainer: Any) -> None:
    """Say in TRL's card what was trained; it knows models of the hub alone, and calls others "None"."""
    path = Path(trainer.args.output_dir) / "README.md"
    if not (trainer.is_world_process_zero() and path.exists()):
        return
    save_text(path, _with_base(trainer, path.read_text()))


def _with_base(trainer: Any, card: str) -> str:
    base = escape(_base_model(trainer) or "a model object without a name")
    return card.replace(_NO_BASE, base)


def _base_model(trainer: Any) -> str:
    """Return the name of the model that training began with, of a folder its last part; "" if it has none."""
    source = str(getattr(trainer.model.config, "name_or_path", "") or "")
    if not source or not Path(source).exists():
        return source
    return f"a model in a local folder, {Path(source).name or Path(source).resolve().name}"


def _lineage(trainer: Any, lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of what the model was made from."""
    args, play, run = trainer.args, trainer.self_play, trainer.run
    scorer, eval_scorer = play.collector.scorer, play.collector.eval_scorer
    toolbox = play.toolbox
    adapters = getattr(trainer.model, "peft_config", {})
    packages = ["trl-selfplay", "trl", *(["peft"] if adapters else [])]
    facts: dict[str, Any] = {
        "Method": trainer._name,
        "Base model": _base_model(trainer),
        "Adapter": ", ".join(str(c.peft_type).split(".")[-1] for c in adapters.values()),
        "Training prompts": f"{len(play.rows):,}",
        "Held-out prompts": ", ".join(
            f"{len(rows):,}" + (f" in {name}" if name else "")
            for name, rows in play.heldout.items()
        ),
        "Reward functions": "" if scorer is None else ", ".join(scorer.names),
        "Held-out reward functions": "" if eval_scorer is None else ", ".join(eval_scorer.names),
        "Tools": "" if toolbox is None else ", ".join(map(name_of_schema, toolbox.schemas)),
        "Tools declared as not deterministic": ""
        if toolbox is None
        else ", ".join(toolbox.nondeterministic),
        "Few-shot examples": str(len(play.formatter.few_shot_examples) or ""),
        "Rounds": f"{len(lines)} of {len(args.plan_rounds())}",
        "Weights": _weights(round_at_end(run, lines, args.alarm_actions)) if lines else "",
        "Seed": args.seed,
        "Versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }
    rows = [f"| {name} | {escape(value)} |" for name, value in facts.items() if value != ""]
    return "\n".join(["## Lineage", "", "| | |", "|---|---|", *rows])


def _weights(index: int) -> str:
    return "those before training" if index == UNTRAINED else f"those after round {index}"


def _dropped(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the outcomes of each round's completions, with those that there are."""
    funnels = [Funnel.from_dict(line["funnel"]) for line in lines]
    counts = [
        {name: getattr(f.unhinted, name) + getattr(f.hinted, name) for name in get_args(Outcome)}
        for f in funnels
    ]
    names = [name for name in counts[0] if any(count[name] for count in counts)]
    table = [
        f"| round | sampled | {' | '.join(name.replace('_', ' ') for name in names)} |",
        "|" + "---:|" * (2 + len(names)),
    ]
    for line, count in zip(lines, counts, strict=True):
        cells = (line["round"], sum(count.values()), *(count[name] for name in names))
        table.append(f"| {' | '.join(f'{cell:,}' for cell in cells)} |")
    return "\n".join(["### What became of the completions", "", *table])


def _alarms(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the alarms of all rounds as a list; "" if no detector watched the run."""
    if not any("alarms" in line for line in lines):
        return ""
    items = [
        f"- Round {line['round']}, {escape(alarm['name'])}: {escape(alarm['text'])}"
        for line in lines
        for alarm in line.get("alarms", ())
    ]
    return "\n".join(["### Alarms", "", *(items or ["None."])])
