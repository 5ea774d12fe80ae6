"""Sample with many workers on the machines of a Ray cluster.

In: requests, and the current weights as folders. Out: completions as they finish. Ray places the workers,
moves weights and completions, and tells of a worker that is lost; here, requests are given to workers
that are free, and those of a lost one go back to the queue. A sample is a function of its stream key,
so it makes no difference which worker draws it.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from trl_selfplay.generation.engine import EngineWeights
from trl_selfplay.generation.ray_cluster import RayCluster
from trl_selfplay.generation.ray_worker import (
    Folder,
    RayWorker,
    WorkerPlan,
    describe_folder,
    files_of,
)
from trl_selfplay.generation.request_queue import SECONDS_BETWEEN_LOOKS, RequestQueue, queue_checked
from trl_selfplay.generation.sampler import Requests, SampledCompletion, SamplingOptions
from trl_selfplay.generation.vllm_process import EngineFailure

logger = logging.getLogger(__name__)

# Losses, per worker of the pool and without one completion between them, that end the phase.
_LOSSES_PER_WORKER = 2
_LONGEST_WAIT_S = 1.0
_CLOSE_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """The workers.

    Attributes:
        num_workers: How many.
        num_cpus: CPUs that Ray reserves for each; a fraction is allowed.
        num_gpus: GPUs that Ray reserves for each, and that it alone sees.
        start_patience_s: Seconds to wait for a worker, while there is none, without news of any.
    """

    num_workers: int
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    start_patience_s: float = 1800.0

    def needs(self) -> dict[str, float]:
        """Return the resources of one worker, by Ray's names."""
        return {"CPU": self.num_cpus, "GPU": self.num_gpus}


@dataclass(slots=True, eq=False)
class _Worker:
    """An actor, and what it has.

    Attributes:
        actor: Ray's handle.
        version: Of its weights, once they are loaded.
        numbers: The requests that it is to draw, by its own index of them.
    """

    actor: Any
    version: int | str | None = None
    numbers: dict[int, int] = field(default_factory=dict)


class RaySampler:
    """The `Sampler` over a pool of workers, each with the in-process sampler or a vLLM engine.

    In float32 on CPUs, samples equal those of the in-process sampler, as long as the workers load what is
    trained as it is: all weights, or a LoRA adapter. Other adapters, and quantized weights, reach them
    merged or dequantized, which rounds differently; so do other devices and precisions.

    The workers live from the first `sample` after a `release` until the next one. A worker that is lost
    (killed, out of memory, or with its node) is replaced as soon as there is room, and its unfinished
    requests go to others. A replacement loads the same files as those before, by their digest.

    Args:
        cluster: Where the workers run.
        plan: How a worker samples.
        pool: How many workers there are, and what each may use.
        export: Returns the current weights; called at the start of every `sample`.
        announce: Gets a line when workers start, and one when the first has.

    Attributes:
        engine_record: What the workers sample with; None before the first has started.
        on_restart: Never called: see above.
    """

    def __init__(
        self,
        cluster: RayCluster,
        plan: WorkerPlan,
        pool: PoolSettings,
        export: Callable[[], EngineWeights],
        announce: Callable[[str], None] = logger.info,
    ) -> None:
        self._cluster = cluster
        self._plan = plan
        self._pool = pool
        self._export = export
        self._announce = announce
        self._ray: Any = None
        self._workers: list[_Worker] = []
        # What is awaited of Ray, and of which worker.
        self._awaited: dict[Any, _Worker] = {}
        self._sent: dict[Folder, dict[str, Any]] = {}
        self._weights: EngineWeights | None = None
        self._folders: list[Folder] = []
        self._num_losses = 0  # since the last completion
        self._silence_s = 0.0  # waited without news, and without a worker that has its weights
        self._is_sampling = False
        self.engine_record: dict[str, Any] | None = None
        self.on_restart: Callable[[], None] | None = None

    def suggest_batch_size(self, longest_prompt: int, max_completion_length: int) -> int:
        """Return how many sequences the workers take together: what one takes, for each of them."""
        self._prepare(self._export())
        each = 0
        while not each:
            while not (ready := [w for w in self._workers if w.version is not None]):
                self._receive(None)
            ask = ready[0].actor.suggest_batch_size
            with self._replacing_if_lost(ready[0], None):
                each = self._ray.get(ask.remote(longest_prompt, max_completion_length))
        return self._pool.num_workers * each

    def sample(
        self,
        requests: Requests,
        options: SamplingOptions,
        batch_size: int,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, SampledCompletion]]:
        """Yield `(request index, completion)` as completions finish, each request once.

        Args:
            requests: See `Sampler.sample`.
            options: See `Sampler.sample`.
            batch_size: Most sequences decoded together by all workers.
            on_tokens: See `Sampler.sample`; called when completions arrive, and at least each second.

        Raises:
            ConnectionError: No cluster answers.
            EngineFailure: No worker can be started, or they are lost again and again.
            RuntimeError, ValueError: As a worker's sampler raises them.
        """
        queue = queue_checked(requests, options, batch_size, self._plan.traits.context_length)
        return self._sample_checked(queue, options, batch_size, on_tokens)

    def _sample_checked(
        self,
        queue: RequestQueue,
        options: SamplingOptions,
        batch_size: int,
        on_tokens: Callable[[int], None] | None,
    ) -> Iterator[tuple[int, SampledCompletion]]:
        if not queue.has_more(batch_size, is_decoding=False):
            return
        if self._is_sampling:
            raise RuntimeError(
                "the workers serve one `sample` at a time; close the other one first."
            )
        self._is_sampling = True
        try:
            self._prepare(self._export())
            while True:
                in_progress = sum(len(worker.numbers) for worker in self._workers)
                queue.has_more(batch_size - in_progress, is_decoding=in_progress > 0)
                if not queue and not in_progress:
                    return
                self._give(queue, options, ceil(batch_size / self._pool.num_workers))
                has_idle = any(w.version is not None and not w.numbers for w in self._workers)
                finished = self._receive(
                    queue, SECONDS_BETWEEN_LOOKS if queue.is_open and has_idle else _LONGEST_WAIT_S
                )
                if on_tokens is not None:  # also of nothing, so that the caller can end this
                    on_tokens(sum(len(each.completion_ids) for _, each in finished))
                yield from finished
        finally:
            self._is_sampling = False
            for worker in [w for w in self._workers if w.numbers]:
                self._end(worker)  # it can't be told to stop

    def release(self) -> None:
        """End the workers, and leave the cluster."""
        if self._ray is None:
            return
        closing = [worker.actor.close.remote() for worker in self._workers if worker.version]
        if closing:
            self._ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_PATIENCE_S)
        actors = [worker.actor for worker in self._workers]
        for worker in list(self._workers):
            self._end(worker)
        if actors:  # Ray answers for those that have ended
            answers = [actor.lacks.remote([]) for actor in actors]
            self._ray.wait(answers, num_returns=len(answers), timeout=_CLOSE_PATIENCE_S)
        self._sent.clear()
        self._weights = self._ray = None
        self._num_losses = 0
        self._cluster.release()

    def _prepare(self, weights: EngineWeights) -> None:
        """Have the workers, each of which has these weights or is about to load them."""
        if self._ray is None:
            self._ray = self._cluster.connect()
        self._silence_s = 0.0
        if self._weights != weights:
            self._weights = weights
            paths = [weights.model, *([] if weights.adapter is None else [str(weights.adapter)])]
            self._folders = [describe_folder(path) for path in paths]
            for worker in list(self._workers):
                self._begin_loading(worker)
        if len(self._workers) < self._pool.num_workers:
            if not self._workers:
                self._announce(f"starting {self._pool.num_workers} Ray workers: may take minutes")
            self._fill_pool()

    def _fill_pool(self) -> None:
        """Ask Ray for as many workers as are missing.

        Raises:
            EngineFailure: No node is large enough for one, and none is left.
        """
        self._check_room()
        while len(self._workers) < self._pool.num_workers:
            start = self._ray.remote(
                num_cpus=self._pool.num_cpus, num_gpus=self._pool.num_gpus, max_restarts=0
            )(RayWorker)
            worker = _Worker(start.remote(self._plan))
            self._workers.append(worker)
            self._begin_loading(worker)

    def _check_room(self) -> None:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        needs = {name: amount for name, amount in self._pool.needs().items() if amount > 0}
        fits = any(all(node.get(name, 0) >= needs[name] for name in needs) for node in nodes)
        if fits or any(worker.version is not None for worker in self._workers):
            return
        has = "; ".join(
            ", ".join(f"{node.get(name, 0):g} {name}" for name in needs) for node in nodes
        )
        wants = ", ".join(f"{amount:g} {name}" for name, amount in needs.items())
        raise EngineFailure(
            f"no node of the Ray cluster has room for a worker, which needs {wants}; the nodes have: "
            f"{has or 'none is left'}. Lower ray_cpus_per_worker or ray_gpus_per_worker, or add nodes.",
            may_pass=False,
        )

    def _begin_loading(self, worker: _Worker) -> None:
        worker.version = None
        self._forget(worker)
        self._awaited[worker.actor.lacks.remote(self._folders)] = worker

    def _give(self, queue: RequestQueue, options: SamplingOptions, batch_size: int) -> None:
        """Give requests to the workers that have nothing to do.

        Half of what waits is divided among all of them, so that they end at about the same time; but a
        worker gets as many as it decodes together. The only one of a pool gets all.
        """
        num_workers = self._pool.num_workers
        for worker in self._workers:
            if worker.numbers or worker.version is None or not queue:
                continue
            share = len(queue) if num_workers == 1 else ceil(len(queue) / (2 * num_workers))
            numbers = queue.take(max(share, batch_size), lambda _: True)
            worker.numbers = dict(enumerate(numbers))
            requests = [queue.requests[number] for number in numbers]
            draw = worker.actor.sample.options(num_returns="streaming")
            self._awaited[draw.remote(worker.version, requests, options, batch_size)] = worker

    def _receive(
        self, queue: RequestQueue | None, wait_s: float = _LONGEST_WAIT_S
    ) -> list[tuple[int, SampledCompletion]]:
        """Wait for news of a worker; return the completions that have come."""
        ready, _ = self._ray.wait(list(self._awaited), num_returns=1, timeout=wait_s)
        if not ready:
            self._check_patience(wait_s)
            return []
        self._silence_s = 0.0
        worker = self._awaited.pop(ready[0])
        with self._replacing_if_lost(worker, queue):
            return self._read(ready[0], worker)
        return []

    def _read(self, item: Any, worker: _Worker) -> list[tuple[int, SampledCompletion]]:
        """Take what a worker has returned: folders that it lacks, its record, or completions."""
        if not isinstance(item, self._ray.ObjectRef):
            try:
                group = self._ray.get(next(item))
            except StopIteration:
                raise RuntimeError(
                    f"a worker gave no completion for {len(worker.numbers)} of its requests"
                ) from None
            finished = [(worker.numbers.pop(index), completion) for index, completion in group]
            if worker.numbers:  # else there is nothing more to come
                self._awaited[item] = worker
            self._num_losses = 0
            return finished
        answer = self._ray.get(item)
        weights = self._weights
        assert weights is not None
        if isinstance(answer, list):
            files = {folder.path: self._send(folder) for folder in answer}
            loading = worker.actor.load.remote(weights, self._folders, files)
            self._awaited[loading] = worker
        else:
            if self.engine_record is None:
                self._announce(f"the first Ray worker has started: {answer}")
            elif self.engine_record != answer:
                raise RuntimeError(
                    f"workers sample with different software: {self.engine_record} and {answer}. "
                    "Install the same on all nodes."
                )
            self.engine_record = answer
            worker.version = weights.version
        return []

    def _send(self, folder: Folder) -> dict[str, Any]:
        """Return a folder's files in Ray's object store, which get there once."""
        if folder not in self._sent:
            files = files_of(Path(folder.path))
            self._sent[folder] = {file.name: self._ray.put(file.read_bytes()) for file in files}
        return self._sent[folder]

    def _check_patience(self, waited_s: float) -> None:
        """Count seconds without news; raise EngineFailure after too many without a worker."""
        if any(worker.version is not None for worker in self._workers):
            self._silence_s = 0.0
            return
        self._silence_s += waited_s
        if self._silence_s > self._pool.start_patience_s:
            free = self._ray.available_resources()
            raise EngineFailure(
                f"no Ray worker has started within {self._silence_s:.0f} s; each needs {self._pool.needs()}, "
                f"and free is {free}. Is the cluster busy with other jobs?",
                may_pass=False,
            )

    @contextmanager
    def _replacing_if_lost(self, worker: _Worker, queue: RequestQueue | None) -> Iterator[None]:
        """Replace the worker if Ray or its engine says that it has failed; raise what it raised itself."""
        errors = self._ray.exceptions
        try:
            yield
        except errors.RayTaskError as error:
            if not isinstance(error.cause, EngineFailure):
                raise error.cause from error
            self._replace(worker, error.cause, queue)
        except errors.RayError as error:
            self._replace(worker, error, queue)

    def _replace(self, worker: _Worker, error: Exception, queue: RequestQueue | None) -> None:
        """Put a lost worker's requests back, and start another in its place.

        Raises:
            EngineFailure: Too many were lost since the last completion.
        """
        if queue is not None:
            queue.put_back(worker.numbers.values())
        num_requests = len(worker.numbers)
        self._end(worker)
        self._num_losses += 1
        if self._num_losses > _LOSSES_PER_WORKER * self._pool.num_workers:
            raise EngineFailure(
                f"{self._num_losses} Ray workers were lost without a completion between them, the last "
                f"one by: {error}\nWhat is sampled is kept; resuming goes on from there.",
                may_pass=False,
            ) from error
        logger.warning(
            "a Ray worker was lost (%s); its %d unfinished requests go to others.",
            str(error).strip().split("\n")[0],
            num_requests,
        )
        self._fill_pool()

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._forget(worker)
        self._ray.kill(worker.actor)

    def _forget(self, worker: _Worker) -> None:
        for item in [item for item, other in self._awaited.items() if other is worker]:
            del self._awaited[item]
