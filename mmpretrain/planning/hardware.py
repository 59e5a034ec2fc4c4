"""Descriptions of machines: figures of data sheets, and the shares of them that training is assumed to reach."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from mmpretrain.errors import InputError
from mmpretrain.planning.numbers import number

GIB = 2**30
_TEXTS = ("name", "kind", "source")
_DIVIDED = (
    "peak_tflops",
    "float32_tflops",
    "memory_gib",
    "memory_gb_per_s",
    "cores_per_device",
    "link_gb_per_s",
    "network_gb_per_s",
    "reserved_gib",
)
"""Figures of a CPU that the ranks on it divide."""


@dataclass(frozen=True)
class Hardware:
    """One kind of node. Data sheets give the first ten figures; the last four are assumptions until measured.

    `peak_tflops` dense bfloat16 products of one device, `float32_tflops` the same in float32, `memory_gib` and
    `memory_gb_per_s` of one device, `devices_per_node`, `cores_per_device` (processor cores that decode for it),
    `link_gb_per_s` one device's bandwidth to the others of its node and `network_gb_per_s` its share of the node's
    network, both in one direction. `attainable`: share of the peak that large matrix products reach. `efficiency`:
    share of *that* which a training step's useful products reach. `link_efficiency`: share of both bandwidths that
    collectives reach. `latency_us`: what one hop of a collective takes beside its bytes. `reserved_gib`: memory that
    the driver, its libraries and unusable holes take. The one device of a CPU's node is the whole machine (`shared`).

    Raises `InputError` for a figure that cannot be.
    """

    name: str
    kind: Literal["gpu", "cpu"]
    peak_tflops: float
    float32_tflops: float
    memory_gib: float
    memory_gb_per_s: float
    devices_per_node: int
    cores_per_device: float
    link_gb_per_s: float
    network_gb_per_s: float
    attainable: float
    efficiency: float
    link_efficiency: float
    latency_us: float
    reserved_gib: float
    source: str

    def __post_init__(self) -> None:
        if self.kind not in ("gpu", "cpu"):
            raise InputError(f"hardware.kind is {self.kind!r}; give gpu or cpu")
        for field in fields(self):
            if field.name not in _TEXTS:
                least = {"latency_us": 0, "reserved_gib": 0, "devices_per_node": 1}.get(field.name)
                number(f"hardware.{field.name}", getattr(self, field.name), least, field.name == "devices_per_node")
        for name in ("attainable", "efficiency", "link_efficiency"):
            if getattr(self, name) > 1:
                raise InputError(f"hardware.{name} is {getattr(self, name)}; it is a share: give at most 1")
        if self.reserved_gib >= self.memory_gib:
            raise InputError(f"hardware.reserved_gib {self.reserved_gib} leaves nothing of {self.memory_gib} GiB")

    def shared(self, ranks: int) -> Hardware:
        """What one of `ranks` of a node has: a GPU of its own, but a CPU's cores, memory and bandwidth are divided."""
        if self.kind == "gpu" or ranks <= self.devices_per_node:
            return self
        part = self.devices_per_node / ranks
        divided: dict[str, Any] = {name: getattr(self, name) * part for name in _DIVIDED}
        return replace(self, **divided)

    @property
    def usable_bytes(self) -> float:
        """Memory of one device that training can use."""
        return (self.memory_gib - self.reserved_gib) * GIB

    def matmul_flops(self, float32: bool = False) -> float:
        """FLOP/s of one device that large matrix products reach."""
        return (self.float32_tflops if float32 else self.peak_tflops) * 1e12 * self.attainable
