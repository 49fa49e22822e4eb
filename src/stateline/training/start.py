"""What a run starts from: a folder that is free or holds its checkpoint, a device, and a model fit to be trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stateline.checks import fail
from stateline.files import bundled
from stateline.models import LanguageModel, ModelConfig, checkpoint
from stateline.training import adapters, removal, resume
from stateline.training.arguments import read_file
from stateline.training.config import (
    CONVOLVED,
    MAMBAS,
    SETTINGS_FILE,
    DataConfig,
    ShapeConfig,
    TrainConfig,
    differences,
)
from stateline.training.data import TextData
from stateline.training.resume import Position
from stateline.training.schedule import make_schedule
from stateline.training.vocabulary import Vocabulary, beside

#: Of new models: channels of a head, and how far back attention looks.
HEAD, WINDOW = 64, 512
#: Reads the model that `init_from` names.
Loader = Callable[[str], LanguageModel]


@dataclass(frozen=True)
class Start:
    """The checkpoint a run continues from."""

    path: Path
    position: Position
    changed: list[str]


def refuse_occupied(config: TrainConfig) -> None:
    """Refuse to disturb a run unasked; before anything is prepared in its folder."""
    root = config.directory
    if root.exists() and not root.is_dir():
        raise fail("train", f"{root} is a file, expected a folder to write to.", "Choose another --out.")
    last, never_saved = resume.newest(root), resume.never_saved(root)
    if config.save.resume and never_saved:
        settings = root / SETTINGS_FILE
        _refuse_changes(settings, TrainConfig.from_dict(read_file(settings)), config)
    elif config.save.resume and last is None:
        raise fail("train", f"{root} holds no checkpoint to resume from.", "Start the run without --resume.")
    if resume.holds_run(root) and not (config.save.resume or config.save.overwrite):
        how = "--resume to continue it" if last or never_saved else "--out to choose another folder"
        raise fail("train", f"{root} already holds a run.", f"Use {how}, or --overwrite to delete it and start.")
    if not config.save.resume:
        removal.refuse_losses(config)


def find_start(config: TrainConfig, data: TextData) -> Start | None:
    """The checkpoint to continue from, if asked and if there is one; refuses to continue another run."""
    last = resume.newest(config.directory)
    if not config.save.resume or last is None:
        return None
    position, old, digest = resume.read_about(last)
    other = "the text: its contents or its split differ from what the run was started with"
    _refuse_changes(last, old, config, *[other] * (digest != data.digest))
    return Start(last, position, differences(old, config, "free"))


def settings_before(config: TrainConfig) -> DataConfig | None:
    """How the text was read by the run whose checkpoint is resumed, None without one."""
    last = resume.newest(config.directory) if config.save.resume else None
    return resume.read_about(last)[1].data if last else None


def _refuse_changes(place: Path, old: TrainConfig, new: TrainConfig, *others: str) -> None:
    wrong = [*differences(old, new, "fixed"), *others]
    if wrong:
        listed = "".join(f"\n  {line}" for line in wrong)
        problem = f"{place} was made with other settings:{listed}\n"
        raise fail("train", problem, "Drop these changes, or start a new run.")


def settled(config: TrainConfig) -> TrainConfig:
    """The settings with defaults looked up and absolute paths: the run can be resumed from any folder."""
    data, save = config.data, config.save
    named = {"path": data.path, "val": data.val, "cache": data.cache}
    if data.tokenizer and data.tokenizer != "bytes" and not data.tokenizer.startswith("bpe:"):
        named["tokenizer"] = data.tokenizer
    if save.init_from and bundled(save.init_from) is None and Path(save.init_from).expanduser().exists():
        named["init_from"] = save.init_from  # what is not there keeps its name, for the loader to refuse
    places = {name: str(Path(place).expanduser().resolve()) for name, place in named.items() if place}
    return config.replace(lr=config.peak_lr, **places)


def source(config: TrainConfig) -> Path | None:
    """The folder of the weights that a run starts from: those of the checkpoint it resumes, else of --init-from."""
    if config.save.resume and (last := resume.newest(config.directory)):
        return resume.weights(last)
    return _folder(config.save.init_from) if config.save.init_from else None


def replaces_source(config: TrainConfig) -> bool:
    """Whether a run overwrites the one whose weights it starts from."""
    folder = _folder(config.save.init_from) if config.save.init_from else None
    return config.save.overwrite and folder is not None and folder.is_relative_to(config.directory.resolve())


def named_model(config: TrainConfig, load: Loader | None) -> LanguageModel | None:
    """What --init-from names, on the CPU, unless a checkpoint is resumed; `load` as in `train`.

    Raises ValueError, before any text is prepared, if nothing says what its ids are.
    """
    folder, name = source(config), config.save.init_from
    if folder is None or not name or (config.save.resume and resume.newest(config.directory)):
        return None
    model = load(name) if load else checkpoint.load(folder)
    _check_size(model, beside(folder))
    return model


def refuse_unfit(config: TrainConfig, model: LanguageModel | None) -> None:
    """Refuse, before any text is prepared, a length too short for its schedule, and a model at odds with the settings.

    model: the weights to start from, None if they are new or a checkpoint's.
    """
    if not config.budget.epochs:  # whose steps only the text tells
        make_schedule(config, 1)
    if model is not None and adapters.present(model):
        raise fail("train", "model has adapters already.", "Give a plain one, such as an earlier result's model.")
    dropout = config.optim.dropout
    if model is not None and model.backbone.dropout not in (0.0, dropout):
        problem = f"model.backbone.dropout is {model.backbone.dropout:g}, the settings' dropout is {dropout:g}."
        raise fail("train", problem, "Set the wanted one in the settings (--dropout); a resumed run reads it there.")
    if config.adapters.lora:
        adapters.require()
        if model is not None:
            adapters.targets(model, config.adapters)


def initial_model(config: TrainConfig, start: Start | None, vocabulary: Vocabulary) -> LanguageModel:
    """A checkpoint's model, or a new one, on the CPU."""
    if start:
        return resume.load_model(start.path)
    shape, (d_model, n_layer) = config.model, config.shape
    return LanguageModel(
        ModelConfig(
            d_model=d_model,
            n_layer=n_layer,
            vocab_size=vocabulary.size,
            d_intermediate=shape.d_intermediate,
            ssm_cfg=_mixer(shape, d_model),
            **_attention(shape, d_model, n_layer),
        )
    )


def _mixer(shape: ShapeConfig, d_model: int) -> dict[str, Any]:
    """ModelConfig's ssm_cfg. Mamba-2 and 3 get heads of 64 channels, fewer where 64 do not divide the inner width."""
    options: dict[str, Any] = {"d_state": shape.d_state}
    if shape.mixer not in MAMBAS:
        return {"layer": shape.mixer, **options}
    options["expand"] = shape.expand
    if shape.mixer in CONVOLVED:
        options["d_conv"] = shape.d_conv
    if shape.mixer == "Mamba1":
        return options
    options["headdim"] = math.gcd(HEAD, shape.expand * d_model)
    if shape.mixer == "Mamba3" and shape.mimo_rank > 1:
        options |= {"is_mimo": True, "mimo_rank": shape.mimo_rank}
    return {"layer": shape.mixer, **options}


def _attention(shape: ShapeConfig, d_model: int, n_layer: int) -> dict[str, Any]:
    """The fields of ModelConfig about attention: heads of 64 channels, one in four for keys and values, turned."""
    if not shape.attention_every:
        return {}
    heads, width = max(1, d_model // HEAD), min(HEAD, d_model)
    options: dict[str, Any] = {"num_heads": heads, "head_dim": width, "rotary_emb_dim": width // 2 * 2}
    options["num_heads_kv"] = heads // 4 if heads % 4 == 0 else heads
    options["window"] = shape.attention_window or WINDOW
    blocks = list(range(shape.attention_every - 1, n_layer, shape.attention_every))
    return {"attn_layer_idx": blocks, "attn_cfg": {**options, "qkv_proj_bias": False, "out_proj_bias": False}}


def prepared(model: LanguageModel, config: TrainConfig, vocabulary: Vocabulary) -> LanguageModel:
    """The model as it is trained: float32 at least, with adapters and checkpointing if asked."""
    _check_vocabulary(model, vocabulary)
    if model.config.attn_layer_idx and model.config.attn_cfg.get("window") is None:
        problem = "the model's attention has no window, and validation and samples read texts of any length."
        raise fail("train", problem, "Give attn_cfg one; if it is no shorter than --context, it changes no gradient.")
    if model.backbone.embedding.weight.dtype.itemsize < torch.float32.itemsize:
        model.float()  # steps smaller than half precision can hold would be lost
    if config.adapters.lora:
        adapters.add(model, config.adapters)
    model.backbone.checkpoint_activations = config.optim.checkpoint_activations
    return model


def device_of(name: str) -> torch.device:
    """The device that --device names. Raises ValueError if it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0].rstrip(".")
        raise fail("train", f"device {name!r} cannot be used: {reason}.", "Use --device cpu.") from error
    return device


def _folder(name: str) -> Path:
    """Where the model of that name lies: one that ships, a run's best one, or the folder itself."""
    if (ours := bundled(name)) is not None:
        return ours
    folder = Path(name).expanduser()
    return folder / resume.MODEL if (folder / resume.MODEL).is_dir() else folder


def _check_vocabulary(model: LanguageModel, vocabulary: Vocabulary) -> None:
    """Refuse a model of other ids than the text's, and note which they are."""
    _check_size(model, vocabulary)
    known = model.metadata.get("tokenizer_sha256", vocabulary.fingerprint)
    if known != vocabulary.fingerprint:
        problem = f"the model was made for the tokenizer {known[:12]}, training reads {vocabulary}."
        raise fail("train", problem, "Put that tokenizer.json beside the model, or start from none.")
    if not vocabulary.is_bytes:
        model.metadata["tokenizer_sha256"] = vocabulary.fingerprint


def _check_size(model: LanguageModel, vocabulary: Vocabulary) -> None:
    size, own = model.config.vocab_size, "Start from another model"
    if vocabulary.is_bytes:
        own = "Put the model's own tokenizer.json beside its weights"
    if size != vocabulary.size if vocabulary.is_bytes else size < vocabulary.size:
        reads = f"bytes ({vocabulary.size})" if vocabulary.is_bytes else str(vocabulary)
        raise fail(
            "train",
            f"the model's vocabulary has {size} entries, training reads {reads}.",
            f"{own}, or start from none.",
        )
