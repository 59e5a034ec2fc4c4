"""Weights of open_clip's CLIP and CoCa under our names, as tables: pattern of their name -> our name and what to do.

Every operation is linear, so the same tables carry gradients from one side to the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

Rule = tuple[str, str, Callable[[Tensor], Tensor] | None]
"""Pattern of open_clip's whole name, our name (`\\1` is the pattern's first group), and an operation or None."""


def transposed(x: Tensor) -> Tensor:
    """open_clip multiplies by (in,out) matrices from the right; a `Linear` holds (out,in)."""
    return x.T


def with_batch(x: Tensor) -> Tensor:
    """Timm keeps a leading dimension of 1 on positions (1,N,D)."""
    return x[None]


def as_token(x: Tensor) -> Tensor:
    """Timm keeps its class token as (1,1,D)."""
    return x[None, None]


def as_vector(x: Tensor) -> Tensor:
    """Scalars are (1,) here."""
    return x.reshape(1)


def third(index: int) -> Callable[[Tensor], Tensor]:
    """Query, key or value (index 0, 1, 2) out of a joint (3D,...) projection."""
    return lambda x: x.chunk(3)[index]


def attention(theirs: str, ours: str) -> list[Rule]:
    """Match `nn.MultiheadAttention` with our `Attention`, whether its projections are joint or apart."""
    rules: list[Rule] = [(rf"{theirs}\.out_proj\.(weight|bias)", rf"{ours}.o.\g<last>", None)]
    for index, name in enumerate("qkv"):
        rules += [
            (rf"{theirs}\.in_proj_(weight|bias)", rf"{ours}.{name}.\g<last>", third(index)),
            (rf"{theirs}\.{name}_proj_(weight)", rf"{ours}.{name}.\g<last>", None),
        ]
    return rules


def block(theirs: str, ours: str) -> list[Rule]:
    """Match open_clip's residual block with our `Block` or `CrossBlock`; `theirs` must have one group, the index."""
    return [
        (rf"{theirs}\.ln_([12])\.(weight|bias)", rf"{ours}.norm\2.\g<last>", None),
        (rf"{theirs}\.ln_1_kv\.(weight|bias)", rf"{ours}.context_norm.\g<last>", None),
        *attention(rf"{theirs}\.attn", rf"{ours}.attention"),
        (rf"{theirs}\.mlp\.c_fc\.(weight|bias)", rf"{ours}.mlp.up.\g<last>", None),
        (rf"{theirs}\.mlp\.c_proj\.(weight|bias)", rf"{ours}.mlp.down.\g<last>", None),
    ]


BACKBONE = "encoders.image.backbone"
IMAGE: list[Rule] = [
    (r"visual\.conv1\.weight", f"{BACKBONE}.patch_embed.proj.weight", None),
    (r"visual\.class_embedding", f"{BACKBONE}.cls_token", as_token),
    (r"visual\.positional_embedding", f"{BACKBONE}.pos_embed", with_batch),
    (r"visual\.ln_pre\.(weight|bias)", rf"{BACKBONE}.norm_pre.\1", None),
    (r"visual\.transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)", rf"{BACKBONE}.blocks.\1.norm\2.\3", None),
    (r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", rf"{BACKBONE}.blocks.\1.attn.qkv.\2", None),
    (
        r"visual\.transformer\.resblocks\.(\d+)\.attn\.out_proj\.(weight|bias)",
        rf"{BACKBONE}.blocks.\1.attn.proj.\2",
        None,
    ),
    (r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)", rf"{BACKBONE}.blocks.\1.mlp.fc1.\2", None),
    (r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)", rf"{BACKBONE}.blocks.\1.mlp.fc2.\2", None),
    (r"visual\.proj", "projections.image.weight", transposed),
]
CLASS_TOKEN_POOL: list[Rule] = [(r"visual\.ln_post\.(weight|bias)", rf"{BACKBONE}.norm.\1", None)]
ATTENTION_POOL: list[Rule] = [
    (r"visual\.attn_pool\.query", "encoders.image.pool.pool.query", None),
    (r"visual\.attn_pool\.ln_q\.(weight|bias)", r"encoders.image.pool.pool.query_norm.\1", None),
    (r"visual\.attn_pool\.ln_k\.(weight|bias)", r"encoders.image.pool.pool.context_norm.\1", None),
    *attention(r"visual\.attn_pool\.attn", "encoders.image.pool.pool.attention"),
    (r"visual\.ln_post\.(weight|bias)", r"encoders.image.pool.norm.\1", None),
]


def text(prefix: str) -> list[Rule]:
    """Match the text tower, whose names begin with `text.` in CoCa and with nothing in CLIP."""
    prefix = re.escape(prefix)
    return [
        (rf"{prefix}token_embedding\.weight", "encoders.text.token_embedding.weight", None),
        (rf"{prefix}positional_embedding", "encoders.text.position_embedding", None),
        (rf"{prefix}cls_emb", "encoders.text.class_token", None),
        *block(rf"{prefix}transformer\.resblocks\.(\d+)", r"encoders.text.blocks.\1"),
        (rf"{prefix}ln_final\.(weight|bias)", r"encoders.text.norm.\1", None),
        (rf"{prefix}text_projection", "projections.text.weight", transposed),
    ]


DECODER: list[Rule] = [
    *block(r"text_decoder\.resblocks\.(\d+)", r"fusion.blocks.\1"),
    *block(r"text_decoder\.cross_attn\.(\d+)", r"fusion.cross_blocks.\1"),
    (r"text_decoder\.ln_final\.(weight|bias)", r"fusion.norm.\1", None),
    (r"text_decoder\.text_projection", "heads.caption.weight", transposed),
]
SCALARS: list[Rule] = [(r"(logit_scale|logit_bias)", r"\1", as_vector)]

CLIP: list[Rule] = [*IMAGE, *CLASS_TOKEN_POOL, *text(""), *SCALARS]
COCA: list[Rule] = [*IMAGE, *ATTENTION_POOL, *text("text."), *DECODER, *SCALARS]


def converted(theirs: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Return open_clip's tensors under our names; raises `KeyError` for one that no rule takes."""
    ours: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        taken = False
        for pattern, target, operation in rules:
            found = re.fullmatch(pattern, name)
            if found is not None:
                # `\g<last>` is the pattern's last group, whatever came before it.
                target = target.replace(r"\g<last>", rf"\g<{found.re.groups}>")
                ours[found.expand(target)] = tensor if operation is None else operation(tensor)
                taken = True
        if not taken:
            raise KeyError(f"no rule takes open_clip's {name!r}")
    return ours
