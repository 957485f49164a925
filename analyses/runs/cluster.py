"""The shards of a run on a Ray cluster: each worker loads the model once, and takes the next shard whenever it is free.

1. There is one worker per GPU of the cluster, or per `Cluster.cpus` CPUs if there are no GPUs; nodes may join during the run.
2. The driver reads the data, opens the images, and sends a worker the questions of a shard; no shared folder is needed.
3. The worker returns the rows of the shard, and the driver writes the same file as a single process would.
4. If a worker or its node dies, another worker runs its shard again. Errors raised by the work itself end the run.

A worker with other weights or packages than the driver's ends the run with an error, because its rows would differ.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from analyses.data.examples import Example
    from analyses.runs.engine import Run, Shard

ATTEMPTS = 3  # attempts at a shard whose workers die; then the run ends
PATIENCE = 60.0  # seconds to wait for a node when no worker is left


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that runs shards.

    Attributes:
        address: the cluster's address, or "auto" for the cluster that this machine belongs to.
        load: function that loads the model; called once on each worker.
        cpus: CPUs per worker, if the cluster has no GPU.
        patience: seconds to wait for a node when no worker is left.
    """

    address: str
    load: Callable[[], Any]
    cpus: int = 1
    patience: float = PATIENCE

    def work_on(
        self,
        state: Run,
        shards: Iterator[tuple[int, Shard, Any, dict[int, Example | str]]],
        work: Any,
        done: Callable[[int, Shard], Any],
    ) -> None:
        """Runs every shard on the cluster.

        Args:
            shards: (number, the shard as far as it is done, its rows of the plan, its opened questions or the errors from opening them).
            work: an `Experiment`; a worker makes the same one for the model that it loaded (`Experiment.of`).
            done: called with each shard, in the order in which they finish.
        Raises:
            ValueError: ray is not installed, a worker's weights or packages differ, or a shard's workers died 3 times.
            ConnectionError: no such cluster, or no node of it is left.
        """
        ray = _ray()
        _connect(ray, self.address)
        workers = _Workers(ray, self, work.of, state.manifest)
        try:
            self._hand_out(ray, workers, shards, done, state.manifest["seed"])
        finally:
            workers.stop()

    def _hand_out(self, ray: Any, workers: _Workers, shards: Iterator, done: Callable, seed: int) -> None:
        waiting: deque[_Task] = deque()  # tasks to run next, among them those of workers that died
        running: dict[Any, tuple[_Task, Any]] = {}
        deaths: Counter[int] = Counter()
        left = True
        while left or waiting or running:
            workers.grow()
            while workers.free and (left or waiting):
                if not waiting:
                    found = next(shards, None)
                    left = found is not None
                    if not left:
                        break
                    waiting.append(_Task(found[0], found[1], ray.put((found[2], found[3]))))
                task, worker = waiting.popleft(), workers.free.pop()
                running[worker.do.remote(task.begun, task.questions, seed)] = task, worker
            for answer in workers.wait(list(running)):
                task, worker = running.pop(answer)
                try:
                    shard = ray.get(answer)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError as error:  # the worker or its node is gone
                    workers.lost(worker)
                    deaths[task.number] += 1
                    if deaths[task.number] == ATTEMPTS:
                        raise ValueError(
                            f"shard {task.number} was given to {ATTEMPTS} workers, and each died of it or with its node "
                            f"({' '.join(str(error).split())[:300]}): take a smaller --batch-size, or look at the nodes' memory."
                        ) from error
                    waiting.append(task)
                    continue
                workers.free.append(worker)
                done(task.number, replace(shard, earlier=task.begun.earlier))


@dataclass(frozen=True)
class _Task:
    number: int
    begun: Shard
    questions: Any  # a reference into Ray's object store, kept for further attempts


@dataclass
class _Workers:
    """The workers: as many as the cluster has resources for.

    Attributes:
        free: workers that have loaded their model and have no shard.
    """

    ray: Any
    cluster: Cluster
    make: Callable[[Any], Any]
    manifest: dict[str, Any]
    free: list[Any] = field(default_factory=list)
    _all: list[Any] = field(default_factory=list)
    _starting: dict[Any, Any] = field(default_factory=dict)
    _alone_since: float | None = None

    def grow(self) -> None:
        """Starts a worker for every free share of the cluster's resources; on a dying node it may never become ready."""
        kind, size = self._kind()
        for _ in range(int(self.ray.cluster_resources().get(kind, 0) // size) - len(self._all)):
            options = {"num_gpus": 1, "num_cpus": 1} if kind == "GPU" else {"num_cpus": size}
            worker = self.ray.remote(Worker).options(**options).remote(self.cluster.load, self.make, self.manifest)
            self._all.append(worker)
            self._starting[worker.problem.remote()] = worker

    def _kind(self) -> tuple[str, int]:
        return ("GPU", 1) if self.ray.cluster_resources().get("GPU") else ("CPU", self.cluster.cpus)

    def wait(self, running: list[Any]) -> list[Any]:
        """The finished answers, after at most one second; workers that have loaded their model become free.

        Raises:
            ValueError: a worker's model or packages differ, or it cannot load the model.
            ConnectionError: no node has been there for `Cluster.patience` seconds.
        """
        self._require_nodes(bool(running))
        pending = [*running, *self._starting]
        if not pending:
            time.sleep(0.5)
            return []
        finished, _ = self.ray.wait(pending, num_returns=1, timeout=1.0)
        for answer in [answer for answer in finished if answer in self._starting]:
            worker = self._starting.pop(answer)
            try:
                if problem := self.ray.get(answer):
                    raise ValueError(problem)
                self.free.append(worker)
            except self.ray.exceptions.ActorDiedError as error:
                if "creation task" in str(error) or "__init__" in str(error):  # loading failed, as it would on any worker
                    raise ValueError(f"a worker could not load the model: {' '.join(str(error).split())[-500:]}") from error
                self.lost(worker)
            except self.ray.exceptions.RayError:
                self.lost(worker)
        return [answer for answer in finished if answer in running]

    def _require_nodes(self, running: bool) -> None:
        kind, size = self._kind()
        if running or self.ray.cluster_resources().get(kind, 0) >= size:
            self._alone_since = None
            return
        self._alone_since = self._alone_since or time.monotonic()
        if time.monotonic() - self._alone_since > self.cluster.patience:
            raise ConnectionError(
                f"no node of the cluster has {size} {kind} to work on: what was done is kept; start the same command again once one has."
            )

    def lost(self, worker: Any) -> None:
        self._all.remove(worker)

    def stop(self) -> None:
        for worker in self._all:
            self.ray.kill(worker)


class Worker:
    """A worker process on a node: loads the model once, then runs shards."""

    def __init__(self, load: Callable[[], Any], make: Callable[[Any], Any], manifest: dict[str, Any]):
        self.said, self.work = "", None
        model = load()
        from analyses.runs.engine import describe_model, versions

        ours = {"model": describe_model(model), "versions": versions()}
        if differing := [key for key in ours if ours[key] != manifest[key]]:
            said = "; ".join(f"{key} {ours[key]}, the driver's {manifest[key]}" for key in differing)
            self.said = f"a node's {' and '.join(differing)} differ: {said}. Install and load the same on every node."
            return
        self.work = make(model)

    def problem(self) -> str:
        """The reason why this worker cannot be used (its weights or packages differ from the driver's), or ""."""
        return self.said

    def do(self, begun: Shard, given: tuple[Any, dict[int, Example | str]], seed: int) -> Shard:
        """Runs the questions of a shard that are not done yet; returns the shard with their rows."""
        from analyses.runs.engine import do_shard

        planned, questions = given

        def question(row: Any) -> Example:
            if isinstance(found := questions[row.item], str):
                raise ValueError(found)
            return found

        do_shard(begun, planned, question, cast(Any, self.work), seed)
        return begun


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ValueError("--cluster needs ray: pip install 'hooked-qwen2vl[cluster]', on every node.") from error
    return ray


def _connect(ray: Any, address: str) -> None:
    """Connects to the cluster, unless that was done before.

    Raises:
        ConnectionError: no such cluster.
    """
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"there is no Ray cluster at {address!r} ({' '.join(str(error).split())[:300]}): start one with `ray start --head`, and "
            f"`ray start --address=HEAD:6379` on the other nodes (docs/scale.md)."
        ) from error
