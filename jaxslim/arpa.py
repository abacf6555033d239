"""n-gram language models in ARPA files (KenLM, SRILM, pocolm write them), in plain Python, for decoding."""
from __future__ import annotations

import gzip
import math
import os

LN10 = math.log(10.0)


class Arpa:
    """Back-off n-gram model. `score` gives natural logarithms; a state is the tuple of the last order - 1 words.

    Raises:
      ValueError: the file is no ARPA file, or its counts do not fit its sections.
    """

    def __init__(self, path: str | os.PathLike):
        self.grams: dict[tuple[str, ...], tuple[float, float]] = {}      # words -> log10 probability, log10 back-off
        self.order, stated, found = 0, {}, {}
        opened = gzip.open if os.fspath(path).endswith(".gz") else open
        section, ended = None, False
        try:
            with opened(path, "rt", encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    line = line.strip()
                    if not line:
                        continue
                    if line.startswith("ngram ") and section == 0:
                        order, count = line[6:].split("=")
                        stated[int(order)] = int(count)
                    elif line == "\\data\\":
                        section = 0
                    elif line == "\\end\\":
                        ended = True
                        break
                    elif line.startswith("\\") and line.endswith("-grams:"):
                        section = int(line[1:-7])
                        self.order = max(self.order, section)
                    elif section:
                        parts = line.split("\t") if "\t" in line else line.split()
                        words = tuple(parts[1].split()) if "\t" in line else tuple(parts[1 : section + 1])
                        back = parts[2] if "\t" in line and len(parts) > 2 else (
                            parts[section + 1] if "\t" not in line and len(parts) > section + 1 else "0")
                        if len(words) != section:
                            raise ValueError(f"line {number} has {len(words)} words in the section of {section}-grams")
                        self.grams[words] = float(parts[0]), float(back)
                        found[section] = found.get(section, 0) + 1
        except (ValueError, IndexError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no ARPA file: {error}.") from error
        if not ended or not stated or any(found.get(n, 0) != count for n, count in stated.items()):
            raise ValueError(f"{path} is no whole ARPA file: it states {stated} n-grams and holds {found}.")
        self.unknown = self.grams.get(("<unk>",), (-7.0, 0.0))[0]
        self.start = ("<s>",) if self.order > 1 else ()

    def score(self, state: tuple[str, ...], word: str) -> tuple[float, tuple[str, ...]]:
        """(ln p(word | state), the state after it); an unknown word has the probability of <unk>."""
        context, total = state[max(0, len(state) - self.order + 1):], 0.0
        word = word if (word,) in self.grams else "<unk>"
        while True:
            if (hit := self.grams.get((*context, word))) is not None:
                total += hit[0]
                break
            if not context:
                total += self.unknown
                break
            total += self.grams.get(context, (0.0, 0.0))[1]
            context = context[1:]
        return total * LN10, ((*state, word))[-(self.order - 1):] if self.order > 1 else ()

    def end(self, state: tuple[str, ...]) -> float:
        """ln p(</s> | state)."""
        return self.score(state, "</s>")[0]
