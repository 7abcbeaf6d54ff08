"""Preparing: the same bytes however it is done, splits that stay put, and nothing half-made left behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sky_core.components.tokenizer import Bpe, Byte, Char
from sky_core.data import prepare as prepare_module
from sky_core.data.folder import locked
from sky_core.data.prepare import in_validation, prepare
from sky_core.data.prepared import META, Meta, map_file
from sky_core.data.read import Corpus, Document
from sky_core.errors import DataError, SkyError
from sky_core.tokenizer.byte import ByteTokenizer
from sky_core.tokenizer.files import load_tokenizer

BYTE = Byte().train(())


def corpus(n: int = 40) -> list[Document]:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs\nand", "naïve", "cafés", "😀", ""]
    rng = np.random.default_rng(0)
    return [Document(f"d{i}", " ".join(rng.choice(words, 30 + i)), f"memory:{i}") for i in range(n)]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def decoded(folder: Path, split: str) -> list[str]:
    """The documents of a split, read with nothing but numpy and the tokenizer."""
    meta, tokenizer = Meta.read(folder), load_tokenizer(folder / "tokenizer")
    tokens = np.fromfile(folder / f"{split}.bin", meta.dtype)
    ends = np.fromfile(folder / f"{split}.idx", "<u8").astype(int).tolist()
    return [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


class Prefixed(ByteTokenizer):
    """Bytes of a model that saw every text behind a token of its own."""

    @property
    def prompt_prefix(self) -> tuple[int, ...]:
        return (self.vocab_size - 1,)


@pytest.mark.parametrize("split", ["document", "position"])
def test_a_document_begins_as_prompts_do(tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "PIECE", 50)  # a document is encoded in several pieces, the prefix comes once
    documents, tokenizer = corpus(10), Prefixed(special=["<|bos|>"])
    meta = prepare(documents, tmp_path / "out", tokenizer, validation=0.3, split=split)
    for name, facts in meta.splits.items():
        tokens = np.fromfile(tmp_path / "out" / f"{name}.bin", meta.dtype).tolist()
        begins = [0, *[i + 1 for i, token in enumerate(tokens[:-1]) if token == tokenizer.end_of_text]]
        found = [i for i, token in enumerate(tokens) if token == tokenizer.vocab_size - 1]
        assert found == begins[-len(found) :]
        assert len(found) in ({facts.documents, facts.documents - 1} if split == "position" else {facts.documents})


def test_every_document_comes_back_from_the_split_it_belongs_to(tmp_path: Path) -> None:
    documents = corpus()
    meta = prepare(documents, tmp_path / "out", BYTE, validation=0.3)
    for split, wanted in (("train", False), ("validation", True)):
        texts = [document.text for document in documents if in_validation(document.id, 0.3) is wanted]
        assert decoded(tmp_path / "out", split) == texts
        assert meta.splits[split].documents == len(texts)
        assert meta.splits[split].bytes == sum(len(text.encode()) for text in texts)
        assert meta.splits[split].tokens == meta.splits[split].bytes + len(texts)  # one end of text each
    assert Meta.read(tmp_path / "out") == meta


def test_documents_end_with_the_end_of_text_if_the_tokenizer_has_one(tmp_path: Path) -> None:
    for name, end in (("with", True), ("without", False)):
        prepare(corpus(), tmp_path / name, Byte(end_of_text=end))
        tokens = np.fromfile(tmp_path / name / "train.bin", "<u2")
        ends = np.fromfile(tmp_path / name / "train.idx", "<u8")
        assert ((tokens[ends.astype(int) - 1] == 256).all()) is np.bool_(end)
        assert (tokens == 256).sum() == (len(ends) if end else 0)


def test_numbers_are_as_wide_as_the_vocabulary_needs(tmp_path: Path) -> None:
    assert prepare(corpus(), tmp_path / "small", BYTE).dtype == "uint16"
    characters = "".join(chr(0x20000 + i) for i in range(66_000)) + "abc"
    big = prepare([Document("a", characters, "m")], tmp_path / "big", Char(byte_fallback=False), validation=0.0)
    assert big.dtype == "uint32"
    assert decoded(tmp_path / "big", "train") == [characters]


@pytest.mark.parametrize("format", ["tokens", "shards"])
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "PIECE", 300)  # many tasks
    for workers in (1, 2):
        prepare(corpus(), tmp_path / str(workers), Bpe(vocab_size=300), workers=workers, format=format)  # type: ignore[arg-type]
    assert content(tmp_path / "1") == content(tmp_path / "2")


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_cutting_a_long_document_changes_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    lines = [" ".join(document.text.split()) for document in corpus()]
    # Only every sixth line ends in a word, one line end, and a word.
    shaped = [f"{'   ' * (i % 2)}{line}{'  ' * (i % 3 == 2)}\n{chr(10) * (i % 3 == 1)}" for i, line in enumerate(lines)]
    text = "".join(shaped)
    tokenizer = Bpe(vocab_size=310, pattern=pattern).train([text])
    for piece in (1 << 20, 2500):
        monkeypatch.setattr(prepare_module, "PIECE", piece)
        prepare([Document("a", text, "m")], tmp_path / str(piece), tokenizer, validation=0.0)
    assert content(tmp_path / "2500") == content(tmp_path / str(1 << 20))


def test_a_tokenizer_learns_from_training_documents_only(tmp_path: Path) -> None:
    documents = [Document(f"d{i}", chr(0x4E00 + i) * 3, "m") for i in range(60)]
    prepare(documents, tmp_path / "out", Char(), validation=0.5)
    known = set(load_tokenizer(tmp_path / "out" / "tokenizer").as_dict()["characters"])
    assert known == {document.text[0] for document in documents if not in_validation(document.id, 0.5)}


def test_text_that_a_tokenizer_cannot_write_names_the_document(tmp_path: Path) -> None:
    tokenizer = Char(byte_fallback=False).train(["abc"])
    with pytest.raises(DataError, match="memory:0: character 0 of the text"):
        prepare(corpus(), tmp_path / "out", tokenizer)
    assert list(tmp_path.iterdir()) == []


@given(fraction=st.floats(0.05, 0.5), seed=st.integers(0, 1000))
def test_a_larger_fraction_keeps_what_validated_before(fraction: float, seed: int) -> None:
    ids = [f"{seed}/{i}" for i in range(200)]
    small = {i for i in ids if in_validation(i, fraction)}
    assert small <= {i for i in ids if in_validation(i, fraction * 1.5)}


def test_the_fraction_is_met_and_zero_is_zero() -> None:
    ids = [f"document-{i}" for i in range(20_000)]
    assert abs(sum(in_validation(i, 0.1) for i in ids) - 2000) < 212  # 5 binomial deviations
    assert not any(in_validation(i, 0.0) for i in ids)


def test_the_split_is_stable_when_documents_are_added(tmp_path: Path) -> None:
    some = corpus(30)
    more = [Document(f"new{i}", "added later", "m") for i in range(30)]
    prepare(some, tmp_path / "some", BYTE, validation=0.3)
    prepare([*more[:15], *some, *more[15:]], tmp_path / "more", BYTE, validation=0.3)
    for split in ("train", "validation"):
        kept = [text for text in decoded(tmp_path / "more", split) if text != "added later"]
        assert kept == decoded(tmp_path / "some", split)


def test_position_split_cuts_the_joined_characters(tmp_path: Path) -> None:
    documents = corpus()
    text = "".join(document.text for document in documents)
    meta = prepare(documents, tmp_path / "out", BYTE, split="position", validation=0.25)
    border = int(len(text) * 0.75)
    assert "".join(decoded(tmp_path / "out", "train")) == text[:border]
    assert "".join(decoded(tmp_path / "out", "validation")) == text[border:]
    train = np.fromfile(tmp_path / "out" / "train.bin", "<u2")
    assert train[-1] != 256, "a document that goes on in the other split has not ended"
    assert sum(split.documents for split in meta.splits.values()) == len(documents) + 1


def test_tinyshakespeare_is_split_as_nanogpt_splits_it(tmp_path: Path) -> None:
    data = os.environ.get("SKY_DATA")
    if not data:
        pytest.skip("SKY_DATA is not set")
    source = Path(data) / "tinyshakespeare" / "input.txt"
    tokenizer = Char(byte_fallback=False, end_of_text=False)
    meta = prepare(Corpus([source]), tmp_path / "out", tokenizer, split="position")
    assert (meta.splits["train"].tokens, meta.splits["validation"].tokens) == (1_003_854, 111_540)
    assert meta.tokenizer.vocab_size == 65
    text = source.read_text()
    ids = {character: i for i, character in enumerate(sorted(set(text)))}  # nanoGPT's stoi
    ours = np.concatenate([np.fromfile(tmp_path / "out" / f"{split}.bin", "<u2") for split in ("train", "validation")])
    assert np.array_equal(ours, np.array([ids[character] for character in text]))


@pytest.mark.parametrize("split", ["document", "position"])
def test_a_split_without_text_says_what_to_change(tmp_path: Path, split: str) -> None:
    advice = r"in a run file, split: position.*in a run file, validation:" if split == "document" else "give more text"
    with pytest.raises(DataError, match=rf"the (train|validation) split is empty: 1 document, .*{advice}"):
        prepare([Document("d", "x", "m")], tmp_path / "out", BYTE, split=split, validation=0.5)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_generator_of_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a list or a Corpus, not a generator"):
        prepare(iter(corpus()), tmp_path / "out", BYTE)


def test_a_corpus_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    class Growing:
        n = 3

        def __iter__(self) -> Iterator[Document]:
            self.n += 1
            return iter(corpus(self.n))

    with pytest.raises(DataError, match="the corpus changed while it was read"):
        prepare(Growing(), tmp_path / "out", BYTE, split="position")


# What is on disk


def test_a_prepared_folder_is_only_replaced_by_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(corpus(10), out, BYTE)
    before = content(out)
    with pytest.raises(DataError, match="prepared already; give another folder, or --force"):
        prepare(corpus(20), out, BYTE)
    assert content(out) == before
    assert prepare(corpus(20), out, BYTE, reuse=True) == Meta.read(out)
    assert content(out) == before
    prepare(corpus(20), out, BYTE, force=True)
    assert content(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="a folder with other things in it"):
        prepare(corpus(), tmp_path, BYTE, force=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_leaves_the_old_folder_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    prepare(corpus(10), out, BYTE)
    before = content(out)

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_module, "write_atomic", full)
    with pytest.raises(SkyError, match="cannot be written: No space left on device; nothing was left behind"):
        prepare(corpus(20), out, BYTE, force=True)
    assert content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_processes_never_write_one_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "out", wait=False), pytest.raises(DataError, match="another process is writing it"):
        prepare(corpus(), tmp_path / "out", BYTE)


KILLED = """
import sys, time
from pathlib import Path
from sky_core.components.tokenizer import Byte
from sky_core.data import prepare as module
from sky_core.data.read import Corpus

if __name__ == "__main__":
    def progress(stage, documents, characters):
        if documents == 20:
            print("halfway", flush=True)
            time.sleep(60)
    module.PIECE = 500
    module.prepare(Corpus([sys.argv[1]]), Path(sys.argv[2]), Byte(), workers=int(sys.argv[3]), progress=progress)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for surviving workers in /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_leaves_nothing_that_looks_complete_and_a_second_run_gives_the_same_bytes(
    tmp_path: Path, workers: int
) -> None:
    texts, out, script = tmp_path / "texts.jsonl", tmp_path / "data" / "out", tmp_path / "killed.py"
    texts.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in corpus()))
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(texts), str(out), str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"halfway\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert list(out.parent.glob("*/meta.json")) == []
    deadline = time.monotonic() + 30
    while group_is_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not group_is_alive(process.pid), "workers outlive a killed parent"

    prepare(Corpus([texts]), out, Byte())
    prepare(Corpus([texts]), tmp_path / "undisturbed", Byte())
    assert content(out) == content(tmp_path / "undisturbed")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def group_is_alive(group: int) -> bool:
    """Whether a process of the group still runs (zombies, which only wait to be reaped, do not)."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = status.read_text().rpartition(") ")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(process_group) == group and state != "Z":
            return True
    return False


# Meta


def test_a_damaged_or_foreign_meta_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="no such folder; make it with: sky data prepare"):
        Meta.read(out)
    prepare(corpus(), out, BYTE)
    path = out / META
    good = json.loads(path.read_text())
    for bad, message in [
        ("{", "damaged"),
        (json.dumps(good | {"dtype": "int8"}), r"damaged \(dtype: "),
        (json.dumps(good | {"version": 2}), "format 2, this sky-core reads up to 1; upgrade"),
        ("[]", "damaged"),
    ]:
        path.write_text(bad)
        with pytest.raises(DataError, match=message):
            Meta.read(out)
    path.unlink()
    with pytest.raises(DataError, match=r"not prepared \(no meta\.json\)"):
        Meta.read(out)


def test_mapping_an_empty_file_gives_no_numbers(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    assert len(map_file(tmp_path / "x", "uint64")) == 0
