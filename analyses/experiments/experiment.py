"""Experiments: a method over a data set, in memory or in a folder, with the same result.

1. An experiment is a function from a batch of questions to rows, with a name, the settings that determine the rows, and a
   function from rows to a result.
2. `run(data)` works in memory; the first error stops it. `run(data, out)` is a run in the folder `out` (`analyses.runs`): it can
   be killed and resumed, several processes can share it, and questions that fail are recorded.
3. `read(out)` computes the result from a finished folder, without the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from tqdm.auto import tqdm

from analyses.common.sums import add_up
from analyses.data.examples import Example, in_batches
from analyses.runs.cluster import Cluster
from analyses.runs.engine import Run, describe_model, opened, read_failures, read_results, run, wait_for_all
from analyses.runs.files import read_manifest, read_plan
from analyses.runs.plan import size_by_model
from analyses.runs.sums import read_sums, write_sums
from hooked_qwen2vl.image_embeddings import CAPACITY
from hooked_qwen2vl.moved import renamed_arguments
from hooked_qwen2vl.protocols import Model

Data = Iterable[Example] | Callable[[], Iterable[Example]]


@dataclass(frozen=True)
class Done:
    """The rows of a finished experiment, from memory or from a folder.

    Attributes:
        rows: a table in the order of the data, or sums.
        ids: ids of all questions.
        failed: number of questions without a result (for a run in a folder; `runs.read_failures` gives the reasons).
        settings: of the experiment.
        model_name: name of the model. weights: function that returns the hash of its weights.
    """

    rows: Any
    ids: tuple[str, ...]
    failed: int
    settings: Mapping[str, Any]
    model_name: str
    weights: Callable[[], str]


class Experiment:
    """Base class of experiments; a subclass defines `__call__` (batch -> rows) and `result` (rows -> result).

    Attributes:
        name: name of its runs.
        summed: whether its rows are terms of a sum (`analyses.common.sums`) instead of being kept.
        by_domain: whether all questions of a batch must be of one domain.
        gradients: whether it computes gradients, for the estimate of memory.
        batches_per_shard: number of batches in a shard, which a run writes as one file.
        model: the model. of: function from another copy of the model to the same experiment, for the nodes of a cluster.
        settings: what determines the rows, as JSON values. seed: of a run.
    """

    name: ClassVar[str]
    summed: ClassVar[bool] = False
    by_domain: ClassVar[bool] = False
    gradients: ClassVar[bool] = False
    batches_per_shard: ClassVar[int] = 4
    of: Callable[..., Any]

    def __new__(cls, model: Model, *args: Any, **kwargs: Any) -> Experiment:
        made = super().__new__(cls)
        made.of = partial(_of, cls, args, kwargs)
        return made

    def __init__(self, model: Model, settings: Mapping[str, Any], seed: int = 0):
        self.model, self.settings, self.seed = model, dict(settings), seed

    def __call__(self, batch: Sequence[Example]) -> Iterable[Mapping[str, Any]]:
        """The rows of a batch of questions with opened images, in their order; each row has the "id" of its question."""
        raise NotImplementedError

    @staticmethod
    def result(done: Done, **about: Any) -> Any:
        """The result computed from the rows."""
        raise NotImplementedError

    def asked(self, data: Iterable[Example]) -> Iterable[Example]:
        """The questions to run, made from the data; by default the data."""
        return data

    @renamed_arguments
    def run(
        self,
        data: Data,
        /,
        out: str | Path | None = None,
        *,
        batch_size: int = 8,
        rank: tuple[int, int] | None = None,
        progress: bool = True,
        **about: Any,
    ) -> Any:
        """The result over a data set, in memory, or with `out` by a run in that folder, which resumes an interrupted one.

        Args:
            data: questions, or a function that returns a new iterator over them. A run iterates twice, so the questions of an
                iterator are kept in memory.
            rank: (k, n) for process k = 0..n−1 of n processes that share the folder. None: from the launcher (see
                `runs.this_rank`); processes that were launched together wait for each other.
            about: further arguments of `result`.
        Returns:
            the result; None if `rank` is given and shards of other ranks are missing.
        Raises:
            ValueError: a rank without a folder, or as `runs.run`.
        """
        if out is None:
            if rank is not None:
                raise ValueError(f"rank={rank} is of a run in a folder: pass out= too.")
            return self.result(self._in_memory(data, batch_size, progress), **about)
        state = self.start(data, out, batch_size=batch_size, rank=rank, progress=progress)
        if rank is None and not state.complete:
            wait_for_all(state)
        elif not state.complete:
            return None
        if len(failures := read_failures(out)):
            first = failures.iloc[0]
            warnings.warn(
                f"{len(failures)} questions failed and are not in the result, the first ({first['id']}): {first['error']} "
                f"(analyses.runs.read_failures({str(out)!r}) has all)",
                stacklevel=3,
            )
        return self.read(out, **about)

    @renamed_arguments
    def start(
        self,
        data: Data,
        out: str | Path,
        *,
        batch_size: int = 8,
        rank: tuple[int, int] | None = None,
        dry_run: bool = False,
        progress: bool = True,
        cluster: Cluster | None = None,
    ) -> Run:
        """Runs what is not in the folder yet, here or on a cluster (with `dry_run` nothing); returns the state of the run."""
        again = data if callable(data) else partial(iter, data if isinstance(data, Sequence) else list(data))
        return run(
            self.name, lambda: self.asked(again()), self, out, self.settings, model=self.model,
            size=size_by_model(self.model, by_domain=self.by_domain), batch_size=batch_size, seed=self.seed, rank=rank,
            dry_run=dry_run, progress=progress, batches_per_shard=self.batches_per_shard, embeddings=CAPACITY,
            gradients=self.gradients, write=write_sums if self.summed else None, cluster=cluster,
        )  # fmt: skip

    @classmethod
    def read(cls, out: str | Path, **about: Any) -> Any:
        """The result of a finished run.

        Raises:
            ValueError: no run there, one that is not finished, or of another experiment.
        """
        manifest = read_manifest(out)
        try:
            rows = read_sums(out) if cls.summed else read_results(out).drop(columns="item")
            ids = tuple(read_plan(out)["id"])
            model = manifest["model"]
            done = Done(rows, ids, len(read_failures(out)), manifest["settings"], model["name"], lambda: model["weights"])
            return cls.result(done, **about)
        except KeyError as error:
            raise ValueError(f"{out} holds {manifest['name']!r}, which has no {error}: expected a run of {cls.name!r}.") from error

    def _in_memory(self, data: Data, batch_size: int, progress: bool) -> Done:
        ids: list[str] = []
        questions = self.asked(data() if callable(data) else data)
        bar = tqdm(questions, desc=self.name, unit="question", disable=not progress, delay=2)
        rows = (row for batch in in_batches(_opened(bar, ids), batch_size) for row in self(batch))
        gathered = add_up(rows) if self.summed else pd.DataFrame(rows)
        name = str(self.model.cfg.model_name)
        return Done(gathered, tuple(ids), 0, self.settings, name, lambda: describe_model(self.model)["weights"])


def _of(kind: type[Experiment], args: tuple, kwargs: dict, model: Model) -> Experiment:
    return kind(model, *args, **kwargs)


def _opened(data: Iterable[Example], ids: list[str]) -> Iterator[Example]:
    """The questions with opened images, one at a time; appends their ids to `ids`."""
    for example in data:
        ids.append(example.id)
        yield opened(example)
