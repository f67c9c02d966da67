"""Who may import whom, what no source may do, and what every method must say of itself."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import trimtab
from trimtab import catalogue, docs
from trimtab.core.claim import Check, Claim, record
from trimtab.core.method import FAMILIES, VERBS, discover

PACKAGE = Path(trimtab.__file__).parent
ROOT = PACKAGE.parent
INNER = {
    "core": {"core"},
    "formats": {"core", "formats"},
    "parts": {"core", "formats", "parts"},
    "kernels": {"core", "formats", "parts", "kernels"},
    "engine": {"core", "formats", "parts", "kernels", "engine"},
} | {family: {"core", "formats", "parts", family} for family in FAMILIES}

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNNERS = {"eval", "exec", "compile", "__import__"}
LOADERS = {"torch.load", "yaml.load", "yaml.unsafe_load", "torch.jit.load", "torch.package.PackageImporter"}
SWITCHES = {"trust_remote_code": True, "allow_pickle": True, "weights_only": False, "shell": True}


def sources(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    """Nodes under `if TYPE_CHECKING:`; they import nothing when the module runs."""
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {node for guard in guards for statement in guard.body for node in ast.walk(statement)}


def imports(tree: ast.Module, module: str) -> Iterator[str]:
    """Full names of the modules that a module imports, the relative ones resolved."""
    skipped = for_types_only(tree)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            name = ".".join(filter(None, (base, node.module)))
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def foreign(text: str, module: str) -> set[str]:
    """Rooms of ours that a module may not import, and does."""
    room = module.split(".")[1]
    named = {name.split(".")[1] for name in imports(ast.parse(text), module) if name.startswith("trimtab.")}
    rooms = named & {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    return rooms - INNER[room] if room in INNER else rooms & set(FAMILIES)


def dangers(text: str) -> list[str]:
    """What a source does that could run code which a file brought along."""
    tree, found = ast.parse(text), []
    for name in imports(tree, "module"):
        if name.split(".")[0] in UNPICKLERS:
            found.append(f"import {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in LOADERS or (isinstance(node.func, ast.Name) and called in RUNNERS):
                found.append(f"{called}()")
        pairs: list[tuple[object, ast.expr]] = []
        if isinstance(node, ast.keyword):
            pairs = [(node.arg, node.value)]
        elif isinstance(node, ast.Dict):
            pairs = [
                (k.value if isinstance(k, ast.Constant) else None, v)
                for k, v in zip(node.keys, node.values, strict=True)
            ]
        for key, value in pairs:
            if key in SWITCHES and not (isinstance(value, ast.Constant) and value.value is not SWITCHES[str(key)]):
                found.append(f"{key}={ast.unparse(value)}")
    return found


def test_rooms_import_only_what_they_may() -> None:
    wrong = {}
    for file in sources("trimtab"):
        if rooms := foreign(file.read_text("utf-8"), module_of(file)):
            wrong[module_of(file)] = sorted(rooms)
    assert wrong == {}


@pytest.mark.parametrize(
    ("module", "text", "rooms"),
    [
        ("trimtab.core.site", "from trimtab.parts.grids import affine", {"parts"}),
        ("trimtab.core.site", "def f():\n    import trimtab.engine.apply", {"engine"}),
        ("trimtab.quant.gptq", "from ..prune import wanda", {"prune"}),
        ("trimtab.quant.gptq", "from trimtab import cli", {"cli"}),
        ("trimtab.engine.apply", "from trimtab.quant.gptq import GPTQ", {"quant"}),
        ("trimtab.cli.fit", "from trimtab.quant.gptq import GPTQ", {"quant"}),
        ("trimtab.parts.grids", "from trimtab.formats.packed import Packed\nfrom trimtab.core import level", set()),
        ("trimtab.core.method", "if TYPE_CHECKING:\n    from trimtab.formats.packed import Packed", set()),
    ],
)
def test_the_rule_of_imports_sees(module: str, text: str, rooms: set[str]) -> None:
    assert foreign(text, module) == rooms


def test_no_source_runs_code_from_a_file() -> None:
    files = sources("trimtab", "claims", "benchmarks", ".ci")
    wrong = {str(f.relative_to(ROOT)): found for f in files if (found := dangers(f.read_text("utf-8")))}
    assert wrong == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path, weights_only=True)",
        "eval(text)",
        "yaml.load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "f(trust_remote_code=asked)",
        "f(**{'trust_remote_code': True})",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_the_rule_of_dangers_sees(text: str) -> None:
    assert dangers(text)


@pytest.mark.parametrize("text", ["model.eval()", "ast.literal_eval(t)", "f(trust_remote_code=False)", "re.compile(t)"])
def test_the_rule_of_dangers_lets_pass(text: str) -> None:
    assert dangers(text) == []


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]

    def names(requirements: list[str]) -> set[str]:
        return {canonicalize_name(Requirement(text).name) for text in requirements}

    core, optional = names(project["dependencies"]), names(extras["formats"] + extras["serve"] + extras["vision"])
    allowed = {
        "trimtab": core | optional,
        "claims": core | optional,
        "benchmarks": core | optional | names(extras["dev"] + extras["search"]),
    }
    allowed["tests"] = allowed["benchmarks"] | names(extras["fuzz"])
    owners = packages_distributions()
    ours = {"trimtab", "claims", "benchmarks", "tests"} | {file.stem for file in sources("tests")}
    wrong = {}
    for folder, known in allowed.items():
        for file in sources(folder):
            tops = {name.split(".")[0] for name in imports(ast.parse(file.read_text("utf-8")), module_of(file))}
            outside = tops - sys.stdlib_module_names - ours
            if missing := {
                top for top in outside if not {canonicalize_name(d) for d in owners.get(top, [top])} & known
            }:
                wrong[str(file.relative_to(ROOT))] = sorted(missing)
    assert wrong == {}


def test_importing_trimtab_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "scipy", "rich", "typer", "matplotlib", "sklearn", "fastapi")
    code = f"import sys, trimtab; print(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


def test_methods_are_found() -> None:
    assert len(discover()) >= 10


@pytest.mark.parametrize("name", discover())
def test_a_method_says_what_it_is(name: str) -> None:
    cls = discover()[name]
    text = inspect.getdoc(cls) or ""
    assert "Reference:" in text and "Departures:" in text, f"{cls.__module__} needs both in its docstring"
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert [verb for verb in VERBS if verb in vars(cls)] == [cls.verb]
    file = Path(inspect.getfile(cls))
    lines = file.read_text("utf-8").count("\n")
    assert lines <= 200, f"{file.name} has {lines} lines"
    assert file.name == file.name.lower()
    assert name == cls.card.name == name.lower()


def test_pages_are_written_from_cards_docstrings_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "ROOT", tmp_path)
    checks = (Check("a | below b", "a", "<", "b"), Check("b below a", "b", "<", "a"))
    claim = Claim("gptq", "A *statement*.", "section 1", "a setting", "nats", checks)
    row = record(claim, [{"a": 1.0, "b": 2.0}, {"a": 1.1, "b": 2.3}, {"a": 0.9, "b": 2.1}], {"machine": {"cores": 2}})
    (tmp_path / "records" / "quant").mkdir(parents=True)
    (tmp_path / "records" / "quant" / "gptq.jsonl").write_text(
        "\n".join(map(json.dumps, (row | {"verdict": "old"}, row)))
    )
    stale = tmp_path / "methods" / "quant" / "gone.md"
    stale.parent.mkdir(parents=True)
    stale.write_text("a method that is no more")
    assert docs.main([str(tmp_path / "methods")]) == len(discover()) + 1
    assert not stale.exists()
    index = (tmp_path / "methods" / "index.md").read_text("utf-8")
    links = re.findall(r"\]\((\w+/[\w.-]+\.md)\)", index)
    assert len(links) == len(discover()) and all((tmp_path / "methods" / link).exists() for link in links)
    assert "- partly: 1\n" in index and f"- none: {len(discover()) - 1}\n" in index
    text = (tmp_path / "methods" / "quant" / "gptq.md").read_text("utf-8")
    assert "Verdict: **partly**, from `records/quant/gptq.jsonl`" in text
    assert r"A \*statement\*." in text and r"| a \| below b | 1 | 2.133 |" in text
    assert "`damp=0.01`" in text and "## Departures" in text and "```python\n>>>" in text
    assert text.count("```") % 2 == 0
