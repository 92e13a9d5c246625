"""The list of methods in docs/methods.md."""

import re

from noisyssl.benchmarks import methods_page
from noisyssl.methods import METHODS


def test_every_method_has_its_paragraph_under_its_family():
    text = methods_page.rewrite("before\n<!-- methods -->\nstale\n<!-- end -->\nafter\n")
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "stale" not in text
    found = {}
    for part in text.split("### ")[1:]:
        for name in re.findall(r"\(`--method (\w+)`\)", part):
            found[name] = part.split("\n")[0].lower()
    assert found == {name: kind.family for name, kind in METHODS.items()}


def test_a_paragraph_is_idea_use_paper_and_defaults():
    idea, _, paper, settings, end = methods_page.paragraph("simclr").split("\n")
    assert idea.startswith("**SimCLR** (`--method simclr`): two views of one image find each other")
    assert "batch. The first choice" in idea
    assert paper == "- Chen et al., ICML 2020, arXiv:2002.05709, eq. 1 (NT-Xent)."
    assert settings.startswith("- `[pretrain.simclr]`: ")
    assert "temperature = 0.2" in settings
    assert end == ""
