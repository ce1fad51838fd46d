"""Strict configuration: what is wrong is named with its path, its value and what is valid, on one line."""
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from files.config import ConfigError, apply_overrides, from_dict, read_yaml, to_dict
from pipeline.config import read_data_config, read_system_config
from training.experiment import STAGES, Experiment, load_experiment

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Inner:
    size: int
    rate: float = 0.5
    kind: Literal["small", "large"] = "small"
    pair: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size: {self.size}; valid: from 1 up")


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    on: bool = False
    widths: tuple[int, ...] = (1, 2)
    limit: int | None = None
    many: tuple[Inner, ...] = ()
    table: dict[str, float] = field(default_factory=dict)


GOOD = {"name": "x", "inner": {"size": 3}}


@pytest.mark.parametrize("change, message", [
    ({"colour": 1}, "unknown key 'colour'; valid keys here: inner, limit, many, name, on, table, widths"),
    ({"inner": {"size": 3, "rat": 1}}, "unknown key 'inner.rat'; valid keys here: kind, pair, rate, size"),
    ({"inner": {}}, "missing key 'inner.size' (a whole number)"),
    ({"inner": 3}, "inner: expected a mapping of keys, got 3"),
    ({"inner": None}, "inner: expected a mapping of keys, got None"),
    ({"inner": {"size": "3"}}, "inner.size: got '3'; valid: a whole number"),
    ({"inner": {"size": 3.0}}, "inner.size: got 3.0; valid: a whole number"),
    ({"inner": {"size": True}}, "inner.size: got True; valid: a whole number"),
    ({"inner": {"size": 0}}, "inner.size: 0; valid: from 1 up"),
    ({"inner": {"size": 3, "rate": "fast"}}, "inner.rate: got 'fast'; valid: a number"),
    ({"inner": {"size": 3, "rate": True}}, "inner.rate: got True; valid: a number"),
    ({"inner": {"size": 3, "rate": float("nan")}}, "inner.rate: got nan; valid: a number"),
    ({"inner": {"size": 3, "kind": "huge"}}, "inner.kind: got 'huge'; valid: one of small, large"),
    ({"inner": {"size": 3, "pair": [1.0]}}, "inner.pair: got [1.0]; valid: a list of 2, each a number"),
    ({"inner": {"size": 3, "pair": [1, "a"]}}, "inner.pair[1]: got 'a'; valid: a number"),
    ({"on": 1}, "on: got 1; valid: true or false"),
    ({"on": "yes"}, "on: got 'yes'; valid: true or false"),
    ({"name": 3}, "name: got 3; valid: text"),
    ({"widths": 3}, "widths: got 3; valid: a list, each a whole number"),
    ({"widths": [1, 2.5]}, "widths[1]: got 2.5; valid: a whole number"),
    ({"limit": "none"}, "limit: got 'none'; valid: a whole number"),
    ({"many": [{"size": 1}, {"size": 0}]}, "many[1].size: 0; valid: from 1 up"),
    ({"table": {"a": "b"}}, "table.a: got 'b'; valid: a number"),
])
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(Outer, {**GOOD, **change})
    assert str(caught.value) == message


def test_missing_key_at_the_top():
    with pytest.raises(ConfigError, match=r"^missing key 'name' \(text\)$"):
        from_dict(Outer, {"inner": {"size": 1}})
    with pytest.raises(ConfigError, match="^the configuration: expected a mapping of keys, got 3$"):
        from_dict(Outer, 3)


def test_values_get_their_types():
    read = from_dict(Outer, {"name": "x", "inner": {"size": 3, "rate": 1, "pair": [1, 2]}, "widths": [], "limit": None,
                             "many": [{"size": 1}], "table": {"a": 2}})
    assert read == Outer("x", Inner(3, 1.0, "small", (1.0, 2.0)), widths=(), many=(Inner(1),), table={"a": 2.0})
    assert isinstance(read.inner.rate, float) and isinstance(read.inner.pair, tuple)
    assert from_dict(Outer, GOOD) == Outer("x", Inner(3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        read.name = "y"


def test_to_dict_is_the_inverse_also_through_a_file(tmp_path):
    config = Outer("x", Inner(3, 1e-7, "large", (1e-30, 3e20)), True, (5,), 4, (Inner(1), Inner(2)), {"a": 0.1})
    assert from_dict(Outer, to_dict(config)) == config
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    assert from_dict(Outer, read_yaml(path)) == config


def load(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


@pytest.mark.parametrize("text, number", [("1e-3", 1e-3), ("1E5", 1e5), ("-2e+3", -2e3), ("1.e-3", 1e-3), ("0.5", 0.5),
                                          ("1.0e-6", 1e-6), (".5", 0.5), ("'1e-3'", "1e-3"), ("1e", "1e"), ("12", 12)])
def test_exponents_are_numbers(tmp_path, text, number):
    value = load(tmp_path, f"a: {text}")["a"]
    assert value == number and type(value) is type(number)


@pytest.mark.parametrize("text, message", [
    ("a: 1\nb: 2\na: 3\n", "a.yaml: line 3: key 'a' is given twice"),
    ("a:\n  b: 1\n  b: 1\n", "a.yaml: line 3: key 'b' is given twice"),
    ("a: [1, 2\n", "a.yaml is not valid YAML"),
    ("? [a]\n: 1\n", "a.yaml: line 1: a key must be a word"),
    ("- 1\n", "must hold a mapping of keys, not list"),
    ("", "must hold a mapping of keys, not NoneType"),
    ("a: !!python/object/apply:os.getcwd []\n", "a.yaml is not valid YAML"),
    ("a: &x [*x]\n", "a.yaml is not valid YAML"),
])
def test_files_that_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_names_its_neighbours(tmp_path):
    load(tmp_path, "a: 1")
    with pytest.raises(ConfigError, match=r"no config file .*b\.yaml; found there: .*a\.yaml"):
        read_yaml(tmp_path / "b.yaml")
    with pytest.raises(ConfigError, match="no config file"):
        read_yaml(tmp_path / "nowhere" / "b.yaml")
    (tmp_path / "c.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match=r"c\.yaml is not valid YAML"):
        read_yaml(tmp_path / "c.yaml")


def test_overrides():
    data = {"a": {"b": 1, "c": [1]}, "d": None}
    given = apply_overrides(data, ["a.b=1e-3", "d.e=[x, y]", "f=", "a.g={h: true}", "i=a=b"])
    assert given == {"a": {"b": 1e-3, "c": [1], "g": {"h": True}}, "d": {"e": ["x", "y"]}, "f": None, "i": "a=b"}
    assert data == {"a": {"b": 1, "c": [1]}, "d": None}  # untouched
    assert apply_overrides(data, ["a.b=2", "a.b=3"])["a"]["b"] == 3  # the last one counts


@pytest.mark.parametrize("override, message", [
    ("a.b", "override 'a.b' is not of the form key.path=value"),
    ("=3", "override '=3' is not of the form key.path=value"),
    ("a.b.c=3", "override 'a.b.c=3': 'b' is a value, it has no keys below it"),
    ("a.b=[1", "override 'a.b=[1': the value is not valid YAML"),
    ("a={x: 1, x: 2}", "key 'x' is given twice"),
])
def test_overrides_that_are_refused(override, message):
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"a": {"b": 1}}, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ---- the experiment: values are right one by one and must also fit together

@pytest.mark.parametrize("override, message", [
    ("denoiser.unet.context_width=24", "denoiser.unet.context_width: 24 differs from text_encoder.width: 16"),
    ("denoiser.unet.in_channels=3", "denoiser.unet.in_channels, out_channels: 3, 4; valid: autoencoder.model"),
    ("tokenizer.length=30", "denoiser.text_encoder.length: 24; valid: tokenizer.length = 30"),
    ("tokenizer.vocab_size=400", "denoiser.text_encoder.vocab_size: 300; valid: from tokenizer.vocab_size = 400 up"),
    ("tokenizer.vocab_size=10", "tokenizer.vocab_size: 10; valid: 260"),
    ("data.shapes.size=36", "data.shapes.size: 36; valid: a multiple of 8"),
    ("data.shapes.size=34", "data.shapes.size: 34; valid: a multiple of 4"),
    ("data.source=photos", "data.source: got 'photos'; valid: one of shapes"),
    ("denoiser.unet.norm_groups=5", "norm_groups"),
    ("denoiser.text_encoder.heads=3", "heads"),
    ("denoiser.prediction_type=epsilon", "denoiser.prediction_type: value 'epsilon' cannot recover x_0"),
    ("denoiser.prediction_type=noise", "denoiser.prediction_type: got 'noise'; valid: one of epsilon"),
    ("denoiser.schedule.kind=quadratic", "denoiser.schedule.kind: got 'quadratic'; valid: one of linear"),
    ("denoiser.caption_dropout=1.5", "denoiser.caption_dropout: 1.5; valid"),
    ("denoiser.images=0", "denoiser.images: 0; valid"),
    ("denoiser.validation=0", "denoiser.validation: 0; valid"),
    ("denoiser.train.steps=0", "denoiser.train.steps: 0; valid: from 1 up"),
    ("denoiser.train.ema_std=0.5", "denoiser.train.ema_std: 0.5; valid"),
    ("denoiser.train.precision=fp8", "denoiser.train.precision: got 'fp8'; valid: one of auto, fp32, bf16"),
    ("denoiser.train.optim.learning_rate=-1", "denoiser.train.optim.learning_rate: -1.0; valid"),
    ("denoiser.train.optim.warmup=-1", "denoiser.train.optim.warmup: -1; valid: from 0 up"),
    ("denoiser.train.optim.betas=[0.9, 1.0]", "denoiser.train.optim.betas: (0.9, 1.0); valid"),
    ("denoiser.train.optim.clip=0", "denoiser.train.optim.clip: 0.0; valid: above 0"),
    ("autoencoder.kl=-1", "autoencoder.kl: -1.0; valid: from 0 up"),
    ("autoencoder.validation=0", "autoencoder.validation: 0; valid"),
    ("autoencoder.model.stem=0", "autoencoder.model.stem: 0; valid: 1 to 16"),
    ("sampling.steps=2000", "sampling (sampler ddim, steps 2000, spacing trailing): n: value 2000; valid: 1 .. 1000"),
    ("sampling.sampler=flow_euler", "sampling (sampler flow_euler, steps 3, spacing trailing): schedule: kind"),
    ("sampling.sampler=magic", "sampling.sampler: value 'magic'; valid: "),
    ("sampling.options.eta=2", "sampling.options.eta: value 2; valid: 0 .. 1"),
    ("sampling.eta=2", "sampling.options.eta: value 2; valid: 0 .. 1"),  # as older files write it
    ("sampling.options.order=3", "sampling.options.order: the sampler ddim has no such option; valid: eta, clean_end"),
    ("sampling.guidance.scale=-1", "sampling.guidance.scale: value -1.0; valid: "),
    ("stages=[denoiser, tokenizer]", "stages: ['denoiser', 'tokenizer']; valid: some of tokenizer"),
    ("stages=[]", "stages: []; valid: some of"),
    ("seed=-1", "seed: value -1; valid: 0 to"), ("seed=4294967296", "seed: value 4294967296; valid: 0 to 2^32 - 1"),
    ("clip.seed=4294967297", "clip.seed: value 4294967297; valid: 0 to 2^32 - 1"),
    ("name=../x", "name: '../x'; valid: letters"),
])
def test_an_experiment_that_cannot_run_stops_before_it_starts(tiny_config, override, message):
    with pytest.raises(ConfigError) as caught:
        load_experiment(tiny_config, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_networks_that_are_not_trained_need_not_fit(tiny_config):
    overrides = ["autoencoder.model.latent_channels=6", "tokenizer.length=30"]
    with pytest.raises(ConfigError, match="valid: "):
        load_experiment(tiny_config, overrides)
    assert load_experiment(tiny_config, [*overrides, "stages=[tokenizer, autoencoder]"]).latent_shape == (6, 8, 8)


def test_the_experiment_round_trips(tiny_config, tmp_path):
    experiment = load_experiment(tiny_config, ["denoiser.images=null", "sampling.guidance.interval=[0.1, .inf]"])
    assert from_dict(Experiment, to_dict(experiment)) == experiment
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(experiment)), encoding="utf-8")
    assert load_experiment(tmp_path / "config.yaml") == experiment
    assert experiment.latent_shape == (4, 8, 8) and experiment.denoiser.images is None


def test_every_configuration_class_is_frozen_and_holds_plain_types():
    """What a YAML file can say is what a dataclass can hold: no callables, no class paths."""
    plain = (int, float, bool, str, type(None))

    def check(value, path):
        if dataclasses.is_dataclass(value):
            assert value.__dataclass_params__.frozen, path
            for item in dataclasses.fields(value):
                check(getattr(value, item.name), f"{path}.{item.name}")
        elif isinstance(value, tuple):
            for number, item in enumerate(value):
                check(item, f"{path}[{number}]")
        elif isinstance(value, dict):  # shares by the name of a file
            for key, item in value.items():
                check(key, path)
                check(item, f"{path}.{key}")
        else:
            assert isinstance(value, plain), path

    check(load_experiment(ROOT / "configs" / "shapes.yaml"), "shapes")


# ---- what sampling reads of a run, without knowing training

@pytest.mark.parametrize("overrides", [
    [], ["denoiser.prediction_type=epsilon", "denoiser.schedule.zero_terminal_snr=false"],
    ["data.shapes.size=48", "sampling.steps=7", "sampling.guidance.scale=2"]])
def test_the_system_of_a_run_is_that_of_its_experiment(tiny_config, tmp_path, overrides):
    experiment = load_experiment(tiny_config, overrides)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(experiment)), encoding="utf-8")
    assert read_system_config(tmp_path / "config.yaml") == experiment.system
    assert read_data_config(tmp_path / "config.yaml") == experiment.data


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_defaults_are_the_same_for_training_and_for_sampling(path):
    """A shipped file leaves most keys out; both readers fill them in alike. One that teaches or tunes has the system of
    its base, which sampling reads there."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "name" in data and any(STAGES[name].teaches or STAGES[name].tunes for name in load_experiment(path).stages):
        assert load_experiment(path).system == read_system_config(ROOT / data["start_from"] / "config.yaml")
    elif "name" in data:
        assert read_system_config(path) == load_experiment(path).system


def test_a_system_that_cannot_be_names_its_key(tmp_path):
    (tmp_path / "config.yaml").write_text("denoiser: {unet: {channels: [3]}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"denoiser\.unet\.attention"):
        read_system_config(tmp_path / "config.yaml")
