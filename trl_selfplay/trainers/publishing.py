"""What of a run is published, and what never leaves the machine.

In: a trainer and the Hub's settings in its config. Out: the model and, if configured, the samples in
repositories; files without tokens and other secrets in the config.
"""

from typing import Any

from transformers import Trainer

from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.inspection.samples_repository import push_samples
from trl_selfplay.rounds.identity import without_secrets
from trl_selfplay.rounds.training import changed_settings


class KeepsToken(Trainer):
    """Leaves tokens and other secrets out of the arguments that `save_model` writes.

    The parent writes the whole config as `training_args.bin`, with `hub_token` and, say, the token in
    `model_init_kwargs`, and pushes that file.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; push it, as the parent does, if `push_to_hub` is set."""
        args: Any = self.args
        given = {name: value for name, value in vars(args).items() if isinstance(value, dict)}
        safe = {name: without_secrets(value) for name, value in given.items()}
        with changed_settings(args, {**safe, "hub_token": None, "push_to_hub": False}):
            super().save_model(output_dir, _internal_call)
        if args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=args.hub_revision)


class PublishesSamples(KeepsToken):
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
