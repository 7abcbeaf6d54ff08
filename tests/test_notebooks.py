"""The committed notebooks are the whole, clean, current results of their sources, and the check can tell."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
import pytest

import notebooks

SOURCE = """\
# %% [markdown]
# # A small notebook

# %%
import os
import sys

SEED = 7
print(os.environ["SKY_NOTEBOOK"], sys.executable)

# %% [markdown]
# Half of one is 0.5, which is lower than one.

# %%
assert 1 / 2 == 0.5 < 1
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "notebooks" / "01_small.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> nbformat.NotebookNode:
    path = tmp_path_factory.mktemp("notebooks") / "01_small.py"
    path.write_text(SOURCE)
    return notebooks.execute(path, "full", limit=60)


@pytest.fixture
def result(source: Path, executed: nbformat.NotebookNode) -> Path:
    """The executed notebook beside its source, for a test to spoil."""
    nbformat.write(executed, source.with_suffix(".ipynb"))
    return source.with_suffix(".ipynb")


@pytest.mark.parametrize("path", notebooks.sources(), ids=lambda path: path.stem)
def test_a_committed_notebook_is_the_current_result_of_its_source(path: Path) -> None:
    assert list(notebooks.problems(path)) == []


def test_every_committed_result_has_a_source() -> None:
    results = {path.stem for path in notebooks.FOLDER.glob("*.ipynb")}
    assert results <= {path.stem for path in notebooks.sources()}


def test_a_fresh_result_has_no_problem_and_tells_where_it_comes_from(source: Path, result: Path) -> None:
    assert list(notebooks.problems(source)) == []
    stamp = nbformat.read(result, as_version=4).metadata["sky"]
    assert stamp["source_sha256"] == notebooks.source_hash(source)
    assert (stamp["mode"], stamp["seed"]) == ("full", 7)
    assert stamp["machine"]["cores"] >= 1
    assert {"python", "numpy"} <= set(stamp["versions"])


def test_the_kernel_is_this_interpreter_and_knows_its_mode(executed: nbformat.NotebookNode) -> None:
    assert executed.cells[1].outputs[0].text == f"full {sys.executable}\n"


def test_a_changed_source_makes_its_result_stale(source: Path, result: Path) -> None:
    source.write_text(SOURCE + "\n# %%\n1 + 1\n")
    assert any("stale" in line for line in notebooks.problems(source))


def spoil(result: Path, change: object) -> None:
    notebook = nbformat.read(result, as_version=4)
    change(notebook)  # type: ignore[operator]
    nbformat.write(notebook, result)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda nb: nb.metadata.pop("sky"), "stale"),
        (lambda nb: nb.metadata["sky"].update(mode="smoke"), "full run"),
        (lambda nb: nb.cells[3].update(execution_count=1), "once from top to bottom"),
        (lambda nb: nb.cells[3].update(execution_count=None), "once from top to bottom"),
        (lambda nb: nb.cells[2].update(source="Half of one is 0.4."), "edited by hand"),
        (
            lambda nb: nb.cells[3].outputs.append(
                nbformat.v4.new_output("error", ename="AssertionError", evalue="no", traceback=[])
            ),
            "ended in AssertionError: no",
        ),
    ],
    ids=["no stamp", "smoke", "repeated count", "not executed", "edited", "error"],
)
def test_a_spoiled_result_is_found(source: Path, result: Path, change: object, complaint: str) -> None:
    spoil(result, change)
    assert any(complaint in line for line in notebooks.problems(source))


def test_a_missing_result_is_found(source: Path) -> None:
    assert any("missing" in line for line in notebooks.problems(source))


def test_a_notebook_without_a_seed_is_found(source: Path, result: Path) -> None:
    source.write_text(SOURCE.replace("SEED = 7", "pass"))
    assert any("seed" in line for line in notebooks.problems(source))


@pytest.mark.parametrize(
    "prose", ["The loss falls to 1.88.", "RoPE is better.", "It is Faster than a lookup.", "Perplexity is lower here."]
)
def test_a_claim_needs_an_assertion_beside_it(source: Path, prose: str) -> None:
    source.write_text(f"# %% [markdown]\n# {prose}\n\n# %%\nSEED = 1\n")
    assert len(list(notebooks.claim_problems(source))) == 1


@pytest.mark.parametrize("code", ["assert loss < 2", "value = results('nanogpt')['loss']"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_claim_beside_an_assertion_or_a_recorded_result_stands(source: Path, code: str, order: str) -> None:
    cells = ["# %% [markdown]\n# The loss falls to 1.88.\n", f"# %%\n{code}\n"]
    source.write_text("\n".join(cells if order == "after" else reversed(cells)))
    assert list(notebooks.claim_problems(source)) == []


@pytest.mark.parametrize(
    "prose",
    [
        "See arXiv:1706.03762, section 3.2, and Figure 2.1.",
        "We divide by $\\sqrt{0.5}$ and set `dropout=0.1`.",
        "Follow [the paper](https://example.org/v1.2).",
        "Three heads, 64 wide.",
    ],
)
def test_a_citation_a_formula_or_code_is_no_claim(source: Path, prose: str) -> None:
    source.write_text(f"# %% [markdown]\n# {prose}\n")
    assert list(notebooks.claim_problems(source)) == []


def test_smoke_leaves_the_repository_as_it_was(source: Path) -> None:
    recorded = source.parents[1] / "benchmarks" / "results.json"
    recorded.parent.mkdir()
    recorded.write_text("{}")
    source.write_text(
        SOURCE + "\n# %%\nfrom pathlib import Path\n"
        "assert Path('../benchmarks/results.json').read_text() == '{}'\nPath('../benchmarks/new').touch()\n"
    )
    notebooks.smoke(source)
    assert sorted(path.name for path in source.parents[1].rglob("*") if path.is_file()) == [
        "01_small.py",
        "results.json",
    ]


def test_a_failing_cell_and_an_overrun_fail_the_command(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source.write_text("# %%\nSEED = 1\nraise RuntimeError('broken on purpose')\n")
    assert notebooks.main(["smoke"], source.parent) == 1
    assert "broken on purpose" in capsys.readouterr().err

    source.write_text("# %%\nimport time\n\nSEED = 1\ntime.sleep(30)\n")
    monkeypatch.setattr(notebooks.smoke, "__defaults__", (1.0,))
    assert notebooks.main(["smoke", "01"], source.parent) == 1
    assert "time" in capsys.readouterr().err.lower()
