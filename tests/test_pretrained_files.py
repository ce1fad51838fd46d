"""Files of published checkpoints as people really have them: variants, marks in single files, learned tokens."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clip_vocabulary import write_vocabulary
from safetensors.torch import load_file, save_file
from test_pretrained import published, same
from test_pretrained_single import networks, single_state

import sample
from data.clip_tokenizer import ClipTokenizer
from model.pretrained.folder import read_diffusers_folder
from model.pretrained.single_file import read_single_file
from pipeline.loading import load_pretrained
from pipeline.prompts import chunks_of, parse_prompt

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

UNET = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, diffusers' pipeline) of small random networks."""
    parent = tmp_path_factory.mktemp("files")
    return parent / "pipeline", published(parent, "sd1")


@pytest.fixture
def copy(made, tmp_path) -> Path:
    shutil.copytree(made[0], tmp_path / "copy")
    return tmp_path / "copy"


def changed(path: Path, to: Path, factor: float, dtype: torch.dtype = torch.float32) -> None:
    """The weights of a file times a factor, in another file, so that it shows which one was read."""
    state = {name: (tensor * factor).to(dtype) for name, tensor in load_file(path).items()}
    save_file(state, to) if to.suffix == ".safetensors" else torch.save(state, to)


# ---- variants

@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
@pytest.mark.parametrize("size", [None, "100KB"])
def test_variants_as_diffusers_writes_them(made, tmp_path, variant, size):
    """Alone, the variant is read without being named, whole or in shards."""
    folder, pipeline = made
    pipeline.save_pretrained(tmp_path / "out", variant=variant, **({"max_shard_size": size} if size else {}))
    expected = read_diffusers_folder(folder)
    for given in (None, variant):
        found = read_diffusers_folder(tmp_path / "out", given)
        assert all(same(getattr(found, part), getattr(expected, part))
                   for part in ("unet", "autoencoder", "text_encoder"))
        assert all(variant in path.name for paths in found.files.values() for path in paths)
    with pytest.raises(ValueError, match=rf"out has no variant 'ema'; valid: {variant}"):
        read_diffusers_folder(tmp_path / "out", "ema")


def test_shards_of_a_variant_under_their_older_name(made, tmp_path):
    """diffusers wrote STEM.safetensors.fp16.index.json and STEM-00001-of-00002.fp16.safetensors before."""
    folder, pipeline = made
    pipeline.save_pretrained(tmp_path / "out", variant="fp16", max_shard_size="100KB")
    unet = tmp_path / "out" / "unet"
    index = unet / f"{UNET}.safetensors.index.fp16.json"
    data = json.loads(index.read_text())
    older = {name: f"{UNET}{name.removeprefix(f'{UNET}.fp16').removesuffix('.safetensors')}.fp16.safetensors"
             for name in set(data["weight_map"].values())}
    for name, other in older.items():
        (unet / name).rename(unet / other)
    data["weight_map"] = {name: older[file] for name, file in data["weight_map"].items()}
    index.unlink()
    (unet / f"{UNET}.safetensors.fp16.index.json").write_text(json.dumps(data))
    assert same(read_diffusers_folder(tmp_path / "out").unet, read_diffusers_folder(folder).unet)


def test_full_precision_comes_before_rounded_weights_unless_told(copy):
    plain = copy / "unet" / f"{UNET}.safetensors"
    changed(plain, plain.with_name(f"{UNET}.fp16.safetensors"), 2.0, torch.float16)
    changed(plain, plain.with_suffix(".bin"), 3.0)
    weight = load_file(plain)["conv_in.weight"]

    def read(variant=None) -> float:
        return (read_diffusers_folder(copy, variant).unet.conv_in.weight.float() / weight).median().item()

    assert read() == 1.0 and read("fp16") == pytest.approx(2.0, rel=1e-3)
    plain.unlink()
    assert read() == 3.0  # a .bin in full before a .safetensors that is rounded
    plain.with_suffix(".bin").unlink()
    assert read() == pytest.approx(2.0, rel=1e-3)
    plain.with_name(f"{UNET}.fp16.safetensors").rename(plain.with_name(f"{UNET}.non_ema.safetensors"))
    assert read() == pytest.approx(2.0, rel=1e-3)
    changed(plain.with_name(f"{UNET}.non_ema.safetensors"), plain.with_name(f"{UNET}.ema.safetensors"), 1.0)
    with pytest.raises(FileNotFoundError, match="unet holds only variants of the weights: ema, non_ema; valid: one of"):
        read()
    assert read("ema") == read("non_ema")


def test_of_a_file_and_shards_the_one_that_diffusers_reads(made, copy, tmp_path):
    made[1].save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for path in (tmp_path / "shards" / "unet").glob(f"{UNET}*"):
        shutil.copy(path, copy / "unet")
    changed(copy / "unet" / f"{UNET}.safetensors", copy / "unet" / f"{UNET}.safetensors", 2.0)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(copy / "unet").conv_in.weight
    assert torch.equal(read_diffusers_folder(copy).unet.conv_in.weight, theirs)


def test_what_lies_there_is_listed(copy):
    path = copy / "vae" / f"{UNET}.safetensors"
    path.rename(path.with_suffix(".msgpack"))
    with pytest.raises(FileNotFoundError, match="vae holds no weights; valid: diffusion_pytorch_model.safetensors, its "
                       "shards, or .bin; found there: config.json, diffusion_pytorch_model.msgpack$"):
        load_pretrained(copy)


# ---- marks in single files

@pytest.fixture(scope="module")
def states():
    return {kind: single_state(networks(kind), kind) for kind in ("1.x", "2.x")}


MARK = {"v_pred": torch.tensor([])}
ZERO = {"ztsnr": torch.tensor([])}


@pytest.mark.parametrize("kind, marks, metadata, expected", [
    ("1.x", {}, {}, "epsilon"), ("1.x", MARK, {}, "v_prediction"),
    ("1.x", {}, {"modelspec.prediction_type": "v"}, "v_prediction"),
    ("1.x", {}, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
    ("2.x", {}, {"modelspec.prediction_type": "v"}, "v_prediction"),
    ("2.x", {}, {"modelspec.prediction_type": "epsilon"}, "epsilon"), ("2.x", MARK, {}, "v_prediction"),
    ("1.x", {**MARK, **ZERO}, {}, "v_prediction"), ("1.x", ZERO, {"modelspec.prediction_type": "v"}, "v_prediction"),
])
def test_what_a_single_file_says_of_its_prediction(states, tmp_path, kind, marks, metadata, expected):
    path = tmp_path / "model.safetensors"
    save_file({**states[kind], **marks}, path, metadata)
    scheduler = read_single_file(path).scheduler
    zero = "ztsnr" in marks
    assert scheduler["prediction_type"] == expected and scheduler.get("rescale_betas_zero_snr", False) == zero
    assert scheduler["timestep_spacing"] == ("trailing" if zero else "leading")
    if not zero:
        assert read_single_file(path, "v_prediction").scheduler["prediction_type"] == "v_prediction"  # told otherwise
    write_vocabulary(tmp_path / "tokenizer")
    system = load_pretrained(path)
    assert system.config.prediction_type == expected and system.schedule.ends_in_noise == zero
    system.set_size(16, 16)
    assert system.images(["a star"], [0], replace(system.config.sampling, steps=2)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("marks, metadata, given, message", [
    (ZERO, {}, None, "the file is marked ztsnr, .*; valid: prediction type v_prediction"),
    ({}, {"modelspec.prediction_type": "x0"}, None, "modelspec.prediction_type 'x0' is not supported; valid: epsilon"),
    ({**MARK, **ZERO}, {}, "epsilon", "the file is marked ztsnr"),
])
def test_marks_that_do_not_go_together(states, tmp_path, marks, metadata, given, message):
    save_file({**states["1.x"], **marks}, tmp_path / "model.safetensors", metadata)
    with pytest.raises(ValueError, match=message):
        read_single_file(tmp_path / "model.safetensors", given)


# ---- learned tokens

TEXTS = ["a photo of <sks-toy> in snow", "x<Cat>y and <cat>", "<SKS-TOY><sks-toy>", "a < sks-toy >", "b <x y>! <x y> c",
         "plain words", "<many> things", "<sks-toy> " * 60]
TOKENS = ["<sks-toy>", "<Cat>", transformers.AddedToken("<x y>", lstrip=True, single_word=True, special=True), "<many>",
          "<many>_1", "<many>_2"]


@pytest.fixture(scope="module", params=["whole", "parts", "config"])
def learned(request, tmp_path_factory):
    """(folder, transformers' tokenizer) with added tokens, in the layouts of transformers 5 and 4."""
    words, out = write_vocabulary(tmp_path_factory.mktemp("words")), tmp_path_factory.mktemp("learned")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(words)
    first = len(tokenizer)
    tokenizer.add_tokens(TOKENS)
    if request.param == "whole":
        tokenizer.save_pretrained(out)
        return out, tokenizer
    shutil.copytree(words, out, dirs_exist_ok=True)
    names = [str(token) for token in TOKENS]
    if request.param == "parts":  # without the options of the third
        (out / "added_tokens.json").write_text(json.dumps({name: first + i for i, name in enumerate(names)}))
    else:
        config = json.loads((out / "tokenizer_config.json").read_text())
        config["added_tokens_decoder"] = {
            str(first + i): {"content": name, "lstrip": i == 2, "rstrip": False, "normalized": i != 2,
                             "single_word": i == 2, "special": i == 2} for i, name in enumerate(names)}
        (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out, transformers.CLIPTokenizer.from_pretrained(out)


def ids_of(pipeline, tokenizer, texts) -> torch.Tensor:
    """As the pipeline of diffusers tokenizes prompts: further vectors of a token are written behind it."""
    texts = pipeline.maybe_convert_prompt(texts, tokenizer)
    return tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def test_learned_tokens_have_the_ids_of_diffusers_and_survive(learned, made, tmp_path):
    folder, theirs = learned
    ours = ClipTokenizer.load(folder)
    expected = ids_of(made[1], theirs, TEXTS)
    assert ours.vocab_size == len(theirs) and torch.equal(ours.encode(TEXTS)[0], expected)
    for row, text in zip(expected, TEXTS):
        assert torch.equal(chunks_of(parse_prompt(text, 1, literal=True), ours).ids[0], row)
    ours.save(tmp_path / "saved")
    again = transformers.CLIPTokenizer.from_pretrained(tmp_path / "saved")
    assert torch.equal(ids_of(made[1], again, TEXTS), expected)
    assert torch.equal(ClipTokenizer.load(tmp_path / "saved").encode(TEXTS)[0], expected)


def test_learned_tokens_in_prompts(learned):
    ours = ClipTokenizer.load(learned[0], 8)
    many = [ours.bpe.token_to_id(name) for name in ("<many>", "<many>_1", "<many>_2")]
    chunks = chunks_of(parse_prompt("a (<many>:1.5) b", 2), ours)
    assert chunks.ids[0, 2:5].tolist() == many and chunks.weights[0, 1:6].tolist() == [1.0, 1.5, 1.5, 1.5, 1.0]
    assert [chunks.words[place] for place in (1, 2, 3, 4, 5)] == ["a", "<many>", "<many>", "<many>", "b"]
    split = chunks_of(parse_prompt("a a a a a <many>", 2), ours)
    assert split.ids[1, 1:4].tolist() == many  # the vectors of a token stay together
    assert ours.decode(ours.encode(["a <many> b"])[0]) == ["a <many> <many>_1 <many>_2 b"]
    assert ours.overflow("a a a a a <sks-toy> b") == "b" and ours.overflow("a a a a a a <sks-toy> b") == "<sks-toy> b"


def test_a_learned_token_reaches_the_image_and_the_saved_folder(made, tmp_path):
    folder, pipeline = tmp_path / "learned", published(tmp_path, "sd1")
    pipeline.tokenizer.add_tokens(["<sks-toy>"])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight[-1] = 3 * torch.randn(32)
    pipeline.save_pretrained(folder)
    system = load_pretrained(folder)
    ids = pipeline.tokenizer(["a <sks-toy>"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = pipeline.text_encoder(ids)[0]
    torch.testing.assert_close(system.encode(["a <sks-toy>"])[0], expected, atol=1e-5, rtol=0)
    system.save_pretrained(tmp_path / "saved")
    again = load_pretrained(tmp_path / "saved")
    assert torch.equal(again.encode(["a <sks-toy>"])[0], system.encode(["a <sks-toy>"])[0])
    tokenizer = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved").tokenizer
    assert torch.equal(tokenizer(["a <sks-toy>"], padding="max_length", return_tensors="pt").input_ids, ids)


@pytest.mark.parametrize("name, text, message", [
    ("added_tokens.json", '{"<a>": 700}', "the added token '<a>' has the id 700; valid: 644"),
    ("added_tokens.json", '{"star</w>": 700}', "has the id 700; valid: "),
    ("added_tokens.json", '["<a>"]', "added_tokens.json has no table of added tokens"),
    ("added_tokens.json", '{"<a>": "x"}', "added_tokens.json has no table of added tokens"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"644": "<a>"}}', "tokenizer_config.json has no table of ad"),
])
def test_added_tokens_that_do_not_fit_are_refused(tmp_path, name, text, message):
    write_vocabulary(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        ClipTokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_learned_token_without_its_vector_is_refused(copy):
    path = copy / "tokenizer" / "added_tokens.json"
    size = ClipTokenizer.load(copy / "tokenizer").vocab_size
    path.write_text(json.dumps({"<a>": size}))
    with pytest.raises(ValueError, match=f"the tokenizer has {size + 1} tokens; valid: up to {size}, the voc"):
        load_pretrained(copy)


# ---- the command line

def test_a_scheduler_that_is_none_of_ours_needs_a_sampler(copy, tmp_path, capsys):
    diffusers.LMSDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        copy / "scheduler")
    call = ["a red star", "--pretrained", str(copy), "--steps", "2", "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="_class_name 'LMSDiscreteScheduler' is not supported; .*--sampler"):
        sample.main(call)
    assert sample.main([*call, "--sampler", "unipc"]) == 0
    file = str(tmp_path / "out" / "00000_a-red-star_seed0.png")
    assert sample.main(["--pretrained", str(copy), "--verify", file]) == 0
    assert sample.main([*call[:-1], str(tmp_path / "grid"), "--xy", "sampler=ddim,euler"]) == 0


def test_a_variant_is_chosen_and_verified(copy, tmp_path):
    plain = copy / "unet" / f"{UNET}.safetensors"
    changed(plain, plain.with_name(f"{UNET}.fp16.safetensors"), 1.1, torch.float16)
    call = ["a red star", "--pretrained", str(copy), "--steps", "2", "--out", str(tmp_path / "out")]
    assert sample.main([*call, "--variant", "fp16"]) == 0
    file = str(tmp_path / "out" / "00000_a-red-star_seed0.png")
    assert sample.main(["--pretrained", str(copy), "--variant", "fp16", "--verify", file]) == 0
    assert sample.main(["--pretrained", str(copy), "--verify", file]) == 1
    with pytest.raises(ValueError, match="--variant without --pretrained; valid: both"):
        sample.main(["a red star", "--variant", "fp16"])
