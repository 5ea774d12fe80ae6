"""What of a run is published.

In: a trainer and the Hub's settings in its config. Out: the model and, if configured, the samples in
repositories. Secrets in the config reach no file: see `confidential.py`.
"""

from typing import Any

from transformers import Trainer

from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.inspection.samples_repository import push_samples


class PublishesSamples(Trainer):
    """Pushes the samples of all rounds beside the model if `log_completions_hub_repo` names a repository."""

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push the model with its card, and the samples if configured."""
        pushed = super().push_to_hub(*args, **kwargs)
        config: Any = self.args
        if config.log_completions_hub_repo and self.is_world_process_zero():
            push_samples(
                RunFolder.open(config.output_dir),
                config.log_completions_hub_repo,
                private=config.hub_private_repo,
                token=kwargs.get("token") or config.hub_token,
                model=str(self.hub_model_id or ""),
            )
        return pushed
