# SPDX-License-Identifier: Apache-2.0
"""Schedulers that look into vLLM's block tables after everything that they do.

vLLM loads one by `--scheduler-cls`, in whatever process the engine core lives. What is
wrong goes into a file, which `AUDIT_FILE` names, and serving goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tests.soak.bounds import Bound, ServerOptions, bound_of
from vllm_roco.scheduler import RocoAsyncScheduler, RocoScheduler

AUDIT_FILE = "ROCO_SOAK_AUDIT"
"""Environment variable with the path of the file."""

POISON = "poison_blocks"
"""Attribute of a `SchedulerOutput`: blocks to fill before the step."""

TABLES = "audited_tables"
"""Likewise, for several ranks: of each request of the step its `Table`."""

_MOST_FAULTS = 20
_LOOKS_BETWEEN_WRITES = 500
_MOST_OLD_NAMES = 4
"""Requests that are gone and still named: who was asked about last, and the like."""


class Place(NamedTuple):
    """A block in a request's row.

    Attributes:
        request_id: Whose row.
        manager: Of the group of layers.
        end: Tokens of the request up to the end of the block; of RoCo's layers only
            until the first eviction.
    """

    request_id: str
    manager: int
    end: int


class Table(NamedTuple):
    """A request's row as the scheduler has it, for workers to compare theirs with.

    Attributes:
        blocks: Block ids, None where there is none any more.
        most_blocks: The most that may be in use.
    """

    blocks: list[int | None]
    most_blocks: int


class Auditor:
    """Looks into a scheduler's blocks, proportional to the pool.

    Args:
        scheduler: Of RoCo.
        path: Where to write to.
    """

    def __init__(self, scheduler: Any, path: Path) -> None:
        self._scheduler = scheduler
        self._path = path
        self._pool = scheduler.kv_cache_manager.block_pool
        config = scheduler.roco_config
        (manager,) = scheduler.roco_managers
        self._managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        self._roco = manager
        self._server = ServerOptions(
            *(config.budget, config.stride, config.chunk, config.sink, config.recent),
            block_size=manager.block_size,
            steps_in_flight=scheduler.vllm_config.max_concurrent_batches,
        )
        self._bounds: dict[str, Bound] = {}
        self._poisoned: set[int] = set()
        self._seen: set[str] = set()
        self._num_looks = 0
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self.write()

    def enter(self, request_id: str) -> None:
        """Note a request that arrives."""
        self._seen.add(request_id)

    def look(self) -> None:
        """Check what must hold at any time, and more if nobody is left."""
        started = time.perf_counter()
        self._num_looks += 1
        num_faults = len(self.faults)
        holders = self._check_rows()
        self._check_references(holders)
        self._check_snapshots()
        is_idle = not self._scheduler.requests
        if is_idle:
            self._check_idle()
        self.counts["microseconds"] += int(1e6 * (time.perf_counter() - started))
        if (
            is_idle
            or len(self.faults) > num_faults
            or self._num_looks % _LOOKS_BETWEEN_WRITES == 0
        ):
            self.write()

    def unused(self, copied: Iterable[int]) -> list[int]:
        """Return blocks that are nobody's and were somebody's at the last call.

        Args:
            copied: Blocks that the step being scheduled copies from.
        """
        nobody = {
            block.block_id
            for block in self._pool.blocks
            if not block.ref_cnt and block.block_hash is None and not block.is_null
        }
        new = nobody - self._poisoned
        new.difference_update(copied)
        self._poisoned = (self._poisoned & nobody) | new
        return sorted(new)

    def tables(self, request_ids: Iterable[str]) -> dict[str, Table]:
        """Return the rows of requests in RoCo's layers."""
        return {
            request_id: Table(
                [
                    None if block.is_null else block.block_id
                    for block in self._roco.req_to_blocks[request_id]
                ],
                self._bound(request_id).blocks,
            )
            for request_id in request_ids
        }

    def write(self) -> None:
        """Write what was seen so far."""
        cache = self._scheduler.prefix_cache
        report = {
            "requests": len(self._scheduler.requests),
            "seen": len(self._seen),
            "looks": self._num_looks,
            "freed blocks": self._roco.num_freed_blocks,
            "prefixes": {} if cache is None else cache.counts()._asdict(),
            "counts": dict(self.counts),
            "faults": self.faults,
        }
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(report))
        new.replace(self._path)

    def _fault(self, what: str) -> None:
        self.counts["faults"] += 1
        if len(self.faults) < _MOST_FAULTS:
            self.faults.append(f"look {self._num_looks}: {what}")

    def _check_rows(self) -> dict[int, list[Place]]:
        """Check each request's row; return who holds each block."""
        holders: dict[int, list[Place]] = {}
        requests, size = self._scheduler.requests, self._roco.block_size
        for number, manager in enumerate(self._managers):
            for request_id, row in manager.req_to_blocks.items():
                held = []
                for index, block in enumerate(row):
                    if not block.is_null:
                        held.append(block.block_id)
                        end = (index + 1) * manager.block_size
                        place = Place(request_id, number, end)
                        holders.setdefault(block.block_id, []).append(place)
                if request_id not in requests:
                    if held:
                        self._fault(f"{request_id} is gone and holds {held}")
                    continue
                if manager is not self._roco:
                    continue
                bound = self._bound(request_id)
                if len(held) > bound.blocks:
                    self._fault(
                        f"{request_id} holds {len(held)} blocks, at most "
                        f"{bound.blocks} are its"
                    )
                self.counts["most blocks"] = max(self.counts["most blocks"], len(held))
                known = requests[request_id].num_tokens
                if len(row) * size > known + self._server.steps_in_flight + size:
                    self._fault(f"{request_id} has a row longer than its tokens")
        for block_id, places in holders.items():
            if len(places) > 1:
                self._check_shared(block_id, places)
        self.counts["most sharers"] = max(
            self.counts["most sharers"], *map(len, holders.values()), 0
        )
        return holders

    def _check_shared(self, block_id: int, places: list[Place]) -> None:
        """Check a block that several requests hold: nobody may write to it any more."""
        names = [place.request_id for place in places]
        managers = {place.manager for place in places}
        if len(managers) > 1:
            self._fault(f"block {block_id} is held by {names} for several groups")
        elif self._managers[managers.pop()] is self._roco:
            if any(map(self._may_evict, names)):
                self._fault(f"block {block_id} is held by {names}, and one may evict")
        elif any(map(self._may_be_written, places)):
            self._fault(f"block {block_id} is held by {names}, and one may write")

    def _may_be_written(self, place: Place) -> bool:
        """Return whether a request has not come to the end of a block yet.

        What eviction leaves behind is written to; a window only moves on.
        """
        request = self._scheduler.requests.get(place.request_id)
        return request is not None and request.num_computed_tokens < place.end

    def _bound(self, request_id: str) -> Bound:
        bound = self._bounds.get(request_id)
        if bound is None:
            request = self._scheduler.requests[request_id]
            bound = self._bounds[request_id] = bound_of(
                self._server,
                request.sampling_params.extra_args,
                request.num_prompt_tokens,
                request.max_tokens,
            )
        return bound

    def _may_evict(self, request_id: str) -> bool:
        request = self._scheduler.requests.get(request_id)
        if request is None:
            return False
        first = self._bound(request_id).first_eviction
        most = request.num_prompt_tokens + request.max_tokens
        return first is not None and most >= first

    def _check_references(self, holders: dict[int, list[Place]]) -> None:
        """Compare every reference with the rows: free and held blocks are all."""
        retained = Counter(
            block.block_id
            for _, blocks in self._scheduler.deferred_frees
            for block in blocks
        )
        num_held = 0
        for block in self._pool.blocks:
            if block.is_null:
                continue
            expected = len(holders.get(block.block_id, ()))
            expected += retained[block.block_id]
            num_held += bool(expected)
            if block.ref_cnt != expected:
                self._fault(
                    f"block {block.block_id} has {block.ref_cnt} references, not "
                    f"{expected}"
                )
        num_free = self._pool.get_num_free_blocks()
        num_blocks = self._pool.num_gpu_blocks - 1
        if num_free + num_held != num_blocks:
            self._fault(f"{num_free} blocks free + {num_held} held != {num_blocks}")
        self.counts["fewest free"] = min(
            self.counts.get("fewest free", num_blocks), num_free
        )

    def _check_snapshots(self) -> None:
        cache = self._scheduler.prefix_cache
        if cache is None:
            return
        owners: dict[int, int] = {}
        snapshots = cache.store._snapshots.values()
        for number, snapshot in enumerate(snapshots):
            if not snapshot.is_whole:
                continue
            for block in snapshot.blocks:
                if owners.setdefault(block.block_id, number) != number:
                    self._fault(f"block {block.block_id} is of two snapshots")
        if len(snapshots) > self._pool.num_gpu_blocks:
            self._fault(f"{len(snapshots)} snapshots for fewer blocks")

    def _check_idle(self) -> None:
        """Check that nothing is left of requests that are gone."""
        self.counts["idle"] += 1
        if not self._scheduler.deferred_frees:
            rows = [m.req_to_blocks for m in self._managers if m.req_to_blocks]
            if rows:
                self._fault(f"nobody is left, but there are rows: {rows}")
        if len(self._scheduler.request_plans):
            self._fault(f"{len(self._scheduler.request_plans)} plans are left")
        cache = self._scheduler.prefix_cache
        roots = [self._roco, self._scheduler.request_plans, cache]
        names = names_within(roots, self._seen)
        self.counts["old names"] = max(self.counts["old names"], len(names))
        if len(names) > _MOST_OLD_NAMES:
            self._fault(f"{len(names)} requests are gone and still named: {names[:5]}")
        self._bounds.clear()


def names_within(roots: Iterable[object], names: set[str]) -> list[str]:
    """Return the places in objects of the package where one of the names stands."""
    found: list[str] = []
    seen: set[int] = set()
    waiting = deque((type(root).__name__, root) for root in roots)
    while waiting:
        place, value = waiting.popleft()
        if isinstance(value, str):
            if value in names:
                found.append(f"{place}: {value}")
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            for key, item in value.items():
                waiting.append((place, key))
                waiting.append((place, item))
        elif isinstance(value, list | tuple | set | frozenset | deque):
            waiting.extend((place, item) for item in value)
        elif type(value).__module__.startswith("vllm_roco"):
            inner = dict(getattr(value, "__dict__", {}))
            for of_class in type(value).__mro__:
                for slot in getattr(of_class, "__slots__", ()):
                    inner[slot] = getattr(value, slot, None)
            waiting.extend((f"{place}.{name}", item) for name, item in inner.items())
        elif hasattr(value, "num_prompt_tokens"):
            waiting.append((place, getattr(value, "request_id", "")))
    return found


class _AuditedMixin:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._auditor = Auditor(self, Path(os.environ[AUDIT_FILE]))

    def add_request(self, request: Any) -> None:
        self._auditor.enter(request.request_id)
        super().add_request(request)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        counts = self._auditor.counts
        counts["steps"] += bool(output.total_num_scheduled_tokens)
        counts["tokens"] += output.total_num_scheduled_tokens
        self._auditor.look()
        if output.total_num_scheduled_tokens:
            copies = output.kv_cache_block_copies or ()
            copied = [copy.src_block_id for copy in copies]
            blocks = self._auditor.unused(copied)
            counts["poisoned blocks"] += len(blocks)
            setattr(output, POISON, blocks)
            if self.vllm_config.parallel_config.world_size > 1:  # type: ignore[attr-defined]
                tables = self._auditor.tables(output.num_scheduled_tokens)
                setattr(output, TABLES, tables)
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        self._auditor.look()
        return outputs

    def _preempt_request(self, *args: Any, **kwargs: Any) -> Any:
        self._auditor.counts["preemptions"] += 1
        return super()._preempt_request(*args, **kwargs)  # type: ignore[misc]


class AuditedScheduler(_AuditedMixin, RocoScheduler):
    """RoCo's scheduler, looked into."""


class AuditedAsyncScheduler(_AuditedMixin, RocoAsyncScheduler):
    """RoCo's asynchronous scheduler, looked into."""
