"""Make the bundled model: fetch the data, train, keep the best checkpoint, store it small, write its card.

    python scripts/bundled.py                                           # hours on a CPU; installs into the package
    python scripts/bundled.py --device cuda --minutes 9 --out DIR       # minutes on a GPU; all of it stays in DIR
    python scripts/bundled.py --minutes 1 --d-model 64 --n-layer 2 --out DIR    # a try

The run lies in OUT/run and the model in OUT/model. Ctrl-C, SIGTERM or a crash lose at most a few minutes: the same
command goes on from the last checkpoint, and --finish makes the model of what there is. Where data/ is already there
nothing is fetched, so the repository's tree and data/ are all another machine needs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts")]  # also runs from a tree that is not installed

import card  # noqa: E402  # needs the path above
import data  # noqa: E402
import torch  # noqa: E402

from stateline.models import checkpoint  # noqa: E402
from stateline.training import Interrupted, TrainConfig, TrainResult, train  # noqa: E402

CORPUS = ROOT / "data" / "sotu"
PACKAGED = ROOT / "src" / "stateline" / "bundled" / "model"
LIMIT = 10_000_000  # bytes of the whole folder


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Defaults make a model of 4.8 million parameters, 9.7 MB as stored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, help="folder for everything; the package is left alone (default: runs/bundled, installed)")
    add("--device", help="cpu, or cuda, where the reference back end runs (default: cuda if there is one)")
    add("--minutes", type=float, help="time to train; the learning rate follows it (default: 240, on a GPU 8)")
    add("--d-model", type=int, default=280)
    add("--n-layer", type=int, default=9)
    add("--context", type=int, default=None, help="bytes in a window (default: 1024 on a CPU, 512 on a GPU)")
    add("--batch", type=int, default=None, help="windows in a step (default: 8 on a CPU, 64 on a GPU)")
    add("--eager", action="store_true", help="on a GPU: do not train through CUDA graphs")
    add("--lr", type=float, default=3e-3)
    add("--weight-decay", type=float, default=0.1)
    add("--dtype", choices=("float32", "bfloat16"), help="of matrix products (default: bfloat16 on a GPU)")
    add("--eval-every", type=int, default=400, help="steps between validations and between checkpoints")
    add("--eval-bytes", type=int, default=16384, help="bytes that choose the checkpoint, of all validation documents")
    add("--seed", type=int, default=0)
    add("--finish", action="store_true", help="do not train on: store the best model so far and write its card")
    options = parser.parse_args(argv)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.minutes = options.minutes or (8.0 if options.device.startswith("cuda") else 240.0)
    return options


def selection(out: Path, size: int) -> Path:
    """A file of about `size` bytes that chooses the checkpoint: an equal share of each validation document's start.

    Validation on the way is short because it reads one byte after another, which a GPU does slowly; the card's figure
    is that of all validation years.
    """
    documents = (CORPUS / "validation.txt").read_text(encoding="utf-8").splitlines()
    share = size // len(documents)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "selection.txt"
    path.write_text("".join(document[:share] + "\n" for document in documents), encoding="utf-8")
    return path


def settings(options: argparse.Namespace, out: Path) -> TrainConfig:
    """The training run: starts, or goes on where a run of the same settings stopped."""
    gpu = options.device.startswith("cuda")
    run = out / "run"
    return TrainConfig.of(
        path=str(CORPUS / "train.txt"),
        val=str(selection(out, options.eval_bytes)),
        out=str(run),
        resume=(run / "checkpoints").is_dir() and any((run / "checkpoints").glob("step-*")),
        overwrite=False,
        device=options.device,
        dtype=options.dtype or ("bfloat16" if gpu else "float32"),
        cuda_graphs=gpu and not options.eager,
        minutes=options.minutes,
        d_model=options.d_model,
        n_layer=options.n_layer,
        context=options.context or (512 if gpu else 1024),
        batch_size=options.batch or (64 if gpu else 8),
        lr=options.lr,
        weight_decay=options.weight_decay,
        warmup_steps=100,
        eval_every=options.eval_every,
        eval_bytes=1 << 20,  # all of the selection
        sample_every=0,
        save_every=options.eval_every,
        progress="lines",
        seed=options.seed,
    )


def recipe(config: TrainConfig, result: TrainResult) -> dict[str, str]:
    """What the card says about how the model came to be."""
    device = torch.cuda.get_device_name() if config.device.startswith("cuda") else "CPU"
    per_step = config.data.batch_size * config.data.accumulate
    epochs = result.tokens / (CORPUS / "train.txt").stat().st_size
    optim = config.optim
    return {
        "Trained on": f"{device}, {result.seconds / 60:.0f} minutes",
        "Steps": f"{result.steps:,} of {per_step} windows of {config.data.context} bytes, {epochs:.1f} passes",
        "Optimiser": f"AdamW ({optim.beta1}, {optim.beta2}), weight decay {optim.weight_decay}, clipping {optim.clip}",
        "Learning rate": f"{optim.lr:g}, {optim.warmup_steps} steps of warm-up, cosine to {optim.min_lr_ratio:g} of it",
        "Precision": f"{config.dtype} matrix products, float32 weights and states",
        "Seed": str(config.seed),
    }


def store(model: checkpoint.LanguageModel, folder: Path, about: dict[str, str]) -> None:
    """Write the model with its matrices in bfloat16."""
    checkpoint.save(model, folder, dtype=torch.bfloat16, metadata={"name": "bundled", "recipe": about})


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    out = options.out or ROOT / "runs" / "bundled"
    if code := data.main([]):
        return code
    config = settings(options, out)
    if options.finish:
        config = config.replace(minutes=1e-6)  # time is up: only the last checkpoint is judged
    began = time.perf_counter()
    try:
        result = train(config)
    except Interrupted as stopped:
        print(f"{stopped}\nor, to end here: scripts/bundled.py --finish with the same settings", flush=True)
        return stopped.exit_code
    folder = out / "model"
    store(result.model, folder, recipe(config, result))
    facts = card.write(folder, options.device)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size:,} bytes, {facts['test_bits_per_byte']:.4f} bits per byte on the test years,", end=" ")
    print(f"made in {(time.perf_counter() - began) / 60:.1f} minutes", flush=True)
    if size > LIMIT:
        print(f"bundled: more than the {LIMIT:,} bytes that may ship; use a smaller --d-model or --n-layer")
        return 1
    if options.out is None:
        PACKAGED.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "config.json", "README.md"):
            shutil.copyfile(folder / name, PACKAGED / name)
        print(f"installed in {PACKAGED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
