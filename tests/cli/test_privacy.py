from __future__ import annotations

import re

import pytest

from lightning_fl.cli import main


def printed(capsys: pytest.CaptureFixture[str], words: str) -> str:
    main(["privacy", *words.split()])
    return " ".join(re.sub(r"[^\w.,()=]+", " ", capsys.readouterr().out).split())


def test_epsilon_of_a_setting_over_the_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--noise-multiplier 1 --rate 0.1 --rounds 100 --clients 1000")
    assert "Poisson(rate=0.1) delta 1e 05 neighbours add or remove one" in text
    assert "1 1.6845 2.1330 10 2.8545 3.4416 50 5.1483 5.8854 100 7.0466 7.9039" in text


def test_the_noise_for_an_epsilon(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--epsilon 8 --rounds 100 --delta 1e-5")
    assert "noise multiplier 6.0023 sampling everybody takes part" in text
    assert re.search(r" 100 (7\.999\d|8\.0000) ", text)


def test_fixed_cohorts_and_local_noise_replace_a_client(capsys: pytest.CaptureFixture[str]) -> None:
    fixed = printed(capsys, "--noise-multiplier 1 --cohort 100 --clients 1000 --rounds 1")
    assert "FixedSize(cohort=100 population=1000)" in fixed.replace(",", "")
    assert "replace one" in fixed
    assert "7.7009" in fixed
    local = printed(capsys, "--noise-multiplier 4 --rounds 50 --local")
    assert "replace one mode local" in local
    assert "50 20.6755 22.0199" in local


def test_many_clients_take_a_smaller_delta(capsys: pytest.CaptureFixture[str]) -> None:
    assert "delta 2.51e 07" in printed(capsys, "--noise-multiplier 4 --rounds 1 --clients 1000000")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--noise-multiplier 1 --rounds 5 --cohort 3", "--cohort needs --clients"),
        ("--noise-multiplier 1 --rounds 5 --rate 2", "rate=2.0"),
        ("--noise-multiplier 1 --rounds 5 --rate 0.1 --cohort 3", "give only one of them"),
        ("--noise-multiplier 1 --rounds 5 --rate 0.1 --local", "leave out --rate"),
        ("--noise-multiplier 1 --rounds 0", "count=0"),
        ("--rounds 5", "one of the arguments --noise-multiplier --epsilon is required"),
    ],
)
def test_words_that_cannot_be_right(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["privacy", *words.split()])
    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["privacy", "--help"])
    assert "lightning-fl privacy --epsilon 8 --rate 0.1 --rounds 100" in capsys.readouterr().out
