"""The snippets of docs/library.md, run in their order on a small model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minisd import StableDiffusion

PAGE = Path(__file__).parents[2] / "docs/library.md"


@pytest.mark.filterwarnings("ignore")  # diffusers' own
def test_snippets_of_the_page_run(small_model, tmp_path, monkeypatch):
    load = StableDiffusion.from_pretrained
    monkeypatch.setattr(
        StableDiffusion, "from_pretrained", lambda source=small_model, **options: load(source, device="cpu", **options)
    )
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 12
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
    assert {path.name for path in tmp_path.iterdir()} == {"fox.png", "model", "model.safetensors"}
