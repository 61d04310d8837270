from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from etcbench.compressor import Budget, ModelSpec

ROOT = Path(__file__).parents[1]
SPEC = ModelSpec("tiny", "llava", 4, 8, 2, 2, 4, 16, 36, (6, 6), 3, 8, 2, True)


def example(page: str, name: str) -> Any:
    """Run the Python block of a page and return what it registers."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)
    # dataclasses look their module up by name
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(compile(block, page, "exec"), namespace)
    return namespace[name]


def test_the_method_of_the_docs_works() -> None:
    method = example("add-a-method.md", "METHOD").from_budget(Budget(4), SPEC, skip=2)
    selection = method.select_embeds(torch.randn(2, 36, 8), torch.tensor([[6, 6]] * 2), ["a", "b"])
    assert selection.index.tolist() == [[2, 3, 4, 5]] * 2
    assert method.schedule(36, 4) == [4] * 4


def test_the_benchmark_of_the_docs_works() -> None:
    task = example("add-a-benchmark.md", "TASK")()
    rows = [
        {"id": f"p/{number}", "question": "How many apples?", "answer": str(number)}
        for number in range(2, 8)
    ]
    docs = [task.doc(row, number) for number, row in enumerate(rows)]
    assert task.prompt(docs[0]).endswith("single word or phrase.")
    report = task.score([(doc, "3." if doc.gold < 5 else "many") for doc in docs])
    assert report.value == pytest.approx(100 / 6)
    assert report.n_unparsed == 3
    assert set(report.breakdown["size"]) == {"few", "many"}


def test_the_readme_has_the_two_set_up_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "\npip install -e . && etcbench run --method etc --tokens 1 --task mme\n" in text
    assert '\npip install -e ".[test]" && pytest\n' in text


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_every_dependency_is_explained() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    declared = re.search(r"\ndependencies = \[(.*?)\]", project, re.S)
    assert declared is not None
    explained = (ROOT / "docs" / "dependencies.md").read_text()
    for name in re.findall(r'"([\w-]+)', declared[1]):
        assert f"| {name} |" in explained, name
