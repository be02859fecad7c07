"""Who may import whom: the two stages never each other, `common` neither; only `pipelines` knows both."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY = {
    "common": {"common"},
    "dump": {"common", "dump"},
    "train": {"common", "train"},
    "pipelines": {"common", "dump", "train", "pipelines"},
}


def imported(file: Path) -> set[str]:
    """The modules that a file imports, with what it takes from them."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found |= {f"{node.module}.{one.name}" for one in node.names}
    return found


@pytest.mark.parametrize("folder", MAY)
def test_a_folder_imports_what_it_may(folder):
    others = {*MAY, "tests"} - MAY[folder]
    for file in (ROOT / folder).rglob("*.py"):
        wrong = {name for name in imported(file) if name.split(".")[0] in others}
        assert not wrong, f"{file.relative_to(ROOT)} imports {min(wrong)}"


def test_of_training_the_tables_of_heads_alone_know_a_kind():
    heads = ROOT / "train/heads"
    kinds = {path.name for path in heads.glob("[a-z]*") if path.is_dir()}
    assert "eagle3" in kinds
    for kind in kinds:
        for file in (ROOT / "train").rglob("*.py"):
            if (
                file in (heads / "__init__.py", heads / "head.py")
                or kind in file.relative_to(ROOT).with_suffix("").parts
            ):
                continue
            wrong = {name for name in imported(file) if f"{name}.".startswith(f"train.heads.{kind}.")}
            assert not wrong, f"{file.relative_to(ROOT)} imports {min(wrong)}"
