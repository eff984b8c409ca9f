"""The mini model's tokenizer and text encoder: whole words of the moving-scenes captions, a two-layer UMT5."""

import string

import torch
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from lab.scenes import vocabulary

TEXT_LENGTH = 32
TEXT_DIM = 64


def build_tokenizer() -> T5Tokenizer:
    """Return a T5 tokenizer that knows every caption word whole and spells out the others."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -3.0) for word in vocabulary()]
    pieces += [(letter, -8.0) for letter in ("▁", *string.ascii_lowercase, *string.digits, *",.-'")]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def build_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    """Return an untrained encoder of width 64."""
    config = UMT5Config(
        vocab_size=vocabulary_size,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=False,
    )
    return UMT5EncoderModel(config)


def tokenize(tokenizer: T5Tokenizer, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, both (prompts, 32) int64."""
    batch = tokenizer(
        prompts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, add_special_tokens=True,
        return_attention_mask=True, return_tensors="pt",
    )  # fmt: skip
    return batch.input_ids, batch.attention_mask


def encode_text(text_encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Encode token ids to (B, 32, 64), zero past each prompt's end as Wan's pipeline does."""
    return text_encoder(ids, mask).last_hidden_state * mask[..., None]


@torch.no_grad()
def embed_prompts(tokenizer: T5Tokenizer, text_encoder: UMT5EncoderModel, prompts: list[str]) -> Tensor:
    """Return (prompts, 32, 64) embeddings of captions."""
    ids, mask = tokenize(tokenizer, prompts)
    device = next(text_encoder.parameters()).device
    return encode_text(text_encoder, ids.to(device), mask.to(device))
