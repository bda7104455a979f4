"""What is written in several places, and has to agree."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import torchlinop

ROOT = Path(__file__).parent.parent


def _read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def _notes(*version):
    return subprocess.run(
        [sys.executable, ROOT / ".ci" / "release_notes", *version],
        capture_output=True,
        text=True,
        check=False,
    )


def test_version():
    cited = re.search(r"^version: (.*)$", _read("CITATION.cff"), flags=re.MULTILINE)[1]
    assert cited == torchlinop.__version__
    assert _read("CITATION.cff").splitlines()[0].startswith("cff-version: ")


def test_notes_of_a_release():
    """The newest part of the changelog is this version's, or not released yet."""
    newest, *_ = re.findall(r"^## (\S+)", _read("CHANGELOG.md"), flags=re.MULTILINE)
    assert newest in ("Unreleased", torchlinop.__version__)
    text = _notes(newest).stdout
    assert text.strip()
    assert "\n## " not in text
    assert text.strip() in _read("CHANGELOG.md")
    missing = _notes("99.0")
    assert missing.returncode
    assert "no heading '## 99.0'" in missing.stderr


def test_one_version_of_ruff():
    hook = re.search(r"ruff-pre-commit\n +rev: v(\S+)", _read(".pre-commit-config.yaml"))[1]
    assert f"ruff=={hook}" in _read("tox.ini")


def test_versions_of_python():
    project = tomllib.loads(_read("pyproject.toml"))["project"]
    named = [c.split()[-1] for c in project["classifiers"] if "Python :: 3." in c]
    assert project["requires-python"] == f">={named[0]}"
    tox = _read("tox.ini")
    for version in named[1:]:  # the first one is that of continuous integration
        assert re.search(rf"py3\{{.*{version.split('.')[1]}.*\}}", tox)
    assert f"python{named[0]} -m venv" in _read(".ci/run")
