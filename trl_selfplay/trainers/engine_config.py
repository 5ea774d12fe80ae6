"""Fields that choose the engine which samples, and the settings that vLLM is started with.

In: a config's fields, named as in GRPOConfig where it has them. Out: checked fields, and
`EngineSettings`. Without `use_vllm` and `use_ray` the trainer samples in its own process.
"""

import importlib.util
import logging
import re
import shutil
import subprocess
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import torch
from accelerate import Accelerator

from trl_selfplay.confidential import HidesSecrets, shown
from trl_selfplay.generation.engine import LEAST_VLLM, EngineSettings
from trl_selfplay.generation.ray_cluster import INSTALL as INSTALL_RAY
from trl_selfplay.generation.vllm_process import engine_environment
from trl_selfplay.rounds.plan import OnResume
from trl_selfplay.trainers.field_checks import ABOVE_0, AT_LEAST_0, AT_LEAST_1, Bounds

logger = logging.getLogger(__name__)

_DTYPES = ("bfloat16", "float16", "float32")
_QUANTIZATIONS = ("fp8", "bitsandbytes")
_PATIENCE_S = 60.0  # for another interpreter to look for vLLM
_PRECISION_OF_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Which fields a mode reads, besides `use_vllm`, `vllm_mode` and `allow_engine_change`.
_FIELDS_OF_MODE = {
    "phase": (
        "vllm_python", "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_dtype",
        "vllm_quantization", "vllm_tensor_parallel_size",
    ),
    "server": (
        "vllm_max_model_length", "vllm_server_base_url", "vllm_server_host", "vllm_server_port",
        "vllm_server_timeout",
    ),
}  # fmt: skip
INSTALL = (
    'Install it beside this package (pip install "trl-selfplay[vllm]"), or in an environment of its '
    'own and set vllm_python to its interpreter, such as "/envs/vllm/bin/python".'
)


@dataclass
class EngineConfig(HidesSecrets):
    """Fields of the engine that samples."""

    _BOUNDS = {  # noqa: RUF012  # not a field
        "vllm_gpu_memory_utilization": Bounds(0, 1, exclusive=True),
        "vllm_max_model_length": Bounds(2),  # a prompt and a completion
        "vllm_tensor_parallel_size": AT_LEAST_1,
        "vllm_server_port": Bounds(1, 65535),
        "vllm_server_timeout": Bounds(0),
        "ray_num_workers": AT_LEAST_1,
        "ray_cpus_per_worker": ABOVE_0,
        "ray_gpus_per_worker": AT_LEAST_0,
    }

    use_vllm: Annotated[bool, OnResume.ENGINE] = field(
        default=False,
        metadata={"help": "Sample with vLLM instead of in the training process."},
    )
    vllm_mode: Annotated[str, OnResume.FREE] = field(
        default="phase",
        metadata={
            "help": "'phase': a child process starts vLLM for each sampling phase and exits before "
            "training. 'server': a running vLLM server samples, for a second device."
        },
    )
    vllm_python: Annotated[str | None, OnResume.FREE] = field(
        default=None,
        metadata={
            "help": "Python interpreter that runs vLLM in phase mode; its environment needs vLLM "
            "0.32 or later and none of this package's dependencies. None: this interpreter."
        },
    )
    vllm_gpu_memory_utilization: Annotated[float, OnResume.FREE] = field(
        default=0.9,
        metadata={
            "help": "Share of the device's memory for the engine in phase mode. It gets less if less "
            "is free, since the trainer's model stays on the device."
        },
    )
    vllm_max_model_length: Annotated[int | None, OnResume.FREE] = field(
        default=None,
        metadata={
            "help": "Maximum tokens of a prompt with its completion. None: the model's context, as "
            "far as the engine's memory allows."
        },
    )
    vllm_dtype: Annotated[str | None, OnResume.ENGINE] = field(
        default=None,
        metadata={
            "help": "Precision of the engine in phase mode: 'bfloat16', 'float16' or 'float32'. None: "
            "the precision of the trainer's forward.",
            "choices": list(_DTYPES),
        },
    )
    vllm_quantization: Annotated[str | None, OnResume.ENGINE] = field(
        default=None,
        metadata={
            "help": "Quantize the base weights in the engine in phase mode: 'fp8', or 'bitsandbytes', "
            "which needs vLLM's plug-in. None: as they are in the model's source.",
            "choices": list(_QUANTIZATIONS),
        },
    )
    vllm_tensor_parallel_size: Annotated[int, OnResume.FREE] = field(
        default=1,
        metadata={"help": "Devices over which the engine divides the model in phase mode."},
    )
    vllm_server_base_url: Annotated[str | None, OnResume.FREE] = field(
        default=None,
        metadata={
            "help": "Address of the server, such as 'http://localhost:8000'. If given, "
            "`vllm_server_host` and `vllm_server_port` are ignored."
        },
    )
    vllm_server_host: Annotated[str, OnResume.FREE] = field(
        default="0.0.0.0",  # noqa: S104  # a client's address, TRL's default
        metadata={"help": "Host of the vLLM server in server mode."},
    )
    vllm_server_port: Annotated[int, OnResume.FREE] = field(
        default=8000, metadata={"help": "Port of the vLLM server in server mode."}
    )
    vllm_server_timeout: Annotated[float, OnResume.FREE] = field(
        default=240.0, metadata={"help": "Seconds to wait for the server to be up."}
    )
    use_ray: Annotated[bool, OnResume.ENGINE] = field(
        default=False,
        metadata={
            "help": "Sample with workers on a Ray cluster, each with the in-process sampler, or with "
            "`use_vllm` an engine of its own."
        },
    )
    ray_address: Annotated[str | None, OnResume.FREE] = field(
        default=None,
        metadata={
            "help": "Address 'host:port' of the cluster's head, or 'auto' for the cluster that this "
            "machine is a node of. None: the variable RAY_ADDRESS, or a Ray on this machine alone."
        },
    )
    ray_num_workers: Annotated[int, OnResume.FREE] = field(
        default=1, metadata={"help": "Workers that sample on the Ray cluster."}
    )
    ray_cpus_per_worker: Annotated[float, OnResume.FREE] = field(
        default=1.0, metadata={"help": "CPUs that Ray reserves for a worker; may be a fraction."}
    )
    ray_gpus_per_worker: Annotated[float, OnResume.FREE] = field(
        default=0.0,
        metadata={"help": "GPUs that Ray reserves for a worker. 0: workers sample on CPUs."},
    )
    allow_engine_change: Annotated[bool, OnResume.FREE] = field(
        default=False,
        metadata={
            "help": "Let a resumed run sample with another engine than before: with or without vLLM "
            "or Ray, another version of it, another precision or quantization."
        },
    )

    @property
    def server_url(self) -> str:
        """The address of the vLLM server."""
        given = self.vllm_server_base_url
        return given or f"http://{self.vllm_server_host}:{self.vllm_server_port}"


def check_engine_fields(config: Any) -> None:
    """Raise ValueError for fields of the engine that can't work; warn of those without effect."""
    mode = config.vllm_mode
    if config.use_vllm and mode == "colocate":
        raise ValueError(
            "vllm_mode='colocate' would keep the engine's memory while the model trains. Use "
            "vllm_mode='phase': the engine runs on the same device and ends before training."
        )
    if mode not in (*_FIELDS_OF_MODE, "colocate"):
        raise ValueError(f"vllm_mode={mode!r}; choose 'phase' or 'server'.")
    if config.use_vllm and mode == "server" and config.vllm_server_base_url:
        parts = urlsplit(config.vllm_server_base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"vllm_server_base_url={shown(config.vllm_server_base_url)} is no address. Give one such "
                "as 'http://localhost:8000'."
            )
    used = _FIELDS_OF_MODE[mode] if config.use_vllm else ()
    _warn_unused(
        config, "vllm_", (*used, "vllm_mode"),
        f"vllm_mode={mode!r}" if config.use_vllm else "use_vllm=False",
    )  # fmt: skip
    if not config.use_ray:
        _warn_unused(config, "ray_", (), "use_ray=False")
        return
    _check_ray_fields(config)


def _warn_unused(config: Any, prefix: str, used: tuple[str, ...], where: str) -> None:
    """Warn of fields that aren't at their default and that nothing reads."""
    unused = [
        f"{each.name}={shown(getattr(config, each.name))}"
        for each in fields(EngineConfig)
        if each.name.startswith(prefix)
        and each.name not in used
        and getattr(config, each.name) != each.default
    ]
    if unused:
        logger.warning("%s: without effect with %s.", ", ".join(unused), where)


def _check_ray_fields(config: Any) -> None:
    address, gpus = config.ray_address, config.ray_gpus_per_worker
    if address not in (None, "auto") and not re.fullmatch(r"[^/\s]+:\d+", address):
        raise ValueError(
            f"ray_address={address!r}; give 'host:port' of the cluster's head, 'auto' on one of its "
            "nodes, or None for a Ray on this machine. Ray Client's addresses (ray://…) aren't "
            "supported: run the script on a node, such as with `ray job submit`."
        )
    if config.use_vllm and config.vllm_mode == "server":
        raise ValueError(
            "use_ray=True with vllm_mode='server': a server samples by itself, and Ray's workers start "
            "engines of their own. Set vllm_mode='phase', or leave use_ray out."
        )
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(
            f"ray_gpus_per_worker={gpus:g}; Ray shares one GPU between workers (0.5), or gives a worker "
            "whole ones (1, 2, …)."
        )
    devices = config.vllm_tensor_parallel_size
    if config.use_vllm and devices > 1 and gpus < devices:
        raise ValueError(
            f"vllm_tensor_parallel_size={devices} and ray_gpus_per_worker={gpus:g}: an engine sees only "
            f"the GPUs of its worker. Set ray_gpus_per_worker={devices}."
        )


def check_engine_is_there(config: Any, num_processes: int) -> None:
    """Raise, before a model is loaded, if an engine or Ray can't sample for a config on this machine.

    Raises:
        FileNotFoundError: `vllm_python` is no interpreter.
        ImportError: vLLM or Ray isn't installed, or vLLM is too old.
        ValueError: There are several training processes.
    """
    if not config.use_vllm and not config.use_ray:
        return
    if num_processes > 1:
        field = "use_ray" if config.use_ray else "use_vllm"
        raise ValueError(
            f"{field}=True with {num_processes} training processes, each of which would start its own "
            f"engines or load adapters into one server. Train in one process, or set {field}=False."
        )
    if config.use_ray:
        if importlib.util.find_spec("ray") is None:
            raise ImportError(f"use_ray=True, and Ray isn't installed. {INSTALL_RAY}")
        return  # vLLM has to be on the nodes of the workers
    if config.vllm_mode != "phase":
        return
    if config.vllm_python is not None:
        if shutil.which(Path(config.vllm_python).expanduser()) is None:
            raise FileNotFoundError(
                f"vllm_python={config.vllm_python!r} is no program. Give the path of the "
                'interpreter in the environment that has vLLM, such as "/envs/vllm/bin/python".'
            )
        _check_interpreter(str(Path(config.vllm_python).expanduser()))
    elif importlib.util.find_spec("vllm") is None:
        raise ImportError(f"use_vllm=True, and vLLM isn't installed. {INSTALL}")


# Prints the version of vLLM, "none" without it; importing it would take half a minute.
_FIND_VLLM = """
import importlib.metadata, importlib.util
try:
    print(importlib.metadata.version("vllm"))
except importlib.metadata.PackageNotFoundError:
    print("unknown" if importlib.util.find_spec("vllm") else "none")
"""


def _check_interpreter(python: str) -> None:
    """Raise ImportError if another interpreter has no vLLM, or one that is too old.

    What can't be told here, its engine says when it starts.
    """
    environment = engine_environment(python, torch.device("cpu"), 1)
    command = [python, "-c", _FIND_VLLM]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_PATIENCE_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return
    version = done.stdout.strip()
    if version == "none":
        raise ImportError(
            f"use_vllm=True, and vllm_python={python!r} has no vLLM. Install it there (pip install "
            '"vllm>=0.33"), or name the interpreter of another environment.'
        )
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and tuple(map(int, found.groups())) < LEAST_VLLM:
        raise ImportError(
            f"vllm_python={python!r} has vLLM {version}; {'.'.join(map(str, LEAST_VLLM))} or later is "
            "needed."
        )


def engine_settings(config: Any, model: Any, accelerator: Accelerator) -> EngineSettings:
    """Return the settings of the engine in phase mode.

    Args:
        config: With the fields of `EngineConfig`.
        model: The trainer's model.
        accelerator: The trainer's; its mixed precision is that of the forward.

    Raises:
        ValueError: The quantization doesn't compute in the engine's precision.
    """
    python = config.vllm_python
    dtype = config.vllm_dtype or name_dtype(forward_dtype(model, accelerator))
    if config.vllm_quantization == "fp8" and dtype == "float32":
        whose = "vllm_dtype" if config.vllm_dtype else "that of the trainer's forward"
        raise ValueError(
            f"vllm_quantization='fp8' computes in 16 bits, and the engine's precision is float32, {whose}. "
            "Set vllm_dtype='bfloat16' (or train in it: bf16=True), or leave vllm_quantization out."
        )
    return EngineSettings(
        python=None if python is None else str(Path(python).expanduser()),
        dtype=dtype,  # type: ignore[arg-type]
        quantization=config.vllm_quantization,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        max_model_length=config.vllm_max_model_length,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
        trust_remote_code=config.trust_remote_code,
    )


def forward_dtype(model: Any, accelerator: Accelerator) -> torch.dtype:
    """Return the precision in which the trainer's forward multiplies matrices."""
    autocast = _PRECISION_OF_AUTOCAST.get(accelerator.mixed_precision)
    quantization = getattr(model.config, "quantization_config", None)
    computed = getattr(quantization, "bnb_4bit_compute_dtype", None)
    return autocast or computed or model.dtype


def name_dtype(dtype: torch.dtype) -> str:
    """Return the name of a precision, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
