"""Small models with all files that a user's folder has: tokenizer, feature extractor, generation config."""
from __future__ import annotations

import contextlib
import json
import os
import pathlib

import tiny
import tiny_whisper as tw
from conftest import LETTERS

from jaxslim import hub
from jaxslim.spec import Spec

BERT = dict(feature_projection_input_dim=160, position_embeddings_type="relative_key", left_max_position_embeddings=6,
            right_max_position_embeddings=3, conv_depthwise_kernel_size=5, hidden_act="swish", num_hidden_layers=1,
            conformer_conv_dropout=0.0, mask_time_prob=0.0)
PARAKEET = dict(num_hidden_layers=1, vocab_size=31)
TEXT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=30,
            max_position_embeddings=24)
WHISPER = dict(frames=50, encoder_layers=1, decoder_layers=1)  # windows of one second


def _spec(family: str) -> Spec:
    if family == "whisper":
        return Spec(tw.config(**WHISPER), family, "seq2seq")
    if family == "bert":
        from transformers import BertConfig

        return Spec(BertConfig(**TEXT).to_dict(), family, "classification")
    return Spec(tiny.config(family, **(BERT if family == "wav2vec2-bert" else PARAKEET)), family, "ctc")


SPECS = {family: _spec(family) for family in ("whisper", "wav2vec2-bert", "parakeet_ctc", "bert")}


def folder(family: str, target: pathlib.Path, seed: int = 0) -> str:
    """A random model of the family in `target`, as its users have it."""
    hub.save(tiny.slim(SPECS[family], seed=seed), target)
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        {"whisper": _whisper, "wav2vec2-bert": _bert, "parakeet_ctc": _parakeet}[family](target)
    return str(target)


def _bert(target) -> None:
    from transformers import SeamlessM4TFeatureExtractor

    (target / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(LETTERS)}))
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Wav2Vec2CTCTokenizer",
                                                              "pad_token": "<pad>", "unk_token": "<unk>"}))
    SeamlessM4TFeatureExtractor().save_pretrained(target)


def _parakeet(target) -> None:
    import tokenizers
    from transformers import ParakeetFeatureExtractor, ParakeetTokenizer

    pieces = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer, pieces.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    pieces.train_from_iterator(["a bad cafe", "feed a cab", "dead beef", "face it"] * 4, tokenizers.trainers.BpeTrainer(
        vocab_size=31, special_tokens=["<pad>", "<unk>"], show_progress=False))
    ParakeetTokenizer(tokenizer_object=pieces, pad_token="<pad>", unk_token="<unk>").save_pretrained(target)
    ParakeetFeatureExtractor(feature_size=80).save_pretrained(target)


def _whisper(target) -> None:
    from test_generate import IDS
    from transformers import WhisperFeatureExtractor, WhisperTokenizer

    text = ["\u0120", "'", ",", ".", *"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *"0123"]
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|translate|>", "<|transcribe|>",
               "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    assert len(text) == tw.TEXT
    tokenizer = WhisperTokenizer(vocab={t: i for i, t in enumerate(text)}, merges=[])
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens([f"<|{i * 0.02:.2f}|>" for i in range(51)])
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(target)
    WhisperFeatureExtractor(chunk_length=1).save_pretrained(target)
    known = {k: list(v) if isinstance(v, tuple) else v for k, v in IDS.items()}
    (target / "generation_config.json").write_text(json.dumps(known | {"lang_to_id": {"<|en|>": tw.EN}}))
