"""Image encoder for pictures of any size and shape in one batch, as SigLIP 2's NaFlex reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from mmpretrain.encoders.image import _create
from mmpretrain.errors import InputError
from mmpretrain.types import Encoded


class NaFlexImageEncoder(nn.Module):
    """A timm NaFlex ViT: pictures on canvases (B,C,H,W) -> pooled (B,D), tokens (B,N,D).

    Each picture, its sides multiples of `patch_size`, stands top left on its canvas; `mask` (B,N) says which patches
    are of the picture, row by row, N = (H/patch_size)(W/patch_size). What lies outside is never read, so the size of
    the canvas changes nothing. The grid of learned positions is stretched over each picture (bilinear, antialiased).

    uint8 pixels are normalised here by `mean` and `std`; float pixels are taken as normalised. `model_args` are timm's
    (`patch_size`, `embed_dim`, `depth`, `num_heads`, `mlp_ratio`, `act_layer`, `pos_embed_grid_size`, ...). Raises
    `InputError` for a backbone that is no such ViT.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        name: str = "naflexvit_base_patch16_siglip",
        model_args: Mapping[str, Any] | None = None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = _create(name, dict(model_args or {}), pretrained=False)
        _check_backbone(name, self.backbone)
        self.width: int = int(self.backbone.embed_dim)
        self.patch_size: int = int(self.backbone.embeds.patch_size[0])
        scale, shift = [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
        self.register_buffer("scale", torch.tensor(scale).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(-1, 1, 1), persistent=False)
        if gradient_checkpointing:
            from mmpretrain.activation_checkpointing import checkpoint_activations

            checkpoint_activations(self, "full")

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Encoded:
        """Encode canvases (B,C,H,W); a `mask` of None says that every picture fills its canvas."""
        self._check(values, mask)
        rows, columns = (side // self.patch_size for side in values.shape[-2:])
        patches = _patches(self._normalized(values), self.patch_size)
        place = torch.arange(rows * columns, device=values.device).expand(len(values), -1)
        if mask is None:
            sides = place.new_tensor([[rows, columns]]).expand(len(values), 2)
            return Encoded(*self._encode(patches, place, columns, sides, None), None)
        grid = mask.view(-1, rows, columns)
        sides = torch.stack([grid.any(2).sum(1), grid.any(1).sum(1)], dim=1)
        if torch.compiler.is_compiling():  # how many patches are real is not known to a graph
            return Encoded(*self._encode(patches, place, columns, sides, mask), mask)
        # Pictures of opposite shapes leave much of their canvases empty: only as many places as one picture has at most
        # are computed, and put back afterwards.
        kept = (~mask).int().argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
        pooled, tokens = self._encode(_taken(patches, kept), kept, columns, sides, mask.gather(1, kept))
        where = kept[..., None].expand_as(tokens)
        return Encoded(pooled, tokens.new_zeros(*mask.shape, self.width).scatter(1, where, tokens), mask)

    def _encode(
        self, patches: Tensor, place: Tensor, columns: int, sides: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Encode patches (B,M,p*p*C) that stand at `place` (B,M) of canvases with so many `columns` of patches.

        `sides` (B,2) are the rows and columns of patches of each picture.
        """
        x = self.backbone.embeds.proj(patches)
        x = x + self._positions(place // columns, place % columns, sides).to(x.dtype)
        attended = None
        if mask is not None:  # added, as timm's attention without a fused kernel can only add one
            attended = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
            attended = attended[:, None, None, :]
        for block in self.backbone.blocks:
            x = block(x, attn_mask=attended)
        tokens = self.backbone.norm(x)
        return self.backbone.forward_head(tokens, pre_logits=True, patch_valid=mask), tokens

    def _positions(self, row: Tensor, column: Tensor, sides: Tensor) -> Tensor:
        """Position embeddings (B,M,D) of patches at `row` and `column` (B,M) of pictures with `sides` (B,2)."""
        table = self.backbone.embeds.pos_embed[0]
        across = _stretched(row, sides[:, :1], table.shape[0])
        along = _stretched(column, sides[:, 1:], table.shape[1])
        weight = across[..., :, None] * along[..., None, :]
        found: Tensor = weight.flatten(2).to(table.dtype) @ table.flatten(0, 1)
        return found

    def _normalized(self, values: Tensor) -> Tensor:
        if values.dtype != torch.uint8:
            return values.to(self.scale.dtype)
        return torch.addcmul(self.shift, values.to(self.scale.dtype), self.scale)

    def _check(self, values: Tensor, mask: Tensor | None) -> None:
        size = self.patch_size
        if values.ndim != 4 or values.shape[-2] % size or values.shape[-1] % size or not values.numel():
            raise InputError(
                f"image has shape {tuple(values.shape)}; expected (B,C,H,W) with sides that are multiples of {size}: "
                "use mmpretrain.data.naflex.NaFlexPreprocess with that patch_size"
            )
        expected = (len(values), values.shape[-2] // size * (values.shape[-1] // size))
        if mask is not None and tuple(mask.shape) != expected:
            raise InputError(f"image has a mask of shape {tuple(mask.shape)}; expected {expected}, one for each patch")
        if mask is not None and mask.device.type == "cpu" and not torch.compiler.is_compiling():
            grid = mask.view(len(values), values.shape[-2] // size, -1)
            box = grid.any(2, keepdim=True).cummin(1).values & grid.any(1, keepdim=True).cummin(2).values
            if not (box == grid).all() or not grid[:, 0, 0].all():
                raise InputError("a picture's mask is no rectangle from the canvas's top left corner; see on_canvas")


def _check_backbone(name: str, backbone: Any) -> None:
    lacking = "it is no NaFlexVit" if not isinstance(backbone, NaFlexVit) else None
    if lacking is None:
        embeds = backbone.embeds
        tests = {
            "it has class or register tokens": backbone.num_prefix_tokens == 0,
            "it has rotary positions": backbone.rope is None,
            "its patches are read by a convolution": embeds.is_linear and getattr(embeds, "channels_last", True),
            "its positions are not learned": embeds.pos_embed_type == "learned",
            "its positions keep their shape": not embeds.pos_embed_ar_preserving,
            "its positions are not stretched bilinearly": embeds.pos_embed_interp_mode == "bilinear",
            "its patches are not square": embeds.patch_size[0] == embeds.patch_size[1],
            "it has norms of the embedded patches": all(
                isinstance(norm, nn.Identity) for norm in (embeds.norm, backbone.norm_pre)
            ),
        }
        lacking = next((feature for feature, holds in tests.items() if not holds), None)
    if lacking is not None:
        raise InputError(f"timm model {name!r} cannot be a NaFlexImageEncoder: {lacking}; use a naflexvit_*_siglip")


def _patches(values: Tensor, size: int) -> Tensor:
    """Cut (B,C,H,W) into patches (B,N,size*size*C), row by row, the channels of a pixel together."""
    batch, channels, height, width = values.shape
    x = values.view(batch, channels, height // size, size, width // size, size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, size * size * channels)


def _taken(x: Tensor, kept: Tensor) -> Tensor:
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))


def _stretched(place: Tensor, length: Tensor, entries: int) -> Tensor:
    """Weights (B,M,entries) that stretch a line of `entries` values over `length` (B,1) places, read at `place` (B,M).

    A triangle that is one entry wide on each side, or as wide as a place where there are fewer places than entries:
    `torch.nn.functional.interpolate(mode="bilinear", antialias=True)`, for every row's own length at once.
    """
    step = (entries / length.to(torch.float32))[..., None]
    centre = step * (place[..., None] + 0.5)
    distance = (torch.arange(entries, device=place.device) + 0.5 - centre).abs()
    weight = (1 - distance / step.clamp(min=1)).clamp(min=0)
    return weight / weight.sum(-1, keepdim=True).clamp(min=1e-12)  # padding stands beyond the line
