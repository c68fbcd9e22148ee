"""Makes tests/fixtures/squad.json: F1 and exact match of odd answers by Python's own words, spaces and lower case.

    python3 tests/reference/squad.py

The rules are those of the SQuAD v1.1 metric (Rajpurkar et al. 2016), written again.
"""

import json
import random
import re
import string
from collections import Counter
from pathlib import Path

PIECES = ["a", "an", "the", "The", "AN", "thé", "a_b", "_a", "the-an", "a.", "cat", "Cat", "dog's", "a\u0301", "an\u0300", "\u00aa", "a\u00b2", "\u0130stanbul", "\u03a3\u039f\u03a3",
          "stra\u00dfe", "STRASSE", "\u65e5\u672c", "a\u65e5", "\u0905\u092a", "a\u093f", "1,000", "$5", "5%", "\u20ac5", "\u201ca\u201d", "\u2014the\u2014", "\U0001f600a", "", "!", "\u0661", "\ufb01", "e\u0301"]
SPACES = [" ", "  ", "\t", "\n", "\u00a0", "\u3000", "\u2028", "\x1c", "\x1f", "\x85", "\u200b", ""]


def words(text):
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(answer, reference):
    answer, reference = words(answer), words(reference)
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def main():
    draw = random.Random(0)
    text = lambda: "".join(draw.choice(PIECES) + draw.choice(SPACES) for _ in range(draw.randint(0, 6)))
    rows = []
    for _ in range(300):
        references = [text() for _ in range(draw.randint(1, 3))]
        answer = draw.choice([text(), draw.choice(references), draw.choice(references).upper() + draw.choice(PIECES)])
        exact = max(float(words(answer) == words(r)) for r in references)
        rows.append([answer, references, max(f1(answer, r) for r in references), exact])
    path = Path(__file__).parent.parent / "fixtures" / "squad.json"
    path.write_text(json.dumps(rows, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
