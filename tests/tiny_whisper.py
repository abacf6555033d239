"""Small random Whisper models and their special tokens, for test_whisper and test_generate."""
from __future__ import annotations

from typing import Any

import numpy as np
import tiny

from jaxslim import hub

TEXT = 60                       # ids of text; the special tokens follow in the order of Whisper's tokenizer
EOS, SOT, EN, DE, TRANSLATE, TRANSCRIBE, STARTOFLM, PREV, NOSPEECH, NOTIMESTAMPS = range(TEXT, TEXT + 10)
BEGIN = NOTIMESTAMPS + 1        # <|0.00|>


def config(frames: int = 1500, **changes: Any) -> dict[str, Any]:
    from transformers import WhisperConfig

    small = dict(vocab_size=BEGIN + frames + 1, num_mel_bins=80, encoder_layers=2, encoder_attention_heads=4,
                 encoder_ffn_dim=40, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, d_model=32,
                 max_source_positions=frames, max_target_positions=64, decoder_start_token_id=SOT, pad_token_id=EOS,
                 bos_token_id=EOS, eos_token_id=EOS, suppress_tokens=None, begin_suppress_tokens=None)
    return WhisperConfig(**{**small, **changes}).to_dict()


def pair(folder, head: str = "seq2seq", seed: int = 0, scale: float = 1.2, **changes: Any):
    """A random transformers model and ours, read from what it saves."""
    import torch
    import transformers

    cls = {"seq2seq": transformers.WhisperForConditionalGeneration, "none": transformers.WhisperModel}[head]
    model = cls(transformers.WhisperConfig.from_dict(config(**changes))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            norm = 1.0 if name.endswith("norm.weight") else 0.0
            p.copy_(0.3 * noise + norm if p.ndim == 1 else scale * noise / p[0].numel() ** 0.5)
    return model, hub.load(tiny.save(model, folder))


def features(batch: int = 2, mels: int = 80, frames: int = 1500, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, mels, 2 * frames)).astype(np.float32)


def ids(batch: int = 2, length: int = 7, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TEXT, (batch, length)).astype(np.int32)
