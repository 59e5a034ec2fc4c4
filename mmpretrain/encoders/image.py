"""Image encoder: any timm backbone, optionally with attention pooling on top."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from mmpretrain.encoders.layered import backbone_info, backbone_layers, gives_prefix
from mmpretrain.errors import InputError
from mmpretrain.layers import AttentionPool
from mmpretrain.types import Encoded, LayerInfo

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class CascadedAttentionPool(nn.Module):
    """CoCa's task poolers: many caption queries read the image, one contrastive query reads their output (section 3.2).

    (B,M,context_width) -> tokens (B,num_queries,width), pooled (B,width).
    """

    def __init__(self, width: int, num_heads: int, num_queries: int = 256, context_width: int | None = None) -> None:
        super().__init__()
        self.width = width
        self.caption = AttentionPool(width, num_heads, num_queries, context_width)
        self.contrastive = AttentionPool(width, num_heads, 1)

    def forward(self, tokens: Tensor) -> Encoded:
        """Pool image tokens for captioning and for contrast."""
        queried = self.caption(tokens)
        return _encoded(self.contrastive(queried)[:, 0], queried)


class ParallelAttentionPool(nn.Module):
    """Caption queries and the contrastive query each read the image directly (CoCa's ablation, open_clip's `parallel`).

    (B,M,context_width) -> tokens (B,num_queries,width), pooled (B,width).
    """

    def __init__(self, width: int, num_heads: int, num_queries: int = 256, context_width: int | None = None) -> None:
        super().__init__()
        self.width = width
        self.caption = AttentionPool(width, num_heads, num_queries, context_width)
        self.contrastive = AttentionPool(width, num_heads, 1, context_width)

    def forward(self, tokens: Tensor) -> Encoded:
        """Pool image tokens for captioning and for contrast."""
        return _encoded(self.contrastive(tokens)[:, 0], self.caption(tokens))


class SharedAttentionPool(nn.Module):
    """One pooler: its first query is the contrastive vector, the others feed the decoder, as in released CoCa weights.

    (B,M,context_width) -> tokens (B,num_queries-1,width), pooled (B,width); a norm follows the pooling (open_clip).
    """

    def __init__(self, width: int, num_heads: int, num_queries: int = 256, context_width: int | None = None) -> None:
        super().__init__()
        self.width = width
        self.pool = AttentionPool(width, num_heads, num_queries, context_width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Encoded:
        """Pool image tokens for captioning and for contrast."""
        queried = self.norm(self.pool(tokens))
        return _encoded(queried[:, 0], queried[:, 1:])


class ClassTokenPool(nn.Module):
    """CoCa without poolers: the class token is the contrastive vector, the patches feed the decoder.

    (B,1+M,width) -> tokens (B,M,width), pooled (B,width).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, tokens: Tensor) -> Encoded:
        """Take the class token, which comes first, apart."""
        return _encoded(tokens[:, 0], tokens[:, 1:])


class ImageEncoder(nn.Module):
    """A timm backbone: (B,C,H,W) -> pooled (B,D), tokens (B,N,D).

    uint8 pixels are scaled to [0,1] and normalised by `mean` and `std` here, on the device; float pixels are taken as
    already normalised. Class-token, average or attention (`map`) pooling is the backbone's `global_pool` in
    `model_args`; `pool` replaces it by one of this file's CoCa poolers. `model_args` are timm's own arguments
    (`img_size`, `patch_size`, `depth`, `patch_drop_rate`, ...).

    `init="clip"` draws class token and positions with std width^-0.5, as CLIP does. Raises `InputError` for a name
    timm does not know.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        name: str,
        model_args: Mapping[str, Any] | None = None,
        pool: nn.Module | None = None,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        init: Literal["clip", "timm"] = "timm",
        pretrained: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = _create(name, dict(model_args or {}), pretrained)
        self.pool = pool
        self._gives_prefix = gives_prefix(self.backbone)
        self.width: int = int(self.backbone.head_hidden_size if pool is None else pool.width)  # type: ignore[arg-type]
        # (x / 255 - mean) / std, folded into one multiplication and addition; not weights, so not saved.
        scale, shift = [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
        self.register_buffer("scale", torch.tensor(scale).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(-1, 1, 1), persistent=False)
        if init == "clip":
            for parameter_name in ("cls_token", "pos_embed"):
                parameter = getattr(self.backbone, parameter_name, None)
                if parameter is not None:
                    nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        if gradient_checkpointing:
            self.backbone.set_grad_checkpointing(True)  # timm's own, which every backbone has

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Encoded:
        """Encode (B,C,H,W) pixels; images have no padding, so `mask` is unused."""
        self._check(values)
        tokens = self.backbone.forward_features(self.normalize(values))
        if self.pool is None:
            pooled = self.backbone.forward_head(tokens, pre_logits=True)
            return _encoded(pooled, self._flatten(tokens))
        encoded: Encoded = self.pool(self._flatten(tokens))
        return encoded

    def encode_layers(
        self, values: Tensor, mask: Tensor | None = None, layers: Sequence[int] = (-1,), norm: bool = False
    ) -> list[Encoded]:
        """Encode (B,C,H,W) pixels as the backbone's blocks or stages `layers` give them, one `Encoded` each.

        `tokens` (B,H*W,D) are those of patches alone, without class and register tokens; `pooled` is the class token,
        or the average of the patches where there is none. Negative numbers count from the end; `norm` applies the
        backbone's final norm, if it has one for tokens. Raises `InputError` for a layer there is not.
        """
        self._check(values)
        found = backbone_layers(self.backbone, self.normalize(values), layers, norm, self._gives_prefix)
        return [_encoded(pooled, features.flatten(2).transpose(1, 2)) for features, pooled in found]

    def maps(self, values: Tensor, layers: Sequence[int] = (-1,), norm: bool = False) -> list[Tensor]:
        """Encode (B,C,H,W) pixels as the blocks or stages `layers` give them: maps (B,D,H',W') (see `layer_info`)."""
        self._check(values)
        found = backbone_layers(self.backbone, self.normalize(values), layers, norm, self._gives_prefix)
        return [features for features, _ in found]

    def layer_info(self) -> list[LayerInfo]:
        """List the blocks or stages that `encode_layers` and `maps` count."""
        return backbone_info(self.backbone)

    def _flatten(self, tokens: Tensor) -> Tensor:
        """Turn a map (B,D,H,W), or (B,H,W,D) where timm says so, into tokens (B,H*W,D); leave tokens as they are."""
        if tokens.ndim != 4:
            return tokens
        if getattr(self.backbone, "output_fmt", "") == "NHWC":
            return tokens.flatten(1, 2)
        return tokens.flatten(2).transpose(1, 2)

    def normalize(self, values: Tensor) -> Tensor:
        """Scale and normalise uint8 (B,C,H,W) pixels; float pixels only get the encoder's dtype."""
        if values.dtype != torch.uint8:
            return values.to(self.scale.dtype)
        return torch.addcmul(self.shift, values.to(self.scale.dtype), self.scale)

    def _check(self, values: Tensor) -> None:
        if values.ndim != 4:
            raise InputError(f"image has shape {tuple(values.shape)}; expected (B,C,H,W): add the missing dimension")
        expected = getattr(getattr(self.backbone, "patch_embed", None), "img_size", None)
        strict = getattr(getattr(self.backbone, "patch_embed", None), "strict_img_size", False)
        if strict and expected is not None and tuple(values.shape[-2:]) != tuple(expected):
            raise InputError(
                f"image has {values.shape[-2]}x{values.shape[-1]} pixels but the encoder was built for "
                f"{expected[0]}x{expected[1]}; set data.image_size equal to the model's img_size"
            )


def _create(name: str, model_args: dict[str, Any], pretrained: bool) -> Any:
    files = [key for key in model_args if key.startswith(("checkpoint", "pretrained"))]
    if files:  # timm would read weights from a file that may hold code
        raise InputError(f"model_args has {', '.join(files)}; weights come from pretrained=true or mmpretrain.load")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise InputError(f"timm has no model {name!r}; nearest: {', '.join(close) or 'none'} (see timm.list_models())")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **model_args)
    except TypeError as error:
        raise InputError(f"timm model {name!r} refuses model_args {model_args}: {error}") from error


def _encoded(pooled: Tensor, tokens: Tensor) -> Encoded:
    return Encoded(pooled, tokens, None)  # a mask that allows all would still keep attention from its fastest kernels
