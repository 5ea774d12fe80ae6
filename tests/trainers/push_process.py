"""A tiny STaR run that is pushed twice: `python push_process.py OUTPUT_DIR MODEL_DIR TOKEN`.

It runs in an interpreter of its own, because huggingface_hub reads where the Hub is as it is imported.
"""

import sys
import traceback

from datasets import Dataset

from trl_selfplay import STaRConfig, STaRTrainer

HOSTILE = "| <script>alert(1)</script>\n---\ntags: [evil]"


def contains_solution(completions, solution, **kwargs):
    return [float(s in c.split()) for c, s in zip(completions, solution, strict=True)]


contains_solution.__name__ = HOSTILE

if __name__ == "__main__":
    output_dir, model, token = sys.argv[1:]
    trainer = STaRTrainer(
        model,
        STaRConfig(
            output_dir, num_rounds=1, num_generations=4, temperature=1.0, max_completion_length=8,
            max_steps=1, per_device_train_batch_size=2, report_to=[], disable_tqdm=True, use_cpu=True,
            bf16=False, gradient_checkpointing=False, push_to_hub=True, hub_private_repo=True,
            hub_token=token, log_completions_hub_repo="samples",
        ),
        train_dataset=Dataset.from_dict(
            {"prompt": [f"Q {i} + 0 = ? {HOSTILE}" for i in range(10)], "solution": [*"0123456789"]}
        ),
        eval_dataset=Dataset.from_dict({"prompt": ["Q 1 + 1 = ?"], "solution": ["2"]}),
        reward_funcs=contains_solution,
    )  # fmt: skip
    trainer.train()
    try:
        trainer.push_to_hub()
    except Exception:
        traceback.print_exc()
    trainer.push_to_hub(dataset_name="someone/sums")
