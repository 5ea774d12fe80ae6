"""What does a step with thoughts cost? Seconds and peak memory by text length and thought length.

- split: a step of QuietSTaRTrainer: thoughts sampled without gradients, one forward with gradients
  over text and thoughts, attention split into text and own tokens.
- recomputed: the same with activations recomputed in the backward pass, the trainer's default.
- dense: the official code's scheme on the same model: a pass for each token of the thoughts over
  all columns, one growing cache and one growing mask, gradients through all passes, text and all
  repeated for each thought. Its head isn't the official one's fourfold copy in float32, and it
  computes logits only where they are used, so it is cheaper than the official code.
- official, estimated: the bytes of what the official code keeps for the backward pass on this
  model, by formula: keys and values copied in each pass, masks, logits of each pass.

All steps draw the same thoughts and give the same loss, which is checked. The vocabulary is 16 or
64 times the width: 85 times in SmolLM2-135M, 170 times in Qwen2.5-0.5B. A cell is a process of
its own, for its peak, and a file under results/quiet_star_cost/; what is there is not measured
again. Arms alternate:

    python benchmarks/quiet_star_cost.py
    python benchmarks/quiet_star_cost.py --vocabularies 8192 --lengths 12
"""

import argparse
import datetime
import itertools
import json
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from trl_selfplay.generation.random_streams import gumbel_noise, stream_key, token_words
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE, attach_thought_module, mix
from trl_selfplay.trainers.quiet_star.objective import advantages, base_ahead, objective_sums
from trl_selfplay.trainers.quiet_star.replaced_attention import thoughts_attend
from trl_selfplay.trainers.quiet_star.sampling import (
    can_think,
    choose_columns,
    sample_thoughts,
    thought_keys,
)
from trl_selfplay.trainers.quiet_star.unrolled import ThoughtBatch, think_and_talk

RESULTS = Path(__file__).parent / "results" / "quiet_star_cost"
ARMS = ("split", "recomputed", "dense")
VOCABULARIES = (2048, 8192)
TEXT_LENGTHS, THOUGHT_LENGTHS = (64, 128, 256, 512), (4, 8, 12)
NUM_THOUGHTS, NUM_AHEAD = 2, 4
SIZES: dict[str, int] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
# Steps are timed until both are reached.
LEAST_STEPS, LEAST_SECONDS = 2, 1.0


def build_model(vocabulary: int, seed: int = 0) -> Any:
    """Return a random model whose mixing head has left zero, as after some training."""
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES, vocab_size=vocabulary, bos_token_id=None, eos_token_id=None)
    model = LlamaForCausalLM(config).eval()
    attach_thought_module(model, None, scale=100.0, seed=seed)
    torch.nn.init.normal_(getattr(model, ATTRIBUTE).head[-1].weight, std=0.3)
    return model


def split_step(model: Any, ids: torch.Tensor, length: int, ahead: int = NUM_AHEAD) -> float:
    """Sample and score thoughts as QuietSTaRTrainer does; compute gradients; return the loss."""
    mask = torch.ones_like(ids)
    thinking = choose_columns(can_think(ids, mask, ahead), mask, 1.0, 0, 0, "train", [0])
    anchors = thinking.columns.repeat_interleave(NUM_THOUGHTS, dim=1)
    start = getattr(model, ATTRIBUTE).start_and_end()[0].detach()
    keys = thought_keys(thinking, NUM_THOUGHTS, 0, 0, "train", [0])
    thoughts = sample_thoughts(model.eval(), start, ids, mask, anchors, length, keys)
    model.train()  # where recomputing is switched on; there is no dropout
    real = torch.ones_like(anchors, dtype=torch.bool)
    with thoughts_attend(model):  # over the backward pass, as in a training step
        outputs = think_and_talk(
            model, ids, mask, ThoughtBatch(anchors, thoughts.tokens, real, ahead)
        )
        width = thinking.columns.shape[1]
        base = base_ahead(outputs["base_log_probs"], thinking.columns, ahead)
        talk = outputs["talk_log_probs"].unflatten(1, (width, -1))
        advantage = advantages(talk.sum(-1), base.sum(-1, keepdim=True), "mean")
        own = outputs["thought_log_probs"].unflatten(1, (width, -1))
        labelled = torch.ones_like(outputs["base_log_probs"], dtype=torch.bool)
        sums = objective_sums(outputs["base_log_probs"], labelled, talk, own, advantage)
        loss = 0.5 * sums.base / labelled.sum() + (0.5 * sums.talk + sums.policy) / width
        loss.backward()
    return loss.item()


def dense_step(model: Any, ids: torch.Tensor, length: int, ahead: int = NUM_AHEAD) -> float:
    """Compute the same loss and gradients with a pass a token, a growing cache and mask."""
    module, embed, head = getattr(model, ATTRIBUTE), model.get_input_embeddings(), model.lm_head
    rows, size, device = ids.expand(NUM_THOUGHTS, -1), ids.shape[1], ids.device
    width = size - ahead  # columns that count
    places = torch.arange(size, device=device)
    dtype = embed.weight.dtype
    hidden = torch.finfo(dtype).min
    causal = torch.full((size, size), hidden, dtype=dtype, device=device).triu(1)
    diagonal = torch.full((size, size), hidden, dtype=dtype, device=device).fill_diagonal_(0.0)
    start, end = module.start_and_end().to(dtype).unbind(0)
    words = token_words(model.config.vocab_size, device)
    keys = [
        stream_key(0, 0, "train", f"0/{j}", s) for s in range(NUM_THOUGHTS) for j in range(size)
    ]
    cache, mask = DynamicCache(), causal

    def run(embeddings: torch.Tensor, step: int) -> torch.Tensor:
        nonlocal mask
        if step:
            mask = torch.cat([mask, diagonal], dim=1)
        states: torch.Tensor = model.base_model(
            inputs_embeds=embeddings, attention_mask=mask[None, None], past_key_values=cache,
            position_ids=(places + step)[None], use_cache=True,
        ).last_hidden_state  # fmt: skip
        return states

    text = run(embed(rows), 0)
    base = head(text[:1, :-1]).float().log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
    embeddings, own = start.expand(*rows.shape, -1), []
    for step in range(length):
        log_probs = head(run(embeddings, 1 + step)).float().log_softmax(-1)
        noise = gumbel_noise(words, keys, step).view_as(log_probs)
        tokens = (log_probs.detach() + noise).argmax(-1)
        own.append(log_probs.gather(-1, tokens[..., None])[:, :width, 0])
        embeddings = embed(tokens)
    run(embeddings, 1 + length)  # a thought's last token, which what follows attends to
    embeddings, talk = end.expand(*rows.shape, -1), []
    for t in range(ahead):
        after = run(embeddings, 2 + length + t)[:, :width]
        mixed, _ = mix(module, text[:, t : t + width], after)
        log_probs = head(mixed).float().log_softmax(-1)
        targets = rows[:, 1 + t : 1 + t + width, None]
        talk.append(log_probs.gather(-1, targets)[..., 0])
        embeddings = embed(rows[:, (places + 1 + t).clamp(max=size - 1)])
    reward = torch.stack(talk).sum(0)  # (K, U)
    advantage = advantages(reward.T, reward.T[:, :1], "mean").T
    policy = -(advantage * torch.stack(own).sum(0)).mean(0).sum()
    loss = -0.5 * base.mean() - 0.5 * reward.mean(0).sum() / ahead / width + policy / width
    loss.backward()
    return loss.item()


def official_bytes(
    vocabulary: int, size: int, length: int, ahead: int = NUM_AHEAD, width: int = 4
) -> int:
    """Return the bytes that the official code would keep for the backward pass on this model.

    Keys and values are concatenated in each pass and each copy is kept: S(N + 1)(N + 2)/2 tokens
    with N = n + 1 + n_true passes after the first. Each pass keeps logits of all columns twice
    (themselves and their log-probs); of the masks the last one. Activations of the layers are left
    out.
    """
    passes = length + 2 + ahead  # N + 1
    entries = NUM_THOUGHTS * size * passes * (passes + 1) // 2
    kv_width = SIZES["hidden_size"] * SIZES["num_key_value_heads"] // SIZES["num_attention_heads"]
    keys_and_values = 2 * SIZES["num_hidden_layers"] * kv_width * entries * width
    logits = 2 * NUM_THOUGHTS * size * passes * vocabulary * 4
    masks = size * size * passes * width
    return keys_and_values + logits + masks


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(arm: str, vocabulary: int, size: int, length: int) -> dict[str, Any]:
    """Time steps of one cell in this process; the peak is what a step adds to the built model."""
    torch.set_num_threads(1)
    model = build_model(vocabulary)
    ids = torch.randint(vocabulary, (1, size), generator=torch.Generator().manual_seed(1))
    step = dense_step if arm == "dense" else split_step
    if arm == "recomputed":
        model.gradient_checkpointing_enable()
    step(model, ids[:, : NUM_AHEAD + 4], 1)  # what is set up once, gradients included
    before = peak_bytes()
    seconds: list[float] = []
    loss = 0.0
    while len(seconds) < LEAST_STEPS or sum(seconds) < LEAST_SECONDS:
        model.zero_grad(set_to_none=False)
        started = time.perf_counter()
        loss = step(model, ids, length)
        seconds.append(time.perf_counter() - started)
    return {"seconds": median(seconds), "bytes": peak_bytes() - before, "loss": loss}


def exponent(sizes: list[int], values: list[float]) -> float:
    """Return the exponent of growth, the slope of a line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def load_cells(vocabulary: int) -> dict[tuple[str, int, int], dict[str, float]]:
    """Return medians over repeats of a vocabulary's cells, by (arm, S, n)."""
    found: dict[tuple[str, int, int], list[dict[str, float]]] = {}
    for path in sorted(RESULTS.glob(f"*-{vocabulary}-*-*-*.json")):
        arm, _, size, length, _ = path.stem.split("-")
        found.setdefault((arm, int(size), int(length)), []).append(json.loads(path.read_text()))
    return {
        cell: {k: median(r[k] for r in records) for k in records[0]}
        for cell, records in found.items()
    }


def write_summary() -> None:
    """Write results/quiet_star_cost.md from the cells present."""
    versions = ", ".join(f"{n} {version(n)}" for n in ("transformers", "torch"))
    text = [
        "# What thoughts cost",
        "",
        f"Llama of {SIZES['num_hidden_layers']} layers, width {SIZES['hidden_size']}; one text, "
        f"{NUM_THOUGHTS} thoughts a token, {NUM_AHEAD} tokens ahead, float32, random weights of seed "
        f"0. {platform.machine()}, {platform.system()}, 1 CPU thread; {versions}; "
        f"{datetime.date.today().isoformat()}. Script: `benchmarks/quiet_star_cost.py`, which says "
        "what the arms are. Seconds a step, medians; memory is what a step adds at its peak, in MiB.",
    ]
    for vocabulary in VOCABULARIES:
        cells = load_cells(vocabulary)
        text += ["", f"## Vocabulary of {vocabulary}", ""]
        text += describe_cells(vocabulary, cells) if cells else ["Not measured."]
    RESULTS.with_suffix(".md").write_text("\n".join(text) + "\n")


def describe_cells(
    vocabulary: int, cells: dict[tuple[str, int, int], dict[str, float]]
) -> list[str]:
    """Return a vocabulary's tables: the cells, and how they grow."""
    columns = [f"{arm} {unit}" for unit in ("s", "MiB") for arm in ARMS]
    text = [
        f"| S | thought | {' | '.join(columns)} | official, estimated MiB | dense / split s | "
        "split / dense MiB | recomputed / dense MiB |",
        "|---" * (6 + len(columns)) + "|",
    ]
    largest = 0.0
    for size, length in sorted({cell[1:] for cell in cells}):
        found = {arm: cells.get((arm, size, length)) for arm in ARMS}
        losses = [record["loss"] for record in found.values() if record]
        largest = max(largest, max(losses) - min(losses))
        if largest > 1e-4:
            raise RuntimeError(f"vocabulary {vocabulary}, S={size}, n={length}: losses {losses}")
        values = [f"{r['seconds']:.2f}" if r else "" for r in found.values()]
        values += [f"{r['bytes'] / 2**20:.0f}" if r else "" for r in found.values()]
        values.append(f"{official_bytes(vocabulary, size, length) / 2**20:.0f}")
        for one, two, key in (
            ("dense", "split", "seconds"), ("split", "dense", "bytes"), ("recomputed", "dense", "bytes"),
        ):  # fmt: skip
            above, below = found[one], found[two]
            values.append(f"{above[key] / below[key]:.2f}" if above and below else "")
        text.append(f"| {size} | {length} | {' | '.join(values)} |")
    text += ["", "Exponent of growth in S, of seconds and of memory; attention's is 2:", ""]
    text += [f"| thought | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for length in sorted({cell[2] for cell in cells}):
        slopes = []
        for key in ("seconds", "bytes"):
            for arm in ARMS:
                sizes = sorted(s for a, s, n in cells if (a, n) == (arm, length))
                values = [cells[arm, s, length][key] for s in sizes]
                slopes.append(f"{exponent(sizes, values):.2f}" if len(sizes) > 1 else "")
        text.append(f"| {length} | {' | '.join(slopes)} |")
    return [*text, "", f"Largest difference of the losses: {largest:.1e}."]


def main() -> None:
    """Measure what is missing, in alternation, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=list(VOCABULARIES[:1]))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(TEXT_LENGTHS))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(THOUGHT_LENGTHS))
    parser.add_argument("--cell", nargs=4, help="measure ARM V S N here and print the record")
    args = parser.parse_args()
    if args.cell:
        arm, *numbers = args.cell
        print(json.dumps(measure(arm, *map(int, numbers))))
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    grid = itertools.product(range(args.repeats), args.vocabularies, args.sizes, args.lengths)
    for repeat, vocabulary, size, length in grid:
        for arm in ARMS if repeat % 2 == 0 else ARMS[::-1]:
            path = RESULTS / f"{arm}-{vocabulary}-{size}-{length}-{repeat}.json"
            if path.exists():
                continue
            cell = [arm, str(vocabulary), str(size), str(length)]
            command = [sys.executable, __file__, "--cell", *cell]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            path.write_text(done.stdout.strip().splitlines()[-1])
            write_summary()
    write_summary()


if __name__ == "__main__":
    main()
