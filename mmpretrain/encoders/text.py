"""Text encoder: an own Transformer, causal (CLIP, CoCa) or bidirectional (SigLIP, BERT-style)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmpretrain.activation_checkpointing import checkpoint_activations
from mmpretrain.encoders.layered import layer_indices
from mmpretrain.errors import InputError
from mmpretrain.layers import Block, KeyValueCache, init_transformer
from mmpretrain.packing import Packing, check_lengths, known_lengths, pack_rows, packed_dtype, worth_packing
from mmpretrain.types import Encoded, LayerInfo, Lengths

Pooling = Literal["eos", "last", "mean", "class_token"]


class TextState(NamedTuple):
    """What step-by-step encoding remembers: one cache for each layer, and how many positions they hold."""

    caches: list[KeyValueCache]
    length: int


class TextEncoder(nn.Module):
    """Transformer over token ids: (B,L) -> pooled (B,width), tokens (B,L,width).

    `pooling`: `eos` takes the first end-of-text position (CLIP); `last` the last position, where padding is read as
    text and so is always there in full (SigLIP);
    `mean` the average over real tokens; `class_token` a learned token appended after the text that sees all real
    tokens and is seen by none (CoCa section 3.2). With `class_token` the returned tokens are those before the final
    norm, as CoCa's decoder reads them; otherwise after it.

    `table_std` is the std that tokens and positions are drawn with; None is CLIP's 0.02 and 0.01, SigLIP has
    width^-0.5 for both, without which a bidirectional encoder is slow to tell positions apart.

    `class_mask="legacy"` reproduces released CoCa weights, whose mask for the class token is shifted by one position:
    the class token sees the first padding and not itself; such text must be padded to `context_length`.

    `reads_padding`: a bidirectional encoder attends to padding as to text (MobileCLIP; `last` always does), so text
    must be padded to `context_length`, and nothing is packed.
    """

    skips_padding = True

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        width: int,
        depth: int,
        num_heads: int,
        eos_id: int,
        causal: bool = True,
        pooling: Pooling = "eos",
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        norm_eps: float = 1e-5,
        table_std: float | None = None,
        class_mask: Literal["exact", "legacy"] = "exact",
        reads_padding: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if pooling not in ("eos", "last", "mean", "class_token"):
            raise InputError(f"pooling is {pooling!r}; choose one of eos, last, mean, class_token")
        if not 0 <= eos_id < vocab_size:
            raise InputError(f"eos_id {eos_id} is outside the vocabulary of {vocab_size} ids; give the tokenizer's")
        self.vocab_size, self.context_length, self.width = vocab_size, context_length, width
        self.eos_id, self.causal, self.pooling, self.class_mask = eos_id, causal, pooling, class_mask
        if reads_padding and pooling == "class_token":
            raise InputError("reads_padding=true with pooling=class_token; released weights need class_mask=legacy")
        self.reads_padding = reads_padding or pooling == "last" or class_mask == "legacy"
        self._head_width = width // num_heads
        positions = context_length + (pooling == "class_token")
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(positions, width))
        self.class_token = nn.Parameter(torch.empty(width)) if pooling == "class_token" else None
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio, activation, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self._init(depth, table_std)
        if gradient_checkpointing:
            checkpoint_activations(self, "full")

    def _init(self, depth: int, table_std: float | None) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02 if table_std is None else table_std)
        nn.init.normal_(self.position_embedding, std=0.01 if table_std is None else table_std)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=0.01)
        init_transformer(self.blocks, self.width, depth)

    def forward(self, values: Tensor, mask: Tensor | None = None, lengths: Lengths | None = None) -> Encoded:
        """Encode (B,L) ids; `mask` (B,L) True = real, None = all. Raises `InputError` beyond `context_length`.

        `lengths` say what `mask` says, to the host: the first `counts[i]` ids of row i are real, and no others. A mask
        of another form (padding first, or holes) has none: give None. On the CPU they are compared with the mask
        (`InputError` where they differ); on a GPU they are believed, since asking it would make the host wait.
        With `lengths` (on the CPU also without) and an encoder that reads no padding, only real ids are computed, if
        no row is empty. Without them a class token is masked, which is right for any mask; other causal encoders
        expect padding to come last.
        """
        self._check(values, mask, lengths)
        if not self.reads_padding and (self.causal or self.class_token is None):
            lengths = known_lengths(mask, lengths)
            if mask is not None and lengths is not None and worth_packing(mask, lengths):
                return self._encode_packed(values, mask, lengths)
        return self._encode_padded(values, mask, lengths, [len(self.blocks) - 1], norm=True)[0]

    def encode_layers(
        self, values: Tensor, mask: Tensor | None = None, layers: Sequence[int] = (-1,), norm: bool = False
    ) -> list[Encoded]:
        """Encode (B,L) ids as the blocks `layers` give them, one `Encoded` each, pooled as the last one is.

        Negative numbers count from the end. `norm` applies the final norm to each (with `class_token`: to the pooled
        vector alone). Raises as `forward`, and `InputError` for a block there is not.
        """
        self._check(values, mask, None)
        return self._encode_padded(values, mask, None, layer_indices(layers, len(self.blocks)), norm)

    def layer_info(self) -> list[LayerInfo]:
        """List the blocks that `encode_layers` counts."""
        return [LayerInfo(f"blocks.{index}", self.width, 1) for index in range(len(self.blocks))]

    def _check(self, values: Tensor, mask: Tensor | None, lengths: Lengths | None) -> None:
        if values.ndim != 2 or values.shape[1] > self.context_length:
            raise InputError(
                f"text has shape {tuple(values.shape)} but the encoder was built for (B, up to {self.context_length}); "
                "set the tokenizer's context_length equal to the text encoder's"
            )
        if self.reads_padding and values.shape[1] != self.context_length:
            raise InputError(
                f"text has length {values.shape[1]}, but this encoder reads padding as text and needs all "
                f"{self.context_length} positions; set tokenizer.pad=context_length"
            )
        check_lengths(values, mask, lengths)

    def _encode_packed(self, values: Tensor, mask: Tensor, lengths: Lengths) -> Encoded:
        """Encode only what is real; a class token stands right behind its row, so the triangle alone is enough."""
        has_class = self.class_token is not None
        packing = pack_rows(
            mask, lengths, packed_dtype(self.position_embedding), self._head_width, self.causal, 1 if has_class else 0
        )
        x = self._embed_at(packing.pack(values), packing.place, ~packing.kept if has_class else None)
        x = self._run(x, None, packing, [len(self.blocks) - 1])[0]
        if has_class:
            return Encoded(self.norm(x[packing.ends - 1]), packing.unpack(x), mask, lengths)
        tokens = packing.unpack(self.norm(x))
        return Encoded(self._pool(tokens, values, mask), tokens, mask, lengths)

    def _encode_padded(
        self, values: Tensor, mask: Tensor | None, lengths: Lengths | None, layers: Sequence[int], norm: bool
    ) -> list[Encoded]:
        """Encode with all padding, as the blocks `layers` (from 0) give it."""
        real = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
        length = values.shape[1]
        if self.class_token is None:
            # Padding comes after the text, so a causal encoder needs no mask for it.
            attended = None if self.causal or mask is None or self.reads_padding else real[:, None, None, :]
            found = [self._normed(x, norm) for x in self._run(self._embed(values, 0), attended, None, layers)]
            return [Encoded(self._pool(tokens, values, real), tokens, real, lengths) for tokens in found]
        ids = nn.functional.pad(values, (0, 1))
        place = torch.arange(length + 1, device=values.device).expand_as(ids)
        if self.causal and self.class_mask == "exact" and (mask is None or lengths is not None):
            at = real.sum(1)  # right behind the text, where the triangle alone lets it see all real tokens
            found = self._run(self._embed_at(ids, place, place == at[:, None]), None, None, layers)
            pooled = [x.gather(1, at[:, None, None].expand(-1, 1, self.width))[:, 0] for x in found]
        else:
            seen = self._class_token_mask(real)
            found = self._run(self._embed_at(ids, place, place == length), seen, None, layers)
            pooled = [x[:, -1] for x in found]
        return [
            Encoded(self._normed(vector, norm), x[:, :-1], real, lengths)
            for vector, x in zip(pooled, found, strict=True)
        ]

    def start(self) -> TextState:
        """Begin step-by-step encoding with empty caches."""
        if not self.causal:
            raise InputError("step-by-step encoding needs a causal text encoder; set causal=true")
        return TextState([KeyValueCache() for _ in self.blocks], 0)

    def extend(self, ids: Tensor, state: TextState) -> tuple[Tensor, TextState]:
        """Encode further (B,n) ids: their (B,n,width) tokens, equal to those of one full forward pass."""
        x = self._embed(ids, state.length)
        for block, cache in zip(self.blocks, state.caches, strict=True):
            x = block(x, causal=True, cache=cache)
        tokens = x if self.class_token is not None else self.norm(x)
        return tokens, TextState(state.caches, state.length + ids.shape[1])

    def _embed(self, ids: Tensor, start: int) -> Tensor:
        embedded: Tensor = self.token_embedding(ids) + self.position_embedding[start : start + ids.shape[1]]
        return embedded

    def _embed_at(self, ids: Tensor, place: Tensor, is_class: Tensor | None) -> Tensor:
        """Embed (...,) ids at their places; where `is_class`, the class token with the last position of all."""
        if self.class_token is None or is_class is None:
            return self.token_embedding(ids) + nn.functional.embedding(place, self.position_embedding)  # type: ignore[no-any-return]
        place = torch.where(is_class, len(self.position_embedding) - 1, place)
        token = torch.where(is_class[..., None], self.class_token, self.token_embedding(ids))
        return token + nn.functional.embedding(place, self.position_embedding)

    def _class_token_mask(self, real: Tensor) -> Tensor:
        """Mask (B,1,N,N) for a class token that stands last and is seen by none."""
        legacy, n = self.class_mask == "legacy", real.shape[1] + 1
        validity = _shifted(real) if legacy else nn.functional.pad(real, (0, 1), value=True)
        seen = torch.ones(n, n, dtype=torch.bool, device=real.device)
        if self.causal:
            seen = seen.tril()
        else:
            seen[:-1, -1] = False
        mask = seen & validity[:, None, :]
        if not legacy:  # padding sees itself at least, so that no kernel meets a row without anything to attend to
            mask = mask | torch.eye(n, dtype=torch.bool, device=real.device)
        elif self.causal:
            mask[:, :-1] = seen[:-1]
        return mask[:, None]

    def _run(self, x: Tensor, mask: Tensor | None, packing: Packing | None, layers: Sequence[int]) -> list[Tensor]:
        """Run the blocks up to the highest of `layers`, and return what each of those gives (-1: what goes in)."""
        causal = self.causal and mask is None
        found, last = {-1: x}, max(layers)
        for index, block in enumerate(self.blocks):
            if index > last:
                break
            x = block(x, mask, causal, None, packing)
            if index in layers:
                found[index] = x
        return [found[index] for index in layers]

    def _normed(self, x: Tensor, norm: bool) -> Tensor:
        return self.norm(x) if norm else x

    def _pool(self, tokens: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        if self.pooling == "eos":
            first = ((ids == self.eos_id) & real).int().argmax(dim=1)
            return tokens[torch.arange(tokens.shape[0], device=tokens.device), first]  # len() would fix it in an export
        if self.pooling == "last":
            return tokens[:, -1]
        weight = real.to(tokens.dtype).unsqueeze(-1)
        return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


def _shifted(real: Tensor) -> Tensor:
    """Validity of text then class token, one position late: what open_clip's CoCa builds."""
    return nn.functional.pad(real, (1, 0), value=True)
