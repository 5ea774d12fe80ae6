"""ReST^EM against TRL's GRPOTrainer: held-out accuracy against seconds, and peak memory.

Both start from the same weights, sample as often (prompts x completions x rounds) for the same
prompts with the same reward (0 for a completion that doesn't end), temperature 1 and LoRA, and each has its
learning rate chosen on the selection prompts from the same ones; GRPO also its number of
completions a prompt, at its best learning rate. The curve on the report prompts, which choose
nothing, is reported whoever wins.
Seconds are those of sampling, grading and training: neither loading nor evaluation counts, nor its
memory.

The start is the model after a few steps on worked answers of other prompts, since a model that is
never right teaches neither. ReST^EM samples with this package's sampler; GRPO with `generate`, or
with --use-vllm, where its peak memory is that which vLLM reserves. Each run is a process of its own and a file under results/against_grpo; what
is there is not run again. About an hour on one core:

    OMP_NUM_THREADS=1 python benchmarks/against_grpo.py

At full size, on one GPU (any dataset with the columns prompt, text or chat, and solution):

    python benchmarks/against_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --warm-up-steps 0 \
        --dataset trl-lib/DeepMath-103K --reward math_reward --max-completion-length 1024 \
        --num-prompts 1024 --num-generations 8 --num-rounds 3 --num-select 256 --num-report 512 \
        --grpo-batch 64 --rest-em-batch 16 --rest-em-steps 128 --grpo-generations 4 8 16 \
        --use-vllm --results against_grpo_gpu
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from em_tasks import load_task, train_start
from held_out_curve import Curve, held_out_accuracy
from recipe_demos import demo_lora

from trl_selfplay.disk import save_text

RESULTS = Path(__file__).parent / "results" / "against_grpo"
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
TRAINING: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "logging_steps": 1000,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def load_rows(args: argparse.Namespace) -> dict[str, Any]:
    """Return the training, selection and report prompts, and the worked answers of others."""
    if args.dataset is None:
        task = load_task(args.task, args.seed)
        sets = {"train": task.train, "select": task.select, "report": task.report}
        sets["other"] = task.other
    else:
        from datasets import load_dataset

        rows, start, sets = load_dataset(args.dataset, split="train").shuffle(seed=args.seed), 0, {}
        for name in ("train", "select", "report"):
            size = getattr(args, "num_prompts" if name == "train" else f"num_{name}")
            sets[name] = rows.select(range(start, start + size))
            start += size
    sizes = {"train": args.num_prompts, "select": args.num_select, "report": args.num_report}
    for name, size in sizes.items():
        if len(sets[name]) < size:
            raise ValueError(
                f"there are {len(sets[name])} prompts to {name}; {size} were asked for"
            )
        sets[name] = sets[name].select(range(size)).select_columns(["prompt", "solution"])
    return sets


def lora() -> Any:
    """Return the adapter that every run trains."""
    return demo_lora("star")


def start_folder(args: argparse.Namespace) -> str:
    """Return where the weights lie that every run starts from."""
    from trl_selfplay.demos.words import load_demo_model_path

    model = args.model or load_demo_model_path()
    if args.warm_up_steps == 0:
        return model
    name = f"against-grpo-{Path(model).name}-{args.task}-{args.warm_up_steps}-{args.seed}"
    return str(Path(load_demo_model_path()).parent / name)


def make_start(args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune on worked answers of other prompts, merge, save; return the start's scores."""
    from datasets import Dataset

    from trl_selfplay.demos.words import load_demo_model_path

    rows = load_rows(args)
    source = args.model or load_demo_model_path()
    any_row = [{"prompt": "?", "completion": "!"}]  # for a constructor whose trainer doesn't train
    other = rows.get("other") or Dataset.from_list(any_row)
    trainer = train_start(source, other, args.warm_up_steps, args.seed, dtype())
    scores = score_sets(trainer, rows, args, args.num_rounds)
    if args.warm_up_steps:
        trainer.model.merge_and_unload().save_pretrained(start_folder(args))
        trainer.processing_class.save_pretrained(start_folder(args))
    return {"points": [{"samples": 0, "seconds": 0.0, **scores}]}


def score_sets(
    trainer: Any, rows: dict[str, Any], args: argparse.Namespace, rounds: int
) -> dict[str, float]:
    """Return the accuracy on the report prompts, after all rounds on the selection prompts too."""
    from trl_selfplay.demos.script_arguments import load_reward_func

    reward = load_reward_func(args.reward)
    return {
        name: held_out_accuracy(trainer, rows[name], args.max_completion_length, reward)
        for name in (("select", "report") if rounds == args.num_rounds else ("report",))
    }


def dtype() -> str:
    """Return the weights' type on this machine."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


def run_method(args: argparse.Namespace, method: str, rate: float, num: int) -> dict[str, Any]:
    """Train with one method; return its curve and its peak memory."""
    rows = load_rows(args)
    samples = args.num_prompts * args.num_generations
    with tempfile.TemporaryDirectory() as folder:
        build = build_rest_em if method == "rest_em" else build_grpo
        trainer, steps = build(args, rows, rate, num, folder)
        curve = Curve(lambda rounds: score_sets(trainer, rows, args, rounds), steps, samples)
        trainer.add_callback(curve)
        curve.start()
        trainer.train()
        curve.stop()
    return {
        "points": curve.points,
        "peak_gib": curve.peak_gib,
        "steps": sum(line["steps"] for line in trainer.run.lines)
        if method == "rest_em"
        else trainer.state.global_step,
        "log": [line["seconds"] | {"examples": line["examples"]} for line in trainer.run.lines]
        if method == "rest_em"
        else trainer.state.log_history,
    }


def build_rest_em(
    args: argparse.Namespace, rows: dict[str, Any], rate: float, num: int, folder: str
) -> tuple[Any, None]:
    """Return ReSTEMTrainer with the paper's scheme: every round from the start, cap, filter."""
    from trl_selfplay import ReSTEMConfig, ReSTEMTrainer
    from trl_selfplay.demos.script_arguments import load_reward_func

    trainer = ReSTEMTrainer(
        start_folder(args),
        ReSTEMConfig(
            folder,
            num_rounds=args.num_rounds,
            num_generations=num,
            max_completion_length=args.max_completion_length,
            max_steps=args.rest_em_steps,
            per_device_train_batch_size=args.rest_em_batch,
            learning_rate=rate,
            on_empty_round="stop",
            seed=args.seed,
            bf16=torch.cuda.is_available(),
            model_init_kwargs={"dtype": dtype()},
            **SAMPLING,
            **TRAINING,
        ),
        train_dataset=rows["train"],
        reward_funcs=load_reward_func(args.reward),
        peft_config=lora(),
    )
    return trainer, None


def build_grpo(
    args: argparse.Namespace, rows: dict[str, Any], rate: float, num: int, folder: str
) -> tuple[Any, int]:
    """Return GRPOTrainer with TRL's defaults, and its optimizer steps a round."""
    from trl import GRPOConfig, GRPOTrainer

    from trl_selfplay.demos.script_arguments import load_reward_func

    steps, left = divmod(args.num_prompts * args.num_generations, args.grpo_batch)
    if left or args.grpo_batch % num:
        raise ValueError(
            f"--grpo-batch {args.grpo_batch} must divide the {args.num_prompts} x "
            f"{args.num_generations} completions of a round, and be divisible by {num} completions "
            "a prompt"
        )
    trainer = GRPOTrainer(
        start_folder(args),
        reward_funcs=reward_if_ended(load_reward_func(args.reward), start_folder(args)),
        args=GRPOConfig(
            folder,
            num_generations=num,
            max_completion_length=args.max_completion_length,
            max_steps=steps * args.num_rounds,
            per_device_train_batch_size=args.grpo_batch,
            learning_rate=rate,
            seed=args.seed,
            bf16=torch.cuda.is_available(),
            model_init_kwargs={"dtype": dtype()},
            use_vllm=args.use_vllm,
            **SAMPLING,
            **TRAINING,
        ),
        train_dataset=rows["train"],
        peft_config=lora(),
    )
    return trainer, steps


def reward_if_ended(reward: Any, model: str) -> Any:
    """Return the reward, 0 for completions that were cut, as ReST^EM and the held-out scores see it."""
    from transformers import AutoTokenizer, GenerationConfig

    listed = GenerationConfig.from_pretrained(model).eos_token_id
    ends = {AutoTokenizer.from_pretrained(model).eos_token_id}
    ends |= set(listed) if isinstance(listed, list) else {listed}

    def ended_reward(completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        scores = reward(completions=completions, completion_ids=completion_ids, **columns)
        return [
            float(score or 0.0) if ids and ids[-1] in ends else 0.0
            for score, ids in zip(scores, completion_ids, strict=True)
        ]

    return ended_reward


def name_of(method: str, rate: float, num: int) -> str:
    """Return a run's name."""
    return f"{method}-{rate:g}-{num}"


def load(args: argparse.Namespace, name: str) -> dict[str, Any] | None:
    """Return a finished run.

    Raises:
        ValueError: It was made with other settings.
    """
    path = args.results / f"{name}.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    free = ("here", "results", "learning_rates", "grpo_generations")
    differing = {
        key: (value, now)
        for key, value in record["settings"].items()
        if (now := getattr(args, key, None)) != value and key not in free
    }
    if differing:
        raise ValueError(f"{path} was made with other settings: {differing}. Choose --results.")
    return record


def run(args: argparse.Namespace, name: str) -> None:
    """Run in a process of its own what is not there yet."""
    if load(args, name) is None:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--here", name], check=True)
        write_summary(args)


def run_here(args: argparse.Namespace) -> None:
    """Run one method, or make the start, and write it down."""
    if args.here == "start":
        record = make_start(args)
    else:
        method, rate, num = split_name(args.here)
        record = run_method(args, method, rate, num)
    settings = {k: v for k, v in vars(args).items() if k not in ("here", "results")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    record |= {"settings": settings, "device": device, "threads": torch.get_num_threads()}
    save_text(args.results / f"{args.here}.json", json.dumps(record, indent=1))


def split_name(name: str) -> tuple[str, float, int]:
    """Return method, learning rate and completions a prompt of a run's name."""
    method, rest = name.split("-", 1)
    rate, num = rest.rsplit("-", 1)
    return method, float(rate), int(num)


def best_of(args: argparse.Namespace, method: str, nums: list[int]) -> str | None:
    """Return the run of a method with the best last selection score; ties to the lower rate.

    None if no run has finished all rounds.
    """
    found = {
        name: record["points"][-1]["select"]
        for rate in sorted(args.learning_rates)
        for num in nums
        if (record := load(args, name := name_of(method, rate, num)))
        and "select" in (record["points"] or [{}])[-1]
    }
    return max(found, key=lambda name: found[name]) if found else None


def write_summary(args: argparse.Namespace) -> None:
    """Write the tables of the runs present beside their folder."""
    versions = ", ".join(f"{n} {version(n)}" for n in ("trl", "transformers", "peft", "torch"))
    start = load(args, "start")
    if start is None:
        return
    origin = start["points"][0]
    lines = [
        "# ReST^EM against GRPO",
        "",
        f"{args.model or 'SmolLM2-135M-Instruct'} after {args.warm_up_steps} steps on worked "
        f"answers, LoRA; {args.dataset or args.task}; {args.num_prompts} prompts × "
        f"{args.num_generations} completions × {args.num_rounds} rounds for both; seed {args.seed}. "
        f"{start['device']}, {platform.system()}, {start['threads']} threads; {versions}; "
        f"{datetime.date.today().isoformat()}. Script: `benchmarks/against_grpo.py`. Accuracy is "
        f"greedy: {args.num_select} selection and {args.num_report} report prompts (standard error "
        f"up to {0.5 / args.num_report**0.5:.2f}). Seconds and memory are those of sampling, "
        "grading and training.",
        "",
        f"The start: selection {origin['select']:.3f}, report {origin['report']:.3f}.",
        "",
        "| run | learning rate | completions a prompt | selection | report | seconds | steps | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(args.results.glob("*-*.json")):
        record = json.loads(path.read_text())
        method, rate, num = split_name(path.stem)
        last = record["points"][-1] if record["points"] else origin
        selection = f"{last['select']:.3f}" if "select" in last else "stopped early"
        lines.append(
            f"| {method} | {rate:g} | {num} | {selection} | {last['report']:.3f} | {last['seconds']:.0f} | "
            f"{record['steps']} | {record['peak_gib']:.2f} |"
        )
    lines += ["", "The best of each by the selection prompts; report accuracy by seconds:", ""]
    for method, nums in (
        ("rest_em", [args.num_generations]),
        ("grpo", sorted({args.num_generations, *args.grpo_generations})),
    ):
        if (name := best_of(args, method, nums)) is None:
            continue
        points = ", ".join(
            f"{p['seconds']:.0f} s {p['report']:.3f}" for p in (load(args, name) or {})["points"]
        )
        lines.append(f"- {name}: 0 s {origin['report']:.3f}, {points}")
    args.results.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run what is missing: the start, all learning rates of both, GRPO's other group sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="reversal", help="of em_tasks.py, without --dataset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="id or folder; the demo's by default")
    parser.add_argument("--dataset", help="id or folder; with columns prompt and solution")
    parser.add_argument("--reward", default="exact_reward")
    parser.add_argument("--warm-up-steps", type=int, default=8)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--num-generations", type=int, default=4)
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--num-select", type=int, default=32)
    parser.add_argument("--num-report", type=int, default=64)
    parser.add_argument("--max-completion-length", type=int, default=36)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4, 1e-3])
    parser.add_argument("--grpo-generations", type=int, nargs="*", default=[2, 8])
    parser.add_argument("--grpo-batch", type=int, default=8, help="completions a step")
    parser.add_argument("--rest-em-batch", type=int, default=4, help="examples a step")
    parser.add_argument("--rest-em-steps", type=int, default=12, help="steps a round")
    parser.add_argument("--use-vllm", action="store_true", help="GRPO samples with vLLM")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--here", help="run this one in this process")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    if args.here:
        run_here(args)
        return
    if args.warm_up_steps and args.dataset:
        raise ValueError("--dataset has no worked answers to start from: set --warm-up-steps 0")
    run(args, "start")
    for rate in sorted(args.learning_rates, reverse=True):
        for method in ("rest_em", "grpo"):
            run(args, name_of(method, rate, args.num_generations))
    if best := best_of(args, "grpo", [args.num_generations]):
        for num in args.grpo_generations:
            run(args, name_of("grpo", split_name(best)[1], num))
    write_summary(args)


if __name__ == "__main__":
    main()
