"""torch.compile for the training step: the same mathematics in fewer, larger kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from mmpretrain.activation_checkpointing import repeated_blocks
from mmpretrain.errors import InputError

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Inductor's modes, which generate code."""
GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes that replay CUDA graphs: they hold memory for each size of input, and a pass must end before the next."""
BACKENDS = ("eager", "aot_eager")
"""Backends that run the traced graph as it is, to find out what part of compiling fails; they need no compiler."""
VARIANTS = 32
"""Graphs of one function (all blocks share one) before torch runs it uncompiled; its own limit of 8 is too few."""


def check_compile(mode: str, micro_batch_size: int | None) -> None:
    """Raise `InputError` for a mode that there is not, or that micro-batches rule out."""
    if mode not in (*MODES, *BACKENDS):
        raise InputError(f"trainer.compile is {mode!r}; choose null or one of {', '.join((*MODES, *BACKENDS))}")
    if mode in GRAPHS and micro_batch_size is not None:
        raise InputError(
            f"trainer.compile={mode} replays CUDA graphs, whose results the next micro-batch would overwrite; set "
            "trainer.compile=default, or trainer.micro_batch_size=null"
        )


def check_place(mode: str, device: torch.device, ranks: int) -> None:
    """Raise `InputError` for a CPU without a C++ compiler, and for CUDA graphs on several ranks."""
    if mode in GRAPHS and ranks > 1:
        raise InputError(
            f"trainer.compile={mode} replays CUDA graphs, which hold what ranks exchange between blocks; set "
            "trainer.compile=default or max-autotune-no-cudagraphs"
        )
    if mode not in MODES or device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InputError(
            "trainer.compile on a CPU needs a C++ compiler; install g++, or set trainer.compile=null"
        ) from error


def compile_model(
    model: nn.Module, mode: str, by_block: bool, any_size: bool = False, whole_graph: bool = False
) -> None:
    """Compile a model in place: its state and the names in it stay; `forward` is compiled at its first call.

    `by_block` compiles every repeated block alone instead of `forward` as a whole: where gradients or parameters
    travel between ranks, one block's can then do so while the next is computed. `any_size` makes one graph for all
    sizes from the beginning, as micro-batches need: each is computed twice, and must meet the same graph again.
    `whole_graph` makes a graph break an error instead of a slower step.
    """
    options: dict[str, Any] = {"backend": mode} if mode in BACKENDS else {"mode": mode}
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for part in repeated_blocks(model) if by_block else [model]:
        part.compile(fullgraph=whole_graph, dynamic=any_size or None, **options)


def uncompiled() -> AbstractContextManager[Any]:
    """Run compiled parts as they were written inside the `with` block: evaluation and generation, of any size."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
