"""The package as a whole: its public names, what importing it costs, which way its imports go."""

import ast
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import loramem
from loramem import errors

from .conftest import ROOT

LAYERS = (
    ("loramem.suites.reporter",),
    ("loramem.suites.page",),
    ("loramem.suites.report",),
    ("loramem.suites.write_scaling",),
    (
        "loramem.suites.write_speed",
        "loramem.suites.recall_speed",
        "loramem.suites.store_life",
        "loramem.suites.large_base",
        "loramem.suites.scenarios",
        "loramem.suites.memory_law",
        "loramem.suites.locality",
        "loramem.suites.phonebook",
        "loramem.suites.long_context",
        "loramem.suites.linear_rule",
        "loramem.suites.phase",
    ),
    ("loramem.suites.phonebook_results", "loramem.suites.phase_report", "loramem.suites.methods"),
    ("loramem.suites.baselines", "loramem.suites.paper_recipe"),
    ("loramem.suites.published",),
    ("loramem.suites.placements",),
    (
        "loramem.suites.paper_unit",
        "loramem.suites.paper_schedule",
        "loramem.suites.positions",
        "loramem.suites.scoring",
        "loramem.suites.timing",
        "loramem.suites.divergence",
    ),
    ("loramem.suites.runner",),
    ("loramem.suites.figures",),
    ("loramem.suites",),
    ("loramem.embedded.build", "loramem.calibrate"),
    ("loramem",),
    ("loramem.store",),
    ("loramem.memory", "loramem.creation", "loramem.namespace"),
    ("loramem.hub.push", "loramem.hub.pull"),
    ("loramem.hub.admission", "loramem.hub.card", "loramem.hub.client"),
    ("loramem.hub.publication",),
    ("loramem.hub",),
    ("loramem.deploy",),
    ("loramem.serving",),
    ("loramem.summary", "loramem.verification", "loramem.recheck", "loramem.repair"),
    ("loramem.maintenance", "loramem.bundle", "loramem.verified"),
    ("loramem.engine",),
    ("loramem.transaction", "loramem.reader"),
    ("loramem.jobs", "loramem.checks"),
    ("loramem.manifest",),
    ("loramem.shards",),
    ("loramem.shard_training",),
    ("loramem.feature_writer", "loramem.certificate"),
    ("loramem.writer",),
    ("loramem.adapters",),
    ("loramem.feature_cache",),
    ("loramem.features",),
    ("loramem.recall", "loramem.trunk"),
    (
        "loramem.base_fit",
        "loramem.base_model",
        "loramem.objectives",
        "loramem.initialization",
        "loramem.optimizer",
        "loramem.whitening",
        "loramem.rivals",
        "loramem.calibrations",
        "loramem.plots",
        "loramem.law_tables",
    ),
    ("loramem.architecture",),
    ("loramem.batches", "loramem.placement"),
    ("loramem.module_names",),
    ("loramem.layers",),
    ("loramem.runs", "loramem.joint_law", "loramem.capacity"),
    ("loramem.law_fit", "loramem.generators", "loramem.long_text", "loramem.staging"),
    ("loramem.commits",),
    ("loramem.pretrained",),
    ("loramem.prompts", "loramem.index", "loramem.pace", "loramem.parameters", "loramem.spool"),
    ("loramem.sealed_database",),
    ("loramem.locks", "loramem.database"),
    ("loramem.migrations",),
    ("loramem.tables", "loramem.seals"),
    ("loramem.serving_guide",),
    ("loramem.boundary", "loramem.law", "loramem.targets"),
    ("loramem.adapter_tensors",),
    (
        "loramem.adapter_config",
        "loramem.adapter_header",
        "loramem.chat",
        "loramem.embedded.corpus",
        "loramem.events",
        "loramem.fingerprint",
        "loramem.files",
        "loramem.model_files",
        "loramem.out_of_memory",
        "loramem.pricing",
        "loramem.processes",
        "loramem.reports",
        "loramem.shard_sizes",
        "loramem.timings",
        "loramem.unreachable",
        "loramem.whole_model",
    ),
    ("loramem.settings",),
    ("loramem.embedded",),
    ("loramem.input_files",),
    ("loramem.records",),
    ("loramem.errors",),
)


def test_the_public_names_are_these() -> None:
    assert loramem.__all__ == [
        "Explanation",
        "KeyNotFound",
        "LoramemError",
        "MemoryStore",
        "Namespace",
        "Plan",
        "Recall",
        "Record",
        "VerifyReport",
        "WriteReport",
        "WriterSettings",
        "base_path",
        "read_records",
    ]
    for name in loramem.__all__:
        assert getattr(loramem, name).__doc__
    with pytest.raises(AttributeError, match="nonsense"):
        _ = loramem.nonsense


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
        errors.PromptCollision("the same prompt", other="b", key="a", line=3),
        errors.OtherBaseModel("another model", expected="1", got="2"),
        errors.UnfinishedWrite("a write waits", write_id=1, records=2),
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
        "import sys\nfrom pathlib import Path\nfrom loramem.index import Index\n"
        f"index = Index(Path({str(tmp_path / 'index.db')!r}))\nindex.migrate()\nindex.count()\n"
        "import loramem.store\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_imports_go_one_way() -> None:
    level = {module: height for height, modules in enumerate(LAYERS) for module in modules}
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "loramem").rglob("*.py")
    }
    assert found == set(level)
    for module in found - {"loramem"}:
        path = ROOT / Path(*module.split("."))
        source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("loramem"):
                continue
            targets = {f"{node.module}.{alias.name}" for alias in node.names} & set(level) or {node.module}
            for target in targets:
                assert level[target] > level[module], f"{module} imports {target}"


def test_no_print_in_the_library() -> None:
    for path in (ROOT / "loramem").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"], path
