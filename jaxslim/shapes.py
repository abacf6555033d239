"""Shapes of published checkpoints: what differs from the defaults of transformers. For bench and parity."""
from __future__ import annotations

LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, conv_bias=True,
             feat_extract_norm="layer", do_stable_layer_norm=True)
CONFORMER = dict(LARGE, hidden_act="swish", vocab_size=32)


def whisper(width: int, heads: int, encoder: int, decoder: int, mels: int = 80, vocabulary: int = 51865) -> dict:
    return dict(d_model=width, encoder_layers=encoder, decoder_layers=decoder, encoder_attention_heads=heads,
                decoder_attention_heads=heads, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width, num_mel_bins=mels,
                vocab_size=vocabulary)


def neox(width: int, layers: int, heads: int) -> dict:
    return dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
                vocab_size=50304)


SHAPES = {  # name: (family, head, changes)
    "wav2vec2-base": ("wav2vec2", "ctc", {}),
    "wav2vec2-large-lv60": ("wav2vec2", "ctc", LARGE),
    "hubert-base": ("hubert", "ctc", {}),
    "hubert-large": ("hubert", "ctc", LARGE),
    "hubert-xlarge": ("hubert", "ctc", dict(LARGE, hidden_size=1280, num_hidden_layers=48, intermediate_size=5120)),
    "wavlm-base-plus": ("wavlm", "ctc", {}),
    "wavlm-large": ("wavlm", "ctc", dict(LARGE, conv_bias=False)),
    "wav2vec2-conformer-rel-pos-large": ("wav2vec2-conformer", "ctc", dict(CONFORMER,
                                                                           position_embeddings_type="relative")),
    "wav2vec2-conformer-rope-large": ("wav2vec2-conformer", "ctc", dict(CONFORMER, position_embeddings_type="rotary")),
    "w2v-bert-2.0": ("wav2vec2-bert", "ctc", dict(vocab_size=32)),
    "parakeet-ctc-0.6b": ("parakeet_ctc", "ctc", {}),
    "whisper-tiny": ("whisper", "seq2seq", whisper(384, 6, 4, 4)),
    "whisper-base": ("whisper", "seq2seq", whisper(512, 8, 6, 6)),
    "whisper-small": ("whisper", "seq2seq", whisper(768, 12, 12, 12)),
    "distil-whisper-small.en": ("whisper", "seq2seq", whisper(768, 12, 12, 4, vocabulary=51864)),
    "whisper-large-v3": ("whisper", "seq2seq", whisper(1280, 20, 32, 32, 128, 51866)),
    "whisper-large-v3-turbo": ("whisper", "seq2seq", whisper(1280, 20, 32, 4, 128, 51866)),
    "bert-base": ("bert", "classification", {}),
    "roberta-base": ("roberta", "classification", dict(vocab_size=50265, max_position_embeddings=514,
                                                       type_vocab_size=1, layer_norm_eps=1e-5)),
    "pythia-70m": ("gpt_neox", "causal", neox(512, 6, 8)),
    "pythia-160m": ("gpt_neox", "causal", neox(768, 12, 12)),
    "pythia-1b": ("gpt_neox", "causal", neox(2048, 16, 8)),
}
