"""Train a small byte-level Mamba on a text of yours, then let it write.

    python examples/train_on_your_text.py my_book.txt --minutes 5

Without a file it learns a few lines of a nursery rhyme, in seconds, to show that all is well. Ctrl-C saves;
`stateline train --resume --out runs/mine` continues.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import stateline
from stateline.training import TrainConfig, train

RHYME = """\
The north wind doth blow, and we shall have snow,
And what will the robin do then, poor thing?
He'll sit in a barn and keep himself warm,
And hide his head under his wing, poor thing.
"""


def main() -> None:
    """Train, say how well it went, and write on from a prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", help="a text file, or a folder of them (default: a rhyme)")
    parser.add_argument("--minutes", type=float, default=5.0, help="time to train (default: 5)")
    parser.add_argument("--out", default="runs/mine", help="where the model goes (default: runs/mine)")
    parser.add_argument("--prompt", default="The north wind", help="what the model continues")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.text:
            config = TrainConfig.of(path=arguments.text, out=arguments.out, minutes=arguments.minutes)
        else:
            rhyme = Path(folder) / "rhyme.txt"
            rhyme.write_text(RHYME * 20)
            config = TrainConfig.of(path=rhyme, out=folder, size="tiny", steps=60, context=64, batch_size=4, lr=1e-2)
        result = train(config)
        print(f"{result.best_bpb:.2f} bits per byte after {result.steps} steps\n\n{arguments.prompt}", end="")
        sampling = stateline.generation.SamplingConfig(temperature=0.5, seed=1)
        for piece in stateline.generate(result.model, arguments.prompt, max_tokens=150, sampling=sampling):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
