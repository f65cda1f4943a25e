"""The package as a whole: its public names, what importing it costs, which way its imports go."""

import ast
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_origin

import pytest

import loramem
from loramem import errors, results

from .conftest import ROOT

PACKAGES = (
    ("suites", "endpoint"),
    ("api",),
    ("hub",),
    ("serving",),
    ("store",),
    ("planning",),
    ("workers",),
    ("training",),
    ("index", "models"),
    ("records",),
    ("results",),
    ("_util", "embedded"),
    ("errors",),
)
"""Packages and top-level modules of loramem; each imports from its own row only itself, beyond that what is below."""


def test_the_public_names_are_these() -> None:
    assert loramem.__all__ == [
        "AdapterCheck",
        "BaseModel",
        "BaseType",
        "ChatKeys",
        "CompactChoice",
        "CompactReport",
        "DeployReport",
        "Divergence",
        "Dtype",
        "DtypeChoice",
        "EraseReport",
        "Explanation",
        "Finding",
        "GcReport",
        "GoalName",
        "KeepBase",
        "Kept",
        "KeyNotFound",
        "LawRank",
        "LoramemError",
        "MemoryStore",
        "Namespace",
        "ObjectiveName",
        "OnConflict",
        "Outcome",
        "PendingWrite",
        "Plan",
        "PlanInputs",
        "ProgressCallback",
        "PushPlan",
        "PushReport",
        "RankLimits",
        "Recall",
        "Record",
        "RecordLike",
        "RepairReport",
        "ServerCheck",
        "ServerReport",
        "ServingReport",
        "ShardPlan",
        "Stats",
        "StoredAdapter",
        "StoredRecord",
        "Target",
        "TokenProbability",
        "VerifyReport",
        "Version",
        "WriteProgress",
        "WriteReport",
        "WriterSettings",
        "base_path",
        "dask_executor",
        "process_pool",
        "ray_executor",
        "read_records",
    ]
    for name in loramem.__all__:
        assert getattr(loramem, name).__doc__ or get_origin(getattr(loramem, name))  # a type alias has none
    with pytest.raises(AttributeError, match="nonsense"):
        _ = loramem.nonsense


@pytest.mark.parametrize("path", sorted((ROOT / "loramem" / "api").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_what_public_methods_take_and_return_is_exported(path: Path) -> None:
    tree = ast.parse(path.read_text())
    ours = {  # names of the package, also those that are imported for annotations alone
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loramem")
        for alias in node.names
    }
    methods = [
        node
        for kind in tree.body
        if isinstance(kind, ast.ClassDef) and not kind.name.startswith("_")
        for node in kind.body
        if isinstance(node, ast.FunctionDef)
        if not node.name.startswith("_") or (node.name == "__init__" and kind.name in loramem.__all__)
    ]
    used = {name for method in methods for name in annotated(method)} & ours
    assert used and used <= set(loramem.__all__)


def annotated(method: ast.FunctionDef) -> Iterator[str]:
    """Names in the annotations of a method, quoted or not."""
    arguments = method.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    found = [method.returns, *(argument.annotation for argument in every)]
    for annotation in filter(None, found):
        for node in ast.walk(annotation):
            if isinstance(node, ast.Name):
                yield node.id
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from (part.id for part in ast.walk(ast.parse(node.value)) if isinstance(part, ast.Name))


def test_every_result_is_exported() -> None:
    kinds = {name for name, kind in vars(results).items() if is_dataclass(kind)}
    assert kinds <= set(loramem.__all__)


def test_every_error_has_one_root_and_stands_in_the_tree_of_the_docstring() -> None:
    classes = [
        value for value in vars(errors).values() if isinstance(value, type) and value.__module__ == errors.__name__
    ]
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    assert all(issubclass(kind, errors.LoramemError) for kind in classes)
    assert sorted(drawn) == sorted(kind.__name__ for kind in classes if kind is not errors.LoramemError)


@pytest.mark.parametrize(
    "error",
    [
        errors.StubbornRecords("two records are left", keys=["a", "b"], rank=8),
        errors.TrainingDiverged("not finite", step=3, learning_rate=0.1),
        errors.RecallError("not exact", key="a", adapter="0" * 32),
        errors.KeyNotFound("a", namespace="n", close=["b"]),
        errors.ArgumentError("rank must be at least 1, not 0", argument="rank", value=0),
        errors.PromptCollision("the same prompt", other="b", key="a", line=3),
        errors.OtherBaseModel("another model", expected="1", got="2"),
        errors.UnfinishedWrite("a write waits", write_id=1, records=2),
        errors.UnknownChoice("goal", "tiny", ["fast", "small"]),
        errors.LoramemError("plain"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_come_out_of_another_process_as_they_went_in(error: errors.LoramemError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.args, vars(copy)) == (str(error), error.args, vars(error))


@pytest.mark.parametrize("code", ["import loramem", "from loramem_cli.main import run; run(['--help'])"])
def test_importing_and_help_do_not_import_torch(code: str) -> None:
    check = f"{code}\nimport sys\nassert not {{'torch', 'transformers', 'peft', 'scipy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


def test_reading_the_index_does_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom loramem.index.index import Index\n"
        f"index = Index(Path({str(tmp_path / 'index.db')!r}))\nindex.migrate()\nindex.count()\n"
        "import loramem.api.store\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_imports_go_one_way() -> None:
    level = {name: height for height, row in enumerate(PACKAGES) for name in row}
    library = ROOT / "loramem"
    assert {path.stem for path in library.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} == {
        *level,
        "__init__",
    }
    for name in set(level) - {"embedded"}:  # which is data beside the programs that made it
        sources = [library / f"{name}.py"] if (library / f"{name}.py").exists() else (library / name).rglob("*.py")
        for path in sources:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loramem."):
                    imported = (node.module or "").split(".")[1]
                    assert imported == name or level[imported] > level[name], f"{path.name} imports {node.module}"


def test_every_package_says_what_lives_there() -> None:
    for path in (ROOT / "loramem").rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_what_a_user_may_meet_is_an_error_of_ours() -> None:
    validators = {"hub/admission.py", "hub/publication.py"}  # whose callers say RefusedRepository
    for path in (ROOT / "loramem").rglob("*.py"):
        raised = [node.exc for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
        called = {call.func.id for call in raised if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}
        if path.relative_to(ROOT / "loramem").as_posix() not in validators:
            assert not called & {"ValueError", "TypeError", "KeyError", "RuntimeError", "Exception"}, path


def test_no_print_in_the_library() -> None:
    for path in (ROOT / "loramem").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"], path
