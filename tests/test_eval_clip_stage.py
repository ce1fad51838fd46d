"""The clip stage: learns pairs, is a judge that the run's seed does not change, resumes, and refuses what cannot be."""
import dataclasses

import pytest
import torch
from clip_halves import Halves, config
from clip_vocabulary import write_vocabulary

from data.tokenizer import TokenizerConfig
from eval.clip_score import agreement, derangement
from files.run_folder import RunFolder
from files.weights import CheckpointError
from model.clip import contrastive_loss
from pipeline.clip_vectors import ClipVectors
from training.distributed import Processes
from training.loop import TrainConfig
from training.stages.clip import ClipStage, train_clip
from training.stages.clip_texts import texts_in_captions
from training.stages.context import StageContext

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sources() -> tuple[Halves, Halves]:
    return Halves(False), Halves(True)


@pytest.fixture(scope="module")
def run(tmp_path_factory, sources) -> RunFolder:
    run = RunFolder(tmp_path_factory.mktemp("runs") / "clip")
    run.path.mkdir()
    train_clip(config(), StageContext(run, *sources))
    return run


def test_it_learns_which_caption_belongs_to_which_image(run, sources):
    """Held-out pairs score above shuffled ones, and their captions are found more often than by chance."""
    vectors = ClipVectors.of_run(run.path)
    items = [sources[1][i] for i in range(9)]
    captions = [item["captions"][0] for item in items]
    x = vectors(torch.stack([item["image"] for item in items]).float() / 127.5 - 1)
    y = vectors.texts(captions)
    assert x.shape == y.shape == (9, 32) and not x.requires_grad
    torch.testing.assert_close(x.norm(dim=1), torch.ones(9))
    right, wrong = agreement(x, y, captions), agreement(x[derangement(9)], y, captions)
    assert right.score.low > wrong.score.high and right.recall_1.value >= 5 / 9
    assert "sha256" in vectors.stamp and "24 px" in vectors.stamp
    assert (run.path / "samples" / "clip_000060.png").is_file()


def test_a_stopped_run_goes_on_to_the_same_weights(run, sources, tmp_path):
    """Stopped after the checkpoint at 30, as by a crash, then to the end: bit for bit those of the run in one go."""
    again = RunFolder(tmp_path / "again")
    again.path.mkdir()

    class Crash(Exception):
        pass

    class Failing(Halves):
        reads = 0

        def __getitem__(self, index):
            Failing.reads += 1
            if Failing.reads > 40 * 32:
                raise Crash
            return super().__getitem__(index)

    with pytest.raises((Crash, ValueError)):
        train_clip(config(), StageContext(again, Failing(False), sources[1]))
    assert not again.weights("clip").exists()
    train_clip(config(), StageContext(again, *sources))
    assert again.weights("clip").read_bytes() == run.weights("clip").read_bytes()


def test_the_tokenizer_is_its_own_and_all_files_are_needed(run, tmp_path):
    assert (run.path / "clip_tokenizer.json").is_file() and not (run.path / "tokenizer.json").exists()
    vectors = ClipVectors.of_run(run.path)
    assert vectors.tokenizer.length == 24
    (run.path / "clip_tokenizer.json").rename(run.path / "away.json")
    with pytest.raises(CheckpointError, match="no file .*clip_tokenizer.json; train the stage clip"):
        ClipVectors.of_run(run.path)
    (run.path / "away.json").rename(run.path / "clip_tokenizer.json")
    other = tmp_path / "clip.safetensors"
    other.write_bytes(b"no")
    (tmp_path / "clip_tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged, or not of the stage clip"):
        ClipVectors.of_run(tmp_path)
    with pytest.raises(CheckpointError, match="no file .*clip.safetensors"):
        ClipVectors.of_run(run.path / "nowhere")


def test_published_weights_judge_as_in_transformers(tmp_path):
    """A folder of CLIPModel with its tokenizer, against transformers itself: unit vectors to 2e-5 in fp32."""
    transformers = pytest.importorskip("transformers")
    write_vocabulary(tmp_path)
    words = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    torch.manual_seed(0)
    peer = transformers.CLIPModel(transformers.CLIPConfig(
        text_config={"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 2, "eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id},
        vision_config={"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
                       "image_size": 32, "patch_size": 8}, projection_dim=24)).eval()
    peer.save_pretrained(tmp_path)
    vectors = ClipVectors.from_pretrained(tmp_path)
    captions = ["a photo of a small red star", "oil painting", "above two blue circles"]
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = (torch.tensor(x)[:, None, None] for x in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    ids = words(captions, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        out = peer(input_ids=ids.input_ids, attention_mask=ids.attention_mask,
                   pixel_values=((images + 1) / 2 - mean) / std)
    torch.testing.assert_close(vectors(images), out.image_embeds, rtol=0, atol=2e-5)
    torch.testing.assert_close(vectors.texts(captions), out.text_embeds, rtol=0, atol=2e-5)
    assert vectors.width == 24 and tmp_path.name in vectors.stamp and "32 px" in vectors.stamp
    (tmp_path / "vocab.json").unlink()
    with pytest.raises((ValueError, OSError), match="vocab.json"):
        ClipVectors.from_pretrained(tmp_path)


def test_the_same_caption_is_no_wrong_answer():
    """Two images with one caption: neither is pushed away from the other's text."""
    logits = torch.tensor([[3.0, 3.0, 0.0], [3.0, 3.0, 0.0], [0.0, 0.0, 3.0]], requires_grad=True)
    equal = texts_in_captions(["a star", "a star", "a moon"], ["a star", "a star", "a moon"])
    assert equal.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    loss = contrastive_loss(logits, equal)
    torch.testing.assert_close(loss, contrastive_loss(torch.tensor([[3.0, 0.0], [0.0, 3.0]])) * 2 / 3
                               + torch.tensor(3.0).exp().reciprocal().mul(2).log1p() / 3)
    loss.backward()
    assert logits.grad[0, 1] == logits.grad[1, 0] == 0 and (logits.grad[0, 2] > 0)


def test_what_cannot_be_trained_is_refused(sources, run):
    stage = config()
    for change, line in (
            ({"tokenizer": TokenizerConfig(400, 24)}, "vocab_size: 300; valid: from tokenizer.vocab_size = 400"),
            ({"tokenizer": TokenizerConfig(300, 30)}, "model.text.length: 24; valid: tokenizer.length = 30"),
            ({"validation": 1}, "validation: 1"),
            ({"train": TrainConfig(batch=8, accumulate=2)}, "train.accumulate: 2; valid: 1")):
        with pytest.raises(ValueError, match=line):
            dataclasses.replace(stage, **change)
    with pytest.raises(ValueError, match="stage clip with 2 processes; valid: one"):
        train_clip(stage, StageContext(run, *sources, processes=Processes(world=2)))
    ClipStage()  # the defaults fit each other
