"""The rules of the house (CONTRIBUTING.md draws it) that neither the linter nor the import contracts can hold."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "meshwright"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

GROUND_FLOOR = {"spec", "account", "record"}
COMMAND_LINE = {"cli", "__main__"}
# The package itself: the verbs from Python, which import a wing only when they are called.
FRONT_DOOR = {"__init__"}

PICKLING_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# torch's own checkpoint files: torch.save's are pickles, and FileSystemWriter's .metadata is one.
PICKLING_NAMES = {"torch.load", "torch.save", "FileSystemReader", "FileSystemWriter"}
GROUP_MAKERS = {"init_process_group", "new_group", "new_subgroups", "split_group", "init_device_mesh", "DeviceMesh"}


def wing(contract: str) -> set[str]:
    """The modules of one wing, as its import contract lists them."""
    contracts = {c["id"]: c for c in PROJECT["tool"]["importlinter"]["contracts"]}
    return {name.removeprefix("meshwright.") for name in contracts[contract]["source_modules"]}


TORCH_FREE_WING = wing("torch-free-wing")
TORCH_WING = wing("torch-wing")
JAX_ANNEX = wing("jax-annex")


class Source:
    """One module of the package: where it lies, its text and its syntax tree."""

    def __init__(self, path: Path) -> None:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        self.path = path.relative_to(ROOT)
        self.part = parts[0]
        self.module = ".".join(("meshwright", *parts)).removesuffix(".__init__")
        self.text = path.read_text()
        self.tree = ast.parse(self.text)

    def at(self, node: ast.expr | ast.stmt) -> str:
        return f"{self.path}:{node.lineno}: {ast.unparse(node).splitlines()[0]}"


@cache
def sources() -> list[Source]:
    return [Source(path) for path in sorted(PACKAGE.rglob("*.py"))]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imported(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every imported name in full: `from torch import load` is "torch.load"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def mentioned(tree: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """Every dotted name that is used or imported."""
    yield from imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            yield node, ast.unparse(node)


# --- Where things go -------------------------------------------------------------------------------------------------


def test_every_module_has_its_place_in_one_part_of_the_house():
    parts = [GROUND_FLOOR, TORCH_FREE_WING, TORCH_WING, JAX_ANNEX, COMMAND_LINE, FRONT_DOOR]
    for source in sources():
        homes = [part for part in parts if source.part in part]
        assert len(homes) == 1, f"{source.path}: add meshwright.{source.part} to one wing's contract in pyproject.toml"


def test_every_folder_is_a_package():
    """The import contracts do not see a folder without an __init__.py."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert {str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()} == set()


def test_everything_outside_the_torch_wing_loads_without_torch():
    modules = [source.module for source in sources() if source.part not in TORCH_WING | JAX_ANNEX]
    assert loaded_with(modules) & {"torch", "jax", "numpy", "safetensors"} == set()


def test_what_records_jax_loads_without_torch():
    modules = [source.module for source in sources() if source.part in JAX_ANNEX]
    assert loaded_with(modules) & {"torch", "jax", "safetensors"} == {"jax"}


def loaded_with(modules: list[str]) -> set[str]:
    """What a fresh interpreter has loaded once it has imported these."""
    script = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    finished = subprocess.run([sys.executable, "-c", script, *modules], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return set(finished.stdout.split())


def test_models_know_nothing_of_ranks():
    offences = [
        source.at(node)
        for source in sources()
        if source.part == "models"
        for node, name in mentioned(source.tree)
        if name == "torch.distributed" or name.startswith("torch.distributed.")
    ]
    assert not offences, "\n".join(offences)


def test_only_parallel_creates_process_groups_and_meshes():
    offences = [
        source.at(node)
        for source in sources()
        if source.part != "parallel"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in GROUP_MAKERS
    ]
    assert not offences, "\n".join(offences)


# --- What is not done ------------------------------------------------------------------------------------------------


def test_nothing_is_pickled_or_unpickled():
    offences: list[str] = []
    for source in sources():
        for node, name in imported(source.tree):
            if name.split(".")[0] in PICKLING_MODULES:
                offences.append(source.at(node))
        for node, name in mentioned(source.tree):
            if name in PICKLING_NAMES or name.split(".")[-1] in PICKLING_NAMES:
                offences.append(source.at(node))
        for node in ast.walk(source.tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                offences.append(source.at(node.value))
    assert not offences, "\n".join(offences)


def test_only_the_command_line_reads_argv_and_environment():
    """Elsewhere they may be written, and the environment handed on whole to a child process, but not consulted."""
    offences: list[str] = []
    for source in sources():
        if source.part in COMMAND_LINE:
            continue
        for node, name in imported(source.tree):
            if name in {"os.environ", "os.environb", "os.getenv", "sys.argv"}:
                offences.append(source.at(node))
        parents = {child: node for node in ast.walk(source.tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Attribute):
                continue
            name = ast.unparse(node)
            if name in {"os.getenv", "os.environb"} or (name == "sys.argv" and isinstance(node.ctx, ast.Load)):
                offences.append(source.at(node))
            if name == "os.environ" and not is_written_or_handed_on(node, parents):
                offences.append(source.at(node))
    assert not offences, "\n".join(offences)


def is_written_or_handed_on(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether `os.environ` stands in `os.environ[k] = v`, `del os.environ[k]`, a statement `os.environ.update(...)`,
    `.setdefault(...)` or `.pop(...)` whose result nobody takes, `{**os.environ, ...}` or `os.environ | {...}`.
    """
    parent = parents[node]
    match parent:
        case ast.Subscript(ctx=ast.Store() | ast.Del()) | ast.BinOp(op=ast.BitOr()):
            return True
        case ast.Dict(keys=keys, values=values):
            return any(key is None and value is node for key, value in zip(keys, values, strict=True))
        case ast.Attribute(attr="update" | "setdefault" | "pop"):
            return isinstance(parents[parents[parent]], ast.Expr)
        case _:
            return False


def test_nothing_probes_objects_for_attributes():
    offences = [source.at(node) for source in sources() for node, name in mentioned(source.tree) if name == "hasattr"]
    assert not offences, "\n".join(offences)


# --- What fits a page ------------------------------------------------------------------------------------------------


def test_the_training_loop_is_one_page():
    loop = PACKAGE / "train" / "loop.py"
    assert len(loop.read_text().splitlines()) < 120


def test_files_fit_a_sitting():
    tests = {f"tests/{path.name}": path.read_text() for path in (ROOT / "tests").glob("*.py")}
    texts = tests | {str(source.path): source.text for source in sources()}
    lengths = {path: len(text.splitlines()) for path, text in texts.items()}
    assert {path: lines for path, lines in lengths.items() if lines >= 400} == {}


def test_functions_fit_a_screen():
    lengths = {
        f"{source.path}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for source in sources()
        for node in functions(source.tree)
    }
    assert {function: lines for function, lines in lengths.items() if lines >= 70} == {}


def test_the_ground_floor_is_documented():
    missing: list[str] = []
    for source in sources():
        if source.part not in GROUND_FLOOR:
            continue
        if not ast.get_docstring(source.tree):
            missing.append(f"{source.path}: the module")
        for owner in (source.tree, *(node for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef))):
            for node in owner.body:
                is_definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                if is_definition and not node.name.startswith("_") and not ast.get_docstring(node):
                    missing.append(f"{source.path}:{node.lineno} {node.name}")
    assert not missing, "\n".join(missing)


# --- What a newcomer is told -----------------------------------------------------------------------------------------


def test_readme_names_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert "make run" in readme
    assert "make test" in readme


def test_every_dependency_is_pinned():
    project = PROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    # An extra may include another one.
    wanted = [name for name in wanted if not name.startswith("meshwright[")]
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {distribution(name) for name in wanted} - {distribution(name) for name in pins} == set()


def distribution(requirement: str) -> str:
    """The normalised name in a requirement: "tomli_w>=1" is "tomli-w"."""
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def console_commands(page: str) -> list[str]:
    """The lines behind "$ " in the page's ```console blocks; their other lines show output and are not compared.

    A command that is meant to fail says so in a comment: "# exit code 2".
    """
    blocks = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", ["getting-started.md", pytest.param("finetuning.md", marks=pytest.mark.slow)])
def test_commands_of_a_page_run_in_order(page: str, tmp_path: Path):
    commands = console_commands((ROOT / "docs" / page).read_text())
    assert commands
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    if page != "getting-started.md":
        # Its reader may have read that page before, and have its runs.
        (tmp_path / "runs" / "first").mkdir(parents=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in commands:
        finished = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        expected = int(re.findall(r"# exit code (\d+)$|$", command)[0] or 0)
        assert finished.returncode == expected, f"$ {command}\n{finished.stdout}{finished.stderr}"
