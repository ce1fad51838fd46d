"""Teaching a run from a few images: the three stages, sampling with what they leave, verifying, and no trace."""
import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from made_up_moderation import written
from PIL import Image
from safetensors.torch import load_file, save_file
from sample_calls import draw, parameters, pixels

import benchmarks.personalization
import sample
import train
from data.shapes.shapes import Shapes, ShapesConfig
from files.config import ConfigError, from_dict, to_dict
from files.whole import sha256_of
from model.pretrained.adapters import networks_of
from model.pretrained.card import card_of, hash_of_networks, read_header
from model.pretrained.embeddings import read_embeddings
from pipeline.loading import load_run
from pipeline.personal import Personal, cards_of_run
from sampling.personal import parse_adapter
from training.experiment import with_base
from training.stages.dreambooth import DreamboothStage
from training.stages.lora import LoraStage
from training.stages.textual_inversion import TextualInversionStage

TRAIN = {"steps": 3, "batch": 2, "log_every": 1, "validate_every": 3, "preview_every": 3, "checkpoint_every": 2,
         "precision": "fp32"}
PROMPT = "a sks star"


def write_images(folder: Path, count: int, caption: str = "a sks {}") -> Path:
    source = Shapes(ShapesConfig(size=32), "train")
    folder.mkdir(parents=True)
    for number in range(count):
        item = source[number]
        Image.fromarray(item["image"].permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption.format(item["caption"]))
    return folder


def config_of(tiny_run: Path, images: Path, stage: str, **settings) -> dict:
    return {"name": "few", "start_from": str(tiny_run), "stages": [stage],
            "data": {"source": "folder", "folder": {"root": str(images), "size": 32}},
            stage: {"train": TRAIN, **settings}}


def run_of(folder: Path, config: dict, *overrides: str) -> Path:
    """Train a configuration; the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "few.yaml").write_text(yaml.safe_dump(config))
    train.main([str(folder / "few.yaml"), f"run={folder / 'run'}", *overrides])
    return folder / "run"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("few") / "images", 3)


@pytest.fixture(scope="module")
def files_before(tiny_run) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(tiny_run.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def lora(tmp_path_factory, tiny_run, images, files_before) -> Path:
    """The run of a LoRA with prior preservation."""
    config = config_of(tiny_run, images, "lora", trigger="sks", adapter={"rank": 2},
                       prior={"prompts": ["a star", "a moon"], "images": 3})
    config["lora"]["train"] = {**TRAIN, "optim": {"learning_rate": 0.05, "warmup": 0}}
    return run_of(tmp_path_factory.mktemp("lora"), config)


@pytest.fixture(scope="module")
def words(tmp_path_factory, tiny_run, images, files_before) -> Path:
    """The run of two learned words, one of two vectors."""
    config = config_of(tiny_run, images, "textual_inversion", captions=["a <cat> in <styles>"],
                       tokens=[{"token": "<cat>", "vectors": 2, "init": "star"}, {"token": "<styles>"}])
    return run_of(tmp_path_factory.mktemp("words"), config)


# ---- what the stages leave

def test_a_lora_says_what_it_is_and_the_base_is_untouched(lora, tiny_run, files_before):
    card = card_of(read_header(lora / "adapter.safetensors"), lora)
    system = load_run(tiny_run, moderation=None)
    assert card.base == hash_of_networks(networks_of(system.unet, system.text_encoder))
    assert card.triggers == {"sks": ""} and len(card.captions) == 3 and all("sks" in text for text in card.captions)
    assert str(tiny_run) not in json.dumps(card.about)
    assert {path.name: sha256_of(path) for path in sorted(tiny_run.iterdir()) if path.is_file()} == files_before
    manifest = json.loads((lora / "manifest.json").read_text())["lora"]
    assert manifest["images"] == 3 and manifest["base"] == card.base and manifest["parameters"] < 20_000
    assert {"loss_before", "loss_after", "prior_loss_before", "prior_loss_after"} <= manifest.keys()
    assert manifest["loss_before"] != manifest["loss_after"]
    rows = [json.loads(line) for line in (lora / "metrics.jsonl").read_text().splitlines()]
    assert any({"given", "prior"} <= row.keys() for row in rows)
    assert any("validation_prior_loss" in row for row in rows)
    tensors = load_file(lora / "adapter.safetensors")
    assert any(key.startswith("lora_unet_") for key in tensors) and all(bool(t.isfinite().all())
                                                                        for t in tensors.values())


def test_an_interrupted_lora_continues_bit_for_bit(tiny_run, images, tmp_path, lora):
    config = yaml.safe_load((lora / "config.yaml").read_text())
    run = run_of(tmp_path, config)
    (run / "adapter.safetensors").unlink()
    for newest in (run / "state" / "lora").glob("step_00000003*"):  # back to the checkpoint of step 2
        newest.unlink()
    train.main([str(run / "config.yaml"), f"run={run}"])
    assert (run / "adapter.safetensors").read_bytes() == (lora / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("kind, decompose", [("lora", True), ("loha", False), ("lokr", True)])
def test_other_kinds_are_trained_too(tiny_run, images, tmp_path, kind, decompose):
    config = config_of(tiny_run, images, "lora", adapter={
        "kind": kind, "decompose": decompose, "rank": 2, "text_encoder": True,
        "targets": ["attention", "convolution"]})
    config["lora"]["train"] = {**TRAIN, "steps": 1}
    run = run_of(tmp_path, config)
    system = load_run(tiny_run, moderation=None)
    before = hash_of_networks(networks_of(system.unet, system.text_encoder))
    personal = Personal(system, adapters=[(run / "adapter.safetensors", 1.0)])
    assert {place.network for place in personal.adapters[0][0].places} == {"unet", "text_encoder"}
    assert hash_of_networks(networks_of(system.unet, system.text_encoder)) != before
    personal.set_scales([0.0])
    assert hash_of_networks(networks_of(system.unet, system.text_encoder)) == before


def test_words_are_trained_and_nothing_else(words, tiny_run, files_before):
    found, card = read_embeddings(words / "embedding.safetensors", 16)
    assert {token: len(rows) for token, rows in found.items()} == {"<cat>": 2, "<styles>": 1}
    assert card.triggers == {"<cat>": "star", "<styles>": ""} and card.captions == ("a <cat> in <styles>",)
    system = load_run(tiny_run, moderation=None)
    star = system.tokenizer.bpe.encode("star", add_special_tokens=False).ids
    start = system.text_encoder.token_embedding.weight[star].mean(dim=0)
    assert not torch.equal(found["<cat>"][0], start) and (found["<cat>"][0] - start).abs().max() < 0.1
    assert {path.name: sha256_of(path) for path in sorted(tiny_run.iterdir()) if path.is_file()} == files_before
    assert json.loads((words / "manifest.json").read_text())["textual_inversion"]["parameters"] == 3 * 16


def test_dreambooth_leaves_a_system_that_is_judged_by_its_captions(tiny_run, images, tmp_path, files_before):
    base = tmp_path / "base"
    shutil.copytree(tiny_run, base)
    written(base / "moderation.safetensors")
    config = config_of(base, images, "dreambooth", trigger="sks", text_encoder=False,
                       prior={"prompts": ["a star"], "images": 2})
    run = run_of(tmp_path / "dreambooth", config)
    assert sha256_of(run / "text_encoder.safetensors") == files_before["text_encoder.safetensors"]
    assert sha256_of(run / "denoiser.safetensors") != files_before["denoiser.safetensors"]
    for name in ("autoencoder.safetensors", "tokenizer.json", "moderation.safetensors"):
        assert sha256_of(run / name) == sha256_of(base / name)
    assert list(cards_of_run(run)) == [str(run / "dreambooth.json")] and cards_of_run(base) == {}
    assert len(draw(run, tmp_path / "out", PROMPT)) == 2
    card = json.loads((run / "dreambooth.json").read_text())
    (run / "dreambooth.json").write_text(json.dumps({**card, "captions": ["a zorbic"]}))
    with pytest.raises(ValueError, match="dreambooth.json is refused for a trigger word or caption"):
        sample.main([PROMPT, "--run", str(run), "--out", str(tmp_path / "no")])
    with pytest.raises(ValueError, match="dreambooth.json is refused"):
        load_run(run)


# ---- sampling and verifying

def test_images_name_what_they_were_drawn_with_and_are_verified(tiny_run, lora, words, tmp_path, files_before, capsys):
    plain = pixels(draw(tiny_run, tmp_path / "plain", "a <cat> star")["00000_a-cat-star_seed0.png"])
    flags = ["--adapter", f"{lora / 'adapter.safetensors'}:0.7", str(lora), "--embedding", str(words)]
    image = draw(tiny_run, tmp_path / "out", "a <cat> star", *flags)["00000_a-cat-star_seed0.png"]
    stored = parameters(image)
    file, word = (sha256_of(lora / "adapter.safetensors"), sha256_of(words / "embedding.safetensors"))
    assert stored["adapters"] == [{"file": "adapter.safetensors", "sha256": file, "scale": 0.7},
                                  {"file": "adapter.safetensors", "sha256": file, "scale": 1.0}]
    assert stored["embeddings"] == [{"file": "embedding.safetensors", "sha256": word}]
    assert str(tmp_path) not in json.dumps(stored)
    assert (pixels(image) != plain).any()
    after = pixels(draw(tiny_run, tmp_path / "after", "a <cat> star")["00000_a-cat-star_seed0.png"])
    assert (after == plain).all()
    assert {path.name: sha256_of(path) for path in sorted(tiny_run.iterdir()) if path.is_file()} == files_before

    def verified(*given: str) -> tuple[int, str]:
        capsys.readouterr()
        code = sample.main(["--run", str(tiny_run), "--verify", str(image), *given])
        return code, "".join(capsys.readouterr())

    assert verified("--adapter", str(lora), str(lora), "--embedding", str(words))[0] == 0
    for given, message in (
        ((), "was drawn with adapter.safetensors, adapter.safetensors; valid: --adapter with these files"),
        (("--adapter", str(lora), str(lora)), "was drawn with embedding.safetensors; valid: --embedding with this"),
        (("--adapter", str(lora), str(lora), "--embedding", str(lora / "adapter.safetensors")), "with another embedd"),
        (("--adapter", str(lora), f"{lora}:0.5", "--embedding", str(words)), "was drawn at scale 1; valid:"),
        (("--adapter", str(lora), str(tmp_path / "none"), "--embedding", str(words)), "no file"),
    ):
        code, text = verified(*given)
        assert code == 1 and message in text, (given, text)
    image = tmp_path / "plain" / "00000_a-cat-star_seed0.png"
    code, text = verified("--adapter", str(lora))
    assert code == 1 and "was not drawn with --adapter; valid: --verify without it" in text


def test_scale_0_is_the_base_and_scales_are_read(tiny_run, lora, tmp_path):
    plain = pixels(draw(tiny_run, tmp_path / "plain", PROMPT)["00000_a-sks-star_seed0.png"])
    none = pixels(draw(tiny_run, tmp_path / "none", PROMPT, "--adapter", f"{lora}:0")["00000_a-sks-star_seed0.png"])
    assert (plain == none).all()
    assert parse_adapter(f"{lora}:-0.5") == (lora / "adapter.safetensors", -0.5)
    assert parse_adapter("C:\\a.safetensors")[1] == 1.0 and parse_adapter("a/b:c/d.safetensors")[1] == 1.0
    for text, message in (("a:x", "--adapter a:x; valid: FILE or FILE:SCALE"), ("a:nan", "scale nan; valid: -10 to 10"),
                          ("a:11", "scale 11; valid")):
        with pytest.raises(ValueError, match=message):
            parse_adapter(text)


def test_another_base_is_refused_unless_it_is_forced(tiny_run, lora, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny_run, other)
    tensors = load_file(other / "denoiser.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, other / "denoiser.safetensors")
    with pytest.raises(ValueError, match="was trained on another base .*; valid: its own base, or --any-base"):
        sample.main([PROMPT, "--run", str(other), "--adapter", str(lora), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert len(draw(other, tmp_path / "out", PROMPT, "--adapter", str(lora), "--any-base")) == 2
    assert "note: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="--any-base without --adapter or --embedding; valid: both"):
        sample.main([PROMPT, "--run", str(other), "--any-base"])


# ---- what is refused before anything is trained

def test_what_cannot_be_taught_is_said_in_one_line(tiny_run, images, tmp_path):
    good = config_of(tiny_run, images, "lora")
    few, none = write_images(tmp_path / "one", 1), write_images(tmp_path / "harm", 3, "a zorbic {}")
    gated = tmp_path / "gated"
    shutil.copytree(tiny_run, gated)
    written(gated / "moderation.safetensors")

    def changed(path: str, value) -> dict:
        config = copy.deepcopy(good)
        *parents, last = path.split(".")
        node = config
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
        return config

    cases = [
        (changed("data.folder.root", str(few)), ValueError, "data: 1 image to learn from; valid: from 3 up"),
        (changed("start_from", ""), ConfigError, "lora: neither start_from nor lora.pretrained; valid: one of them"),
        (changed("lora.pretrained", "sd"), ConfigError, "lora: both start_from: .* and lora.pretrained"),
        (changed("start_from", str(tmp_path / "none")), ConfigError, "no run folder"),
        (changed("stages", ["denoiser", "lora"]), ConfigError, "valid with lora: in a run of its own"),
        (changed("lora.trigger", "qqq"), ValueError, "lora.trigger: qqq, which is in no caption; valid: a word of"),
        (changed("data.folder.flip", 0.5), ValueError, "data.folder.flip: 0.5; valid here: 0.0, the images are en"),
        (changed("lora.adapter.rank", 0), ConfigError, "lora.adapter.rank: 0; valid: from 1 up"),
        (changed("lora.train.compile", True), ConfigError, "lora.train.compile: True, .*; valid for this stage: false"),
        (changed("lora.layout", "peft") | {"lora": {"layout": "peft", "adapter": {"kind": "lokr"}}}, ConfigError,
         "lora.layout: peft with adapter.kind: lokr; valid: kohya"),
        (changed("denoiser", {"unet": {"channels": [8]}}), ConfigError, "denoiser.unet.channels: .*; valid: that of"),
        (changed("start_from", str(gated)) | {"data": {"source": "folder", "folder": {"root": str(none), "size": 32}}},
         ValueError, "lora is refused for a trigger word or caption of its training"),
        (config_of(tiny_run, images, "textual_inversion"), ValueError, "textual_inversion.tokens: none; valid: at"),
        (config_of(tiny_run, images, "textual_inversion", tokens=[{"token": "<cat>"}]), ValueError,
         "textual_inversion.tokens: <cat>, which is in no caption"),
        (config_of(tiny_run, images, "textual_inversion", tokens=[{"token": "a"}, {"token": "A"}]), ConfigError,
         "textual_inversion.tokens: a, a; valid: different words"),
        (config_of(tiny_run, images, "textual_inversion", tokens=[{"token": "a", "vectors": 0}]), ConfigError,
         r"textual_inversion.tokens\[0\].vectors: 0; valid: 1 to 64"),
        (config_of(tiny_run, images, "dreambooth", prior={"prompts": ["a"], "weight": 0}), ConfigError,
         "dreambooth.prior.weight: 0"),
    ]
    for number, (config, kind, message) in enumerate(cases):
        with pytest.raises(kind, match=message) as error:
            run_of(tmp_path / str(number), config)
        assert "\n" not in str(error.value)
        assert not list((tmp_path / str(number)).glob("run/*.safetensors"))
        assert kind is ValueError or not (tmp_path / str(number) / "run").exists()


def test_the_benchmark_measures_forgetting(tiny_run, lora, capsys):
    """Scale 0 is the base, another is not; what needs a CLIP is left out without one."""
    benchmarks.personalization.main([str(tiny_run), "--adapter", str(lora), "--count", "6", "--scales", "0", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| system | scale | validation loss |" and len(lines) == 5
    base, unchanged, taught = [line.split("|")[1:4] for line in lines[2:]]
    assert base[0].strip() == "base" and unchanged[1].strip() == "0" and taught[1].strip() == "1"
    assert base[2] == unchanged[2] != taught[2]


def test_one_key_of_train_leaves_the_others_as_the_stage_has_them():
    for stage in (LoraStage, TextualInversionStage, DreamboothStage):
        given = {"train": {"steps": 7, "optim": {"warmup": 3}}}
        usual, some = stage().train, from_dict(stage, given).train
        assert some == replace(usual, steps=7, optim=replace(usual.optim, warmup=3)) and usual.batch == 4
        assert from_dict(stage, to_dict(some_stage := from_dict(stage, given))) == some_stage
    assert DreamboothStage().train.optim.learning_rate < LoraStage().train.optim.learning_rate
    with pytest.raises(ConfigError, match="unknown key 'lora.train.stepz'"):
        from_dict(LoraStage, {"train": {"stepz": 7}}, "lora")


def test_how_the_base_was_trained_does_not_matter(tiny_run, images):
    """The configuration that the base was trained with will do, with any override of its training."""
    data = {**yaml.safe_load((tiny_run / "config.yaml").read_text()), **config_of(tiny_run, images, "lora")}
    data["denoiser"] = {**data["denoiser"], "images": 7, "train": {"steps": 1}}
    assert with_base(data)["denoiser"] == yaml.safe_load((tiny_run / "config.yaml").read_text())["denoiser"]


def test_a_check_says_what_would_be_learned_from(tiny_run, images, tmp_path, capsys):
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(config_of(tiny_run, images, "lora")))
    train.main([str(tmp_path / "few.yaml"), "--check"])
    assert "lora: 3 images of 32 x 32 to learn from, as 'a sks " in capsys.readouterr().out
    config = config_of(tiny_run, write_images(tmp_path / "one", 1), "lora")
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        train.main([str(tmp_path / "few.yaml"), "--check"])
