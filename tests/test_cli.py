"""The command line: what each command does, its flags, its complaints, and how it ends."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import contents
from scripted import Scripted

import stateline
from stateline import ops
from stateline.cli import build_parser, main
from stateline.generation import SamplingConfig, generate
from stateline.models import LanguageModel, ModelConfig

COMMAND = [sys.executable, "-m", "stateline"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("cli") / "model"
    stateline.save(LanguageModel(ModelConfig(d_model=16, n_layer=2, vocab_size=256)), path)
    return path


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must succeed, "MODEL" standing for a small model, and return what it printed."""

    def call(*arguments: str) -> str:
        code = main([str(home) if a == "MODEL" else a for a in arguments])
        out = capsys.readouterr()
        assert code == 0, out.err
        return out.out

    return call


def shell(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False, **options)


# ---- help and flags --------------------------------------------------------------------------------------------------

FLAGS = {
    "bench": ["--debug", "--help", "--json", "--model", "--quick", "--room", "--threads", "-h"],
    "classify": ["--debug", "--help", "-h"],
    "convert": ["--debug", "--dtype", "--force", "--help", "--no-tokenizer", "--room", "--to", "-h"],
    "eval": [
        "--cache-dtype", "--context", "--debug", "--device", "--dtype", "--field", "--force-binary", "--help", "--json",
        "--limit", "--lines", "--mode", "--room", "--state-dtype", "--stride", "--threads", "--weights", "-h",
    ],
    "explain": ["--debug", "--device", "--help", "--json", "-h"],
    "filter": [
        "--columns", "--debug", "--decimal", "--follow", "--forecast", "--help", "--interval", "--learn-rows",
        "--load-state", "--model", "--out", "--overwrite", "--plot", "--quiet", "--save-state", "--smooth", "--step",
        "--time", "--time-format", "-h",
    ],
    "generate": [
        "--batch", "--batch-size", "--cache-dtype", "--debug", "--device", "--dtype", "--echo", "--endless", "--greedy",
        "--help",
        "--load-stream", "--max-tokens", "--min-p", "--model", "--prompt-file", "--repetition-penalty",
        "--repetition-window", "--room", "--save-every", "--save-stream", "--seed", "--state-dtype", "--stats",
        "--stop", "--temperature", "--threads", "--top-k", "--top-p", "--weights", "-h",
    ],
    "info": ["--debug", "--help", "--json", "-h"],
    "tokenize": [
        "--debug", "--document-separator", "--force-binary", "--help", "--json", "--out", "--overwrite", "--pattern",
        "--progress", "--text-field", "--tokenizer", "-h",
    ],
}  # fmt: skip
CLASSIFY_FLAGS = {
    "train": [
        "--batch-size", "--bidirectional", "--class-weight", "--crop", "--debug", "--device", "--dropout",
        "--early-stopping", "--epochs", "--help", "--label-smoothing", "--layers", "--learning-rate", "--mixer",
        "--out", "--overwrite", "--pool", "--quiet", "--rate", "--regress", "--seed", "--test", "--test-share",
        "--threads", "--width", "-h",
    ],
    "predict": ["--debug", "--device", "--help", "--probabilities", "-h"],
    "stream": ["--debug", "--device", "--every", "--help", "-h"],
}  # fmt: skip
TRAIN_FLAGS = {"--out", "--steps", "--minutes", "--size", "--context", "--batch-size", "--seed", "--resume", "--config"}


def test_commands_and_flags_are_frozen() -> None:
    """A flag that goes breaks scripts: this list changes on purpose only, with a line in the changelog."""
    commands = next(a for a in build_parser()._actions if a.dest == "command").choices
    names = ["bench", "classify", "convert", "eval", "explain", "filter", "generate", "info", "tokenize", "train"]
    assert sorted(commands) == names  # type: ignore[arg-type]
    for name, flags in FLAGS.items():
        assert sorted(commands[name]._option_string_actions) == flags, name  # type: ignore[index, call-overload]
    actions = next(a for a in commands["classify"]._actions if a.dest == "action").choices  # type: ignore[index, call-overload]
    assert {name: sorted(parser._option_string_actions) for name, parser in actions.items()} == CLASSIFY_FLAGS


@pytest.mark.parametrize(
    "command",
    [
        [], ["train"], ["tokenize"], ["generate"], ["eval"], ["bench"], ["convert"], ["info"], ["explain"], ["filter"],
        ["classify"], ["classify", "train"], ["classify", "predict"], ["classify", "stream"],
    ],
)  # fmt: skip
def test_help_teaches_with_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert re.search(r"examples:\n  (tail -f \S+ \| )?stateline ", out)
    assert "==SUPPRESS==" not in out
    if command == ["train"]:
        assert all(flag in out for flag in TRAIN_FLAGS)


def test_help_and_version_come_without_torch() -> None:
    code = """
import sys
from stateline.cli import main
commands = ("generate", "train", "tokenize", "eval", "bench", "classify", "classify train", "filter")
for command in ("--help", *(f"{name} --help" for name in commands), "--version", "nonsense"):
    try:
        main(command.split())
    except SystemExit:
        pass
print("torch" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith(f"stateline {stateline.__version__}\nFalse\n")


# ---- generate --------------------------------------------------------------------------------------------------------


def test_generate_prints_what_the_api_gives(run: Callable[..., str], home: Path) -> None:
    sampling = SamplingConfig(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=4)
    expected = "".join(generate(stateline.load(home), "My fellow", max_tokens=40, sampling=sampling))
    filters = ["--temperature", "0.7", "--top-k", "40", "--top-p", "0.9", "--min-p", "0.01", "--seed", "4"]
    filters += ["--repetition-penalty", "1.2", "--max-tokens", "40"]
    assert run("generate", "My fellow", "--model", "MODEL", *filters) == expected + "\n"
    assert run("generate", "--echo", "--model", "MODEL", *filters, "My fellow") == f"My fellow{expected}\n"
    assert (
        run("generate", "My fellow", "--model", "MODEL", *filters, "--threads", "1", "--device", "cpu")
        == expected + "\n"
    )


def test_generate_defaults_and_greedy(run: Callable[..., str], home: Path) -> None:
    model = stateline.load(home)
    plain = "".join(generate(model, "x", sampling=SamplingConfig(temperature=0.8, seed=1)))
    assert run("generate", "x", "--model", "MODEL", "--seed", "1") == plain + "\n"
    greedy = "".join(generate(model, "", max_tokens=9, sampling=SamplingConfig(temperature=0)))
    assert run("generate", "--model", "MODEL", "--greedy", "--max-tokens", "9") == greedy + "\n"
    assert run("generate", "x", "--model", "MODEL", "--max-tokens", "0") == "\n"


def test_generate_stops(run: Callable[..., str]) -> None:
    whole = run("generate", "x", "--model", "MODEL", "--seed", "3", "--max-tokens", "60")
    stop = whole[20:22]
    stopped = run(
        "generate", "x", "--model", "MODEL", "--seed", "3", "--stop", "never there", "--stop", stop, "--endless"
    )
    assert stopped == whole[: whole.index(stop)] + "\n"


def test_prompts_from_files_and_stdin(run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "zwölf\n".encode() + b"\xff"
    (tmp_path / "prompt").write_bytes(prompt)
    options = ("--model", "MODEL", "--seed", "1", "--max-tokens", "10")
    expected = run("generate", os.fsdecode(prompt), *options)
    assert run("generate", "--prompt-file", str(tmp_path / "prompt"), *options) == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt)))
    assert run("generate", "--prompt-file", "-", *options) == expected


def test_batches_write_json_lines(run: Callable[..., str], tmp_path: Path) -> None:
    options = ("--batch", "--model", "MODEL", "--max-tokens", "12")
    prompts = ["one", "", "three é"]
    lines = [json.loads(line) for line in run("generate", *prompts, *options, "--seed", "5").splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    for row, line in enumerate(lines):
        alone = run("generate", prompts[row], "--model", "MODEL", "--max-tokens", "12", "--seed", str(5 + row))
        assert line["text"] + "\n" == alone
    (tmp_path / "prompts").write_text("\n".join(prompts) + "\n")
    from_file = run(
        "generate", "--prompt-file", str(tmp_path / "prompts"), *options, "--seed", "5", "--batch-size", "2"
    )
    assert [json.loads(line) for line in from_file.splitlines()] == lines


def test_stats_go_to_stderr(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "12345", "--model", str(home), "--max-tokens", "7", "--stats"]) == 0
    out = capsys.readouterr()
    assert "prompt 5 tokens" in out.err
    assert "generated 7 tokens" in out.err
    assert "tokens/s" not in out.out
    assert main(["generate", "--batch", "a", "b", "--model", str(home), "--max-tokens", "7", "--stats"]) == 0
    assert "2 prompts in" in capsys.readouterr().err


def test_a_terminal_is_not_steered(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("generate", "x", "--model", "MODEL", "--seed", "1", "--temperature", "3", "--max-tokens", "400")
    raw = run(*options)
    assert "\x1b" in raw  # an untrained model writes escapes; a file gets them as they are
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = run(*options)
    assert len(shown) == len(raw)
    assert all(c.isprintable() or c in "\n\t" for c in shown)


def test_a_character_cut_short_is_shown_as_such(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stateline.interop.load", lambda *_, **__: Scripted("a😀".encode()))
    assert run("generate", "x", "--model", "MODEL", "--max-tokens", "3") == "a\ufffd\n"
    assert run("generate", "x", "--model", "MODEL", "--max-tokens", "5") == "a😀\n"


def test_the_bundled_models_write_at_once(run: Callable[..., str]) -> None:
    assert len(run("generate", "My fellow citizens", "--max-tokens", "20", "--seed", "1")) > 10
    assert "。" in run("generate", "春", "--model", "bundled-zh", "--max-tokens", "40", "--seed", "1")
    assert json.loads(run("info", "bundled-zh", "--json"))["config"]["vocab_size"] == 6144


# ---- train, convert, info, explain -----------------------------------------------------------------------------------


def test_train_then_generate_from_the_run(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The state of the union is strong, and so is the text. " * 100)
    out = str(tmp_path / "run")
    sizes = ["--d-model", "16", "--n-layer", "1", "--d-state", "4", "--context", "32", "--batch-size", "2"]
    sizes += ["--steps", "3"]
    run("train", str(tmp_path / "text.txt"), "--out", out, *sizes, "--sample-every", "0", "--progress", "off")
    assert run("generate", "The", "--model", out, "--max-tokens", "5")
    facts = json.loads(run("info", out, "--json"))
    assert facts["config"]["d_model"] == 16
    run("convert", out, str(tmp_path / "hf"), "--to", "huggingface")


def test_a_run_of_mamba2_is_written_with_and_converted(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The state of the Union is strong. " * 40)
    out, stream = str(tmp_path / "run"), str(tmp_path / "a.stream")
    sizes = ["--mixer", "Mamba2", "--d-model", "32", "--n-layer", "2", "--context", "16", "--batch-size", "2"]
    quiet = ["--steps", "3", "--sample-every", "0", "--progress", "off"]
    run("train", str(tmp_path / "text.txt"), "--out", out, *sizes, *quiet)
    assert json.loads(run("info", out, "--json"))["config"]["ssm_cfg"]["layer"] == "Mamba2"

    def write(*more: str, model: str = out) -> str:
        return run("generate", "--model", model, "--seed", "1", "--max-tokens", "6", *more)

    for form in ([], ["--weights", "int8"]):
        whole = run("generate", "The", "--model", out, "--seed", "1", "--max-tokens", "12", *form)
        parts = [write("The", "--save-stream", stream, *form), write("--load-stream", stream, *form)]
        assert "".join(part.rstrip("\n") for part in parts) == whole.rstrip("\n")
    ids = torch.randint(256, (1, 9))
    logits = stateline.load(out)(ids)
    for to in ("mamba_ssm", "huggingface", "stateline"):
        run("convert", out, str(tmp_path / to), "--to", to)
        assert torch.equal(stateline.load(tmp_path / to)(ids), logits)
        assert write("The", model=str(tmp_path / to)) == write("The")
    run("convert", out, str(tmp_path / "small"), "--dtype", "int8")
    assert (
        stateline.load(tmp_path / "small")(ids) - logits
    ).abs().max() < 0.04 * logits.abs().max()  # as packing to eight bits
    rows = json.loads(run("bench", "--model", out, "--quick", "--json"))["rows"]
    assert all(row["decode"] for row in rows)


@pytest.mark.parametrize("to", ["stateline", "mamba_ssm", "huggingface"])
def test_convert_keeps_the_model(run: Callable[..., str], home: Path, tmp_path: Path, to: str) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert to in run("convert", "MODEL", str(there), "--to", to)
    run("convert", str(there), str(back))
    ids = torch.randint(256, (2, 9))
    torch.testing.assert_close(stateline.load(back)(ids), stateline.load(home)(ids), rtol=0, atol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "there"]  # nothing is left over


def test_weights_are_packed_on_request(run: Callable[..., str], home: Path) -> None:
    import stateline

    packed = stateline.prepare_for_decode(stateline.load(home), "int8")
    sampling = stateline.generation.SamplingConfig(temperature=0)
    expected = "".join(stateline.generate(packed, "abc", max_tokens=9, sampling=sampling))
    out = run("generate", "abc", "--model", "MODEL", "--greedy", "--max-tokens", "9", "--weights", "int8")
    assert out.rstrip("\n") == expected.rstrip("\n")
    assert main(["generate", "abc", "--model", str(home), "--weights", "int8", "--dtype", "bfloat16"]) == 2


def test_convert_dtype_and_tokenizer(run: Callable[..., str], home: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    run("convert", "MODEL", str(source))
    (source / "tokenizer.json").write_text('{"any": "thing"}')
    run("convert", str(source), str(tmp_path / "half"), "--dtype", "bfloat16")
    assert (tmp_path / "half" / "tokenizer.json").read_text() == '{"any": "thing"}'
    weights = "model.safetensors"
    assert (tmp_path / "half" / weights).stat().st_size < 0.8 * (source / weights).stat().st_size
    run("convert", str(source), str(tmp_path / "quarter"), "--dtype", "int8")
    assert (tmp_path / "quarter" / weights).stat().st_size < 0.8 * (tmp_path / "half" / weights).stat().st_size
    for other in ("mamba_ssm", "huggingface", "export", "onnx"):
        assert main(["convert", str(source), str(tmp_path / "other"), "--dtype", "int8", "--to", other]) == 2
    assert not (tmp_path / "other").exists()


def test_convert_replaces_only_when_forced_and_only_when_done(
    run: Callable[..., str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    run("convert", "MODEL", str(target), "--to", "mamba_ssm")
    (target / "README.md").write_text("old")
    before = contents(tmp_path)
    assert main(["convert", str(home), str(target)]) == 2

    def full(model: Any, path: Path, **_: Any) -> None:
        path.mkdir()
        (path / "half").write_text("written")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("stateline.interop.save", full)
        assert main(["convert", str(home), str(target), "--force"]) == 2
    assert contents(tmp_path) == before
    rename = Path.rename

    def stuck(source: Path, to: Path) -> Path:
        if source.name == "new":
            raise OSError(5, "Input/output error")
        return rename(source, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stuck)
        assert main(["convert", str(home), str(target), "--force"]) == 2
    assert contents(tmp_path) == before
    run("convert", "MODEL", str(target), "--force")
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "model.safetensors"]
    stateline.load(target)


@pytest.mark.parametrize(
    "files", [["notes.txt"], ["config.json"], ["config.json", "model.safetensors", "thesis/text"]], ids=str
)
def test_convert_never_replaces_what_is_no_checkpoint(
    home: Path, tmp_path: Path, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files:
        (tmp_path / "target" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "target" / name).write_text("precious")
    before = contents(tmp_path)
    assert main(["convert", str(home), str(tmp_path / "target"), "--force"]) == 2
    assert "--force replaces checkpoints only" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_info_tells_sizes(run: Callable[..., str], home: Path) -> None:
    facts = json.loads(run("info", "MODEL", "--json"))
    model = stateline.load(home)
    assert facts["parameters"] == model.num_parameters() == sum(facts["dtypes"].values())
    # per layer: 32 channels of 3 taps and of 16 states, in float32
    assert facts["state bytes per sequence"] == 2 * 32 * (3 + 16) * 4
    assert facts["format"] == "stateline"
    assert facts["config"] == model.config.to_dict()
    assert facts["machine"]["torch"] == torch.__version__
    shown = run("info", "MODEL")
    assert f"{model.num_parameters():,}" in shown
    assert "d_model" in shown


def test_explain_names_back_ends_and_reasons(run: Callable[..., str]) -> None:
    told = json.loads(run("explain", "--json"))
    assert [*told["ops"]] == ops.__all__
    assert told["machine"]["threads"] == torch.get_num_threads()
    shown = run("explain", "selective_scan", "--device", "cuda")
    assert "selective_scan  reference" in shown
    assert "not gpu: " in shown
    assert "not cpu: needs CPU tensors" in shown
    absent = shell("explain", "rms_norm", env={**os.environ, "STATELINE_DISABLE_NATIVE": "1"})
    assert absent.returncode == 0
    assert "not cpu: the C++ library is switched off by STATELINE_DISABLE_NATIVE" in absent.stdout


# ---- complaints and endings ------------------------------------------------------------------------------------------

WRONG = [
    ([], "no command given"),
    (["frobnicate"], "invalid choice: 'frobnicate'"),
    (["generate", "--model", "MODEL", "two", "prompts"], "2 prompts given; quote a prompt"),
    (["generate", "--model", "nowhere/at/all", "x"], "nowhere/at/all"),
    (["generate", "--model", "MODEL", "--temperature", "-1"], "temperature is -1.0, expected a number at least 0"),
    (["generate", "--model", "MODEL", "--temperature", "nan"], "temperature is nan"),
    (["generate", "--model", "MODEL", "--temperature", "hot"], "invalid float value: 'hot'"),
    (["generate", "--model", "MODEL", "--top-p", "0"], "top_p is 0.0"),
    (["generate", "--model", "MODEL", "--top-k", "-1"], "top_k is -1"),
    (["generate", "--model", "MODEL", "--max-tokens", "-1"], "--max-tokens is -1"),
    (["generate", "--model", "MODEL", "--seed", "-1"], "seed is -1"),
    (["generate", "--model", "MODEL", "--stop", ""], "a stop string is empty"),
    (["generate", "--model", "MODEL", "--greedy", "--temperature", "1"], "not allowed with"),
    (["generate", "--model", "MODEL", "--endless", "--max-tokens", "1"], "not allowed with"),
    (["generate", "--model", "MODEL", "--endless", "--batch", "a"], "--endless goes with one prompt"),
    (["generate", "--model", "MODEL", "--batch"], "--batch needs prompts"),
    (["generate", "--model", "MODEL", "--prompt-file", "absent.txt"], "absent.txt: No such file"),
    (
        ["generate", "--model", "MODEL", "--prompt-file", "absent.txt", "x"],
        "a prompt and --prompt-file were both given",
    ),
    (["generate", "--model", "MODEL", "--threads", "0"], "0 is not a whole number from 1"),
    (["generate", "--model", "MODEL", "--device", "nowhere"], "--device nowhere cannot be used here"),
    (["generate", "--model", "MODEL", "--nonsense"], "unrecognized arguments: --nonsense (stateline generate --help"),
    (
        ["classify", "train", "x.csv", "--out", "o", "--nonsense"],
        "--nonsense (stateline classify train --help shows how)",
    ),
    (["filter", "x.csv", "--smoth"], "--smoth (stateline filter --help shows how)"),
    (["generate", "--prompt", "Once"], "unrecognized arguments: --prompt"),  # not taken for --prompt-file
    (["convert", "MODEL", "MODEL"], "exists; --force replaces it"),
    (["convert", "MODEL", "no/such/parent"], "there is no directory"),
    (["convert", "MODEL", "out", "--to", "keras"], "invalid choice: 'keras'"),
    (["convert", "absent", "out"], "absent"),
    (["info", "absent"], "absent"),
    (["explain", "nonsense"], "the operation is 'nonsense', expected one of"),
    (["explain", "--device", "toaster"], "--device is 'toaster', expected one of"),
    (["train", "absent.txt", "--out", "out"], "absent.txt"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_complaints_are_one_line_and_nothing_is_done(
    arguments: list[str],
    message: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(home) if a == "MODEL" else a for a in arguments]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("stateline: error: ")
    assert out.err.count("\n") == 1
    assert message in out.err
    assert not list(tmp_path.iterdir())


def test_debug_shows_where(home: Path) -> None:
    with pytest.raises(ValueError, match="top_p"):
        main(["generate", "x", "--model", str(home), "--top-p", "7", "--debug"])


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stateline.cli.explain.machine", lambda: {}["absent"])
    with pytest.raises(KeyError):
        main(["explain"])


def test_warnings_are_one_line(run: Callable[..., str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = shell(
        "generate", "x", "--model", str(home), "--max-tokens", "1", env={**os.environ, "STATELINE_DISABLE_NATIVE": "1"}
    )
    assert done.returncode == 0
    assert done.stderr.startswith("stateline: note: ")
    assert done.stderr.count("\n") == 1


def test_ctrl_c_ends_an_endless_text(home: Path) -> None:
    command = [*COMMAND, "generate", "x", "--model", str(home), "--endless", "--stats"]

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job would inherit that it is ignored

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=listen) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(50)  # it is writing
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.endswith(b"\n")
    assert b"Traceback" not in errors
    assert b"generated" in errors


def test_a_reader_that_leaves_ends_it_quietly(home: Path) -> None:
    command = [*COMMAND, "generate", "x", "--model", str(home), "--endless"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(50)
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 141
    assert errors == b""
