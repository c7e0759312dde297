"""The command line: a mistake costs a second and one line."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from halos import cli
from halos.config import one_line
from halos.config.errors import explain, require_plain_booleans
from halos.processes import sweeps
from halos.processes.launch import ERRORS
from halos.processes.provenance import command_line
from halos.training.result import trial_value
from tests.configs import compose
from tests.test_safe_text import BAD

ROOT = Path(__file__).parents[1]
ROW = '{"prompt": "a", "completion": "b", "label": true}\n'


def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *words: str) -> int:
    """The exit code of ``halos WORDS``, called in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["halos", *words])
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("HYDRA_FULL_ERROR", one_line.TRACEBACK):  # so that they are put back
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv(cli.COMMAND, os.environ.get(cli.COMMAND, ""))  # so that it is put back
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


MISTAKES = [
    ("loss=kt0", ["loss=kt0", "did you mean kto?", "ipo, irpo, kto, "]),
    ("data=fils", ["data=fils", "did you mean files"]),
    ("strategy=nothinglikeit", ["strategy=nothinglikeit", "expected one of auto, ddp"]),
    ("los=kto", ["los", "loss"]),
    ("optim.lrr=1", ["optim.lrr", "did you mean lr"]),
    ("loss.betta=1", ["loss.betta", "did you mean beta"]),
    ("data.source.sise=1", ["data.source.sise", "did you mean size"]),
    ("trainer.max_step=1", ["trainer.max_step", "max_steps"]),
    ("outputdir=x", ["outputdir", "did you mean output_dir"]),
    ("qqqqqq=1", ["qqqqqq"]),
    ("loss._target_=mine.Hinge loss.scale=2", ["loss.scale", "write +loss.scale=… for a parameter of mine.Hinge"]),
]


@pytest.mark.parametrize(("word", "said"), MISTAKES)
def test_a_mistake_is_explained_in_one_line_with_names_that_come_near(word: str, said: list[str]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (Hydra raises several kinds)
        compose(*word.split())
    line = explain(caught.value)
    assert "\n" not in line
    assert all(part in line for part in said), line


@pytest.mark.parametrize("wanted", ["", "1"])
def test_an_error_of_a_job_is_the_only_line_unless_a_traceback_is_asked_for(
    wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(cfg: DictConfig) -> Path:
        raise ValueError(f"data.batch_size: expected more than {cfg.data.batch_size}")

    monkeypatch.setattr(cli, "_run_or_rounds", fail)
    monkeypatch.setenv(one_line.TRACEBACK, wanted)
    assert call(monkeypatch, tmp_path, "train", "data.batch_size=3", "output_dir=out") == 1
    *before, line = capsys.readouterr().err.splitlines()
    assert line == "error: data.batch_size: expected more than 3"
    assert bool(before) == bool(wanted)
    assert not before or before[0] == "Traceback (most recent call last):"


def test_a_failed_sweep_has_one_line_a_job_and_one_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(cfg: DictConfig) -> Path:
        raise ValueError(f"data.batch_size: expected more than {cfg.data.batch_size}")

    monkeypatch.setattr(cli, "_run_or_rounds", fail)
    assert call(monkeypatch, tmp_path, "train", "-m", "data.batch_size=3,4", "output_dir=out") == 1
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if "HYDRA" not in line] == [
        "job data.batch_size_3",
        "job data.batch_size_4",
        "error",
    ]


@pytest.mark.slow
def test_jobs_of_a_sweep_do_not_push_to_one_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed: list[str | None] = []
    monkeypatch.setattr(cli, "_run_or_rounds", lambda cfg: pushed.append(cfg.hub.push))
    words = ("train", "-m", "seed=0,1", "output_dir=out")
    assert call(monkeypatch, tmp_path, *words, "hub.push=lab/kto") == 1
    error = "hub.push: expected a repository for each job of a sweep, such as 'hub.push=lab/kto-${loss.name}-${seed}'"
    assert capsys.readouterr().err == f"error: {error}, found lab/kto for all\n"
    assert pushed == []
    assert call(monkeypatch, tmp_path, *words, "hub.push=lab/kto-${seed}") == 0
    assert call(monkeypatch, tmp_path, "train", "-m", "output_dir=out", "hub.push=lab/a,lab/b") == 0
    assert call(monkeypatch, tmp_path, *words, "hub.push=null") == 0
    assert call(monkeypatch, tmp_path, "train", "seed=0", "hub.push=lab/kto", "output_dir=out") == 0
    assert pushed == ["lab/kto-0", "lab/kto-1", "lab/a", "lab/b", None, None, "lab/kto"]
    # Named by a file instead of the command line.
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "pushed.yaml").write_text("# @package _global_\nhub: {push: lab/kto}\n")
    assert call(monkeypatch, tmp_path, *words, "experiment=pushed", "--config-dir", str(tmp_path / "own")) == 1
    assert f"job seed_0: error: {error}" in capsys.readouterr().err
    assert len(pushed) == 7


def test_a_run_knows_the_line_that_started_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines: list[str | None] = []
    monkeypatch.setattr(cli, "_run_or_rounds", lambda cfg: lines.append(command_line()))
    assert call(monkeypatch, tmp_path, "train", "data.train=my file.csv", "seed=1", "output_dir=out") == 0
    assert call(monkeypatch, tmp_path, "train", "-m", "loss=kto,dpo", "output_dir=out") == 0
    assert lines == [
        "halos train data=files 'data.train=my file.csv' seed=1 output_dir=out",
        "halos train loss=kto output_dir=out",
        "halos train loss=dpo output_dir=out",
    ]
    assert command_line() is None


def test_a_variable_of_the_chat_template_needs_no_plus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, tmp_path, "train", "model.chat_template_kwargs.mood=calm", "output_dir=out") == 1
    assert (
        "model.chat_template_kwargs.mood: expected a variable that the chat template reads" in capsys.readouterr().err
    )


def test_no_name_is_suggested_where_none_comes_near() -> None:
    with pytest.raises(OmegaConfBaseException) as caught:
        _ = OmegaConf.structured(compose("output_dir=x")).loss.zzzzzzzz
    assert "did you mean" not in explain(caught.value)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_an_error_shows_control_characters_of_others_escaped(
    kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    def job() -> None:
        raise kind("id \x1b]0;title\x07\x9b2J\u202e: bad")

    with pytest.raises(SystemExit):
        one_line.end_with_one_line(job)
    printed = capsys.readouterr().err
    assert printed.endswith("id \\x1b]0;title\\x07\\x9b2J\\u202e: bad\n")
    assert not set(BAD) - {"\n"} & set(printed)  # also in the traceback


@pytest.mark.parametrize("word", ["tuned=toy_cfst", "feedback=toy_grop", "world=toy_toy_topcs"])
def test_a_misspelt_name_of_an_optional_group_is_not_passed_over(
    word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_run_or_rounds", lambda cfg: pytest.fail("it ran"))
    assert call(monkeypatch, tmp_path, "train", word) == 1
    assert f"error: {word}: no such option (did you mean toy_" in capsys.readouterr().err


def test_a_rank_whose_process_group_is_left_ends_without_leaving_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def end(status: int) -> None:
        raise InterruptedError(status)

    group = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "torch.distributed", group)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(ERRORS, str(tmp_path))
    with pytest.raises(InterruptedError, match="1"):
        one_line.fail("CUDA out of memory")
    assert (tmp_path / "1.txt").read_text() == "CUDA out of memory"


def test_an_error_of_several_lines_ends_as_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(cfg: DictConfig) -> None:
        raise ValueError("something is wrong\n  Check your internet connection")

    monkeypatch.setattr(cli, "_run_or_rounds", fail)
    assert call(monkeypatch, tmp_path, "train") == 1
    last = capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]
    assert last == "error: something is wrong Check your internet connection"


@pytest.mark.parametrize("word", ["loss=kt0", "optim.lrr=1", "data.train=none.jsonl", f"data.train={__file__}"])
def test_a_misspelt_word_or_a_wrong_file_fails_before_torch_is_imported(word: str, tmp_path: Path) -> None:
    code = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["train.py", {word!r}]
try:
    runpy.run_path({str(ROOT / "scripts" / "train.py")!r}, run_name="__main__")
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == "False\n"
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("module", ["cli", "terminal", "files", "checks", "config.combinations", "training.result"])
def test_what_every_command_imports_is_light(module: str) -> None:
    code = f"import sys, halos.{module}; print([name for name in ('torch', 'lightning') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_printing_and_logging_import_neither_torch_nor_lightning() -> None:
    code = """
import sys
from halos import terminal
terminal.set_up_logging()
terminal.say("[one] line")
print(list(terminal.track("work", [1, 2], shown=False)), "torch" in sys.modules, "lightning" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[one] line\n[1, 2] False False\n", done.stderr


@pytest.mark.parametrize("word", ["trian", "loss=kto"])
def test_a_command_is_needed(
    word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, tmp_path, word) == 1
    error = capsys.readouterr().err
    close = " (did you mean train?)" if word == "trian" else ""
    assert error == f"error: halos {word}: no such command{close}; expected one of {', '.join(cli.COMMANDS)}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("loss=KTO",), "loss=KTO: no such option (did you mean kto"),
        (("data=csv",), "data=files reads csv files"),
        (("-m", "data.train=größe.csv", "seed=0,1"), "quote the text: 'data.train=\"größe.csv\"'"),
        (("--loss", "kto"), "--loss: expected key=value without dashes, found a flag; write loss=kto"),
    ],
)
def test_what_people_type_instead_is_answered(
    words: tuple[str, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, tmp_path, "train", *words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1


def test_the_train_command_trains_into_the_output_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("halos.commands.train.train", seen.append)
    assert call(monkeypatch, tmp_path, "train", "loss=dpo", "output_dir=here", "loss.beta=0.3") == 0
    (cfg,) = seen
    assert (cfg.loss.name, cfg.loss.beta) == ("dpo", 0.3)
    assert Path(cfg.output_dir) == tmp_path / "here"
    assert str(tmp_path) in sys.path


def test_rounds_may_have_a_loss_of_ones_own_and_lack_no_value(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_losses.py").write_text("from halos.objectives import SFT\nclass Mine(SFT): pass\n")
    monkeypatch.setattr("halos.commands.rounds.run_rounds", lambda cfg, train: get_class(cfg.loss._target_))
    words = ("train", "rounds.count=2", "output_dir=here")
    assert call(monkeypatch, tmp_path, *words, "loss._target_=my_losses.Mine") == 0
    assert call(monkeypatch, tmp_path, *words, "model.path=???") == 1
    assert "error: model.path: expected a value, found none" in capsys.readouterr().err


def test_the_cache_reference_command_has_the_same_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("halos.commands.cache_reference.cache_reference", seen.append)
    assert call(monkeypatch, tmp_path, "cache-reference", "loss=dpo", "output_dir=here", "loss.beta=0.3") == 0
    (cfg,) = seen
    assert (cfg.loss.name, cfg.loss.beta, Path(cfg.output_dir)) == ("dpo", 0.3, tmp_path / "here")


@pytest.mark.parametrize(
    "words", ["compare runs=a", "evaluate policy=a", "data data.train=a.csv", "estimate data=files model.path=a"]
)
def test_other_commands_read_their_data_themselves(words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    function = cli.COMMANDS[words.partition(" ")[0]].function
    seen: list[Any] = []
    monkeypatch.setattr(f"halos.commands.{function}.{function}", seen.append)
    assert call(monkeypatch, tmp_path, *words.split()) == 0
    assert len(seen) == 1


@pytest.mark.parametrize("command", ["train", "cache-reference"])
def test_a_process_that_ddp_launches_does_the_same(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("halos.commands.cache_reference.cache_reference", lambda cfg: seen.append("cache-reference"))
    monkeypatch.setattr("halos.commands.train.train", lambda cfg: seen.append("train"))
    launched = []

    def place(*_: object) -> None:
        launched.extend(sys.argv)  # what Lightning starts the other processes with

    monkeypatch.setattr(cli, "_place", place)
    assert call(monkeypatch, tmp_path, command, "output_dir=here") == 0
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert call(monkeypatch, tmp_path, *launched[1:3]) == 0
    assert seen == [command, command]


@pytest.mark.parametrize("command", ["train", "cache-reference"])
def test_a_rank_does_what_the_command_that_started_it_was_asked_for(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        "halos.commands.cache_reference.cache_reference",
        lambda cfg: seen.append(("cache-reference", cfg.seed)),
    )
    monkeypatch.setattr("halos.commands.train.train", lambda cfg: seen.append(("train", cfg.seed)))
    monkeypatch.setattr(cli, "die_with_parent", lambda: None)
    monkeypatch.setenv(cli.COMMAND, command)
    (tmp_path / "config.yaml").write_text("seed: 7\ndata: {source: {_target_: halos.toy.ToySource}}")
    assert call(monkeypatch, tmp_path, "rank", str(tmp_path / "config.yaml")) == 0
    assert seen == [(command, 7)]


def test_jobs_of_a_sweep_write_into_folders_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("halos.commands.train.train", seen.append)
    assert call(monkeypatch, tmp_path, "train", "-m", "loss=kto,dpo", "seed=3", "output_dir=sweep") == 0
    assert [cfg.loss.name for cfg in seen] == ["kto", "dpo"]
    folders = [Path(cfg.output_dir) for cfg in seen]
    assert [folder.parent for folder in folders] == [tmp_path / "sweep"] * 2
    assert [folder.name for folder in folders] == ["loss_kto", "loss_dpo"]  # the seed is the same for all


@pytest.mark.parametrize("flags", ["-m loss=kto", "loss=kto -m", "--config-dir mine loss=kto", "loss=kto -cd mine"])
def test_flags_may_stand_anywhere_next_to_words_that_imply_others(
    flags: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "a.jsonl").write_text(ROW)
    seen: list[Any] = []
    monkeypatch.setattr("halos.commands.train.train", seen.append)
    words = ("data.train=a.jsonl", "model.path=b", "seed=5", "output_dir=out")
    assert call(monkeypatch, tmp_path, "train", *flags.split(), *words) == 0
    (cfg,) = seen
    assert (cfg.data.train, cfg.model.path, cfg.seed, cfg.loss.name) == ("a.jsonl", "b", 5, "kto")


@pytest.mark.slow
def test_names_of_a_sweeps_folders_need_no_quotes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in (tmp_path / "my data" / "a.jsonl", tmp_path / "b.jsonl"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(ROW)
    seen: list[Any] = []
    monkeypatch.setattr("halos.commands.train.train", seen.append)
    swept = ("seed=4,5", "data.train='my data/a.jsonl',b.jsonl", r"trainer.devices=[0],1", "optim.lr=-1.0,1e-5")
    assert call(monkeypatch, tmp_path, "train", "-m", "data=files", *swept, "output_dir=sweep") == 0
    folders = [Path(cfg.output_dir) for cfg in seen]
    assert len(set(folders)) == 16
    assert {folder.parent for folder in folders} == {tmp_path / "sweep"}
    assert "data.train_my_data_a.jsonl_-optim.lr_-1.0-seed_4-trainer.devices_0" in {folder.name for folder in folders}
    for folder in folders:
        assert shlex.quote(folder.name) == folder.name
        assert compose(f"resume={folder}/checkpoints/step_2.ckpt").resume == f"{folder}/checkpoints/step_2.ckpt"


@pytest.mark.long
def test_a_job_of_a_sweep_that_fails_says_so_at_once_and_the_sweep_counts_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []

    def train(cfg: DictConfig) -> None:
        said.append(capsys.readouterr().err)
        if cfg.loss.name != "kto":
            raise ValueError(f"{cfg.loss.name} needs pairs") if cfg.loss.name == "dpo" else KeyError("x")

    monkeypatch.setattr("halos.commands.train.train", train)
    assert call(monkeypatch, tmp_path, "train", "-m", "loss=dpo,kto,ipo", "seed=3", "output_dir=sweep") == 1
    said.append(capsys.readouterr().err)
    assert said[1] == "job loss_dpo: error: dpo needs pairs\n"
    assert said[2] == ""
    assert said[3].count("Traceback (most recent call last):") == 1
    assert "job loss_ipo: error: KeyError: 'x'\n" in said[3]
    assert said[3].splitlines()[-1] == "error: 2 jobs failed (loss_dpo; loss_ipo): dpo needs pairs"
    assert sweeps.FAILED not in os.environ
    assert call(monkeypatch, tmp_path, "train", "loss=dpo", "output_dir=alone") == 1
    assert "job" not in capsys.readouterr().err.splitlines()[-1]


def test_a_trial_is_a_run_of_each_seed_and_its_value_their_mean(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, told = [], []

    def train(cfg: DictConfig) -> None:
        seen.append((cfg.seed, cfg.data.source.seed, Path(cfg.output_dir).relative_to(tmp_path)))
        summary = {"samples": {"policy_desirable": cfg.seed / 100, "kl": 3.0}}
        Path(cfg.output_dir).mkdir(parents=True)
        (Path(cfg.output_dir) / "summary.json").write_text(json.dumps(summary))

    def value(*args: Any, **kwargs: Any) -> float:
        told.append(trial_value(*args, **kwargs))
        return told[-1]

    monkeypatch.setattr("halos.commands.train.train", train)
    monkeypatch.setattr(cli, "trial_value", value)
    words = ("train", "output_dir=here", "sweep_seeds=[40,60]", "sweep_max_kl=2.75")
    assert call(monkeypatch, tmp_path, *words, "sweep_metric=samples/policy_desirable") == 0
    assert seen == [(40, 40, Path("here/seed_40")), (60, 60, Path("here/seed_60"))]
    assert told == [pytest.approx(0.5 - 0.25)]
    assert call(monkeypatch, tmp_path, *words) == 1
    assert call(monkeypatch, tmp_path, *words, "sweep_metric=samples/kl", "sweep_seeds=[4,4]") == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert said == [
        "error: sweep_metric: expected a metric with sweep_seeds and sweep_max_kl, found null with "
        "sweep_seeds=[40, 60]; such as sweep_metric=samples/policy_desirable",
        "error: sweep_seeds: expected different seeds, found [4, 4]",
    ]


def test_a_key_that_is_also_given_one_value_still_tells_jobs_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("halos.commands.train.train", seen.append)
    assert call(monkeypatch, tmp_path, "train", "-m", "seed=3", "seed=4,5", "output_dir=sweep") == 0
    assert [cfg.seed for cfg in seen] == [4, 5]
    assert len({cfg.output_dir for cfg in seen}) == 2


def test_each_job_of_a_sweep_on_several_devices_has_ranks_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("halos.commands.train.train", lambda cfg: pytest.fail("it trained in this process"))
    monkeypatch.setattr(
        "halos.processes.launch.run_ranks", lambda cfg, count: seen.append((Path(cfg.output_dir).name, count))
    )
    words = ("train", "-m", "loss=kto,dpo", "strategy=ddp", "trainer.devices=2", "output_dir=out")
    assert call(monkeypatch, tmp_path, *words) == 0
    assert seen == [("loss_kto", 2), ("loss_dpo", 2)]


@pytest.mark.parametrize("apart", ["nodes", "torchrun", "srun"])
def test_processes_that_are_started_apart_need_one_folder(
    apart: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[DictConfig] = []
    monkeypatch.setattr("halos.commands.train.train", seen.append)
    if apart == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    elif apart == "srun":
        monkeypatch.setenv("SLURM_NTASKS", "16")
    words = ["train", "trainer.num_nodes=2"] if apart == "nodes" else ["train"]
    assert call(monkeypatch, tmp_path, *words) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: output_dir: expected one for all processes")
    assert call(monkeypatch, tmp_path, *words, "output_dir=out") == 0
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("data.train: no such file"), "error: data.train: no such file"),
        (FloatingPointError("loss is nan"), "error: FloatingPointError: loss is nan"),
        (KeyError("x"), "error: KeyError: 'x'"),
    ],
)
def test_a_failed_run_ends_with_one_line_and_a_bad_exit_code(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(cfg: object) -> None:
        raise error

    monkeypatch.setattr("halos.commands.train.train", fail)
    assert call(monkeypatch, tmp_path, "train", "output_dir=out") == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == line
    assert isinstance(error, ValueError) == ("Traceback (most recent call last):" not in said)


def test_an_output_folder_that_cannot_be_made_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, tmp_path, "train", "output_dir=/proc/none/run") == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    expected = "error: output_dir: expected a folder that can be written, found /proc/none"
    assert error.splitlines()[-1].startswith(expected)


@pytest.mark.parametrize("word", ["yes", "no", "On", "off"])
def test_other_words_for_true_and_false_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.lora\.enabled: expected true or false, found '{word}'$"):
        require_plain_booleans({"overwrite": False, "model": {"path": "none", "lora": {"enabled": word}}})
    require_plain_booleans({"data": {"columns": {"label": word}, "train": ["no.jsonl", "yes"]}})
