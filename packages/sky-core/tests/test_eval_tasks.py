"""Last word, cloze, minimal pairs and domains: each item decided by hand from the model's own probabilities."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sky_core.components.evaluation import Cloze, Domains, LastWord, MinimalPairs
from sky_core.data.read import Corpus, Document
from sky_core.errors import DataError
from sky_core.eval.last_word import find_passages, word_ends
from sky_core.model.language_model import LanguageModel
from sky_core.tokenizer.byte import ByteTokenizer
from sky_core.tokenizer.char import CharTokenizer

BYTES = ByteTokenizer()


class Parrot(LanguageModel):
    """Expects the bytes of `text` over and over: after each byte, with probability `sure`, the one that follows it
    where it stands first in `text`."""

    def __init__(self, text: str, sure: float = 0.9) -> None:
        super().__init__()
        self.vocab_size, self.max_length, self.n_layer = BYTES.vocab_size, 256, 0
        table_VV = torch.full((self.vocab_size, self.vocab_size), (1 - sure) / (self.vocab_size - 1)).log()
        ids = BYTES.encode(text)
        for before, after in reversed(list(zip([BYTES.end_of_text, *ids], [*ids, BYTES.end_of_text], strict=True))):
            table_VV[before] = math.log((1 - sure) / (self.vocab_size - 1))
            table_VV[before, after] = math.log(sure)
        self.table = nn.Embedding.from_pretrained(table_VV)

    def hidden(self, tokens_BT: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.table(tokens_BT)

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return hidden_BTD

    def nll(self, hidden_BTD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(hidden_BTD.flatten(0, 1), targets_BT.flatten(), reduction="sum")

    def unused(self, *given: Any, **options: Any) -> Any:
        raise NotImplementedError

    new_cache = compile_layers = n_parameters = flops_per_token = unused


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """lines(item, item, ...): a JSON-lines file of these (strings as they are), by its name."""
    monkeypatch.chdir(tmp_path)

    def write(*items: Any, name: str = "items.jsonl") -> str:
        text = [item if isinstance(item, str) else json.dumps(item) for item in items]
        Path(name).write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
        return name

    return write


# ------------------------------------------------------------------------------------------------ last word


def test_the_last_word_is_right_when_it_is_all_that_would_be_written(lines: Callable[..., str]) -> None:
    path = lines({"text": "he said: abc"}, {"text": "he said: ab"}, {"text": "he said: xyz"})
    found = LastWord(path=path).build()(Parrot(": abc."), BYTES, None)
    assert found["last_word/items"] == 3
    assert found["last_word/accuracy"] == pytest.approx(1 / 3), "'abc' alone: after 'ab' the parrot goes on"
    assert found["last_word/accuracy_prefix"] == pytest.approx(2 / 3), "'ab' begins what would be written"
    assert found["last_word/accuracy_stderr"] == pytest.approx(1 / 3)


def test_a_words_probability_includes_its_end(lines: Callable[..., str]) -> None:
    letters = sum(chr(byte).isalnum() for byte in range(128))
    rest = 0.1 / (BYTES.vocab_size - 1)
    found = LastWord(path=lines({"text": "he said: abc"})).build()(Parrot(": abc."), BYTES, None)
    # After "c" comes "." with 0.9; every byte but the letters, the digits and those inside of a character ends a word.
    ends = 0.9 + rest * (128 - letters - 1 + 1)
    assert found["last_word/perplexity"] == pytest.approx(1 / (0.9**4 * ends), rel=1e-5)
    assert "last_word/perplexity_stderr" not in found, "one item has no standard error"


def test_tokens_that_go_on_with_a_word_begin_with_a_letter_or_inside_of_a_character() -> None:
    ends_V = word_ends(BYTES, BYTES.vocab_size + 3)
    assert [bool(ends_V[ord(character)]) for character in "aZ7 .'\n_"] == [False] * 3 + [True] * 5
    assert not ends_V[128:256].any()
    assert ends_V[256:].all(), "special tokens and ids that stand for nothing"


def test_passages_of_running_text_have_context(lines: Callable[..., str]) -> None:
    lines(
        "one two three four.\n\nfive six.\n\nseven (eight) 9\n\nnine 'ten eleven!'\n\n  \n\nunder_score x", name="a.txt"
    )
    found = find_passages(LastWord(path="a.txt", min_words=4))
    assert [(passage.context, passage.word) for passage in found] == [
        ("one two three four.\n\nfive ", "six"),
        ("seven (eight) 9\n\nnine 'ten ", "eleven"),
        ("nine 'ten eleven!'\n\n  \n\nunder_score ", "x"),
    ]


def test_lines_of_lambada_are_passages(lines: Callable[..., str]) -> None:
    path = lines(
        {"text": "A guardian.\n\n“Like a sign,” I said. The sign"}, {"text": "no end 7"}, {"text": "well-known d'oh"}
    )
    found = find_passages(LastWord(path=path))
    assert [passage.word for passage in found] == ["sign", "d'oh"]
    assert [passage.word for passage in find_passages(LastWord(path=path, word_in_context=True))] == ["sign"]
    assert found[0].where == "items.jsonl:1"


def test_a_sample_is_the_same_for_everybody(lines: Callable[..., str]) -> None:
    path = lines(*({"text": f"{number} times the word"} for number in range(50)))
    some = find_passages(LastWord(path=path, max_items=10))
    assert len(some) == 10
    assert some == find_passages(LastWord(path=path, max_items=10))
    more = find_passages(LastWord(path=path, max_items=20))
    assert set(some) < set(more)
    assert more == sorted(more, key=lambda passage: int(passage.context.split()[0])), "in the order of the file"


def test_text_without_a_passage_is_an_error(lines: Callable[..., str]) -> None:
    lines("too short", name="a.txt")
    with pytest.raises(DataError, match=r"a.txt: no passage .* at least 30 words before it; .* smaller min_words"):
        find_passages(LastWord(path="a.txt"))


def test_a_character_that_the_tokenizer_lacks_is_named_with_its_place(lines: Callable[..., str]) -> None:
    tokenizer = CharTokenizer.train(["abc "], byte_fallback=False)
    path = lines({"text": "a b"}, {"text": "a λ"})
    with pytest.raises(DataError, match=r"items.jsonl:2: .*λ"):
        LastWord(path=path).build()(Parrot("a"), tokenizer, None)
    path = lines({"context": "a", "choices": ["b", "λ"], "answer": 0})
    with pytest.raises(DataError, match=r"items.jsonl:1: .*λ"):
        Cloze(path=path).build()(Parrot("a"), tokenizer, None)


# ---------------------------------------------------------------------------------------------------- cloze


def test_the_most_likely_choice_is_taken(lines: Callable[..., str]) -> None:
    path = lines(
        {"context": "he said:", "choices": [" abc", " xyz"], "answer": 0},
        {"prompt": "he said:", "choices": ["xyz", "abc", "a"], "answer": 1},
        {"context": "", "choices": ["zzz", "zz"], "answer": 1},
    )
    found = Cloze(path=path).build()(Parrot(": abc."), BYTES, None)
    # 2: as a sum the shorter "a" is likelier, per byte "abc". 3: as a sum "zz"; per byte they are equal.
    assert found["cloze/accuracy"] == pytest.approx(2 / 3)
    assert found["cloze/accuracy_norm"] == pytest.approx(2 / 3)
    assert found["cloze/chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert found["cloze/accuracy_stderr"] == pytest.approx(1 / 3)
    assert found["cloze/items"] == 3


CLOZE = {"context": "one", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{'context': 1}", "not JSON: .* at column 2"),
        ("[1, 2]", "a JSON object is needed"),
        ({**CLOZE, "context": 3}, "'context' must be a string, it is 3"),
        ({"contxt": "one"}, "no key 'context' or 'prompt' .*'contxt'.*did you mean 'contxt'"),
        ({"context": "one", "choices": ["a", "b"]}, "no key 'answer'"),
        ({**CLOZE, "choices": []}, "'choices' must be a list of at least two strings"),
        ({**CLOZE, "choices": ["a", " "]}, "choice 1 is empty"),
        ({**CLOZE, "answer": 2}, "'answer' must be the index of a choice, 0 to 1, it is 2"),
        ({**CLOZE, "answer": -1}, "it is -1"),
        ({**CLOZE, "answer": True}, "it is True"),
        ({**CLOZE, "answer": "a"}, "it is 'a'"),
        ({**CLOZE, "choices": ["a", "b" * 300]}, "301 tokens are to be predicted .* the model's context is 256"),
    ],
)
def test_a_cloze_item_that_cannot_be_used_is_named_by_its_line(
    lines: Callable[..., str], line: Any, complaint: str
) -> None:
    path = lines(CLOZE, "", line)
    with pytest.raises(DataError, match=f"^items.jsonl:3: .*{complaint}"):
        Cloze(path=path).build()(Parrot("a"), BYTES, None)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("itens.jsonl", None, "itens.jsonl: no such file; did you mean 'items.jsonl'"),
        ("items.jsonl", b"\n\n", "items.jsonl: no items"),
        ("items.jsonl", b'{"context": "\xff"}\n', "items.jsonl:1: invalid UTF-8 at byte offset 13"),
        ("items.jsonl.gz", b"\x1f\x8b\x08\x00", "items.jsonl.gz: damaged or incomplete archive"),
        (".", None, r"\.: Is a directory"),
    ],
)
def test_a_file_that_cannot_be_read_is_said(
    lines: Callable[..., str], name: str, content: bytes | None, complaint: str
) -> None:
    lines(CLOZE)
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        Cloze(path=name).build()(Parrot("a"), BYTES, None)


# --------------------------------------------------------------------------------------------- minimal pairs


def test_the_likelier_sentence_is_preferred(lines: Callable[..., str]) -> None:
    path = lines(
        {"good": "abab", "bad": "aabb", "category": "order"},
        {"good": "aa", "bad": "ab", "category": "order"},
        {"sentence_good": "ab", "sentence_bad": "ba", "linguistics_term": "start"},
        {"good": "abab", "bad": "abbb"},
    )
    found = MinimalPairs(path=path).build()(Parrot("aba"), BYTES, None)
    assert found["minimal_pairs/accuracy"] == 0.75
    assert found["minimal_pairs/items"] == 4
    assert found["minimal_pairs/order/accuracy"] == 0.5
    assert found["minimal_pairs/order/accuracy_stderr"] == pytest.approx(0.5)
    assert found["minimal_pairs/start/accuracy"] == 1, "the first character counts as well"
    assert found["minimal_pairs/start/items"] == 1


def test_the_probability_of_a_sentence_is_not_divided_by_its_length(lines: Callable[..., str]) -> None:
    path = lines({"good": "z", "bad": "ab" * 50})
    # one byte at 0.1 / 256 costs 7.8 nats, a hundred at 0.9 cost 10.5
    assert MinimalPairs(path=path).build()(Parrot("aba"), BYTES, None)["minimal_pairs/accuracy"] == 1


def test_sentences_may_follow_a_text(lines: Callable[..., str]) -> None:
    path = lines({"good": "b", "bad": "a"})
    assert MinimalPairs(path=path).build()(Parrot("abcb"), BYTES, None)["minimal_pairs/accuracy"] == 0
    assert MinimalPairs(path=path, prefix="a").build()(Parrot("abcb"), BYTES, None)["minimal_pairs/accuracy"] == 1
    bare = ByteTokenizer(end_of_text=False)
    with pytest.raises(DataError, match=r"items.jsonl:1: the tokenizer has no end-of-text token.*set prefix"):
        MinimalPairs(path=path).build()(Parrot("ab"), bare, None)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"good": "a"}, "no key 'bad' or 'sentence_bad'"),
        ({"good": "a", "bad": "a"}, "both sentences are the same"),
        ({"good": "", "bad": "a"}, "a sentence is empty"),
        ({"good": "a", "bad": "b", "category": 3}, "'category' must be a string"),
        ({"good": "a", "bad": "b" * 300}, "300 tokens are to be predicted"),
    ],
)
def test_a_pair_that_cannot_be_used_is_named_by_its_line(lines: Callable[..., str], line: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=f"^items.jsonl:1: {complaint}"):
        MinimalPairs(path=lines(line)).build()(Parrot("a"), BYTES, None)


# --------------------------------------------------------------------------------------------------- domains


def test_each_domain_has_its_own_bits_per_byte(lines: Callable[..., str]) -> None:
    lines("abcabcabc", name="known.txt")
    lines("zzzzzzzzz", name="other.md")
    task = Domains(path={"letters": "known.txt", "rest": ["other.md"]})
    found = task.build()(Parrot("abca"), BYTES, None)
    assert found["domains/letters/bytes"] == 10
    # Nine letters as expected, and a line end for a letter: bits of 9 x 0.9 and 1 x 0.1 / 256
    right, wrong = -math.log2(0.9), -math.log2(0.1 / 256)
    assert found["domains/letters/bits_per_byte"] == pytest.approx((9 * right + wrong) / 10, rel=1e-5)
    assert found["domains/rest/bits_per_byte"] > 5


def test_json_lines_may_name_their_domain(lines: Callable[..., str]) -> None:
    path = lines({"text": "ab", "domain": "web"}, {"text": "abab"}, {"text": "abababab", "domain": "web"})
    found = Domains(path=path, name="mine").build()(Parrot("aba"), BYTES, None)
    assert {name: value for name, value in found.items() if "bytes" in name} == {
        "mine/web/bytes": 10,
        "mine/items/bytes": 4,
    }
    assert found["mine/web/sequences"] == 2
    assert "mine/web/bits_per_byte_stderr" in found


def test_no_more_than_asked_for_is_read(lines: Callable[..., str]) -> None:
    lines("é" * 20, name="a.txt")
    assert Domains(path="a.txt", max_bytes=7).build()(Parrot("a"), BYTES, None)["domains/a/bytes"] == 6


def test_a_named_domain_is_read_no_further_than_its_bytes(
    lines: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Document] = []

    class Counted(Corpus):
        def __iter__(self) -> Iterator[Document]:
            for document in super().__iter__():
                read.append(document)
                yield document

    monkeypatch.setattr("sky_core.eval.domains.Corpus", Counted)
    path = lines(*({"text": "aaaa"} for _ in range(100)))
    found = Domains(path={"letters": path}, max_bytes=10).build()(Parrot("a"), BYTES, None)
    assert found["domains/letters/bytes"] == 10
    assert len(read) == 3


def test_windows_predict_every_byte_once(lines: Callable[..., str]) -> None:
    lines("ab" * 400, name="a.txt")
    model = Parrot("aba")
    for batch_tokens in (1, 600, 10_000):
        found = Domains(path="a.txt", batch_tokens=batch_tokens).build()(model, BYTES, None)
        assert (found["domains/a/bytes"], found["domains/a/sequences"]) == (801, 4)


def test_a_domain_without_text_is_an_error(lines: Callable[..., str]) -> None:
    lines("x", name="a.txt")
    Path("a.txt").write_text("x")
    with pytest.raises(DataError, match="domain 'a' holds no token to predict"):
        Domains(path="a.txt").build()(Parrot("a"), ByteTokenizer(end_of_text=False), None)
