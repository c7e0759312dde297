"""Mistakes in the words of a command line."""

import shlex

import pytest

from halos.config.words import check_words, without_flags

MISTAKES = [
    ("--loss kto", r"^--loss: expected key=value without dashes, found a flag; write loss=kto$"),
    ("--optim.lr=1e-5", r"write optim\.lr=1e-5$"),
    ("--verbose -m", r"write verbose=VALUE$"),
    ("checkpoint_every=30", r"^checkpoint_every: expected checkpoint\.every, .*; write checkpoint\.every=30$"),
    ("seed=1 loss = kto", r"^loss =: expected no spaces around =; write loss=kto$"),
    ("loss= kto", r"write loss=kto$"),
    ("loss =kto", r"write loss=kto$"),
    ("kto", r"^kto: expected group=option or key=value, found no =$"),
    ("policy=out/a=b", r"""quote the text: 'policy="out/a=b"'$"""),
    ("judge.instruction=a:{b", r"""'judge.instruction="a:\{b"'$"""),
]


@pytest.mark.parametrize(("words", "error"), MISTAKES)
def test_a_mistake_is_answered_with_the_words_to_write(words: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        check_words(words.split())


@pytest.mark.parametrize("value", ["out/a=b", 'say "a=b"', "it's=1", "back\\slash=x", "a}b"])
def test_the_quoted_words_that_an_error_names_mean_the_value(value: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with pytest.raises(ValueError, match="quote the text") as error:
        check_words([f"policy={value}"])
    (word,) = shlex.split(str(error.value).partition("quote the text: ")[2])
    check_words([word])
    assert OverridesParser.create().parse_override(word).value() == value


@pytest.mark.parametrize(
    "words",
    [
        "-m loss=kto,dpo seed=0,1 --cfg job",
        "--config-dir conf2 data=mine",
        "--config-dir=conf2 +loss.new=1 ++x.y=2 ~judge",
        "data.columns.sides=[a,b] data.train=a.jsonl resume= seed=1",
        "-sc install=bash",
        "hydra/launcher=joblib hydra.sweeper.n_jobs=2 'x=${seed}'",
    ],
)
def test_words_that_hydra_reads_pass(words: str) -> None:
    check_words(shlex.split(words))


@pytest.mark.parametrize(
    ("words", "ordered"),
    [
        (["-m", "loss=kto,dpo", "seed=0"], ["loss=kto,dpo", "seed=0", "-m"]),
        (["data.train=a", "--config-dir", "out/a=b", "loss=x"], ["data.train=a", "loss=x", "--config-dir", "out/a=b"]),
        (
            ["--config-dir=mine", "~optim.lr", "-c", "job", "+a=1"],
            ["~optim.lr", "+a=1", "--config-dir=mine", "-c", "job"],
        ),
    ],
)
def test_settings_are_told_from_flags_and_their_values(words: list[str], ordered: list[str]) -> None:
    settings, flags = without_flags(words)
    assert settings + flags == ordered
