"""Every snippet of every page runs, in the order of the page, and prints what it says."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests import standin
from tests.docs.setups import SETUPS

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^(`{3,}|:{3,})(\{[\w-]+\}|\w*) *(.*)$")
LANGUAGES = {"python", "pycon", "{literalinclude}"}
#: what shells and compilers read, and directives of MyST whose content is searched as well
OTHERS = {"", "sh", "text"}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Snippet(NamedTuple):
    """A piece of a page that runs."""

    language: str
    code: str
    line: int


def snippets(path: Path) -> Iterator[Snippet]:
    """Fences of Python, included files, and table cells below a header ``snippet``."""
    fence, table = None, False
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        match = FENCE.match(line)
        if fence is not None and fence[0] in LANGUAGES:
            if line == fence[3]:
                yield Snippet(fence[0], "\n".join(fence[1]) + "\n", fence[2])
                fence = None
            else:
                fence[1].append(line)
        elif match and match[2] == "{literalinclude}":
            code = (path.parent / match[3]).read_text()
            yield Snippet("python", code, number)
        elif match and match[2] in LANGUAGES:
            fence = match[2], [], number, match[1]
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if table and cells[-1].startswith("`"):
                yield Snippet("python", cells[-1].strip("`"), number)
            table = table or cells[-1] == "snippet"
        else:
            table = False


def pages() -> list[Path]:
    found = [p for p in sorted(DOCS.rglob("*.md")) if "_build" not in p.parts]
    return [page for page in found if any(snippets(page))]


def run(snippet: Snippet, scope: dict, name: str) -> None:
    if snippet.language == "pycon":
        test = doctest.DocTestParser().get_doctest(
            snippet.code, {}, name, name, snippet.line
        )
        test.globs = scope
        report = io.StringIO()
        runner = doctest.DocTestRunner(optionflags=FLAGS)
        failed, _ = runner.run(test, out=report.write, clear_globs=False)
        assert not failed, report.getvalue()
    else:
        exec(compile(snippet.code, f"{name}:{snippet.line}", "exec"), scope)


# SciPy 1.11 announces a new default of atol
@pytest.mark.filterwarnings("ignore:.*called without specifying `atol`:DeprecationWarning")
# CuPy's gmres leaves rcond to numpy.linalg.lstsq, about which NumPy 1 warns
@pytest.mark.filterwarnings("ignore:`rcond` parameter will change:FutureWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_page(page, tmp_path, monkeypatch, capsys):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    scope: dict = {"__name__": page.stem}
    exec(SETUPS.get(page.name, "") if page.parent == DOCS else "", scope)
    for snippet in snippets(page):
        with_cupy = re.search(r"\bcu(py|sp)", snippet.code)
        if with_cupy and standin.wheel() is None:
            pytest.skip("CuPy's files are not installed; see tests/standin/__init__.py")
        with standin.installed() if with_cupy else contextlib.nullcontext():
            run(snippet, scope, page.name)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    plt.close("all")


def test_every_fence_has_a_known_language():
    """A misspelt language would hide a snippet from the tests."""
    for page in DOCS.rglob("*.md"):
        for line in page.read_text().splitlines():
            match = FENCE.match(line)
            if match and not match[2].startswith("{"):
                assert match[2] in LANGUAGES | OTHERS, f"{page}: {line}"


#: of SciPy's sparse.linalg, what takes an operator; and of CuPy's
SCIPY = """eigsh eigs lobpcg svds cg minres gmres lgmres gcrotmk bicgstab cgs tfqmr bicg qmr
lsmr lsqr expm_multiply funm_multiply_krylov onenormest"""
CUPYX = "eigsh lobpcg svds cg minres gmres cgs bicgstab lsmr"


@pytest.mark.parametrize(("names", "module"), [(SCIPY, "sla"), (CUPYX, "cusp")])
def test_every_solver_has_a_row_with_a_snippet(names, module):
    page = DOCS / "guide" / "which_solver.md"
    rows = [s.code for s in snippets(page) if "\n" not in s.code]
    called = {name for row in rows for name in re.findall(rf"\b{module}\.(\w+)\(", row)}
    assert called == set(names.split())
