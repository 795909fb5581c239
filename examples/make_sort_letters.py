"""Makes a small JSONL task: sort the letters of a word. One object a line, {"prompt": "sort qzkbe", "answer": "bekqz"}.

python examples/make_sort_letters.py data/sort_letters.jsonl
"""

import json
import random
import string
import sys
from pathlib import Path

LINES = 8000
LETTERS = 5


def main(path: Path) -> None:
    """Write LINES distinct words and their sorted letters, the same ones every time."""
    rng = random.Random(0)
    words: dict[str, None] = {}
    while len(words) < LINES:
        words["".join(rng.sample(string.ascii_lowercase, LETTERS))] = None
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for word in words:
            file.write(json.dumps({"prompt": f"sort {word}", "answer": "".join(sorted(word))}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
