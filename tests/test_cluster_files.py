"""The files for clusters parse: nobody can run them here."""

import re
import shlex
import subprocess
from pathlib import Path

import yaml

from trl_selfplay import STaRConfig

FOLDER = Path(__file__).parent.parent / "recipes" / "cluster"


def our_flags(text: str) -> set[str]:
    return set(re.findall(r"--((?:use_ray|ray_)\w*)", text))


def test_the_script_for_slurm_parses_and_gives_fields_that_exist() -> None:
    script = FOLDER / "ray.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    assert our_flags(script.read_text()) <= {*STaRConfig.__dataclass_fields__}


def test_the_job_for_kubernetes_is_one_that_runs_the_trainer() -> None:
    job = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    command = shlex.split(job["spec"]["entrypoint"])
    assert command[:2] == ["trl-selfplay", "star"]
    assert {"use_ray", "ray_num_workers"} <= our_flags(job["spec"]["entrypoint"])
    assert our_flags(job["spec"]["entrypoint"]) <= {*STaRConfig.__dataclass_fields__}
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    gpus = sum(
        group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
        for group in workers
        for container in group["template"]["spec"]["containers"]
    )
    assert gpus == int(command[command.index("--ray_num_workers") + 1])
