"""Keep the rounds of a run on a store as well: `rounds_dir` follows `output_dir/_rounds`.

In: a trainer whose config names a `rounds_dir`. Out: while it trains, each file and folder of `_rounds`
goes to the store as soon as it is whole on disk, and checkpoints once all processes have written them;
at the start, what the disk lacks is fetched. All code goes on reading and writing local paths.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate import Accelerator
from transformers import TrainerCallback

from trl_selfplay.disk import RESUME, followed, save_text, unused_aside
from trl_selfplay.evaluation.progress import say
from trl_selfplay.peers import from_main, together, wait_for_all
from trl_selfplay.rounds.checkpoints import list_checkpoints
from trl_selfplay.rounds.lease import Lease, LeaseError, LeaseOfMain
from trl_selfplay.rounds.store import (
    FORMAT,
    Entry,
    RoundsStore,
    StoreError,
    is_checkpoint,
    is_same,
    read_record,
    scan,
)

logger = logging.getLogger(__name__)

# On the store: whose rounds these are, and how often a run has gone on with them.
_OWNER = "_run.json"
# In output_dir: the same, and what is still to be deleted on the store.
RECORD = "_rounds_store.json"
_LINES = "rounds.jsonl"
_WAIT_S = 60.0  # before a store that failed is tried again
_LAST_TRIES_S = (5.0, 15.0, 40.0)


def open_store(args: Any, accelerator: Accelerator) -> RoundsStore | None:
    """Return the store that a config names, None without; the main process sees that it answers.

    Raises:
        StoreError: It doesn't; in the other processes PeerError.
    """
    if args.rounds_dir is None:
        return None
    store = RoundsStore(args.rounds_dir)
    with together(accelerator):
        if accelerator.is_main_process:
            store.check_answers()
    return store


def read_from_store(store: RoundsStore | None, path: Path, root: Path) -> str | None:
    """Return the text of a file below `root` that the disk lacks and the store has, otherwise None."""
    if store is None or path.exists():
        return None
    content = store.read(path.relative_to(root).as_posix())
    return None if content is None else content.decode()


@contextmanager
def kept_in_store(trainer: Any, resume: bool) -> Iterator[None]:
    """Fetch what the disk lacks, and keep the store up to date while this lasts.

    Raises:
        FileExistsError: The store holds rounds, and the run isn't to be resumed.
        LeaseError: Another run holds the store, or has taken it over.
        StoreError: The store can't be reached or written to at the start; or at the end it lacks
            files, which are in `output_dir`.
        ValueError: `output_dir` and the store hold rounds of different runs.
    """
    store, root, accelerator = trainer.store, trainer.run.root, trainer.accelerator
    if store is None or trainer.args.dry_run or (not resume and scan(root)):
        yield  # which is refused where the rounds on disk are
        return
    with ExitStack() as stack:
        mirror, token = Mirror(store, root), ""
        stack.callback(setattr, store, "pauses_s", store.pauses_s)
        if accelerator.is_main_process:
            mirror.lease = lease = stack.enter_context(Lease(store))
            mirror.bring_together(resume)
            token = lease.token
        token = from_main(accelerator, token)
        if not accelerator.is_main_process:
            mirror.lease = LeaseOfMain(store, token)
        store.pauses_s = ()  # from here on others files come, and with them other tries
        stack.enter_context(followed(root, mirror))
        callback = _KeepsCheckpoints(mirror, accelerator)
        trainer.add_callback(callback)
        try:
            yield
        except BaseException:
            mirror.finish(is_failing=True)
            raise
        else:
            mirror.finish(is_failing=False)
        finally:
            trainer.remove_callback(callback)


@contextmanager
def followed_by_store(url: str | None, root: Path) -> Iterator[None]:
    """Do the same on a store as on disk while this lasts, where no trainer is; None: there is no store.

    Args:
        url: Of the store, as `rounds_dir`.
        root: The run's folder, which is brought together with the store first.

    Raises:
        LeaseError, StoreError, ValueError: As `kept_in_store`.
    """
    if url is None:
        yield
        return
    store = RoundsStore(url)
    with Lease(store) as lease:
        mirror = Mirror(store, root)
        mirror.lease = lease
        mirror.bring_together(resume=True)
        with followed(root, mirror):
            yield
        mirror.finish(is_failing=False)


class Mirror:
    """Follows `_rounds` on disk, and does the same on the store, in the same order.

    Where the store fails, the run goes on: what it lacks waits in order, and is tried again with the
    next file.

    Args:
        store: The store.
        root: `output_dir/_rounds`.
        clock: Returns the time in seconds; tests pass their own.
        last_tries_s: Seconds before each further try at the end of a run.

    Attributes:
        lease: Of the main process; nothing goes to the store while another run holds it.
    """

    def __init__(
        self,
        store: RoundsStore,
        root: Path,
        clock: Callable[[], float] = time.monotonic,
        last_tries_s: tuple[float, ...] = _LAST_TRIES_S,
    ) -> None:
        self.lease: Lease | LeaseOfMain | None = None
        self._store = store
        self._root = root
        self._record = root.parent / RECORD
        self._clock = clock
        self._last_tries_s = last_tries_s
        self._waiting: dict[str, bool] = {}  # name: is it to be put? else deleted
        self._owner: dict[str, Any] = {}
        self._next_try = 0.0
        self._lock = threading.Lock()  # grading writes in a thread of its own

    def written(self, path: Path) -> None:
        """Put a file or folder that is whole."""
        self._note(path, is_put=True)

    def gone(self, path: Path) -> None:
        """Delete a file or folder on the store."""
        self._note(path, is_put=False)

    def _note(self, path: Path, is_put: bool) -> None:
        name = path.absolute().relative_to(self._root.absolute()).as_posix()
        with self._lock:
            for other in [n for n in self._waiting if n == name or n.startswith(f"{name}/")]:
                del self._waiting[other]
            self._waiting[name] = is_put
            if self._clock() >= self._next_try:
                self._try()
            if not is_put and name in self._waiting:
                self._save_record()

    def _try(self) -> None:
        """Do what waits; where the store fails, say so once and leave the rest for later."""
        try:
            self._do_all()
        except StoreError as error:
            if not self._next_try:
                logger.warning(
                    "%s The run goes on with the files in %s; what %s lacks is put there as soon as it "
                    "answers.",
                    error,
                    self._root,
                    self._store.url,
                )
            self._next_try = self._clock() + _WAIT_S

    def _do_all(self) -> None:
        if self.lease is not None:
            self.lease.ensure()
        had_failed = bool(self._next_try)
        while self._waiting:
            name, is_put = next(iter(self._waiting.items()))
            path = self._root / name
            if not is_put:
                self._store.delete(name)
            elif path.exists():
                self._store.put(name, path)
            del self._waiting[name]
        if had_failed:
            self._next_try = 0.0
            logger.warning("%s answers again and has all files of the run.", self._store.url)
            self._save_record()

    def finish(self, is_failing: bool) -> None:
        """Do what still waits, with more patience unless the run has failed.

        Raises:
            StoreError: The store still fails, and the run has not.
        """
        with self._lock:
            try:
                for pause_s in (None,) if is_failing else (None, *self._last_tries_s):
                    if not self._waiting:
                        return
                    if pause_s is not None:
                        time.sleep(pause_s)
                    self._try()
            except LeaseError:
                if is_failing:  # which has its own error, most often this one
                    return
                raise
            if not self._waiting:
                return
            text = (
                f"{self._store.url} lacks {len(self._waiting)} of this run's files, "
                f"{next(iter(self._waiting))} among them. Keep {self._root}, which has them; once the "
                f"store answers, {RESUME}, with the same output_dir."
            )
        if is_failing:
            logger.warning("%s", text)
        else:
            raise StoreError(text)

    def bring_together(self, resume: bool) -> None:
        """Make disk and store alike, once the lease is held.

        Raises:
            FileExistsError, StoreError, ValueError: As `kept_in_store`.
        """
        content = self._record.read_bytes() if self._record.exists() else None
        record = read_record(content, str(self._record), _names_a_run)
        owner = read_record(self._store.read(_OWNER), f"{self._store.url}/{_OWNER}", _names_a_run)
        stored = self._store.entries()
        local = scan(self._root)
        if stored and not resume:
            raise FileExistsError(
                f"rounds_dir={self._store.url!r} already holds rounds. To go on with them, {RESUME}; or "
                "choose another rounds_dir."
            )
        is_own = bool(owner) and record.get("run") == owner.get("run")
        if local and stored and not is_own:
            raise ValueError(
                f"{str(self._root)!r} and rounds_dir={self._store.url!r} both hold rounds, and not of the "
                "same run. Choose an empty output_dir to go on from the store, or another rounds_dir to "
                "keep the rounds on disk there."
            )
        known = owner if stored or is_own else record if local else {}
        run = known.get("run") or uuid4().hex
        session = max(owner.get("session", 0), record.get("session", 0) if is_own else 0)
        self._owner = {"format": FORMAT, "run": run, "session": session + 1}
        if is_own:
            for name in record.get("deleted", []):
                self._store.delete(name)
                stored = {
                    n: e for n, e in stored.items() if n != name and not n.startswith(f"{name}/")
                }
            if stored and record["session"] < owner["session"]:
                local = self._set_aside(local, stored)
            else:
                self._put_what_differs(local, stored)
        else:
            # First, so that a run that is killed below goes on: both will be known to be its own.
            self._take_over()
            self._put_what_differs(local, stored)
        self._fetch({name: entry for name, entry in stored.items() if name not in local})
        if is_own:  # last: until then what differs is told by the session before
            self._take_over()

    def _take_over(self) -> None:
        """Write whose rounds these are, on the store and on disk."""
        self._store.write(_OWNER, json.dumps(self._owner).encode())
        self._save_record()

    def _put_what_differs(self, local: dict[str, Path], stored: dict[str, Entry]) -> None:
        for name in sorted(local, key=lambda name: (name == _LINES, name)):
            if is_checkpoint(name):
                if name in stored and not is_same(local[name], stored[name]):
                    self._fetch({name: stored[name]})  # the one on disk may be torn
            elif name not in stored or not is_same(local[name], stored[name]):
                self._store.put(name, local[name])

    def _set_aside(self, local: dict[str, Path], stored: dict[str, Entry]) -> dict[str, Path]:
        """Move what differs from the store out of the way; return what is left on disk."""
        same = {n: p for n, p in local.items() if n in stored and is_same(p, stored[n])}
        differing = {name: path for name, path in local.items() if name not in same}
        if not differing:
            return same
        aside = unused_aside(self._root)
        for name, path in differing.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            path.rename(aside / name)
        logger.warning(
            "a run on another disk has gone on with the rounds in %s, so they count, and not those in "
            "%s: %d files and folders that differ or that the store lacks were moved to %s.",
            self._store.url,
            self._root,
            len(differing),
            aside,
        )
        return same

    def _fetch(self, entries: dict[str, Entry]) -> None:
        if not entries:
            return
        started = time.monotonic()
        num_bytes = sum(
            self._store.fetch(name, entry, self._root / name) for name, entry in entries.items()
        )
        say(
            f"fetched {len(entries)} files and folders, {num_bytes / 1e6:,.1f} MB, from "
            f"{self._store.url} in {time.monotonic() - started:.1f} s"
        )

    def _save_record(self) -> None:
        if not self._owner:  # in the other processes, which delete nothing
            return
        deleted = [name for name, is_put in self._waiting.items() if not is_put]
        save_text(self._record, json.dumps({**self._owner, "deleted": deleted}))


class _KeepsCheckpoints(TrainerCallback):
    """Puts each checkpoint on the store once all processes have written their part of it."""

    def __init__(self, mirror: Mirror, accelerator: Accelerator) -> None:
        self._mirror = mirror
        self._accelerator = accelerator
        self._there: set[Path] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take note of the checkpoints that training may go on from."""
        self._there = set(list_checkpoints(Path(args.output_dir)))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the newest checkpoint; delete those that the parent has deleted on disk."""
        wait_for_all(self._accelerator)
        if not self._accelerator.is_main_process:
            return
        folder = Path(args.output_dir)
        for path in {path for path in self._there if not path.exists()}:
            self._mirror.gone(path)
            self._there.remove(path)
        newest = folder / f"checkpoint-{state.global_step}"
        if newest.is_dir():
            self._mirror.written(newest)
            self._there.add(newest)


def _names_a_run(record: dict[str, Any]) -> bool:
    deleted = record.get("deleted", [])
    return (
        isinstance(record.get("run"), str)
        and isinstance(record.get("session"), int)
        and isinstance(deleted, list)
        and all(isinstance(name, str) for name in deleted)
    )
