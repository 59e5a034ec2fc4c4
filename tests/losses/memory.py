"""What a piece of code allocates on the CPU, from the allocator's own log."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocations(work: Callable[[], object]) -> tuple[int, int]:
    """Run `work`; returns the largest single allocation and the peak of what it held at once, in bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler, about itself
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return max(event.nbytes() for event in events), peak
