"""Make a bundled model: fetch the data, train, keep the best checkpoint, store it small, write its card.

    python scripts/bundled.py                                         # English; days on a CPU; goes into the package
    python scripts/bundled.py chinese --device cuda --out DIR         # minutes on a GPU; all of it stays in DIR
    python scripts/bundled.py --minutes 1 --d-model 64 --n-layer 2 --out DIR    # a try

The run lies in OUT/run and the model in OUT/model. Ctrl-C, SIGTERM or a crash lose at most a few minutes: the same
command goes on from the last checkpoint, and --finish makes the model of what there is. Where data/ is already there
nothing is fetched, so the repository's tree and data/ are all another machine needs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts")]  # also runs from a tree that is not installed

import card  # noqa: E402  # needs the path above
import data  # noqa: E402
import torch  # noqa: E402

from stateline.models import checkpoint  # noqa: E402
from stateline.training import Interrupted, TrainConfig, TrainResult, train  # noqa: E402
from stateline.training.vocabulary import TOKENIZER, TOKENIZER_CONFIG  # noqa: E402

LIMIT = 10_000_000  # bytes of a model's folder


@dataclass(frozen=True)
class Recipe:
    """What makes one of the models.

    folder: its place in the package.   corpora: folders of data/, whose training texts are read one after another, and
    whose validation texts choose.   tokenizer: as `stateline train` takes it.   minutes: on a GPU.   context: ids in a
    window.   batch: windows in a step.   dropout, weight_decay: against learning the text by heart.
    """

    folder: str
    corpora: tuple[str, ...]
    tokenizer: str
    minutes: float
    d_model: int
    n_layer: int
    context: int
    batch: int
    lr: float
    dropout: float
    weight_decay: float


RECIPES = {
    "english": Recipe("model", ("sotu", "novels"), "bytes", 8.5, 384, 9, 2048, 48, 2.5e-3, 0.15, 0.2),
    "chinese": Recipe("chinese", ("poems",), "bpe:6144", 8.2, 384, 7, 1024, 64, 2.5e-3, 0.1, 0.1),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; what it leaves out is the recipe's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", default="english", choices=tuple(RECIPES), help="which of them (default: english)")
    add("--out", type=Path, help="folder for everything; the package is left alone (default: runs/MODEL, installed)")
    add("--device", help="cpu, or cuda (default: cuda if there is one)")
    add("--minutes", type=float, help="time to train; the learning rate follows it (default: 8.5 or 8.2; CPU 2880)")
    for name in ("d-model", "n-layer", "context", "batch"):
        add(f"--{name}", type=int, default=None)
    for name in ("lr", "dropout", "weight-decay"):
        add(f"--{name}", type=float, default=None)
    add("--eager", action="store_true", help="on a GPU: do not train through CUDA graphs")
    add("--dtype", choices=("float32", "bfloat16"), help="of matrix products (default: bfloat16 on a GPU)")
    add("--eval-every", type=int, default=400, help="steps between validations; checkpoints are made four times less")
    add("--eval-bytes", type=int, default=131072, help="bytes that choose the checkpoint, of all validation documents")
    add("--seed", type=int, default=0)
    add("--finish", action="store_true", help="do not train on: store the best model so far and write its card")
    options = parser.parse_args(argv)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    recipe = RECIPES[options.model]
    options.minutes = options.minutes or (recipe.minutes if options.device.startswith("cuda") else 2880.0)
    for name, value in vars(recipe).items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    return options


def texts(corpora: tuple[str, ...], out: Path, size: int) -> tuple[Path, Path]:
    """(the training text, about `size` bytes that choose the checkpoint) of some corpora, as files in `out`.

    Those bytes are an equal share of each corpus: of few documents the beginnings, of many every so-manieth.
    Validation on the way is short because it takes time from training; the card's figure is that of all validation
    documents.
    """
    out.mkdir(parents=True, exist_ok=True)
    learnt, chosen = out / "train.txt", out / "selection.txt"
    with learnt.open("wb") as whole:
        for name in corpora:
            whole.write((data.ROOT / "data" / name / "train.txt").read_bytes())
    lines: list[str] = []
    for name in corpora:
        documents = (data.ROOT / "data" / name / "validation.txt").read_text(encoding="utf-8").splitlines()
        share = size // len(corpora)
        total = sum(len(document.encode()) for document in documents)
        if len(documents) < 1000:
            lines += [document[: share // len(documents)] for document in documents]
        else:
            lines += documents[:: max(1, total // share)]
    chosen.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return learnt, chosen


def settings(options: argparse.Namespace, out: Path) -> TrainConfig:
    """The training run: starts, or goes on where a run of the same settings stopped."""
    gpu = options.device.startswith("cuda")
    run = out / "run"
    learnt, chosen = texts(options.corpora, out, options.eval_bytes)
    return TrainConfig.of(
        path=str(learnt),
        val=str(chosen),
        tokenizer=options.tokenizer,
        document_separator=None if options.tokenizer == "bytes" else "\\n",
        out=str(run),
        resume=(run / "checkpoints").is_dir() and any((run / "checkpoints").glob("step-*")),
        overwrite=False,
        device=options.device,
        dtype=options.dtype or ("bfloat16" if gpu else "float32"),
        cuda_graphs=gpu and not options.eager,
        minutes=options.minutes,
        d_model=options.d_model,
        n_layer=options.n_layer,
        context=options.context,
        batch_size=options.batch,
        lr=options.lr,
        dropout=options.dropout,
        weight_decay=options.weight_decay,
        min_lr_ratio=0.02,
        ema=0.999,
        warmup_steps=100,
        eval_every=options.eval_every,
        eval_bytes=1 << 20,  # all of the selection
        sample_every=0,
        save_every=4 * options.eval_every,
        on_spike="ignore",
        progress="lines",
        seed=options.seed,
    )


def recipe(config: TrainConfig, result: TrainResult) -> dict[str, str]:
    """What the card says about how the model came to be."""
    device = torch.cuda.get_device_name() if config.device.startswith("cuda") else "CPU"
    per_step = config.data.batch_size * config.data.accumulate
    unit = "bytes" if config.data.tokenizer == "bytes" else "tokens"
    optim, best = config.optim, result.model.metadata["training"]["step"]
    windows = f"{per_step} windows of {config.data.context} {unit}"
    return {
        "Trained on": f"{device}, {result.seconds / 60:.1f} minutes",
        "Steps": f"{best:,} of {windows}: the best by validation of {result.steps:,}",
        "Optimiser": f"AdamW ({optim.beta1}, {optim.beta2}), weight decay {optim.weight_decay}, clipping {optim.clip}",
        "Learning rate": f"{optim.lr:g}, {optim.warmup_steps} steps of warm-up, cosine to {optim.min_lr_ratio:g} of it",
        "Dropout": f"{optim.dropout:g} of what each block adds",
        "Weights": f"running mean, decay {optim.ema:g}",
        "Precision": f"{config.dtype} matrix products, float32 weights and states",
        "Seed": str(config.seed),
    }


def store(model: checkpoint.LanguageModel, run: Path, folder: Path, name: str, about: dict[str, str]) -> None:
    """Write the model with its matrices in eight bits, and the tokenizer of its run, if it has one."""
    checkpoint.save(model, folder, dtype=torch.int8, metadata={"name": name, "recipe": about})
    if (run / TOKENIZER).is_file():
        shutil.copyfile(run / TOKENIZER_CONFIG, folder / TOKENIZER_CONFIG)
        told = json.loads((run / TOKENIZER).read_text(encoding="utf-8"))
        end = told["added_tokens"][0]
        told["post_processor"] = opening(end["content"], end["id"])
        compact = json.dumps(told, ensure_ascii=False, separators=(",", ":"))
        (folder / TOKENIZER).write_text(compact, encoding="utf-8")


def opening(end: str, number: int) -> dict[str, object]:
    """What makes a tokenizer put its end-of-text id before a prompt, as in training before every document."""
    first, text = {"SpecialToken": {"id": end, "type_id": 0}}, [{"Sequence": {"id": x, "type_id": 0}} for x in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [first, text[0]],
        "pair": [first, text[0], first, text[1]],
        "special_tokens": {end: {"id": end, "ids": [number], "tokens": [end]}},
    }


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    out = options.out or ROOT / "runs" / options.model
    if code := data.main(list(options.corpora)):
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
    store(result.model, out / "run", folder, options.model, recipe(config, result))
    card.write(options.model, folder, options.device)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size:,} bytes, made in {(time.perf_counter() - began) / 60:.1f} minutes", flush=True)
    if size > LIMIT:
        print(f"bundled: more than the {LIMIT:,} bytes that may ship; use a smaller --d-model or --n-layer")
        return 1
    if options.out is None:
        packaged = ROOT / "src" / "stateline" / "bundled" / options.folder
        packaged.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            shutil.copyfile(file, packaged / file.name)
        print(f"installed in {packaged}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
