"""The model: encoders and projections into one shared space, with optional fusion and heads."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mmpretrain.errors import InputError
from mmpretrain.types import Batch, Encoded, LayeredEncoder, LayerInfo, MapEncoder, Outputs, Padded, Prediction


class MultimodalModel(nn.Module):
    """Separate encoders into one space of `embed_dim` dimensions, joined by an optional fusion.

    CLIP is two encoders; SigLIP adds `logit_bias`; CoCa adds a fusion and a caption head. `projections` default to a
    bias-free linear map for each encoder with std width^-0.5 (CLIP); give `torch.nn.Identity()` where an encoder
    already has `embed_dim` dimensions. `freeze` names encoders that are not trained and stay in evaluation mode; so do
    batch norms whose weights are frozen, as beside adapters: their averages are weights too.

    `logit_scale` holds ln(scale) as (1,), and `logit_bias` (1,) or None; both are kept in float32 by the losses.
    Raises `InputError` where the parts do not fit each other.
    """

    def __init__(
        self,
        embed_dim: int,
        encoders: Mapping[str, nn.Module],
        fusion: nn.Module | None = None,
        heads: Mapping[str, nn.Module] | None = None,
        projections: Mapping[str, nn.Module] | None = None,
        logit_scale: float = 1 / 0.07,
        logit_bias: float | None = None,
        freeze: Collection[str] = (),
    ) -> None:
        super().__init__()
        if isinstance(freeze, str):
            raise InputError(f"freeze is {freeze!r}; expected a list of encoders, such as [{freeze}]")
        self.embed_dim = embed_dim
        self.encoders = nn.ModuleDict(encoders)
        given = projections or {}
        self.projections = nn.ModuleDict(
            {m: given[m] if m in given else _projection(encoder, embed_dim) for m, encoder in encoders.items()}
        )
        self.fusion = fusion
        self.heads = nn.ModuleDict(heads or {})
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(logit_scale)))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.full((1,), float(logit_bias)))
        self.frozen = frozenset(freeze)
        self._check(set(given))
        for name in self.frozen:
            self.encoders[name].requires_grad_(False)
        self.train()

    def _check(self, projected: set[str]) -> None:
        unknown = (self.frozen | projected) - set(self.encoders)
        if unknown:
            raise InputError(f"freeze or projections name {sorted(unknown)}; the encoders are {sorted(self.encoders)}")
        for name, head in self.heads.items():
            modality = str(getattr(head, "modality", ""))
            if getattr(head, "needs_causal", False) and not getattr(self.encoders[modality], "causal", True):
                raise InputError(
                    f"head {name!r} predicts the next token of {modality!r}, whose encoder is bidirectional and so "
                    f"sees it; set model.encoders.{modality}.causal=true"
                )
            if self.fusion is None:
                raise InputError(f"head {name!r} needs fused tokens but the model has no fusion; give model.fusion")

    def train(self, mode: bool = True) -> MultimodalModel:
        """Switch to training mode, except frozen encoders and batch norms, which stay in evaluation mode."""
        super().train(mode)
        for name in self.frozen:
            self.encoders[name].eval()
        for module in self.modules():
            if isinstance(module, _BatchNorm) and module.affine and not module.weight.requires_grad:
                module.eval()
        return self

    def encode(self, modality: str, values: Padded | Tensor) -> Encoded:
        """Run one encoder: pooled (B,D), tokens (B,N,D), mask (B,N). Raises `InputError` for an unknown modality."""
        return self._encode(modality, values)

    def _encode(self, modality: str, values: Padded | Tensor) -> Encoded:
        # The public methods do not call each other: FSDP gathers parameters around each, and cannot be nested.
        padded = values if isinstance(values, Padded) else Padded(values)
        encoder = self._encoder(modality)
        # Only an encoder that asks for it is told what the host knows of the lengths; others need only tensors.
        known = (padded.lengths,) if getattr(encoder, "skips_padding", False) else ()
        encoded: Encoded = encoder(padded.values, padded.mask, *known)
        return encoded

    def encode_layers(
        self, modality: str, values: Padded | Tensor, layers: Sequence[int] = (-1,), norm: bool = False
    ) -> list[Encoded]:
        """Run one encoder up to the highest of `layers`: what each gives, counted from 0, or from -1 at the end.

        `norm` applies the encoder's final norm to each. Tokens (B,N,D) are those of patches or ids alone; `pooled` is
        the class token, or as the encoder defines it. Raises `InputError` for an encoder without layers, or too few.
        """
        padded = values if isinstance(values, Padded) else Padded(values)
        return self._layered(modality).encode_layers(padded.values, padded.mask, layers, norm)

    def feature_maps(
        self, modality: str, values: Padded | Tensor, layers: Sequence[int] = (-1,), norm: bool = False
    ) -> list[Tensor]:
        """Run one encoder up to the highest of `layers`, as `encode_layers`: maps (B,D,H,W), for dense tasks."""
        encoder = self._layered(modality)
        if not hasattr(encoder, "maps"):
            raise InputError(f"the tokens of {modality!r} lie on no grid; use encode_layers")
        return cast(MapEncoder, encoder).maps(values.values if isinstance(values, Padded) else values, layers, norm)

    def feature_info(self, modality: str) -> list[LayerInfo]:
        """List the layers of one encoder that `encode_layers` counts: name, width, pixels a token spans."""
        return self._layered(modality).layer_info()

    def _layered(self, modality: str) -> LayeredEncoder:
        encoder = self._encoder(modality)
        if not hasattr(encoder, "encode_layers"):  # not isinstance: a compiler cannot look into protocols
            raise InputError(
                f"the encoder of {modality!r} ({type(encoder).__name__}) gives no layers; write its encode_layers and "
                "layer_info, or use encode"
            )
        return cast(LayeredEncoder, encoder)

    def embed(self, modality: str, values: Padded | Tensor) -> Tensor:
        """Embed a batch of one modality: (B,E) float32 unit vectors."""
        return self._project(modality, self._encode(modality, values))

    def encode_image(self, values: Padded | Tensor) -> Tensor:
        """Embed images, under the name the ecosystem expects: (B,E) unit vectors."""
        return self.embed("image", values)

    def encode_text(self, values: Padded | Tensor) -> Tensor:
        """Embed texts, under the name the ecosystem expects: (B,E) unit vectors."""
        return self.embed("text", values)

    def forward(self, batch: Batch) -> Outputs:
        """Encode, embed and fuse every modality of a batch."""
        encoded = {m: self._encode(m, padded) for m, padded in batch.items()}
        embeddings = {m: self._project(m, e) for m, e in encoded.items()}
        fused = {} if self.fusion is None else self.fusion(encoded)
        predictions: dict[str, Prediction] = {n: h(fused, batch) for n, h in self.heads.items() if h.modality in fused}
        identities = {
            m: identity(p) for m, p in batch.items() if not p.values.is_floating_point() and p.values.ndim == 2
        }
        return Outputs(embeddings, self.logit_scale.exp(), self.logit_bias, predictions, identities)

    def _encoder(self, modality: str) -> nn.Module:
        if modality not in self.encoders:
            raise InputError(f"no encoder for {modality!r}; this model has {', '.join(self.encoders)}")
        return self.encoders[modality]

    def _project(self, modality: str, encoded: Encoded) -> Tensor:
        projected = self.projections[modality](encoded.pooled)
        # Half precision is too coarse for unit vectors and their similarities; float64 stays for exact tests.
        return F.normalize(projected.to(torch.promote_types(projected.dtype, torch.float32)), dim=-1)


def identity(padded: Padded) -> Tensor:
    """Hash (B,L) ids to (B,) int64 that does not depend on how far a row is padded; equal rows have equal hashes."""
    values, mask = padded.values, padded.mask
    # Wrapping int64 arithmetic: a polynomial of odd multipliers in the position, mixed per id.
    position = torch.arange(1, values.shape[1] + 1, device=values.device, dtype=torch.int64)
    mixed = (values.to(torch.int64) + 1) * -7046029254386353131
    mixed = (mixed ^ (mixed >> 29)) * (position * -4658895280553007687 + 1442695040888963407)
    mixed = mixed ^ (mixed >> 32)
    return (mixed if mask is None else mixed * mask).sum(1)


def _projection(encoder: nn.Module, embed_dim: int) -> nn.Linear:
    width: int = encoder.width  # type: ignore[assignment]
    layer = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(layer.weight, std=width**-0.5)
    return layer
