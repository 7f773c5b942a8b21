"""The notebook's imports, functions, classes and UPPER_CASE names as a module, without running the rest."""

import ast
import json
import sys
import types
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parent.parent / "DiffusionModel.ipynb"


def code_cells(path: Path = NOTEBOOK) -> list[str]:
    """The sources of the notebook's code cells, without magics."""
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    sources = ("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    return ["\n".join(x for x in s.splitlines() if not x.startswith(("%", "!"))) for s in sources]


def is_definition(node: ast.stmt) -> bool:
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
        return True
    targets = [node.target] if isinstance(node, ast.AugAssign) else getattr(node, "targets", [])
    names = [t.id for t in targets if isinstance(t, ast.Name)]
    return bool(names) and all(name.isupper() for name in names)


def load(path: Path = NOTEBOOK, name: str = "notebook") -> types.ModuleType:
    """A module holding the notebook's definitions."""
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look their module up
    for number, source in enumerate(code_cells(path), 1):
        tree = ast.parse(source)
        tree.body = [node for node in tree.body if is_definition(node)]
        exec(compile(tree, f"{Path(path).name}, code cell {number}", "exec"), module.__dict__)
    return module
