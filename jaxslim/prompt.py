"""What `generate` is asked for: its options, and the tokens that a transcript starts with."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxslim import hub, search
from jaxslim.slim import Slim
from jaxslim.spec import Spec, nearest


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `generate`, named as in transformers; most come from generation_config.json."""

    decoder_start_token_id: int
    eos_token_id: int
    pad_token_id: int
    max_length: int
    max_new_tokens: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    forced_decoder_ids: tuple | None = None               # of old checkpoints: [[place, id], ...]; ids None = detect
    no_timestamps_token_id: int | None = None
    max_initial_timestamp_index: int | None = None
    prev_sot_token_id: int | None = None
    lang_to_id: Mapping[str, int] | None = None
    task_to_id: Mapping[str, int] | None = None
    is_multilingual: bool = True
    language: str | Sequence[str] | None = None           # name or code, or one a clip; None = detect if possible
    task: str | None = None                               # "transcribe" or "translate"
    return_timestamps: bool | None = None                 # None = when the audio is longer than a window
    temperature: float | tuple[float, ...] = 0.0          # several: the later ones are fallbacks
    top_k: int | None = 50                                # when sampling
    compression_ratio_threshold: float | None = None      # above it a window falls back
    logprob_threshold: float | None = None                # below it too,
    no_speech_threshold: float | None = None              # unless it is taken for silence, and skipped
    condition_on_prev_tokens: bool = False
    prompt_ids: tuple[int, ...] | None = None
    prompt_condition_type: str = "first-segment"          # or "all-segments"
    seed: int = 0


def generation_config(name: str) -> dict[str, Any]:
    """The options in the generation_config.json of a model folder or hub id; keys that `generate` has not are left, and
    so is `return_timestamps: false`, a default there: audio longer than a window is read by timestamps all the same."""
    path = hub.folder(name) / "generation_config.json"
    config = hub._json(path) if path.is_file() else {}
    if config.get("return_timestamps") is False:
        del config["return_timestamps"]
    return {f.name: config[f.name] for f in dataclasses.fields(Options) if config.get(f.name) is not None}


def options(spec: Spec, **given: Any) -> Options:
    """`given` over the values in the model's config. Raises ValueError for an unknown name or a contradiction."""
    names = [f.name for f in dataclasses.fields(Options)]
    for name in given:
        if name not in names:
            raise ValueError(f"generate has no option {name!r}.{nearest(name, names)}")
    config = {k: spec.get(k) for k in ("decoder_start_token_id", "eos_token_id", "pad_token_id", "suppress_tokens",
                                       "begin_suppress_tokens", "forced_decoder_ids")}
    values = {"max_length": spec["max_target_positions"], **config, **given}
    for key, value in values.items():
        values[key] = tuple(value) if isinstance(value, (list, np.ndarray)) else value
    if isinstance(values["eos_token_id"], tuple):
        values["eos_token_id"] = values["eos_token_id"][0]
    o = Options(**values)
    if o.no_speech_threshold is not None and o.logprob_threshold is None:
        raise ValueError("no_speech_threshold needs logprob_threshold: silence is what is unlikely and not speech.")
    if o.return_timestamps and o.no_timestamps_token_id is None:
        raise ValueError("return_timestamps needs no_timestamps_token_id (see generation_config.json).")
    if not o.is_multilingual and (o.task or o.language):
        raise ValueError("task and language cannot be chosen: the model is for English only.")
    if o.prompt_condition_type not in ("first-segment", "all-segments"):
        raise ValueError("prompt_condition_type is 'first-segment' or 'all-segments'.")
    if o.prompt_condition_type == "all-segments" and not o.condition_on_prev_tokens:
        raise ValueError("prompt_condition_type='all-segments' needs condition_on_prev_tokens=True.")
    return o


def start_tokens(model: Slim, window: jax.Array, o: Options, stamps: bool) -> np.ndarray:
    """(B, n): start of transcript, language, task, <|notimestamps|>, as far as the options have them."""
    clips, start = window.shape[0], [o.decoder_start_token_id]
    if o.task is None and o.language is None and o.forced_decoder_ids and o.forced_decoder_ids[0][0] == 1:
        for place, (want, token) in enumerate(o.forced_decoder_ids, 1):
            if want != place:
                raise ValueError(f"forced_decoder_ids {o.forced_decoder_ids} must force the places 1, 2, ... in order.")
            start.append(token)
    if o.language is not None:
        given = [o.language] * clips if isinstance(o.language, str) else list(o.language)
        if len(given) != clips:
            raise ValueError(f"language lists {len(given)} languages for {clips} clips.")
        languages = [_language(name, o.lang_to_id) for name in given]
    elif o.lang_to_id and (len(start) < 2 or start[1] is None):
        states = search.encode(model.params, window, spec=model.spec)
        logits = np.asarray(search.first_logits(model.params, states, o.decoder_start_token_id, spec=model.spec))
        known = sorted(o.lang_to_id.values())
        languages = [known[k] for k in logits[:, known].argmax(-1)]
    else:
        languages = [None] * clips
    tasks = set((o.task_to_id or {}).values())
    if o.task is not None and o.task not in (o.task_to_id or {}):
        raise ValueError(f"task {o.task!r} is none of {sorted(o.task_to_id or {})} (task_to_id of "
                         "generation_config.json).")
    out = []
    for language in languages:
        tokens = list(start) if language is None else [start[0], language, *start[2:]]
        if o.task is not None:
            tokens.append(o.task_to_id[o.task])
        elif o.language is not None and tasks and not tasks & set(tokens):
            tokens.append(o.task_to_id["transcribe"])
        if o.no_timestamps_token_id is not None:
            if not stamps and tokens[-1] != o.no_timestamps_token_id:
                tokens.append(o.no_timestamps_token_id)
            elif stamps and tokens[-1] == o.no_timestamps_token_id:
                tokens.pop()
        out.append([t for t in tokens if t is not None])
    return np.array(out, np.int32)


def _language(name: str, ids: Mapping[str, int] | None) -> int:
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE  # lazy: names of 100 languages

    for key in (name.lower(), f"<|{name.lower()}|>", f"<|{TO_LANGUAGE_CODE.get(name.lower())}|>"):
        if key in (ids or {}):
            return ids[key]
    raise ValueError(f"language {name!r} is none of this model's (lang_to_id of generation_config.json): "
                     f"{', '.join(k.strip('<|>') for k in ids or {}) or 'it has none'}.")
