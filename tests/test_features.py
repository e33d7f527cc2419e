"""The feature cache on disk: shards of made-up features, read back, stale, unfinished and damaged."""

import json
import math
import os
import pickle
import resource
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from opensoraplan.data import features
from opensoraplan.data.buckets import Draw
from opensoraplan.data.dataset import caption_of
from opensoraplan.data.features import Description, FeatureDataset, LeftOut, check_fresh, collate_features
from opensoraplan.data.record import Record
from opensoraplan.data.selection import Sample
from opensoraplan.data.shards import VideoIndex, read_index

TEXTS = ["", "a red ball", "a blue cube rolls", "ein grüner Kegel"]
PARTS = {"T5": "0123456789abcdef0123456789abcdef", "seed": "0"}


def sample(index: int, *, aesthetic: float | None = None) -> Sample:
    captions = (TEXTS[1 + index % 3], TEXTS[1])
    record = Record(Path(f"clip{index}.mp4"), captions, aesthetic=aesthetic)
    return Sample(index, record, num_frames=9, height=16, width=24)


def moments(index: int) -> Tensor:
    return torch.randn(8, 2, 2, 3, generator=torch.Generator().manual_seed(index))


def states(place: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + place)
    sequence = torch.randn(1 + 2 * place, 6, generator=generator).bfloat16()
    return {"sequence": sequence, "pooled": torch.randn(5, generator=generator).bfloat16()}


def description(**changes: object) -> Description:
    plain = Description(
        parts=PARTS,
        vae={"shift": [0.5], "scale": [2.0]},
        text_features={"sequence": (None, 6), "pooled": (5,)},
        use_aesthetic=False,
        samples=5,
        texts=4,
        videos_per_shard=2,
        texts_per_shard=3,
    )
    return plain.model_copy(update=changes)


def write(folder: Path, *, aesthetic: float | None = None) -> Path:
    """A cache of 5 clips in 3 shards, of which number 2 cannot be read, and of 4 texts in 2 shards."""
    plan = description()
    features.begin(folder, plan)
    for shard in range(plan.shards("videos")):
        places = plan.places("videos", shard)
        features.write_videos(
            folder,
            shard,
            [(sample(index, aesthetic=aesthetic), moments(index)) for index in places if index != 2],
            left_out=[LeftOut("clip2.mp4", "clip2.mp4 is damaged")] if 2 in places else [],
        )
    for shard in range(plan.shards("texts")):
        places = plan.places("texts", shard)
        features.write_texts(folder, shard, {TEXTS[place]: states(place) for place in places})
    features.finish(folder)
    return folder


def dataset(folder: Path, *, caption_dropout: float = 0.5, use_aesthetic: bool = False) -> FeatureDataset:
    return FeatureDataset(folder, seed=3, caption_dropout=caption_dropout, use_aesthetic=use_aesthetic)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    data = dataset(write(tmp_path))
    assert [item.index for item in data.samples] == [0, 1, 3, 4]
    assert data.shapes == [(9, 16, 24)] * 4
    assert data.latent_channels == 4
    assert data.text_features == {"sequence": (None, 6), "pooled": (5,)}
    assert data.description.vae == {"shift": [0.5], "scale": [2.0]}
    assert data.description.left_out == (LeftOut("clip2.mp4", "clip2.mp4 is damaged"),)
    drawn = set()
    for slot in range(20):
        draw = Draw(index=slot % 4, epoch=slot, step=7, slot=0)
        item = data[draw]
        here = data.samples[draw.index]
        assert item.caption == caption_of(here, draw, seed=3, dropout=0.5)
        assert torch.equal(item.moments, moments(here.index))
        text = states(TEXTS.index(item.caption))
        assert item.text.keys() == text.keys()
        assert all(torch.equal(item.text[name], feature) for name, feature in text.items())
        assert item.text["sequence"].dtype == torch.bfloat16
        drawn.add(item.caption)
    assert drawn == set(TEXTS[:3])


def test_collate(tmp_path: Path) -> None:
    data = dataset(write(tmp_path), caption_dropout=0.0)
    items = [data[Draw(index=index, epoch=0, step=0, slot=index)] for index in range(4)]
    batch = collate_features(items)
    assert batch.moments.shape == (4, 8, 2, 2, 3)
    assert batch.joined.keys() == {"sequence", "pooled"}  # a tensor each, however large the batch is
    for caption, text, item in zip(batch.captions, batch.texts, items, strict=True):
        assert text.keys() == item.text.keys()
        assert text["sequence"].shape == (1 + 2 * TEXTS.index(caption), 6)
        assert all(torch.equal(text[name], feature) for name, feature in item.text.items())
    assert batch.failures == ()


def test_workers_and_copies_read_the_same(tmp_path: Path) -> None:
    data = dataset(write(tmp_path))
    draws = [Draw(index=index, epoch=1, step=2, slot=index) for index in range(4)]
    expected = collate_features([data[draw] for draw in draws])
    copy = pickle.loads(pickle.dumps(data))
    loader = DataLoader(data, batch_sampler=[draws], num_workers=1, collate_fn=collate_features)
    for batch in (collate_features([copy[draw] for draw in draws]), *loader):
        assert torch.equal(batch.moments, expected.moments)
        for text, wanted in zip(batch.texts, expected.texts, strict=True):
            assert all(torch.equal(text[name], feature) for name, feature in wanted.items())
        assert batch.captions == expected.captions


def test_same_bytes_and_no_other_files(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one"), write(tmp_path / "other")
    names = sorted(os.listdir(one))
    assert names == [
        "features.json",
        *(f"texts-0000{shard}.safetensors" for shard in range(2)),
        *(f"videos-0000{shard}.safetensors" for shard in range(3)),
    ]
    assert names == sorted(os.listdir(other))
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_stale_caches_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    check_fresh(tmp_path, {"T5": PARTS["T5"]})
    with pytest.raises(ValueError, match=r"stale, .* another T5 \(was 01234567, is fedcba98\): write a new"):
        check_fresh(tmp_path, {"T5": "fedcba9876543210fedcba9876543210", "seed": "0"})
    with pytest.raises(ValueError, match=r"another seed \(was 0, is 1\), CLIP \(was not there, is x\): "):
        features.begin(tmp_path, description(parts={**PARTS, "seed": "1", "CLIP": "x"}))
    with pytest.raises(ValueError, match="a cache with videos_per_shard 2, not 3: give another folder"):
        features.begin(tmp_path, description(videos_per_shard=3))
    features.begin(tmp_path, description())


def test_unfinished_caches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no feature cache: it has no features\.json"):
        dataset(tmp_path)
    write(tmp_path)
    (tmp_path / "videos-00001.safetensors").unlink()
    (tmp_path / "texts-00000.safetensors").unlink()
    expected = (
        f"2 of 5 shards are missing, the first is videos-00001.safetensors; "
        f"go on with `osp cache --out {tmp_path}`"
    )
    with pytest.raises(ValueError, match=expected):
        dataset(tmp_path)


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    shard = write(tmp_path) / "videos-00000.safetensors"
    assert features.is_written(tmp_path, description(), "videos", 0)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    assert not features.is_written(tmp_path, description(), "videos", 0)
    with pytest.raises(ValueError, match=r"videos-00000\.safetensors is missing or damaged .* delete it"):
        dataset(tmp_path)
    shard.write_bytes(whole)
    data = dataset(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"videos-00000\.safetensors is missing or damaged"):
        _ = data[Draw(index=0, epoch=0, step=0, slot=0)]


@pytest.mark.parametrize("kind", ["videos", "texts"])
def test_bytes_that_have_changed_are_noticed(tmp_path: Path, kind: str) -> None:
    """In the middle of tensors, where safetensors sees nothing, and in the header."""
    shard = write(tmp_path) / f"{kind}-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    data = dataset(tmp_path)
    draws = [
        Draw(index=index, epoch=epoch, step=0, slot=0) for index in range(len(data)) for epoch in range(20)
    ]
    with pytest.raises(ValueError, match=rf"{kind}-00000\.safetensors is missing or damaged \(the bytes of"):
        [data[draw] for draw in draws]
    word = b"left_out" if kind == "videos" else b"checksums"
    changed = whole.replace(word, word.upper(), 1)
    assert changed != whole
    shard.write_bytes(changed)
    with pytest.raises(ValueError, match="the bytes of its header have changed"):
        dataset(tmp_path)


def rewrite(
    path: Path, *, index: Callable[[Any], object] = len, tensors: Callable[[Any], object] = len
) -> None:
    """Change a shard as no damage would: with the checksums of what it has then."""
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["index"][8:])
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    index(content)
    tensors(values)
    content["checksums"] = {}
    text = json.dumps(content)
    save_file(values, path, metadata={"index": f"{zlib.crc32(text.encode()):08x}{text}"})


INDICES: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "missing": ("videos", lambda i: i["samples"][1].pop("path"), "samples.1.path: Field required"),
    "no samples": ("videos", lambda i: i.pop("samples"), "samples: Field required"),
    "unknown": ("videos", lambda i: i.update(sample=1), "unknown key 'sample'"),
    "text for a number": (
        "videos",
        lambda i: i["samples"][0].update(index="0"),
        "samples.0.index: .* valid integer, got '0'",
    ),
    "number for a text": ("videos", lambda i: i["samples"][0].update(path=1), "samples.0.path: must be text"),
    "text for a list": (
        "videos",
        lambda i: i["samples"][0].update(captions="a ball"),
        "samples.0.captions: .* valid list",
    ),
    "not a number": (
        "videos",
        lambda i: i["samples"][0].update(aesthetic=math.nan),
        "samples.0.aesthetic: .* finite number, got nan",
    ),
    "two sides": ("videos", lambda i: i["samples"][0].update(shape=[9, 16]), "samples.0.shape: .* 3 items"),
    "no size": (
        "videos",
        lambda i: i["samples"][0].update(shape=[8, 16, 24]),
        r"samples.0.shape: frames must be 8k \+ 1",
    ),
    "another size": (
        "videos",
        lambda i: i["samples"][1].update(shape=[9, 16, 32]),
        r"00001.moments: 9 x 16 x 32 pixels have moments \[2 C, 2, 2, 4\], got \[8, 2, 2, 3\]",
    ),
    "a list": ("videos", lambda i: i.update(left_out=[["clip.mp4"]]), "left_out.0.1: Field required"),
    "a mapping": ("texts", lambda i: i.update(texts={}), "texts: .* valid list"),
    "key": ("texts", lambda i: i["texts"].append("x"), r"x.sequence: must be \[L, 6\], got none"),
}


@pytest.mark.parametrize("name", INDICES)
def test_what_is_wrong_in_an_index_is_told_with_file_and_field(tmp_path: Path, name: str) -> None:
    kind, change, message = INDICES[name]
    shard = write(tmp_path) / f"{kind}-00000.safetensors"
    rewrite(shard)
    dataset(tmp_path)
    rewrite(shard, index=change)
    with pytest.raises(ValueError, match=rf"{shard} is missing or damaged \(.*{message}.*\): delete it"):
        dataset(tmp_path)


NAME = f"{features.text_key('')}.sequence"
TENSORS: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "flat moments": (
        "videos",
        lambda t: t.update({"00001.moments": torch.zeros(8)}),
        r"00001.moments: .* got \[8\]",
    ),
    "odd moments": (
        "videos",
        lambda t: t.update({"00001.moments": torch.zeros(7, 2, 2, 3)}),
        "00001.moments",
    ),
    "other channels": (
        "videos",
        lambda t: t.update({"00001.moments": torch.zeros(6, 2, 2, 3)}),
        "moments: of 3 channels here, of 4 before",
    ),
    "whole numbers": (
        "videos",
        lambda t: t.update({"00001.moments": torch.zeros(8, 2, 2, 3, dtype=torch.int32)}),
        "00001.moments: must be of floating point, got I32",
    ),
    "empty text": (
        "texts",
        lambda t: t.update({NAME: torch.zeros(0, 6)}),
        rf"{NAME}: must be \[L, 6\], got \[0, 6\]",
    ),
    "wide text": (
        "texts",
        lambda t: t.update({NAME: torch.zeros(1, 9)}),
        rf"{NAME}: must be \[L, 6\], got \[1, 9\]",
    ),
    "flat text": ("texts", lambda t: t.update({NAME: torch.zeros(6)}), rf"{NAME}: must .*, got \[6\]"),
    "another name": ("texts", lambda t: t.update(other=t.pop(NAME)), rf"{NAME}: must be \[L, 6\], got none"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_other_shapes_are_told_with_their_files(tmp_path: Path, name: str) -> None:
    kind, change, message = TENSORS[name]
    shard = write(tmp_path) / f"{kind}-00000.safetensors"
    rewrite(shard, tensors=change)
    with pytest.raises(ValueError, match=rf"{shard} is missing or damaged \(.*{message}"):
        dataset(tmp_path)


def test_files_of_other_widths_do_not_belong_together(tmp_path: Path) -> None:
    shard = write(tmp_path) / "videos-00002.safetensors"
    rewrite(shard, tensors=lambda t: t.update({"00000.moments": torch.zeros(6, 2, 2, 3)}))
    with pytest.raises(ValueError, match=rf"{shard} .* \(moments: of 3 channels here, of 4 before\)"):
        dataset(tmp_path)


def test_a_caption_without_states_is_told(tmp_path: Path) -> None:
    shard = write(tmp_path) / "texts-00000.safetensors"
    rewrite(shard, index=lambda i: i["texts"].pop(1))
    data = dataset(tmp_path, caption_dropout=0.0)
    with pytest.raises(
        ValueError, match=f"{tmp_path} is damaged: no file has the features of .* 'a red ball'"
    ):
        [data[Draw(index=0, epoch=epoch, step=0, slot=0)] for epoch in range(20)]


def test_a_file_without_a_sample_is_told(tmp_path: Path) -> None:
    shard = write(tmp_path) / "videos-00000.safetensors"
    rewrite(shard, index=lambda i: i.update(files=[[9, 1, 2, 3, "hash"]]))
    with pytest.raises(ValueError, match=rf"{shard} .*\(files: there is no sample 9, of 5\)"):
        features.changed_clips(tmp_path, [sample(index) for index in range(5)], [0])


OLD = Path(__file__).with_name("golden") / "old_cache"


def test_a_cache_that_does_not_name_its_features_is_read() -> None:
    """It was written before there was the key `text_features`; all else is as it is now."""
    assert "text_features" not in json.loads((OLD / "features.json").read_text())
    data = dataset(OLD, caption_dropout=0.0)
    assert data.text_features == {"sequence": (None, 3), "pooled": (4,)}
    assert (data.latent_channels, data.shapes) == (2, [(9, 16, 16)])
    for dropout, tokens in ((0.0, 4), (1.0, 1)):
        item = dataset(OLD, caption_dropout=dropout)[Draw(index=0, epoch=0, step=0, slot=0)]
        assert torch.equal(item.moments, torch.arange(32.0).view(4, 2, 2, 2))
        assert torch.equal(item.text["sequence"].float(), torch.arange(3.0 * tokens).view(tokens, 3) / 8)
        assert torch.equal(item.text["pooled"].float(), torch.arange(tokens, tokens + 4.0))


def test_an_old_cache_is_gone_on_with(tmp_path: Path) -> None:
    """Its files have the same bytes as new ones."""
    shutil.copytree(OLD, tmp_path / "cache")
    plan = Description.read_file(OLD / "features.json")
    new = plan.model_copy(update={"text_features": {"sequence": (None, 3), "pooled": (4,)}})
    features.begin(tmp_path / "cache", new)
    assert all(features.is_written(tmp_path / "cache", new, kind, 0) for kind in features.KINDS)
    file = "texts-00000.safetensors"
    (tmp_path / "cache" / file).unlink()
    texts = {
        text: {
            "sequence": (torch.arange(3.0 * tokens).view(tokens, 3) / 8).bfloat16(),
            "pooled": torch.arange(tokens, tokens + 4.0).bfloat16(),
        }
        for text, tokens in (("", 1), ("a red ball", 4))
    }
    features.write_texts(tmp_path / "cache", 0, texts)
    assert (tmp_path / "cache" / file).read_bytes() == (OLD / file).read_bytes()


def test_texts_of_other_widths_in_an_old_cache_are_told(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "cache")
    name = f"{features.text_key('a red ball')}.sequence"
    shard = tmp_path / "cache" / "texts-00000.safetensors"
    rewrite(shard, tensors=lambda t: t.update({name: torch.zeros(4, 5)}))
    with pytest.raises(ValueError, match=rf"{name}: must be \[L, 3\], got \[4, 5\]"):
        dataset(tmp_path / "cache")


def test_names_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(b"gr\xf6\xdfe.mp4"))
    clip = Sample(0, Record(odd, ("x",)), num_frames=9, height=16, width=24)
    features.begin(tmp_path, description())
    features.write_videos(tmp_path, 0, [(clip, moments(0))])
    index, _ = read_index(features.shard_path(tmp_path, "videos", 0), VideoIndex)
    assert index.samples[0].sample().record.path == odd


def test_quality_phrases_are_other_captions(tmp_path: Path) -> None:
    write(tmp_path / "unscored")
    dataset(tmp_path / "unscored", use_aesthetic=True)
    write(tmp_path / "scored", aesthetic=6.0)
    dataset(tmp_path / "scored")
    with pytest.raises(ValueError, match="written with use_aesthetic False, so it has other captions"):
        dataset(tmp_path / "scored", use_aesthetic=True)


def test_nothing_else_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="exists and is no feature cache: give another folder"):
        features.begin(tmp_path, description())
    with pytest.raises(ValueError, match=r"cannot write to .*mine: give"):
        features.begin(tmp_path / "mine" / "cache", description())
    assert os.listdir(tmp_path) == ["mine"]


def test_a_full_disk_leaves_what_was_written(tmp_path: Path) -> None:
    write(tmp_path)
    before = (tmp_path / "videos-00000.safetensors").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond 100 bytes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot write .*videos-00000\.safetensors: .*File too large"):
            features.write_videos(tmp_path, 0, [(sample(0), moments(0))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "videos-00000.safetensors").read_bytes() == before
    assert len(os.listdir(tmp_path)) == 6
