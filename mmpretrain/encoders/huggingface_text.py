"""Text encoder: any text model of Hugging Face transformers, built from its own config."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mmpretrain.encoders.layered import layer_indices
from mmpretrain.errors import InputError
from mmpretrain.types import Encoded, LayerInfo

HuggingFacePooling = Literal["mean", "first", "pooler"]

REFUSED_KEYS = ("auto_map", "custom_pipelines", "quantization_config")
"""Keys of a config that would bring other code or other weights with them."""
REFUSED_ENDING = "_implementation"
"""So end the keys by which transformers fetches kernels from the hub."""
UNREAD = ("dtype", "torch_dtype", "transformers_version", "architectures")
"""What a config says of the file it stood in; weights are float32 here."""


class HuggingFaceTextEncoder(nn.Module):
    """A Hugging Face text model: (B,L) -> pooled (B,width), tokens (B,L,width) of its last layer.

    `config`: what its `config.json` says; `model_type` chooses the class among those of transformers (extra
    [huggingface]). Of an encoder-decoder model (mT5, NLLB) only the encoder is kept.
    `pooling`: `mean` over real tokens; `first` the first token; `pooler` the first token through the model's own
    pooling layer (BERT).
    `pretrained`: a folder with the model's weights (`model.safetensors`), which are loaded over random ones; a saved
    model has them in its own file and forgets the folder. Nothing is downloaded, no code of a checkpoint runs.

    Raises `InputError` for a config that transformers has no class for, or that asks for other code, and for a
    `context_length` beyond its learned positions.
    """

    causal = False

    def __init__(
        self,
        config: Mapping[str, Any],
        context_length: int,
        pooling: HuggingFacePooling = "mean",
        pretrained: str | Path | Literal[False] = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if pooling not in get_args(HuggingFacePooling):
            raise InputError(f"pooling is {pooling!r}; choose one of {', '.join(get_args(HuggingFacePooling))}")
        self.pooling, self.context_length = pooling, context_length
        self.transformer = _create(config, own_pooler=pooling == "pooler")
        _check_length(self.transformer, context_length)
        found = self.transformer.config
        self.width, self.vocab_size, self.pad_id = int(found.hidden_size), int(found.vocab_size), found.pad_token_id
        if pretrained is not False and pretrained is not None:
            _load(self.transformer, Path(pretrained))
        if gradient_checkpointing:
            self.transformer.gradient_checkpointing_enable()

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Encoded:
        """Encode (B,L) ids; `mask` (B,L) True = real, None = all. Raises `InputError` beyond `context_length`."""
        real = self._real(values, mask)
        # transformers asks a mask for its values, which the meta device (`mmpretrain plan`) does not have.
        attended = None if mask is None or values.is_meta else mask.long()
        out = self.transformer(input_ids=values, attention_mask=attended)
        tokens: Tensor = out.last_hidden_state
        pooled: Tensor = out.pooler_output if self.pooling == "pooler" else self._pool(tokens, real)
        return Encoded(pooled, tokens, mask)

    def encode_layers(
        self, values: Tensor, mask: Tensor | None = None, layers: Sequence[int] = (-1,), norm: bool = False
    ) -> list[Encoded]:
        """Encode (B,L) ids as the layers `layers` give them; with pooling=`pooler` the first token is the pooled one.

        Raises as `forward`, and `InputError` for a layer there is not and for `norm`, which these models keep inside.
        """
        wanted = layer_indices(layers, len(self.layer_info()))
        if norm:
            raise InputError("the layers of a Hugging Face text model have their norms inside; leave norm out")
        real = self._real(values, mask)
        out = self.transformer(input_ids=values, attention_mask=real.long(), output_hidden_states=True)
        found = [out.hidden_states[index + 1] for index in wanted]  # the first are the embeddings
        return [Encoded(self._pool(tokens, real), tokens, mask) for tokens in found]

    def layer_info(self) -> list[LayerInfo]:
        """List the layers that `encode_layers` counts."""
        count = int(self.transformer.config.num_hidden_layers)
        return [LayerInfo(f"layers.{index}", self.width, 1) for index in range(count)]

    def _real(self, values: Tensor, mask: Tensor | None) -> Tensor:
        if values.ndim != 2 or values.shape[1] > self.context_length:
            raise InputError(
                f"text has shape {tuple(values.shape)} but the encoder was built for (B, up to {self.context_length}); "
                "set the tokenizer's context_length equal to the text encoder's"
            )
        return torch.ones_like(values, dtype=torch.bool) if mask is None else mask

    def _pool(self, tokens: Tensor, real: Tensor) -> Tensor:
        if self.pooling != "mean":
            return tokens[:, 0]
        weight = real.to(tokens.dtype).unsqueeze(-1)
        return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a `config.json` describes the model itself, as plain values; raises as the encoder."""
    unsafe = [key for key in config if key in REFUSED_KEYS or key.endswith(REFUSED_ENDING)]
    if unsafe:
        raise InputError(f"the config has {', '.join(unsafe)}, which may fetch code; remove it to use the plain model")
    return {key: value for key, value in config.items() if key not in UNREAD and not key.startswith("_")}


def library_config(config: Mapping[str, Any]) -> Any:
    """Return the library's own config object for a `config.json`; raises `InputError` as the encoder."""
    try:
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError as error:
        raise InputError(
            "this text encoder needs transformers; pip install 'mmpretrain-contrastive[huggingface]'"
        ) from error
    given = plain_config(config)
    model_type = given.pop("model_type", None)
    if model_type not in CONFIG_MAPPING or not _is_text(CONFIG_MAPPING[model_type]):
        raise InputError(f"model_type={model_type!r} is no text model of transformers; give that of a text encoder")
    try:
        return AutoConfig.for_model(model_type, **given)
    except Exception as error:  # each config class checks in its own way
        raise InputError(f"no text encoder of model_type={model_type!r}: {_one_line(error)}") from error


def _is_text(config_class: Any) -> bool:
    """Whether a config class is that of one text model, seen before it is built: others may ask the hub for parts."""
    if getattr(config_class, "sub_configs", None):
        return False
    return hasattr(config_class, "vocab_size") or "vocab_size" in inspect.signature(config_class).parameters


def _create(config: Mapping[str, Any], own_pooler: bool) -> Any:
    built = library_config(config)
    from transformers import AutoModel

    lacks = InputError(f"a {built.model_type} encoder has no pooling layer of its own; set pooling=first or mean")
    try:
        if getattr(built, "is_encoder_decoder", False):
            if own_pooler:
                raise lacks
            return AutoModel.from_config(built).encoder
        try:
            return AutoModel.from_config(built, add_pooling_layer=own_pooler)
        except TypeError as error:  # a class without such a layer
            if own_pooler:
                raise lacks from error
            return AutoModel.from_config(built)
    except (ValueError, AttributeError) as error:  # sizes that do not fit each other, a model of other modalities
        if isinstance(error, InputError):
            raise
        raise InputError(f"no text encoder of model_type={built.model_type!r}: {_one_line(error)}") from error


def _check_length(transformer: Any, context_length: int) -> None:
    table = getattr(getattr(transformer, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):  # positions are computed
        return
    most = table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)  # RoBERTa's begin later
    if context_length > most:
        raise InputError(f"context_length={context_length} but the text model has positions for {most} ids; lower it")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _load(transformer: nn.Module, folder: Path) -> None:
    """Load the weights of a folder, whether they are those of the bare model or lie under a prefix such as `bert.`."""
    from mmpretrain.interop.converted import as_float32
    from mmpretrain.interop.files import read_tensors
    from mmpretrain.interop.names import check_keys, check_numbers

    given, own = read_tensors(folder), transformer.state_dict()
    first = next(iter(own))
    prefixes = [name.removesuffix(first) for name in given if name == first or name.endswith(f".{first}")]
    prefix = prefixes[0] if prefixes else ""
    # Heads, other towers and the pooling layer are left where they are: only what the encoder lacks is an error.
    found = as_float32({name: given[prefix + name] for name in own if prefix + name in given})
    check_keys(found, own, str(folder))
    check_numbers(found, own, str(folder))
    transformer.load_state_dict(found)
