"""Hands out jobs to workers that Ray started, and keeps the account: none is lost, none is done twice.

Ray places the workers, starts one anew that died, and tells that it did; what is decided here is which job comes next,
and whether one that failed is tried again.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import Cancelled, TavError
from ..recompute import MEMORY

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported: it shall tell nobody
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as later versions do; earlier ones warn of it
PERIOD = 1.0  # seconds, in which the table is drawn anew
PARTS = {"control": 1}  # of a worker: `progress` and `stop` have a thread of their own
_FALLS = 6  # times that a worker may not answer before that is told
_LATEST = 30.0  # seconds between two times that it is asked again


@dataclass
class Job:
    """A job, and what has become of it.

    Attributes:
        spec: what a worker is given; its `name` is what people see.
        deaths: of workers that had it.
        memory: the mode of the next try, where an earlier one ran out of memory.
        result: what the worker gave back (see `Worker.run`), None as long as there is none.
    """

    spec: dict[str, Any]
    deaths: int = 0
    memory: str | None = None
    result: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.spec["name"]


@dataclass
class Hand:
    """A worker as the driver sees it.

    Attributes:
        state: "starting", "working" or "gone".
        told: what its job tells of its progress.
        asked: whether that has been asked for, and no answer came yet.
        falls: times that it has not answered since it last worked.
    """

    name: str
    actor: Any
    state: str = "starting"
    node: str = ""
    job: Job | None = None
    told: dict[str, Any] = field(default_factory=dict)
    asked: bool = False
    falls: int = 0


class Pool:
    """A batch that runs.

    Attributes:
        waiting: jobs that no worker has, in their order.
        finished: those that have a result.
    """

    def __init__(self, jobs: Sequence[Job], hire: Callable[[str], Any], workers: int, base: str | None, retries: int):
        """
        Args:
            hire: starts the actor of a name.
            base: fingerprint of the checkpoint that all must have; None takes any.
            retries: of a job whose worker dies.
        """
        self.waiting, self.finished = deque(jobs), []
        self.base, self.retries = base, retries
        self.hands = [Hand(f"worker {n}", hire(f"worker {n}")) for n in range(1, min(workers, len(jobs)) + 1)]
        self.calls: dict[Any, tuple[Hand, Callable[[Hand, Any], Iterator[str]]]] = {}
        self.later: list[tuple[float, Hand]] = []  # who is greeted again, and when
        self.stopped = False
        for hand in self.hands:
            self._greet(hand)

    @property
    def running(self) -> list[Hand]:
        return [hand for hand in self.hands if hand.job is not None]

    def events(self, stopping: Callable[[], bool]) -> Iterator[str]:
        """Works until all is done; a line whenever there is something to tell, and "" at least once a `PERIOD`.

        Args:
            stopping: whether no more jobs shall begin, and those that run stop after their step.

        Raises:
            Cancelled: it was stopped, and some are not done.
            TavError: there is no worker left.
        """
        import ray

        asked = time.monotonic()
        while self.running or (self.waiting and not self.stopped):
            if stopping() and not self.stopped:
                self.stopped = True
                for hand in self.running:
                    hand.actor.stop.options(concurrency_group="control").remote()
            if all(hand.state == "gone" or hand.falls >= _FALLS for hand in self.hands):
                remedy = "see above, put it right, and run the command again, which does only what is missing"
                raise TavError("workers", None, "are none that can work", remedy)
            for due in [due for due in self.later if due[0] <= time.monotonic()]:
                self.later.remove(due)
                self._greet(due[1])
            if not self.calls:
                time.sleep(PERIOD / 4)
            ready, _ = ray.wait(list(self.calls), timeout=PERIOD / 4) if self.calls else ([], [])
            for ref in ready:
                hand, then = self.calls.pop(ref)
                try:
                    answer = ray.get(ref)
                except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
                    answer = error
                yield from then(hand, answer)
            if time.monotonic() - asked >= PERIOD:
                asked = time.monotonic()
                self._ask()
                yield ""
        if self.stopped and self.waiting:
            raise Cancelled(f"stopped, {len(self.waiting)} not done")

    # ------------------------------------------------------------------------------------------------ workers

    def _greet(self, hand: Hand):
        """Asks a worker that was started, or started anew, to load its checkpoint; waits until there is room for it."""
        hand.state, hand.told = "starting", {}
        self.calls[hand.actor.hello.options(max_task_retries=0).remote()] = hand, self._greeted

    def _greeted(self, hand: Hand, answer: Any) -> Iterator[str]:
        import ray

        if isinstance(answer, ray.exceptions.ActorUnavailableError):  # it is just being started anew, or has no room
            hand.falls += 1
            self.later.append((time.monotonic() + min(0.25 * 2**hand.falls, _LATEST), hand))
            if hand.falls == _FALLS:
                yield f"{hand.name} is not there ({_first_line(answer)})"
            return
        fault = f"can't begin ({_first_line(answer)})" if isinstance(answer, Exception) else answer.get("fault")
        if not fault and self.base is not None and answer["base"] != self.base:
            fault = "has another checkpoint, whose weights are others than those of the machine that began the batch"
        if fault:
            hand.state = "gone"
            yield f"{hand.name}{'' if isinstance(answer, Exception) else ' on ' + answer['node']} {fault}"
        else:
            hand.state, hand.node, hand.falls = "working", answer["node"], 0
            self._next(hand)

    def _next(self, hand: Hand):
        hand.job, hand.told = None, {}
        if self.waiting and not self.stopped:
            hand.job = job = self.waiting.popleft()
            call = hand.actor.run.options(name=job.name, max_task_retries=0).remote(job.spec | {"memory": job.memory})
            self.calls[call] = hand, self._ran

    def _ask(self):
        for hand in self.running:
            if not hand.asked:
                hand.asked = True
                self.calls[hand.actor.progress.options(concurrency_group="control").remote()] = hand, self._told

    def _told(self, hand: Hand, answer: Any) -> Iterator[str]:
        hand.asked = False
        if isinstance(answer, Mapping) and hand.job is not None:
            hand.told = dict(answer)
        yield from ()

    # ------------------------------------------------------------------------------------------------- jobs

    def _ran(self, hand: Hand, answer: Any) -> Iterator[str]:
        job, hand.job = hand.job, None
        if isinstance(answer, Exception):
            self._greet(hand)
            yield from self._lost(job, answer)
            return
        if answer["status"] == "memory":
            yield from self._lower(job, answer["memory"], answer["why"])
        elif answer["status"] == "stopped":
            self.waiting.appendleft(job)
        else:
            yield self._finish(job, answer)
        if answer.get("lost"):  # a process may be damaged by what nobody foresaw
            import ray

            ray.kill(hand.actor, no_restart=False)
            self._greet(hand)
        else:
            self._next(hand)

    def _lost(self, job: Job, error: Exception) -> Iterator[str]:
        """The worker died with the job, which another one goes on with."""
        job.deaths += 1
        if job.deaths > self.retries:
            why = f"its worker died {job.deaths} times; the last time: {_first_line(error)}"
            yield self._finish(job, {"status": "failed", "why": why})
            return
        self.waiting.appendleft(job)
        if _for_memory(error) or job.deaths > 1:  # whom the system kills for it can't tell
            job.memory = _lower_than(job.memory or MEMORY[0]) or job.memory
        yield f"{job.name}: its worker died; it goes on from its state" + f", memory {job.memory}" * bool(job.memory)

    def _lower(self, job: Job, used: str, why: str) -> Iterator[str]:
        if (lower := _lower_than(used)) is None:
            yield self._finish(job, {"status": "failed", "why": why})
            return
        job.memory = lower
        self.waiting.appendleft(job)
        yield f"{job.name}: {used} ran out of memory; it goes on with memory {lower}"

    def _finish(self, job: Job, result: dict[str, Any]) -> str:
        job.result = result
        self.finished.append(job)
        return f"{job.name} failed: {result['why']}" if result["status"] == "failed" else f"{job.name} is done"


def _lower_than(memory: str) -> str | None:
    return MEMORY[MEMORY.index(memory) + 1] if memory != MEMORY[-1] else None


def _for_memory(error: Exception) -> bool:
    """Whether Ray killed the worker because the machine ran out of memory."""
    return type(error).__name__ == "OutOfMemoryError" or "running low on memory" in str(error)


def _first_line(error: Exception) -> str:
    """What tells most of an error of Ray, which has many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = [line for line in lines if "Error:" in line or "exit" in line.lower()]
    return ((found or lines or [type(error).__name__])[-1])[:200]
