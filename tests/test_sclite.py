"""WER against NIST's sclite (Debian: sctk; `sctk sclite`), where it is installed. PyPI's sctk is something else."""
import re
import shutil
import subprocess

import numpy as np
import pytest

from jaxslim.score import score

WORDS = "the quick brown fox jumps over a lazy dog and runs far away from home to sea".split()


def pairs(n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        said = list(rng.choice(WORDS, rng.integers(1, 12)))
        heard = [w if rng.random() > 0.15 else str(rng.choice(WORDS)) for w in said if rng.random() > 0.1]
        for _ in range(rng.poisson(0.6)):
            heard.insert(int(rng.integers(len(heard) + 1)), str(rng.choice(WORDS)))
        yield " ".join(said), " ".join(heard)


@pytest.mark.skipif(shutil.which("sctk") is None, reason="NIST's sclite is not installed")
def test_the_same_errors_as_sclite_on_1000_random_pairs(tmp_path):
    texts = list(pairs(1000))
    for k, name in enumerate(("ref", "hyp")):
        (tmp_path / name).write_text("".join(f"{pair[k]} (s-{i:04})\n" for i, pair in enumerate(texts)))
    words = "sctk sclite -r ref trn -h hyp trn -i rm -o pralign stdout".split()
    out = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    theirs = {int(i): sum(map(int, counts.split()[1:])) for i, counts in
              re.findall(r"id: \(s-(\d+)\)\nScores: \(#C #S #D #I\) ([\d ]+)", out)}
    ours = score(*zip(*texts))
    assert len(theirs) == 1000 and ours["n"] == 1000
    assert [i for i, u in enumerate(ours.utterances) if u["errors"] != theirs[i]] == []
    assert ours["wer"] == sum(theirs.values()) / ours["words"]


def test_counts_are_the_edit_distance():
    for said, heard in pairs(200, 1):
        a, b = said.split(), heard.split()
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            old, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                old, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, old + (x != y))
        assert score([said], [heard]).utterances[0]["errors"] == row[-1]


def test_normalizers_are_named_and_hashed():
    from jaxslim.score import NORMALIZERS, normalizer_hash

    assert len({normalizer_hash(name) for name in NORMALIZERS}) == 4
    assert score(["It's Two!"], ["it's 2"], "whisper-english")["wer"] == 0
    assert score(["It's Two!"], ["its two"], "letters")["wer"] == 0.5
    assert score(["Caf\u00e9, please"], ["caf\u00e9 please"], "whisper")["wer"] == 0
    assert score(["a"], ["a"])["normalize_hash"] == normalizer_hash("none")
