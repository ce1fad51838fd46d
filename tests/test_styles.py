"""Styles: files of three kinds, composition, and a strength that goes from no style to all of it."""
import json

import pytest

from pipeline.palette import parse_palette
from pipeline.styles import DEFAULT, Style, apply_styles, parse_style, read_styles

STYLES = {style.name: style for style in (
    Style("ink", "ink drawing of {prompt}", "colour"), Style("soft", "soft light", "harsh"), Style("plain"))}


def test_the_styles_that_come_with_the_repository():
    styles = read_styles(DEFAULT)
    assert {"noto", "twemoji", "openmoji", "fluent", "flat", "impressionist", "photorealistic"} <= set(styles)
    assert styles["noto"].of_prompt("a fox") == "a fox, noto style"
    for style in styles.values():
        assert "a fox" in style.of_prompt("a fox")
        assert not style.palette or parse_palette(style.palette)


def test_styles_of_web_interfaces_are_read_as_they_are(tmp_path):
    (tmp_path / "styles.csv").write_text('\ufeffname,prompt,negative_prompt\n"None","",""\n'
                                         'ink,"ink drawing of {prompt}, black","colour, blur"\n', encoding="utf-8")
    found = read_styles(tmp_path / "styles.csv")
    assert found["ink"] == Style("ink", "ink drawing of {prompt}, black", "colour, blur")
    assert found["None"].of_prompt("a fox") == "a fox"
    (tmp_path / "sai.json").write_text(json.dumps([
        {"name": "sai-anime", "prompt": "anime artwork {prompt} . vibrant", "negative_prompt": "photo"},
        {"name": "empty", "prompt": "{prompt}"}]))
    found = read_styles(tmp_path / "sai.json")
    assert found["sai-anime"].of_prompt("a fox") == "anime artwork a fox . vibrant"
    assert found["empty"] == Style("empty", "{prompt}")


@pytest.mark.parametrize("name, text, message", [
    ("a.csv", "name,colour\nink,red\n", "has the columns name, colour; valid"),
    ("a.csv", 'name,prompt\nink,"open\n', "row"),
    ("a.csv", "name,prompt\nink,a\nink,b\n", "occurs twice"),
    ("a.csv", "name,prompt\n,a\n", "is empty"),
    ("a.csv", "name,prompt\nink,a,b\n", "unknown None"),
    ("a.json", "{", "is not JSON"),
    ("a.json", '{"name": "ink"}', "valid: a list of objects"),
    ("a.json", '[{"name": "ink", "prompt": 3}]', "entry 1: a value is no text"),
    ("a.yaml", "styles: [{name: ink, colour: red}]", "colour"),
])
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_styles(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_style_by_its_name_and_strength():
    assert parse_style("ink", STYLES) == (STYLES["ink"], 1.0)
    assert parse_style("ink:0.25", STYLES) == (STYLES["ink"], 0.25)
    with pytest.raises(ValueError, match=r"--style inc; valid: ink"):
        parse_style("inc", STYLES)
    assert parse_style("ink:2", STYLES) == (STYLES["ink"], 2.0)
    for text in ("ink:2.1", "ink:-1", "ink:x", "ink:nan"):
        with pytest.raises(ValueError, match="a strength from 0 to 2"):
            parse_style(text, STYLES)


def test_styles_are_composed():
    ink, soft, plain = STYLES.values()
    styled = apply_styles("a fox", "blur", [(ink, 1.0), (soft, 1.0), (plain, 1.0)])
    assert (styled.prompt, styled.negative) == ("ink drawing of a fox, soft light", "blur, colour, harsh")
    assert styled.further == ()
    assert apply_styles("a fox", "", [(ink, 0.0)]).prompt == "a fox"
    half = apply_styles("a fox", "", [(ink, 1.0), (soft, 0.5)])
    assert half.prompt == "ink drawing of a fox" and half.further == (("ink drawing of a fox, soft light", 0.5),)
    first = apply_styles("a fox", "", [(ink, 0.5), (soft, 1.0)])
    assert (first.prompt, first.further) == ("a fox, soft light", (("ink drawing of a fox, soft light", 0.5),))
    several = apply_styles("a fox", "", [(ink, 0.5), (plain, 1.0), (soft, 1.5)])
    assert several.further == (("ink drawing of a fox", 0.5), ("a fox, soft light", 1.5))
    assert (several.prompt, several.negative) == ("a fox", "")
