"""Where the time of a step goes: a profile's events, summed by component and phase.

Forward work belongs to the innermost range of `ranges.py` around it. A backward operation
belongs to the autograd node that runs it, and the node to the forward operation with the same
sequence number. A range inside a node is a recomputation. On a GPU the time is that of the kernels,
each found by the call that launched it; on a CPU it is the operations' own. What no rule finds is
`other`, listed by name.

The events are those of torch.profiler's Chrome trace: only there kernels, launches and operations
stand side by side with their threads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from parts.step.ranges import ALL, COMPONENTS, PREFIX

PHASES = ("forward", "recompute", "backward", "update")
_HOST = ("cpu_op", "user_annotation")
_LAUNCH = ("cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_NODE = "autograd::engine::evaluate_function: "


class Place(NamedTuple):
    """What a moment of a thread belongs to."""

    component: str
    phase: str


@dataclass
class _Frame:
    """An event that has begun and not ended."""

    name: str
    end: float
    place: Place
    is_in_node: bool
    own: float
    launches: list[int] = field(default_factory=list)


@dataclass
class Breakdown:
    """Microseconds by component and phase, over all profiled steps.

    Attributes:
        total: device time of all kernels; on a CPU the time of the profiled steps.
        by_place: the same, parted.
        other: what is in `other`, by the name of the kernel or operation.
        wall: from the first profiled step's begin to the last one's end.
        clock: `kernels` or `cpu`; the latter on a GPU too where the profiler saw no kernel.
    """

    total: float = 0.0
    by_place: dict[Place, float] = field(default_factory=lambda: defaultdict(float))
    other: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    wall: float = 0.0
    clock: str = "cpu"

    def add(self, place: Place, name: str, duration: float) -> None:
        """Count some time."""
        self.by_place[place] += duration
        if place.component == "other":
            self.other[name] += duration

    def per_token(self, tokens: int) -> dict[str, Any]:
        """Return microseconds per token, and the share and contents of `other`."""
        rows = {
            component: {
                phase: round(self.by_place.get(Place(component, phase), 0.0) / tokens, 4)
                for phase in PHASES
            }
            for component in COMPONENTS
        }
        largest = sorted(self.other.items(), key=lambda item: -item[1])[:8]
        other = sum(us for place, us in self.by_place.items() if place.component == "other")
        return {
            "clock": self.clock,
            "tokens": tokens,
            "us_per_token": rows,
            "total_us_per_token": round(self.total / tokens, 4),
            "wall_us_per_token": round(self.wall / tokens, 4),
            "other_share": other / self.total if self.total else 0.0,
            "other": {name: round(us / tokens, 4) for name, us in largest},
        }


def breakdown(events: Iterable[dict[str, Any]]) -> Breakdown:
    """Attribute the events of a Chrome trace in which the range `bench::all` spans the steps.

    Raises:
        ValueError: there is no such range.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    host = [e for e in complete if e.get("cat") in (*_HOST, *_LAUNCH)]
    device = [e for e in complete if e.get("cat") in _DEVICE]
    spans = [e for e in host if e["name"] == ALL]
    if not spans:
        raise ValueError(f"the trace has no range {ALL!r}")
    walker = _Walker(spans[0])
    for event in sorted(host, key=lambda e: (e["ts"], -e["dur"])):
        walker.take(event)
    walker.finish()
    result = Breakdown(wall=spans[0]["dur"])
    if device:
        result.clock = "kernels"
        for event in device:
            result.add(walker.place_of(event["args"]), event["name"], event["dur"])
            result.total += event["dur"]
        return result
    for place, name, own in walker.owned:
        result.add(place, name, own)
    result.total = walker.top_level
    return result


_NOWHERE = Place("other", "forward")


class _Walker:
    """Goes through the host's events in the order of their begin, one stack per thread.

    Attributes:
        launched: place by the correlation of a launch.
        operations: place by the profiler's number of an operation, for launches that it lost.
        owned: (place, name, microseconds) of each operation outside of those it calls.
        top_level: duration of the events that no other encloses.
    """

    def __init__(self, span: dict[str, Any]) -> None:
        self.main, self.begin, self.end = span["tid"], span["ts"], span["ts"] + span["dur"]
        self.launched: dict[int, Place] = {}
        self.operations: dict[int, Place] = {}
        self.owned: list[tuple[Place, str, float]] = []
        self.top_level = 0.0
        self._stacks: dict[Any, list[_Frame]] = defaultdict(list)
        self._nodes: dict[tuple[Any, int], Place] = {}
        self._main_id: int | None = None

    def take(self, event: dict[str, Any]) -> None:
        """Count one event; they come sorted by their begin, the longer one first."""
        if not self.begin <= event["ts"] < self.end:
            return
        stack = self._stacks[event["tid"]]
        while stack and stack[-1].end <= event["ts"]:
            self._close(stack)
        parent = stack[-1] if stack else None
        if event["cat"] in _LAUNCH:
            if "correlation" in event.get("args", {}):
                self.launched[event["args"]["correlation"]] = parent.place if parent else _NOWHERE
            return
        frame = self._frame(event, parent)
        if parent is None:
            self.top_level += event["dur"]
        else:
            parent.own -= event["dur"]
        stack.append(frame)
        arguments = event.get("args", {})
        if "External id" in arguments:
            self.operations[arguments["External id"]] = frame.place
        sequence = arguments.get("Sequence number")
        if sequence is not None and not frame.name.startswith(_NODE):
            # Several operations carry a number until one makes the node that has it: the last.
            self._nodes[event["tid"], sequence] = frame.place

    def _frame(self, event: dict[str, Any], parent: _Frame | None) -> _Frame:
        name = event["name"]
        place = parent.place if parent else _NOWHERE
        is_in_node = parent.is_in_node if parent else False
        if name.startswith(_NODE):
            place, is_in_node = self._of_node(name, event), True
        elif name.startswith(PREFIX) and name != ALL:
            component = name.removeprefix(PREFIX)
            place = Place(component, "recompute" if is_in_node else "forward")
        elif name.startswith("Optimizer.step#"):
            place = Place("optimizer", "update")
        if place.component == "optimizer":
            place = Place("optimizer", "update")
        return _Frame(name, event["ts"] + event["dur"], place, is_in_node, event["dur"])

    def _of_node(self, name: str, event: dict[str, Any]) -> Place:
        """Return what an autograd node belongs to; a parameter's own node updates or adds."""
        if "AccumulateGrad" in name:
            return Place("optimizer", "update")
        arguments = event.get("args", {})
        thread = arguments.get("Fwd thread id")
        if self._main_id is None:  # the first node of a backward pass is the loss's
            self._main_id = thread
        maker = self.main if thread == self._main_id else event["tid"]
        made = self._nodes.get((maker, arguments.get("Sequence number", -1)), _NOWHERE)
        return Place(made.component, "backward")

    def place_of(self, arguments: dict[str, Any]) -> Place:
        """Return what a kernel with these arguments belongs to."""
        by_launch = self.launched.get(arguments.get("correlation", -1))
        return by_launch or self.operations.get(arguments.get("External id", -1), _NOWHERE)

    def _close(self, stack: list[_Frame]) -> None:
        frame = stack.pop()
        self.owned.append((frame.place, frame.name, frame.own))

    def finish(self) -> None:
        """Close what is open."""
        for stack in self._stacks.values():
            while stack:
                self._close(stack)


def table(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a text table of `Breakdown.per_token`."""
    total = result["total_us_per_token"]
    yield f"{'us/token, ' + result['clock']:17}" + "".join(
        f"{name:>11}" for name in (*PHASES, "all", "share")
    )
    for component, phases in result["us_per_token"].items():
        whole = sum(phases.values())
        cells = [f"{phases[phase]:11.3f}" for phase in PHASES]
        share = whole / total if total else 0.0
        yield f"{component:17}{''.join(cells)}{whole:11.3f}{share:11.1%}"
    yield f"{'all':17}{total:55.3f}    (wall {result['wall_us_per_token']:.3f})"
    for name, us in result["other"].items():
        yield f"  other: {us:9.3f}  {name[:80]}"
