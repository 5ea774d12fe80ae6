"""Of two runs in one folder the second is refused, however it names the folder, until the first has ended."""

import signal
from pathlib import Path
from typing import Any

import processes
import pytest
from tiny_runs import build, outcome_of
from transformers import TrainerCallback

from trl_selfplay.disk import is_found


class Waits(TrainerCallback):
    """Touches a file at the first step, and waits for a signal."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        Path(self.path).touch()
        signal.pause()


def train(folder: str, source: str, *waits: str) -> None:
    trainer = build("STaR", folder, source, callbacks=[Waits(path) for path in waits])
    trainer.train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_folder_is_one_runs_until_it_is_killed(source, tmp_path) -> None:
    folder, link = tmp_path / "run", tmp_path / "link"
    first = processes.start(train, str(folder), str(source), str(tmp_path / "waits"))
    try:
        assert is_found(tmp_path / "waits")
        link.symlink_to(folder)
        for method, name in (("STaR", folder), ("STaR", link), ("IRPO", link), ("SPIN", folder)):
            with pytest.raises(RuntimeError, match="another process is training into"):
                build(method, name, source).train()
    finally:
        first.kill()
        processes.wait_for(first)
    train(str(link), str(source))
    train(str(tmp_path / "whole"), str(source))
    assert outcome_of(folder) == outcome_of(tmp_path / "whole")
