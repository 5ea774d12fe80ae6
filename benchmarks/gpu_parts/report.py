"""Write results/gpu.md from the JSON files of the parts, one section for each card.

In: the folder of results. Out: tables in which what isn't there is "not measured".
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from gpu_parts.items import is_done, is_out_of_memory

PARTS = ("a", "c", "d", "b", "e")
MISSING = "not measured"
_COMMAND = "python benchmarks/gpu.py"
_INTRO = f"""# On a GPU

Script: `{_COMMAND}`. Weights are random, but for the demo's model in part c. GB are 10^9 bytes; peaks
are those of tensors in PyTorch's allocator. "A card of 24 GB" is a share of the card at hand's memory:
24 GB less .6 GB for CUDA itself. Speeds are those of the card at hand, and of no other."""

Records = Mapping[str, Any]


def write_report(results: Path) -> None:
    """Write the tables of all cards beside their folder."""
    cards = sorted({path.parent for path in results.glob("*/*.json")})
    text = [_INTRO, ""]
    if not cards:
        text += [f"No card has been measured. Run `{_COMMAND}` on a machine with one.", ""]
    for card in cards or [results / MISSING]:
        text += write_card(card)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.with_suffix(".md").write_text("\n".join(text).rstrip() + "\n")


def write_card(folder: Path) -> list[str]:
    """Return a card's section."""
    files = {part: folder / f"{part}.json" for part in PARTS}
    found = {part: json.loads(path.read_text()) for part, path in files.items() if path.exists()}
    items: dict[str, Records] = {part: found.get(part, {}).get("items", {}) for part in PARTS}
    text = [f"## {folder.name}", ""]
    if found:
        newest = max(found.values(), key=lambda content: content["date"])
        versions = ", ".join(f"{name} {number}" for name, number in newest["versions"].items())
        text += [f"Python {newest['python']}; {versions}; {newest['date']}.", ""]
    writers: dict[str, Callable[[Records], list[str]]] = {
        "a": write_quantized, "c": write_real_task, "d": write_estimates, "b": write_whole_round,
        "e": write_quiet_star,
    }  # fmt: skip
    for part, write in writers.items():
        text += [*write(items[part]), "", *write_failures(items[part])]
        for note in found.get(part, {}).get("notes", ()):
            text += [note, ""]
    return text


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *map(list, rows))]


def row_of(
    name: str, record: Records | None, width: int, read: Callable[[Any], Sequence[str]]
) -> list[str]:
    """Return a row: its name and what `read` finds in a record, or why there is nothing."""
    if record is not None and is_done(record):
        return [name, *read(record)]
    return [name, why_missing(record), *[""] * (width - 1)]


def why_missing(record: Records | None) -> str:
    """Return what stands in place of a number."""
    if record is not None and record.get("state") == "stopped":
        return f"{MISSING}: stopped after {record['after_seconds']:.0f} s"
    if record is None or "error" not in record:
        return MISSING
    return "out of memory" if is_out_of_memory(record) else "failed"


def in_gb(count: float) -> str:
    """Return bytes as GB."""
    return f"{count / 1e9:.2f}"


def write_failures(items: Records) -> list[str]:
    """Return the last line of each error that isn't a want of memory."""
    lines = []
    for name, record in items.items():
        if "error" in record and not is_out_of_memory(record):
            last = record["error"].strip().splitlines()[-1]
            lines.append(f"- {name} failed: `{last[:300]}`")
    return [*lines, ""] if lines else []


def write_quantized(items: Records) -> list[str]:
    """Return part a."""

    def read_training(record: Any) -> list[str]:
        peaks, gaps = record["peaks"], record["seconds_between"]
        return [
            *(in_gb(peaks[p]["allocated"]) if p in peaks else "–" for p in ("training", "scoring")),
            in_gb(peaks["training"].get("reserved", 0)),
            f"{record['trained_tokens_per_second']:.0f}",
            "; ".join(f"{name}: {median(seconds):.1f}" for name, seconds in gaps.items()),
        ]

    rows = [
        row_of(name, items.get(item), 5, read_training)
        for name, item in (("STaR (target 10 GB)", "star"), ("SPIN (target 12 GB)", "spin"))
    ]
    head = [
        "trainer", "training, peak GB", "scoring, peak GB", "training, GB held by the allocator",
        "trained tokens/s", "seconds between phases",
    ]  # fmt: skip
    cards = [
        row_of(
            name,
            items.get(name),
            5,
            lambda r: [
                r["model"],
                str(r["rows"]),
                *(in_gb(r["peaks"]["training"].get(key, 0)) for key in ("allocated", "reserved")),
                in_gb(r["peaks"]["sampling"]["allocated"]),
            ],
        )
        for name in ("card of 8 GB", "card of 16 GB", "card of 24 GB")
    ]
    text = [
        "### a. 8B with QLoRA",
        "",
        "The size of Llama-3.1-8B; nf4 with double quantization, bfloat16, LoRA of rank 16 on all linear "
        "layers, gradient checkpointing, one row of 1,024 tokens per step (SPIN: a pair of them), "
        "two rounds, on a card of 24 GB.",
        "",
        *table(head, rows),
        "",
        "STaR in the same way on other cards, with more rows per step:",
        "",
        *table(
            ["card", "model", "rows", "training, peak GB", "held by the allocator", "sampling, peak GB"],
            cards,
        ),
        "",
        "Sampled tokens per second on a card of 24 GB, adapters attached: 64 tokens each, 8 samples of "
        "each prompt of 448 tokens, half of which all prompts share; prompts included. Medians of 2 "
        "runs after a first one, whose seconds stand in brackets.",
        "",
    ]  # fmt: skip
    ways = ("eager", "graphs", "generate", "generate_batch")
    cells: dict[tuple[str, int], dict[str, Any]] = {
        (precision, batch): {} for precision in ("nf4", "16-bit") for batch in (8, 32, 128)
    }
    for name, record in items.items():
        way, _, case = name.partition(" ")
        if way in ways:
            precision, batch = case.split()
            cells.setdefault((precision, int(batch)), {})[way] = record
    rows = [
        [precision, str(batch), *(speed_of(arms.get(way)) for way in ways)]
        for (precision, batch), arms in sorted(cells.items())
    ]
    return text + table(["weights", "batch", *ways], rows)


def speed_of(arm: Any) -> str:
    """Return tokens per second of one way of sampling."""
    if arm is None or not is_done(arm):
        return why_missing(arm)
    return f"{arm['tokens_per_second']:.0f} [{arm['first_seconds']:.1f}]"


def write_real_task(items: Records) -> list[str]:
    """Return part c."""
    text = [
        "### c. SmolLM2-135M on 2,000 word problems",
        "",
        "2,000 problems × 8 samples, 2 rounds of ReST^EM, 100 steps of 16 rows per round; controls with as "
        "many steps. Greedy accuracy on 400 other problems (standard error up to .025). The start has "
        "seen 600 worked answers to others.",
        "",
    ]
    rows = []
    seeds = sorted({name.split()[1] for name in items}) or ["0"]
    arms = ("rest_em 0", "rest_em 1", "random 0", "random 1", "gold")
    for seed in seeds:
        records = [items.get(f"seed {seed} {arm}") for arm in arms]
        before = [r["before"] for r in records if r and is_done(r) and "before" in r]
        rows.append([seed, f"{before[0]:.3f}" if before else MISSING, *map(accuracy_of, records)])
    text += table(["seed", "start", *arms], rows)
    rows = [
        row_of(
            f"seed 0, round {t}",
            items.get(f"seed 0 rest_em {t}"),
            5,
            lambda r: [
                *(
                    f"{r['seconds'].get(phase, 0.0):.0f}"
                    for phase in ("sample", "train", "evaluate")
                ),
                f"{r['share_right']:.3f}",
                str(r["examples"]),
            ],
        )
        for t in range(2)
    ]
    head = ["round", "sampling s", "training s", "evaluation s", "share right", "rows kept"]
    return [*text, "", "Alone on the card:", "", *table(head, rows)]


def accuracy_of(record: Any) -> str:
    """Return an accuracy."""
    return f"{record['accuracy']:.3f}" if is_done(record) else why_missing(record)


def write_estimates(items: Records) -> list[str]:
    """Return part d."""
    rows, differences = [], []
    for name, record in items.items():
        if not is_done(record):
            rows.append(row_of(name, record, 4, lambda r: []))
            continue
        for phase, found in record["phases"].items():
            ratio = found["estimated"] / found["measured"]
            differences.append(abs(ratio - 1.0))
            rows.append(
                [name, phase, in_gb(found["estimated"]), in_gb(found["measured"]), f"{ratio:.2f}"]
            )
    text = [
        "### d. Memory estimated and measured",
        "",
        "`trl_selfplay.estimate` before anything is loaded, against the peaks of the other parts.",
        "",
        *table(
            ["part and item", "phase", "estimated GB", "measured GB", "estimated / measured"],
            rows or [[MISSING, "", "", "", ""]],
        ),
    ]
    if differences:
        text += ["", f"Largest difference {max(differences):.0%}, mean {mean(differences):.0%}."]
    return text


def write_whole_round(items: Records) -> list[str]:
    """Return part b."""

    def read(record: Any) -> list[str]:
        peaks = [peak["allocated"] for peak in record["peaks"].values()]
        phases = record["phases"]
        return [
            f"{record['seconds']:.1f}",
            *(f"{phases[p]:.1f}" if p in phases else "–" for p in ("sample", "train")),
            str(record["steps"]),
            in_gb(max(peaks)),
        ]

    rows = [
        row_of(name, items.get(name), 5, read) for name in ("rest_em", "generate and SFT", "GRPO")
    ]
    return [
        "### b. A round of a 0.5B model against TRL's pieces",
        "",
        "The size of Qwen2.5-0.5B in bfloat16, LoRA of rank 16; 64 prompts of 64 to 192 tokens × 8 "
        "completions, which end at random after 100 tokens on average; the reward keeps half. By hand: "
        "`generate` in batches of 256 sorted by length, then SFTTrainer. GRPOTrainer: the same "
        "completions, 16 per step. Loading, construction and what is compiled once don't count.",
        "",
        *table(["way", "seconds", "sampling s", "training s", "steps", "peak GB"], rows),
    ]  # fmt: skip


def write_quiet_star(items: Records) -> list[str]:
    """Return part e."""

    def read(record: Any) -> list[str]:
        return [
            in_gb(record["peak"]["allocated"]),
            f"{record['step_seconds']:.2f}",
            f"{record['text_tokens_per_second']:.0f}",
        ]

    names = sorted({"split 256", "dense 256", *items}, key=lambda n: (n[:5] == "split", _length(n)))
    rows = [row_of(name, items.get(name), 3, read) for name in names]
    fitting = [_length(n) for n, r in items.items() if n.startswith("split") and is_done(r)]
    longest = f"{max(fitting)} tokens" if fitting else MISSING
    if fitting and not any(map(is_out_of_memory, items.values())):
        longest += "; none was too long, so longer ones may fit"
    return [
        "### e. Quiet-STaR on a 0.5B model",
        "",
        "The size of Qwen2.5-0.5B in bfloat16, all weights trained, one text per step, 2 thoughts of 8 "
        "tokens, 4 tokens ahead. split: a training step; dense: its gradients alone, with one pass per "
        "token and a dense mask, on all of the card.",
        "",
        *table(["way and length", "peak GB", "seconds per step", "tokens of text/s"], rows),
        "",
        f"Longest text that fits a card of 24 GB, of those tried: {longest}.",
    ]


def _length(name: str) -> int:
    return int(name.split()[1])
