"""An image knows at which speed it was drawn, and is drawn again with the same."""
import pytest
from sample_calls import PROMPT, draw, parameters, pixels

import sample
from model.device import cpu_has_bf16

NAME = "00000_a-small-red-star_seed0.png"


def test_fast_is_in_the_metadata_and_exact_is_not(tiny_run, tmp_path, capsys):
    fast = draw(tiny_run, tmp_path / "fast", PROMPT, "--speed", "fast")[NAME]
    exact = draw(tiny_run, tmp_path / "exact", PROMPT)[NAME]
    assert "speed" not in parameters(exact)
    assert parameters(fast).get("speed") == ("fast" if cpu_has_bf16() else None)
    away = abs(pixels(fast) - pixels(exact))
    assert away.mean() <= 3 and away.any() == cpu_has_bf16()
    assert sample.main(["--run", str(tiny_run), "--verify", str(fast), str(exact)]) == 0
    assert capsys.readouterr().out.count(": equal, ") == 2


def test_other_speeds_are_refused(tiny_run, capsys):
    with pytest.raises(SystemExit):
        sample.main([PROMPT, "--run", str(tiny_run), "--speed", "warp"])
    assert "--speed" in capsys.readouterr().err
