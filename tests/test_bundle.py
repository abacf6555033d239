"""Bundled prompts: what is there, that the splits share nothing, and that scripts/bundle.py makes them."""
import pathlib
import runpy

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxslim.data import load_rows

ROOT = pathlib.Path(__file__).parents[1]
VOICES = {"es": "Allison", "fr": "June", "it": "Carlo", "ru": "Ivrvoice"}


@pytest.mark.parametrize("language", VOICES)
def test_other_languages(language):
    train, test = (load_rows(f"bundled:prompts-{language}/{split}") for split in ("train", "test"))
    assert (len(train), len(test)) == (80, 40) and len(load_rows(f"bundled:prompts-{language}")) == 80
    assert not set(train.column("id")) & set(test.column("id")) and "text" not in train.columns
    assert set(train.column("speaker") + test.column("speaker")) == {VOICES[language]}
    for rows in (train, test):
        assert all(1 <= rows.duration(i) <= 6 for i in range(len(rows)))
        assert rows.audio(3).shape == (pytest.approx(16000 * rows.duration(3), abs=32),)
    notices = (ROOT / "NOTICE").read_text(), (ROOT / f"jaxslim/assets/prompts-{language}/NOTICE").read_text()
    licence = "CC-BY-SA 3.0" if language in ("es", "fr") else "CC-BY 3.0"
    assert all(licence in text for text in notices) and f"prompts-{language}" in notices[0]


def test_they_can_be_made_again(tmp_path):
    parts = [pq.read_table(ROOT / f"jaxslim/assets/prompts-es/{split}.parquet") for split in ("train", "test")]
    for language in VOICES:
        (tmp_path / "src" / language).mkdir(parents=True)
        pq.write_table(pa.concat_tables(parts), tmp_path / "src" / language / "train.parquet")
    runpy.run_path(str(ROOT / "scripts/bundle.py"))["prompts"](tmp_path / "src", tmp_path / "out")
    for split, part in zip(("train", "test"), parts):    # of just those 120 the same 80 and 40
        assert pq.read_table(tmp_path / f"out/prompts-ru/{split}.parquet").equals(part)
