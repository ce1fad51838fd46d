"""Regions of a CLIP: how a text attends to patches, what is learnt of it, and that nothing else changes."""
import dataclasses
import json

import pytest
import torch
from clip_halves import COLOURS, Halves, config
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize, softplus

from files.run_folder import RunFolder
from files.weights import CheckpointError, load_weights, save_weights
from model.clip import Clip, attend_regions, contrastive_loss, region_loss
from pipeline.clip_vectors import ClipVectors
from pipeline.moderation import image_moderator
from safety.image import Concept, write_concepts
from training.stages.clip import train_clip
from training.stages.context import StageContext


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_attention_of_a_text_to_patches_equals_a_loop():
    patches, texts = unit(3, 5, 4).double(), unit(6, 4, seed=1).double()
    found = attend_regions(patches, texts, 7.0)
    for b in range(3):
        for p in range(6):
            cosines = [float(patches[b, n] @ texts[p]) for n in range(5)]
            weights = [torch.tensor(7.0 * c).exp().item() for c in cosines]
            expected = sum(w * c for w, c in zip(weights, cosines)) / sum(weights)
            assert float(found[b, p]) == pytest.approx(expected, rel=1e-6)
    cosines = torch.einsum("bne,pe->bpn", patches, texts)
    torch.testing.assert_close(attend_regions(patches, texts, 0.0), cosines.mean(dim=-1))
    torch.testing.assert_close(attend_regions(patches, texts, 1e4), cosines.amax(dim=-1))


def test_a_planted_patch_is_found_and_the_order_of_patches_is_not_seen():
    patches, texts = unit(4, 36, 64), unit(8, 64, seed=1)
    before = attend_regions(patches, texts)
    patches[2, 17] = texts[5]
    found = attend_regions(patches, texts)
    assert found[2, 5] > 0.6 and found[2, 5] == found.max() and before.max() < 0.4
    others = torch.ones(4, 8, dtype=torch.bool)
    others[2] = False
    assert torch.equal(found[others], before[others])
    torch.testing.assert_close(attend_regions(patches[:, torch.randperm(36)], texts), found)


def test_loss_closed_form():
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    shown = torch.tensor([[True, False], [False, False]])
    expected = (softplus(torch.tensor(-2.0)) + softplus(torch.tensor([-1.0, 0.5, 3.0])).sum()) / 2
    torch.testing.assert_close(region_loss(logits, shown), expected)


def networks() -> tuple[Clip, Clip]:
    """Without and with regions, from one seed."""
    model, found = config().model, []
    for regions in (False, True):
        torch.manual_seed(0)
        found.append(Clip(dataclasses.replace(model, regions=regions)))
    return found[0], found[1]


def test_regions_change_no_other_weight_and_no_other_logit():
    plain, both = networks()
    assert set(both.state_dict()) - set(plain.state_dict()) == {"region_image.weight", "region_text.weight",
                                                                "region_scale", "region_bias"}
    assert all(torch.equal(tensor, both.state_dict()[name]) for name, tensor in plain.state_dict().items())
    images, ids = torch.rand(3, 3, 24, 24) * 2 - 1, torch.randint(0, 300, (5, 8))
    mask = torch.ones(5, 8, dtype=torch.bool)
    logits, parts = both.logits_with_regions(images, (ids, mask), [(ids[:1], mask[:1]), (ids[1:4, :6], mask[1:4, :6])])
    torch.testing.assert_close(logits, plain(images, ids, mask))
    named = [both.part_vectors(ids[:1], mask[:1]), both.part_vectors(ids[1:4, :6], mask[1:4, :6])]
    expected = 10 * attend_regions(both.patch_vectors(images), torch.cat(named)) - 5
    torch.testing.assert_close(parts, expected)
    assert both.patch_vectors(images).shape == (3, 16, 32)
    loss = contrastive_loss(logits[:, :3]) + region_loss(parts, torch.eye(4, dtype=torch.bool)[:3])
    loss.backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for name, weight in both.named_parameters()
               if name.startswith("region_"))


def test_older_weights_are_read_and_regions_begin_anew(tmp_path):
    plain, both = networks()
    with torch.no_grad():
        plain.logit_scale.add_(1)
    save_weights(plain, tmp_path / "old.safetensors")
    new = both.region_image.weight.clone()
    load_weights(both, tmp_path / "old.safetensors", new=("region_",))
    assert torch.equal(both.logit_scale, plain.logit_scale) and torch.equal(both.region_image.weight, new)
    with pytest.raises(CheckpointError, match="missing region_"):
        load_weights(both, tmp_path / "old.safetensors")


class NamedHalves(Halves):
    """The same images; captions name each half as a thing."""

    def captions(self, index: int) -> tuple[str, ...]:
        left, right = self.pairs[index]
        return f"a {left} half and a {right} half", f"a {right} half next to a {left} half"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    run = RunFolder(tmp_path_factory.mktemp("runs") / "regions")
    run.path.mkdir()
    stage = config(90)
    stage = dataclasses.replace(stage, model=dataclasses.replace(stage.model, regions=True), wrong_words=True)
    train_clip(stage, StageContext(run, NamedHalves(False), NamedHalves(True)))
    return run


def test_halves_are_found_in_images_of_pairs_that_training_has_not_seen(run):
    vectors, source = ClipVectors.of_run(run.path), NamedHalves(True)
    images = torch.stack([source[i]["image"] for i in range(9)]).float() / 127.5 - 1
    shown = torch.tensor([[name in source.pairs[i] for name in COLOURS] for i in range(9)])
    for phrasing in ("a {} half", "this is the {} half"):  # the second in words that no caption has
        texts = vectors.parts([phrasing.format(name) for name in COLOURS])
        found = torch.einsum("bne,pe->bpn", vectors.patches(images), texts).amax(dim=-1)
        assert float((found[shown][:, None] > found[~shown]).float().mean()) > 0.9


def test_the_judge_is_chosen_by_what_the_weights_have(run, tmp_path):
    """By regions; from the file of a network that was written before there were any, by whole images."""
    write_concepts(tmp_path / "concepts.yaml", [Concept("red", "stand_in", ("a red half",), threshold=0.0)])
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    judge = image_moderator(tmp_path / "concepts.yaml", run.path)
    assert judge.regions and judge.margins(images).shape == (2, 1)
    tensors = {name: tensor for name, tensor in load_file(run.weights("clip")).items() if "region_" not in name}
    model = {name: value for name, value in dataclasses.asdict(config().model).items() if name != "regions"}
    save_file(tensors, tmp_path / "clip.safetensors", {"model": json.dumps(model)})
    (tmp_path / "clip_tokenizer.json").write_bytes((run.path / "clip_tokenizer.json").read_bytes())
    old = image_moderator(tmp_path / "concepts.yaml", tmp_path)
    assert not old.regions and old.margins(images).shape == (2, 1)
    whole = ClipVectors.of_run(run.path)
    torch.testing.assert_close(ClipVectors.of_run(tmp_path)(images), whole(images))
