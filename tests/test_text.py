"""Prompt embeddings and both encoders, from tiny folders laid out like the released ones."""

import json
import logging
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from tiny_text import write_text_encoders
from transformers import CLIPModel, CLIPTextModelWithProjection, T5EncoderModel, T5ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from opensoraplan.models.pretrained_text import load_tokenizer
from opensoraplan.models.text import (
    TEXT_PARTS,
    PromptEmbeds,
    encode_prompts,
    load_text_model,
    text_encoder_of,
)

PROMPTS = ["a red ball", "the camera moves slowly through a quiet street", ""]
ASCII = " ".join(map(chr, range(33, 127)))
WORDS = "the quick brown fox jumps over the lazy dog "


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_text_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def parts(folders: tuple[Path, Path]) -> dict:
    t5, clip = folders
    return {
        "tokenizer": load_tokenizer(t5),
        "text_encoder": load_t5(t5),
        "tokenizer_2": load_tokenizer(clip),
        "text_encoder_2": load_clip(clip),
    }


@pytest.fixture
def t5_copy(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[0], tmp_path / "t5"))


@pytest.fixture
def clip_copy(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[1], tmp_path / "clip"))


def load_t5(folder: Path, dtype: torch.dtype = torch.float32) -> T5EncoderModel:
    return load_text_model(folder, TEXT_PARTS[0], dtype=dtype, device="cpu")


def load_clip(folder: Path, dtype: torch.dtype = torch.float32) -> CLIPTextModelWithProjection:
    return load_text_model(folder, TEXT_PARTS[1], dtype=dtype, device="cpu")


def embeds(lengths: list[int], *, columns: int) -> PromptEmbeds:
    generator = torch.Generator().manual_seed(sum(lengths))
    return PromptEmbeds(
        torch.randn(len(lengths), columns, 6, generator=generator),
        torch.arange(columns) < torch.tensor(lengths)[:, None],
        torch.randn(len(lengths), 4, generator=generator),
    )


# Prompt embeddings


@pytest.mark.parametrize(
    ("sequence", "mask", "pooled", "dtype", "message"),
    [
        ((2, 6), (2, 6), (2, 4), torch.bool, r"got \(2, 6\)"),
        ((2, 5, 6), (2, 4), (2, 4), torch.bool, r"mask must be torch.bool \(2, 5\), got torch.bool \(2, 4\)"),
        (
            (2, 5, 6),
            (2, 5),
            (2, 4),
            torch.long,
            r"mask must be torch.bool \(2, 5\), got torch.int64 \(2, 5\)",
        ),
        ((2, 5, 6), (2, 5), (3, 4), torch.bool, r"pooled must be \[2, width\].*got \(3, 4\)"),
        ((2, 5, 6), (2, 5), (4,), torch.bool, r"pooled must be \[2, width\].*got \(4,\)"),
    ],
)
def test_shapes_must_belong_together(
    sequence: tuple[int, ...],
    mask: tuple[int, ...],
    pooled: tuple[int, ...],
    dtype: torch.dtype,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        PromptEmbeds(torch.zeros(sequence), torch.ones(mask, dtype=dtype), torch.zeros(pooled))


def test_repeat_and_select() -> None:
    two = embeds([3, 5], columns=5)
    many = two.repeat(3)
    assert many.batch_size == 6
    for row, source in enumerate([0, 0, 0, 1, 1, 1]):
        assert torch.equal(many.sequence[row], two.sequence[source])
        assert torch.equal(many.mask[row], two.mask[source])
        assert torch.equal(many.pooled[row], two.pooled[source])
    swapped = two.select([1, 0])
    assert torch.equal(swapped.sequence, two.sequence.flip(0))
    assert torch.equal(swapped.pooled, two.pooled.flip(0))
    assert torch.equal(two.select(slice(1, 2)).mask, two.mask[1:])
    with pytest.raises(ValueError, match=r"got 0"):
        two.repeat(0)


def test_cat_pads_with_masked_zeros_and_trimmed_undoes_it() -> None:
    short, long = embeds([2, 3], columns=3), embeds([7], columns=7)
    both = PromptEmbeds.cat([short, long])
    assert both.sequence.shape == (3, 7, 6)
    assert both.mask.sum(dim=1).tolist() == [2, 3, 7]
    assert torch.equal(both.sequence[:2, :3], short.sequence)
    assert not both.sequence[:2, 3:].any()
    assert torch.equal(both.pooled, torch.cat([short.pooled, long.pooled]))
    again = both.select([0, 1]).trimmed()
    assert torch.equal(again.sequence, short.sequence)
    assert torch.equal(again.mask, short.mask)


def test_cat_refuses_what_cannot_be_joined() -> None:
    one = embeds([3], columns=3)
    wide = PromptEmbeds(torch.zeros(1, 3, 8), torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"\[\(6, 4\), \(8, 4\)\]"):
        PromptEmbeds.cat([one, wide])
    with pytest.raises(ValueError, match=r"at least one"):
        PromptEmbeds.cat([])


def test_key_mask_is_none_when_every_token_is_real() -> None:
    assert embeds([4, 4], columns=4).key_mask is None
    assert embeds([4, 4], columns=9).key_mask is not None
    assert embeds([4, 4], columns=9).trimmed().key_mask is None
    ragged = embeds([4, 2], columns=4)
    assert ragged.key_mask is ragged.mask


def test_to_moves_all_and_casts_the_states_only() -> None:
    moved = embeds([2, 3], columns=3).to("meta", torch.bfloat16)
    assert {t.device.type for t in (moved.sequence, moved.mask, moved.pooled)} == {"meta"}
    assert (moved.sequence.dtype, moved.mask.dtype, moved.pooled.dtype) == (
        torch.bfloat16,
        torch.bool,
        torch.bfloat16,
    )
    assert embeds([2], columns=2).to(dtype=torch.float64).sequence.device.type == "cpu"


# Encoding


def encode(texts: Any, parts: dict, **options: int) -> PromptEmbeds:  # noqa: ANN401 (also what is refused)
    return encode_prompts(
        texts, [text_encoder_of(parts[part.encoder], parts[part.tokenizer], **options) for part in TEXT_PARTS]
    )


def test_equals_the_originals_padded_and_masked_encoding(parts: dict) -> None:
    found = encode(PROMPTS, parts)
    ids = parts["tokenizer"](
        PROMPTS, padding="max_length", max_length=512, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        padded = parts["text_encoder"](**ids).last_hidden_state
    lengths = ids.attention_mask.sum(dim=1)
    assert found.mask.sum(dim=1).tolist() == lengths.tolist()
    assert found.sequence.shape == (3, int(lengths.max()), 24)
    assert found.pooled.shape == (3, 20)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found.sequence[row, :length], padded[row, :length], rtol=1e-5, atol=1e-5)


def test_a_batch_is_bit_equal_to_single_runs(parts: dict) -> None:
    batch = encode(PROMPTS, parts)
    for row, prompt in enumerate(PROMPTS):
        single = encode([prompt], parts)
        assert single.key_mask is None
        alone = batch.select([row]).trimmed()
        assert torch.equal(alone.sequence, single.sequence)
        assert torch.equal(alone.pooled, single.pooled)


def test_the_empty_prompt_is_the_end_token_alone(parts: dict) -> None:
    found = encode([""], parts)
    assert found.sequence.shape == (1, 1, 24)
    with torch.no_grad():
        end = parts["text_encoder"](
            input_ids=torch.tensor([[parts["tokenizer"].eos_token_id]])
        ).last_hidden_state
    assert torch.equal(found.sequence, end)
    assert not found.sequence.requires_grad


def test_nothing_is_kept_for_gradients(parts: dict) -> None:
    encoder = parts["text_encoder"].requires_grad_(True)
    try:
        assert not encode(["a red ball"], parts).sequence.requires_grad
    finally:
        encoder.requires_grad_(False)


def test_clip_pools_at_the_end_token(parts: dict) -> None:
    model, tokenizer = parts["text_encoder_2"], parts["tokenizer_2"]
    prompt = "a red ball over green grass"
    ids = tokenizer(
        prompt, return_tensors="pt"
    ).input_ids  # without padding: causal, so the end token ends it
    with torch.no_grad():
        states = model(input_ids=ids).last_hidden_state
        projected = model.text_projection(states)[0]
    found = encode([prompt], parts).pooled[0]
    torch.testing.assert_close(found, projected[-1], rtol=1e-5, atol=1e-5)
    others = (projected[:-1] - found).abs().amax(dim=1)
    assert others.min() > 0.01


def test_an_older_clip_config_pools_at_the_same_token(parts: dict, clip_copy: Path) -> None:
    edit_json(clip_copy / "config.json", lambda config: config["text_config"].update(eos_token_id=2))
    older = {**parts, "text_encoder_2": load_clip(clip_copy)}
    assert torch.equal(
        encode(PROMPTS, older).pooled,
        encode(PROMPTS, parts).pooled,
    )


def test_what_is_not_read_is_logged(parts: dict, caplog: pytest.LogCaptureFixture) -> None:
    prompt = WORDS * 3 + "and the rest of it"
    t5 = len(parts["tokenizer"](prompt).input_ids)
    clip = len(parts["tokenizer_2"](prompt, verbose=False).input_ids)
    assert t5 > 60
    assert clip > 77
    with caplog.at_level(logging.WARNING):
        found = encode([prompt], parts, max_tokens=60)
    assert found.sequence.shape[1] == 60
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith(f"T5 reads 60 tokens; the last {t5 - 60} tokens")
    assert messages[1].startswith(f"CLIP reads 77 tokens; the last {clip - 77} tokens")
    assert messages[1].endswith("are not read: and the rest of it")


def test_a_prompt_that_just_fits_is_not_warned_about(parts: dict, caplog: pytest.LogCaptureFixture) -> None:
    prompt = "a red ball"
    length = len(parts["tokenizer"](prompt).input_ids)
    with caplog.at_level(logging.WARNING):
        encode([prompt], parts, max_tokens=length)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        encode([prompt], parts, max_tokens=length - 1)
    assert len(caplog.records) == 1


def test_unusable_arguments_are_named(parts: dict) -> None:
    with pytest.raises(ValueError, match=r"got 'a red ball'"):
        encode("a red ball", parts)
    with pytest.raises(ValueError, match=r"got \[\]"):
        encode([], parts)
    with pytest.raises(ValueError, match=r"at least 1, got 0"):
        encode(["a"], parts, max_tokens=0)


def test_a_tokenizer_of_another_model_is_refused(parts: dict) -> None:
    swapped = {**parts, "tokenizer": parts["tokenizer_2"]}
    known = parts["text_encoder"].config.vocab_size
    with pytest.raises(ValueError, match=rf"T5 knows {known} tokens: is it the tokenizer of another model"):
        encode(["a red ball"], swapped)
    swapped = {**parts, "tokenizer_2": parts["tokenizer"]}
    with pytest.raises(ValueError, match=r"pool at token 661, but the tokenizer ends a text with 1"):
        encode(["a red ball"], swapped)


# Loading


def test_t5_is_the_encoder_of_the_whole_model(folders: tuple[Path, Path], parts: dict) -> None:
    whole = T5ForConditionalGeneration.from_pretrained(folders[0]).eval()
    ids = parts["tokenizer"]("a red ball", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = whole.get_encoder()(input_ids=ids).last_hidden_state
    found = encode(["a red ball"], parts)
    assert torch.equal(found.sequence, expected)
    encoder = parts["text_encoder"]
    assert type(encoder) is T5EncoderModel
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())


def test_clip_is_the_text_tower_of_the_whole_model(folders: tuple[Path, Path], parts: dict) -> None:
    raw = json.loads((folders[1] / "config.json").read_text())
    assert raw["projection_dim"] == 20
    assert (
        raw["text_config"]["projection_dim"] == 512
    )  # the trap: the library's text tower would believe this one
    whole = CLIPModel.from_pretrained(folders[1]).eval()
    ids = parts["tokenizer_2"](PROMPTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = whole.text_projection(whole.text_model(input_ids=ids).pooler_output)
    torch.testing.assert_close(encode(PROMPTS, parts).pooled, expected, rtol=1e-5, atol=1e-5)
    assert type(parts["text_encoder_2"]) is CLIPTextModelWithProjection


def test_what_transformers_saves_loads_again(parts: dict, tmp_path: Path) -> None:
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
    again = {
        "tokenizer": load_tokenizer(tmp_path / "tokenizer"),
        "text_encoder": load_t5(tmp_path / "text_encoder"),
        "tokenizer_2": load_tokenizer(tmp_path / "tokenizer_2"),
        "text_encoder_2": load_clip(tmp_path / "text_encoder_2"),
    }
    assert again["text_encoder_2"].config.projection_dim == 20
    first, second = (
        encode([*PROMPTS, ASCII], parts),
        encode([*PROMPTS, ASCII], again),
    )
    assert torch.equal(first.sequence, second.sequence)
    assert torch.equal(first.pooled, second.pooled)


@pytest.mark.parametrize("absent", ["shared.weight", "encoder.embed_tokens.weight"])
def test_either_name_of_the_t5_embedding_will_do(parts: dict, t5_copy: Path, absent: str) -> None:
    edit_weights(t5_copy, lambda weights: weights.pop(absent))
    found = encode(PROMPTS, {**parts, "text_encoder": load_t5(t5_copy)})
    assert torch.equal(found.sequence, encode(PROMPTS, parts).sequence)


def test_dtype_is_that_of_the_result(parts: dict, folders: tuple[Path, Path]) -> None:
    t5, clip = load_t5(folders[0], torch.bfloat16), load_clip(folders[1], torch.bfloat16)
    found = encode(PROMPTS, {**parts, "text_encoder": t5, "text_encoder_2": clip})
    assert (found.sequence.dtype, found.pooled.dtype) == (torch.bfloat16, torch.bfloat16)
    exact = encode(PROMPTS, parts)
    torch.testing.assert_close(found.sequence.float(), exact.sequence, rtol=0.05, atol=0.1)
    torch.testing.assert_close(found.pooled.float(), exact.pooled, rtol=0.05, atol=0.1)


def test_the_half_that_is_not_used_is_not_reported(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    level = transformers_logging.get_verbosity()
    load_t5(folders[0])
    load_clip(folders[1])
    assert not caplog.records
    assert transformers_logging.get_verbosity() == level
    CLIPTextModelWithProjection.from_pretrained(folders[1], ignore_mismatched_sizes=True)
    assert "vision_model" in caplog.text  # what it would have said


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_weights(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, path)


QUERY = "encoder.block.1.layer.0.SelfAttention.q.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(QUERY), rf"\(1 wrong\): {QUERY} is missing"),
        (lambda w: w.update({QUERY: torch.ones(3, 5)}), rf"{QUERY} has shape \(3, 5\), expected \(32, 24\)"),
        (
            lambda w: w.update({QUERY.replace("1", "2"): torch.ones(1)}),
            "block.2.layer.0.* has no place in the model",
        ),
        (lambda w: (w.clear(), w.update(a=torch.ones(1))), r"\(22 wrong\).*shared.weight is missing"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    t5_copy: Path, change: Callable[[dict], object], message: str
) -> None:
    edit_weights(t5_copy, change)
    with pytest.raises(ValueError, match=message):
        load_t5(t5_copy)


def test_a_clip_without_projection_is_refused(parts: dict, tmp_path: Path) -> None:
    parts["text_encoder_2"].text_model.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"text_projection.weight is missing"):
        load_clip(tmp_path / "clip")


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_not_run(t5_copy: Path, tmp_path: Path) -> None:
    trace = tmp_path / "was-run"
    torch.save({"shared.weight": Code(trace)}, t5_copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"hold code .*\(getattr\): refused"):
        load_t5(t5_copy)
    assert not trace.exists()
    (t5_copy / "pytorch_model.bin").write_bytes(pickle.dumps({"shared.weight": Code(trace)}, protocol=2))
    with pytest.raises(ValueError, match=r"hold code .*\(getattr\): refused"):
        load_t5(t5_copy)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Code(trace)))
    assert trace.exists()  # so the code would have left a trace


def test_damaged_files_are_named(t5_copy: Path, clip_copy: Path) -> None:
    weights = t5_copy / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=rf"cannot load the model in {t5_copy}"):
        load_t5(t5_copy)
    shard = next(clip_copy.glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"cannot load the model in {clip_copy}"):
        load_clip(clip_copy)
    edit_json(clip_copy / "config.json", lambda config: config["text_config"].update(hidden_size="wide"))
    with pytest.raises(ValueError, match=r"hidden_size.*'wide'"):
        load_clip(clip_copy)
    (clip_copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        load_clip(clip_copy)


def test_what_is_not_there_is_named(t5_copy: Path, clip_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        load_t5(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a file: give the folder"):
        load_t5(t5_copy / "pytorch_model.bin")
    (t5_copy / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights in .*model.safetensors"):
        load_t5(t5_copy)
    (t5_copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json in .*t5"):
        load_t5(t5_copy)
    shard = next(clip_copy.glob("model-00002-*"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"not there: {shard.name}"):
        load_clip(clip_copy)


def test_swapped_folders_are_recognised(t5_copy: Path, clip_copy: Path) -> None:
    with pytest.raises(
        ValueError, match=r"text_encoder must be a T5 encoder, .*'clip'. This is one for text_encoder_2"
    ):
        load_t5(clip_copy)
    with pytest.raises(
        ValueError, match=r"text_encoder_2 must be a CLIP encoder, .*'t5'. This is one for text_encoder:"
    ):
        load_clip(t5_copy)
    edit_json(t5_copy / "config.json", lambda config: config.update(model_type="bert"))
    with pytest.raises(ValueError, match=r"holds a model of type 'bert'\.$"):
        load_t5(t5_copy)


# Tokenizers


def test_t5_tokenizer_is_sentencepiece_and_the_end_token(folders: tuple[Path, Path], parts: dict) -> None:
    tokenizer = parts["tokenizer"]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folders[0] / "spiece.model"))
    for text in [*PROMPTS, ASCII, "  two  spaces\nand\ta tab ", "\ufb01ne \u2167 caf\u00e9", WORDS]:
        assert tokenizer(text).input_ids == [*pieces.encode(text), tokenizer.eos_token_id]
    assert tokenizer.unk_token_id not in tokenizer(ASCII + WORDS).input_ids
    assert len(tokenizer) < parts["text_encoder"].config.vocab_size


def test_clip_tokenizer_reads_every_character(parts: dict) -> None:
    tokenizer = parts["tokenizer_2"]
    # Its unknown token is the end token as well, which must stand at the end only.
    ids = tokenizer(f"{ASCII} \u732b {WORDS}").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1
    assert tokenizer("The Beach").input_ids == tokenizer("the beach").input_ids
    assert len(tokenizer("the beach").input_ids) == 4  # merged to two words, between start and end
    assert tokenizer.model_max_length == 77


def test_tokenizer_files_that_are_not_there_are_named(t5_copy: Path, clip_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (t5_copy / "spiece.model").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"expected tokenizer.json, or spiece.model, or vocab.json and merges"
    ):
        load_tokenizer(t5_copy)
    (clip_copy / "config.json").unlink()
    assert load_tokenizer(clip_copy)("the beach").input_ids[0] == 660
    (clip_copy / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer_config.json or config.json"):
        load_tokenizer(clip_copy)


def test_a_damaged_tokenizer_is_named(clip_copy: Path) -> None:
    (clip_copy / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{clip_copy}/vocab.json is not valid JSON"):
        load_tokenizer(clip_copy)


# The folders that all this stands on, and the cost of the import


def test_tiny_encoders_depend_on_their_arguments_only(folders: tuple[Path, Path], tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    t5, clip = write_text_encoders(tmp_path / "same")
    assert torch.equal(torch.random.get_rng_state(), before)
    for mine, theirs in zip((t5, clip), folders, strict=True):
        names = sorted(path.name for path in mine.iterdir())
        assert names == sorted(path.name for path in theirs.iterdir())
    assert torch.equal(load_t5(t5).shared.weight, load_t5(folders[0]).shared.weight)
    t5, clip = write_text_encoders(tmp_path / "other", caption_channels=40, pooled_projection_dim=36, seed=1)
    wide = load_t5(t5)
    assert wide.config.d_model == 40
    assert not torch.equal(wide.shared.weight[:, :24], load_t5(folders[0]).shared.weight)
    assert load_clip(clip).config.projection_dim == 36


def test_the_import_leaves_transformers_alone() -> None:
    code = "import sys, opensoraplan.models.text; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_begin_where_torch_lets_tensors_begin(tiny_model: Path) -> None:
    """Else results differ in the last bit from process to process."""
    for part in TEXT_PARTS:
        encoder = load_text_model(tiny_model / part.encoder, part, dtype=torch.float32, device="cpu")
        assert all(parameter.data_ptr() % 64 == 0 for parameter in encoder.parameters())


@pytest.mark.parametrize(("key", "value"), [("num_heads", -1), ("d_ff", 0), ("num_layers", 10**9)])
def test_sizes_of_t5_that_cannot_be(key: str, value: int, t5_copy: Path) -> None:
    change_config(t5_copy, key, value)
    with pytest.raises(ValueError, match=rf"config\.json: {key}: .*got {value}"):
        load_t5(t5_copy)


@pytest.mark.parametrize(("key", "value"), [("num_attention_heads", -1), ("layer_norm_eps", -1.0)])
def test_sizes_of_clip_that_cannot_be(key: str, value: float, clip_copy: Path) -> None:
    change_config(clip_copy, key, value)
    with pytest.raises(ValueError, match=rf"config\.json: {key}: .*got {value}"):
        load_clip(clip_copy)


def change_config(folder: Path, key: str, value: float) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    section = content["text_config"] if key in content.get("text_config", {}) else content
    section[key] = value
    path.write_text(json.dumps(content))
