"""The race: a small one from nothing to its row, what cannot take part, and a run that is over the limit."""
import re
from pathlib import Path

import pytest
import yaml

from benchmarks import race

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path, tiny) -> Path:
    """The tiny system with as many held-out scenes as an evaluation chooses its guidance on."""
    tiny["data"]["shapes"] |= {"validation": 100, "test": 40}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tiny), encoding="utf-8")
    return path


def failure(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        race.main(arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.slow
def test_a_small_race_prints_a_row_of_the_table(config, tmp_path, capsys):
    race.main([str(config), "--seed", "4", "--run", str(tmp_path / "run"), "--prompts", "8",
               "--cores", str(race.cores_of(None)[0])])
    row = capsys.readouterr().out
    cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
    assert row.count("\n") == 1 and len(cells) == len(race.COLUMNS)
    found = dict(zip(race.COLUMNS, cells))
    assert (found["config"], found["seed"], found["cores"]) == ("small.yaml", "4", "1")
    assert found["images seen (autoencoder + denoiser)"] == "96 + 96"  # 12 steps of 8 each
    assert re.fullmatch(r"\*\*[\d.]+ % \(\d+-\d+\)\*\* of 8 prompts", found["whole scenes right"])
    assert re.fullmatch(r"\d+\.\d \(\d+\.\d \+ \d+\.\d\)", found["minutes (train + evaluate)"])
    assert "has files in it" in failure([str(config), "--run", str(tmp_path / "run")])  # nothing is trained twice


def test_a_run_is_stopped_at_the_limit(config, tmp_path):
    said = failure([str(config), "--run", str(tmp_path / "run"), "--minutes", "0.005"])
    assert said == f"over the limit of 0.005 minutes: train.py was stopped; the run is in {tmp_path / 'run'}"


def test_what_cannot_take_part_is_one_line(config, tmp_path):
    assert failure([str(tmp_path / "none.yaml")]).startswith("error: no config file")
    assert "valid: shapes" in failure([str(ROOT / "configs" / "emoji.yaml")])
    assert "--cores 0,x; valid" in failure([str(config), "--cores", "0,x"])
    text = config.read_text(encoding="utf-8").replace("steps: 12", "steps: 0")
    config.write_text(text, encoding="utf-8")
    assert "steps: 0" in failure([str(config), "--run", str(tmp_path / "other")])


def test_a_program_that_fails_is_one_line(config, tmp_path, capfd):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    assert failure([str(config), "--run", str(tmp_path / "file" / "run")]) == \
        "error: train.py ended with status 1; what it said stands above"
    assert "error" in capfd.readouterr().err


def test_the_page_has_the_columns_of_a_row():
    page = (ROOT / "docs" / "race.md").read_text(encoding="utf-8")
    assert "| " + " | ".join(race.COLUMNS) + " |" in page
