"""What ranks send each other in one step, and how long that takes on given links."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from mmpretrain.planning.hardware import Hardware

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "send", "broadcast"]
Group = Literal["all", "node", "across"]
"""Who takes part: all ranks, those of one node, or the ranks of one place in each node."""

GRADIENTS = "gradients"
"""The part that travels while the backward pass still computes."""


class Ranks(NamedTuple):
    """How many devices train: `per_node` on each of `nodes`; `gloo` instead of NCCL carries their messages."""

    per_node: int
    nodes: int
    gloo: bool = False

    @property
    def all(self) -> int:
        """World size."""
        return self.per_node * self.nodes

    def of(self, group: Group) -> int:
        """Members of a group."""
        return {"all": self.all, "node": self.per_node, "across": self.nodes}[group]


class Message(NamedTuple):
    """`times` equal operations of `part`, each over a tensor of `bytes`: the whole of what is reduced, gathered or
    scattered over the group, or what one rank sends on."""

    part: str
    operation: Operation
    bytes: float
    times: int = 1
    group: Group = "all"

    def sent(self, ranks: Ranks) -> float:
        """Bytes that one rank sends, by the ring algorithms that NCCL and gloo use for large tensors."""
        n = ranks.of(self.group)
        if n == 1:
            return 0.0
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "all-gather": (n - 1) / n,
            "reduce-scatter": (2 if ranks.gloo else 1) * (n - 1) / n,  # gloo reduces all and throws away the rest
            "send": 1.0,
            "broadcast": (n - 1) / n,
        }[self.operation]
        return share * self.bytes * self.times

    def seconds(self, ranks: Ranks, hardware: Hardware) -> float:
        """Time of all of them, one after the other."""
        n = ranks.of(self.group)
        if n == 1:
            return 0.0
        hops = 1 if self.operation == "send" else math.ceil(math.log2(n))
        latency = self.times * hops * hardware.latency_us * 1e-6
        return self.sent(ranks) / self._bandwidth(ranks, hardware) + latency

    def _bandwidth(self, ranks: Ranks, hardware: Hardware) -> float:
        link, network = hardware.link_gb_per_s, hardware.network_gb_per_s
        if self.group == "node" or ranks.nodes == 1:
            slowest = link
        elif self.group == "across" or self.operation == "send":
            slowest = min(link, network)  # one device's own port
        else:
            # A collective cuts its tensor into as many rings as a node has ports, so each byte crosses all links of a
            # node but only one port.
            slowest = min(link, network * ranks.per_node)
        return slowest * 1e9 * hardware.link_efficiency


def ddp(gradient_bytes: float, buffer_bytes: float) -> list[Message]:
    """Data parallel training: gradients are averaged, rank 0's buffers copied to the others."""
    buffers = [Message("buffers", "broadcast", buffer_bytes)] if buffer_bytes else []
    return [Message(GRADIENTS, "all-reduce", gradient_bytes), *buffers]


def fsdp(block_bytes: float, block_gradient_bytes: float, root_bytes: float, blocks: int, shards: int) -> list[Message]:
    """Fully sharded over the ranks of a node and copied over nodes, as `training.fsdp.shard` does it.

    `block_bytes` as they travel: gathered for the forward and again for the backward pass. The rest (`root_bytes`)
    stays whole in between. Each rank's share of the gradients is then averaged over nodes.
    """
    gradients = block_gradient_bytes + root_bytes
    return [
        Message("parameters", "all-gather", block_bytes / max(1, blocks), 2 * blocks, "node"),
        Message("parameters", "all-gather", root_bytes, 1, "node"),
        Message(GRADIENTS, "reduce-scatter", gradients / (blocks + 1), blocks + 1, "node"),
        Message(GRADIENTS, "all-reduce", gradients / shards, 1, "across"),
    ]


def bookkeeping(sharded: bool) -> list[Message]:
    """What keeps ranks in step: a bad step's two flags, the vote to stop, and for sharded gradients their norm."""
    norm = [Message("flags", "all-reduce", 4)] if sharded else []
    return [Message("flags", "all-reduce", 8), Message("flags", "all-reduce", 4), *norm]
