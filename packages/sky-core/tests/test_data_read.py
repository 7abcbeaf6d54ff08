"""Reading documents: what is found, in which order, and what each kind of bad input says."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import tarfile
from pathlib import Path

import pytest

from sky_core.data import read
from sky_core.data.read import Corpus, Document, read_documents
from sky_core.errors import DataError


def texts(*paths: Path | str) -> list[str]:
    return [document.text for document in read_documents(paths)]


def test_a_folder_is_read_in_sorted_order_with_names_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.py").write_text("three = 3\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    documents = list(Corpus([tmp_path]))
    assert [(document.id, document.text) for document in documents] == [
        ("a.txt", "one"),
        ("b/two.md", "two"),
        ("c.py", "three = 3\n"),
    ]
    assert documents[0].source == str(tmp_path / "a.txt")


def test_json_lines_carry_id_source_and_domain(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two", "id": 7, "source": "s", "domain": "d", "more": 1}\n')
    assert list(Corpus([path])) == [
        Document("x.jsonl:1", "one", f"{path}:1"),
        Document("7", "two", "s", "d"),
    ]


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_a_compressed_file_is_read_as_what_it_holds(tmp_path: Path, ending: str) -> None:
    content = b'{"text": "caf\xc3\xa9"}\n' * 3
    (tmp_path / f"a.jsonl{ending}").write_bytes(compress(content, ending))
    assert texts(tmp_path) == ["café"] * 3


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_a_compressed_file_that_was_cut_short_is_an_error(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.txt{ending}"
    content = compress(os.urandom(5000).hex().encode(), ending)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"a\.txt\{ending}: damaged or incomplete archive"):
        texts(path)


def test_zstd_files_may_hold_several_frames(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").write_bytes(compress(b"one ", ".zst") + compress(b"two", ".zst"))
    assert texts(tmp_path) == ["one two"]


def test_without_zstandard_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.zst").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(DataError, match=r"pip install 'sky-core\[zstd\]'"):
        texts(tmp_path)


def test_tar_members_are_documents_with_their_facts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in [("0.txt", b"one"), ("0.json", b'{"id": "first"}'), ("1.txt", b"two"), ("2.png", b"\0")]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert [(document.id, document.text) for document in Corpus([tmp_path])] == [("first", "one"), ("a.tar:1", "two")]


def test_pythons_own_corpus_holds_english_and_code_and_is_always_the_same() -> None:
    documents = list(Corpus(["python:"]))
    assert documents == list(Corpus(["python:"]))
    assert {document.domain for document in documents if document.id.startswith("topics/")} == {"documentation"}
    assert any(document.id == "argparse.py" and "ArgumentParser" in document.text for document in documents)
    assert not any("/test/" in document.id or "site-packages" in document.id for document in documents)
    assert sum(len(document.text) for document in documents) > 3_000_000


def test_a_named_file_is_text_whatever_its_ending(tmp_path: Path) -> None:
    (tmp_path / "train.en").write_text("hello")
    assert texts(tmp_path / "train.en") == ["hello"]


def test_line_ends_survive_and_a_byte_order_mark_does_not(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\rthree\n".encode())
    assert texts(tmp_path) == ["one\r\ntwo\rthree\n"]


def test_characters_across_chunks_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_CHUNK", 3)
    text = "äöü€😀 " * 5
    (tmp_path / "a.txt").write_text(text)
    assert texts(tmp_path) == [text]


def test_a_long_text_is_cut_after_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "LONGEST", 10)
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nfour\n" + "x" * 25)
    documents = list(Corpus([tmp_path]))
    assert "".join(document.text for document in documents) == "one\ntwo\nthree\nfour\n" + "x" * 25
    assert max(len(document.text) for document in documents) <= 10
    assert [document.id for document in documents][:2] == ["a.txt:part1", "a.txt:part2"]
    assert documents[0].text == "one\ntwo\n"


def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " \\n"}\n{"text": "x"}\n')
    corpus = Corpus([tmp_path])
    assert len(list(corpus)) == 1
    assert corpus.skipped == 2


def test_the_digest_follows_content_and_names_not_the_place(tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_text("same")
    digest = Corpus([tmp_path / "one"]).digest()
    assert digest == Corpus([tmp_path / "two"]).digest()
    (tmp_path / "two" / "a.txt").write_text("other")
    assert digest != Corpus([tmp_path / "two"]).digest()


def test_a_corpus_without_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the corpus is empty: no file below it ends in one of"):
        texts(tmp_path)
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(DataError, match="the corpus is empty: 1 empty documents"):
        texts(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\0def", r"a\.txt: a binary file \(NUL byte at offset 3\)"),
        ("a.txt", b"ab\xffcd", r"a\.txt: invalid UTF-8 at byte offset 2"),
        ("a.txt", "abc€".encode()[:-1], r"a\.txt: invalid UTF-8 at byte offset 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON: .* at column"),
        ("a.jsonl", b'{"Text": "x"}\n', r"a\.jsonl:1: no key 'text' \(it has 'Text'\); did you mean 'Text'"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: 'text' must be a string, it is 5"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1: a JSON object is needed"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: invalid UTF-8 at byte offset 10"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: 'text' holds half a surrogate pair at character 0"),
        ("a.jsonl", b"\0\n", r"a\.jsonl:1: a binary file"),
        ("a.tar", b"no tar at all", r"a\.tar: damaged or incomplete archive"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz: Not a gzipped file"),
    ],
)
def test_bad_content_is_one_line_that_says_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        texts(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_byte_offset_counts_from_the_start_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_CHUNK", 4)
    (tmp_path / "a.txt").write_bytes("abc€abc".encode() + b"\xff")
    with pytest.raises(DataError, match="byte offset 9"):
        texts(tmp_path)


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    documents = iter(Corpus([tmp_path]))
    next(documents)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataError, match=r"b\.txt: the file vanished while the corpus was read"):
        next(documents)


def test_a_path_that_is_not_there_suggests_the_closest(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("x")
    with pytest.raises(DataError, match=r"no such file or folder; did you mean 'shakespeare\.txt'\?"):
        Corpus([tmp_path / "shakespear.txt"])


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_an_error_not_a_gap(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="Permission denied"):
        Corpus([tmp_path])


def compress(content: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(content)
    if ending == ".xz":
        return lzma.compress(content)
    zstandard = pytest.importorskip("zstandard", reason="the extra 'zstd' is not installed")
    return bytes(zstandard.ZstdCompressor().compress(content))


def test_minipile_reads_whole() -> None:
    data = os.environ.get("SKY_DATA")
    if not data:
        pytest.skip("SKY_DATA is not set")
    document = next(read_documents([Path(data) / "minipile" / "speech.jsonl.xz"]))
    assert document.domain == "speech"
    assert json.dumps(document.text)
