"""A plan as tables for people, or as one JSON object."""

from __future__ import annotations

import json
from typing import Any

from mmpretrain.planning.hardware import GIB
from mmpretrain.planning.plan import Plan


def show(plan: Plan, as_json: bool) -> None:
    """Print a plan."""
    if as_json:
        print(json.dumps(as_object(plan)))
        return
    from rich.console import Console

    console = Console()
    for table in _tables(plan):
        console.print(table)
    for line in [*plan.suggestions, *plan.notes]:
        console.print(line, markup=False, highlight=False)


def as_object(plan: Plan) -> dict[str, Any]:
    """Everything a plan says; FLOPs, bytes and seconds are plain numbers, of one sample, one device or one step."""
    run, took = plan.run, plan.times
    return {
        "hardware": run.hardware.name,
        "devices": run.ranks.per_node,
        "nodes": run.ranks.nodes,
        "parallel": run.parallel,
        "global_batch_size": plan.global_batch,
        "batch_size": plan.rows,
        "caption_tokens": plan.caption_tokens,
        "flops_per_sample": {
            "parts": {name: part._asdict() for name, part in run.model.parts.items()},
            "losses": {name: cost.useful / plan.rows for name, cost in _losses(plan).items()},
            "recomputed": run.model.recomputed + sum(cost.recomputed for cost in _losses(plan).values()) / plan.rows,
            "useful": plan.useful,
        },
        "parameters": run.weights.parameters / 4,
        "memory": {
            "parts": plan.memory,
            "total": sum(plan.memory.values()),
            "usable": run.hardware.usable_bytes,
            "fits": plan.fits,
            "largest_batch_size": plan.largest,
            "suggestions": plan.suggestions,
        },
        "communication": {
            "messages": [
                {**message._asdict(), "sent": message.sent(run.ranks)} for message in plan.messages if run.ranks.all > 1
            ],
            "sent": sum(message.sent(run.ranks) for message in plan.messages),
        },
        "seconds": {name: value for name, value in took._asdict().items() if name != "same_cores"}
        | {"step": took.step},
        "input": {
            "images_per_s_per_core": plan.samples_per_s / run.ranks.all / run.hardware.cores_per_device,
            "images_per_s_per_core_of_a_device_that_never_waits": plan.rows
            / took.device
            / run.hardware.cores_per_device,
            "assumed_images_per_s_per_core": plan.feed.images_per_core,
            "bytes_per_s_per_node": plan.samples_per_s / run.ranks.nodes * plan.feed.bytes_per_sample,
        },
        "samples_per_s": plan.samples_per_s,
        "samples_seen": plan.samples_seen,
        "hours": plan.hours,
        "device_hours": plan.hours * run.ranks.all,
        "bound": plan.bound,
        "mfu": plan.mfu,
        "share_of_attainable": plan.reached,
        "notes": plan.notes,
    }


def _losses(plan: Plan) -> dict[str, Any]:
    return plan.run.losses(plan.run.place(plan.rows))


def _tables(plan: Plan) -> list[Any]:
    from rich.table import Table

    run = plan.run
    flops = Table("products", "forward GFLOP", "both passes GFLOP", title="One sample")
    for name, part in run.model.parts.items():
        if part.flops:
            flops.add_row(name, f"{part.forward / 1e9:,.2f}", f"{part.flops / 1e9:,.2f}")
    for name, cost in _losses(plan).items():
        flops.add_row(f"{name} loss", "", f"{cost.useful / plan.rows / 1e9:,.2f}" if cost.known else "not known")
    again = sum(cost.recomputed for cost in _losses(plan).values()) / plan.rows + run.model.recomputed
    flops.add_row("useful", f"{run.model.forward / 1e9:,.2f}", f"{plan.useful / 1e9:,.2f}", style="bold")
    if again:
        flops.add_row("computed again", "", f"{again / 1e9:,.2f}")
    memory = Table("memory", "GiB", title=f"One device, batch {plan.rows:,}")
    for name, size in plan.memory.items():
        if size >= 2**20:
            memory.add_row(name, f"{size / GIB:,.2f}")
    memory.add_row(f"all of {run.hardware.usable_bytes / GIB:,.1f}", _total(plan), style="bold")
    memory.add_row("largest batch that fits", f"{plan.largest:,}")
    return [flops, memory, *_travel(plan), _summary(plan)]


def _total(plan: Plan) -> str:
    return f"{sum(plan.memory.values()) / GIB:,.2f}" + ("" if plan.fits else " (does not fit)")


def _travel(plan: Plan) -> list[Any]:
    from rich.table import Table

    ranks = plan.run.ranks
    if ranks.all == 1:
        return []
    table = Table("sent by a device in a step", "operation", "times", "MB", "ms", title="Communication")
    for message in plan.messages:
        table.add_row(
            message.part,
            message.operation,
            str(message.times),
            f"{message.sent(ranks) / 1e6:,.3f}",
            f"{message.seconds(ranks, plan.run.hardware) * 1e3:,.2f}",
        )
    return [table]


def _summary(plan: Plan) -> Any:
    from rich.table import Table

    run, took = plan.run, plan.times
    where = f"{run.ranks.nodes} x {run.ranks.per_node} {run.hardware.name}"
    table = Table("prediction", where, title=f"Global batch {plan.global_batch:,}")
    shown = {"model": took.model, "losses": took.losses, "optimizer": took.optimizer}
    shown |= {"input, on the same cores": took.input} if took.same_cores else {}
    shown |= {"communication not hidden": took.communication} if run.ranks.all > 1 else {}
    for name, seconds in shown.items():
        table.add_row(f"{name}, ms", f"{seconds * 1e3:,.2f}")
    cores = run.hardware.cores_per_device
    table.add_row("step, ms", f"{took.step * 1e3:,.2f}")
    table.add_row("bound by", plan.bound)
    table.add_row("samples/s", f"{plan.samples_per_s:,.0f}")
    table.add_row("samples/s of one device", f"{plan.samples_per_s / run.ranks.all:,.0f}")
    table.add_row("useful share of the data sheet's peak", f"{plan.mfu:.1%}")
    table.add_row("useful share of what large products reach", f"{plan.reached:.1%}")
    if not took.same_cores:
        must = plan.rows / took.device / cores
        table.add_row("images/s a core must give", f"{must:,.0f} ({cores:g} cores a device)")
    table.add_row("images/s a core is taken to give", f"{plan.feed.images_per_core:,.0f}")
    read = plan.samples_per_s / run.ranks.nodes * plan.feed.bytes_per_sample
    table.add_row("shards read by a node, MB/s", f"{read / 1e6:,.1f}")
    table.add_row("samples seen", f"{plan.samples_seen:,.0f}")
    table.add_row("days", f"{plan.hours / 24:,.2f}")
    table.add_row("device hours", f"{plan.hours * run.ranks.all:,.1f}", style="bold")
    return table
