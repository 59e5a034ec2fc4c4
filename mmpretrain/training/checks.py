"""Whether the parts of a run fit each other, asked before anything is read or written."""

from __future__ import annotations

from mmpretrain.errors import InputError
from mmpretrain.heads import CaptionHead
from mmpretrain.model import MultimodalModel
from mmpretrain.types import Tokenizer


def check_tokenizer(model: MultimodalModel, tokenizer: Tokenizer) -> None:
    """Raise `InputError` where the text encoder was built for another tokenizer."""
    if "text" not in model.encoders:
        return
    for name, head in model.heads.items():
        if isinstance(head, CaptionHead) and len(head.weight) != tokenizer.vocab_size:
            raise InputError(
                f"head {name!r} predicts {len(head.weight)} ids, the tokenizer has {tokenizer.vocab_size}; "
                f"set model.heads.{name}.vocab_size={tokenizer.vocab_size}"
            )
    encoder = model.encoders["text"]
    if getattr(encoder, "reads_padding", False) and getattr(tokenizer, "pad", "context_length") != "context_length":
        raise InputError(
            "the text encoder reads padding as text; set tokenizer.pad=context_length, or tokenizer=siglip"
        )
    for attribute in ("vocab_size", "eos_id", "context_length"):
        want, got = getattr(encoder, attribute, None), getattr(tokenizer, attribute)
        if want is not None and want != got:
            raise InputError(
                f"the text encoder has {attribute} {want}, the tokenizer {got}; "
                f"set model.encoders.text.{attribute}={got}"
            )
