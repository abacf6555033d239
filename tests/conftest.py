"""What all tests share: a compilation cache, the CPU, no network; and a small data set with a model that fits it."""
import atexit
import json
import os
import pathlib
import shutil
import tempfile

# before anything imports jax; subprocesses inherit it
ROOT = pathlib.Path(__file__).parents[1]
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache/tests-xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# A third of the suite's time is LLVM's optimiser; XLA's own passes stay as they are.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Model code that transformers copies: a folder for each worker, as `transformers_modules` is one package per process
# and two workers must not write into one folder.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="jaxslim-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402

from jaxslim import hub  # noqa: E402
from jaxslim.train.log import wav_bytes  # noqa: E402

LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", "a", "b", "c", "d", "e", "f"]  # as many as tiny.SMALL has outputs
TEXTS = ["ab", "cad be", "face", "bed fade", "dad", "cab", "feed a cab", "deaf"]

SHAPE = dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True, num_hidden_layers=1,
             num_conv_pos_embeddings=8, conv_dim=[16, 16], conv_kernel=[10, 8], conv_stride=[5, 8],
             num_feat_extract_layers=2, mask_time_prob=0.0)  # compiles fast


def write_data(folder: pathlib.Path, seconds=(0.115, 0.12), rows: int = 8, seed: int = 0) -> str:
    """A manifest of short noisy clips, their lengths between `seconds`; the path to it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(seed), []
    for i in range(rows):
        length = int(16000 * rng.uniform(*seconds))
        (folder / f"{i}.wav").write_bytes(wav_bytes(0.3 * rng.standard_normal(length)))
        lines.append(json.dumps({"id": f"clip-{i}", "audio": f"{i}.wav", "text": TEXTS[i % len(TEXTS)]}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return str(folder / "rows.jsonl")


def write_model(folder: pathlib.Path, **changes) -> str:
    """A random model with LETTERS as its vocabulary, as a Hugging Face folder; the path to it."""
    model = tiny.slim(**{**SHAPE, **changes})
    hub.save(model, folder)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(LETTERS)}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"return_attention_mask": True}))
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """Drops compiled programs after each file: each holds memory maps, of which Linux gives a process 65,530 by
    default; a worker that runs out of them dies inside XLA."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> dict[str, str]:
    """Paths of a small model and of its data: {"model", "train", "validation", "test"}."""
    folder = tmp_path_factory.mktemp("small")
    return {"model": write_model(folder / "model"),
            **{name: write_data(folder / name, seed=i) for i, name in enumerate(("train", "validation", "test"))}}
