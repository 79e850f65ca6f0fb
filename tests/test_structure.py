"""The joints of the project: who may import whom, and that no value stands in two places."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*ROOT.glob("ssd/**/*.py"), *ROOT.glob("steps/*.py")])
ENTRY_POINTS = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]


def name_of(path: Path) -> str:
    """Dotted name of a module; a package's is that of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}
PACKAGES = {path.parent.name for path in ROOT.glob("ssd/*/__init__.py")}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imported_modules(path: Path) -> set[str]:
    """Modules of this project that a file imports: of `from ssd.data import splits` it is ssd.data.splits alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name in MODULES and name != "ssd"}


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(module: str) -> str:
    """The folder under ssd/ that a module is in, or the module itself where it is at ssd/ level."""
    return module.split(".")[1] if module.startswith("ssd.") else module


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Names along a circle of `arrows`; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(arrows.get(name, ())):
                if found := visit(other, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := visit(name, []))), [])


IN_SSD = [path for path in FILES if relative(path).startswith("ssd/")]
IN_STEPS = [path for path in FILES if relative(path).startswith("steps/")]


@pytest.mark.parametrize("path", IN_SSD, ids=relative)
def test_ssd_never_imports_a_step(path):
    assert "steps" not in tops(path)


@pytest.mark.parametrize("path", IN_STEPS, ids=relative)
def test_no_step_imports_another_step(path):
    assert "steps" not in tops(path)


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_module_imports_itself_by_way_of_others():
    assert circle({name_of(path): imported_modules(path) for path in IN_SSD}) == []


def test_no_folder_imports_itself_by_way_of_others():
    arrows: dict[str, set[str]] = {}
    for path in IN_SSD:
        rooms = {room(name) for name in imported_modules(path)}
        arrows.setdefault(room(name_of(path)), set()).update(rooms - {room(name_of(path))})
    assert circle(arrows) == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("ssd/*.py")), ids=relative)
def test_what_stands_beside_the_folders_belongs_to_none_of_them(path):
    """Its users are steps, other modules at this level, or several folders."""
    name = name_of(path)
    users = {room(name_of(other)) for other in FILES if name in imported_modules(other)}
    assert name == "ssd" or len(users) > 1 or users - PACKAGES


@pytest.mark.parametrize("path", sorted(ROOT.glob("ssd/**/__init__.py")), ids=relative)
def test_a_package_has_a_docstring_and_at_most_names_of_its_modules(path):
    first, *rest = ast.parse(path.read_text()).body
    assert isinstance(first, ast.Expr) and isinstance(first.value.value, str)
    for node in rest:
        is_all = isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
        assert is_all or (isinstance(node, ast.ImportFrom) and node.module.startswith(f"{name_of(path)}."))


@pytest.mark.parametrize("path", IN_SSD, ids=relative)
def test_in_ssd_only_tracking_and_evaluation_import_mlflow(path):
    assert "mlflow" not in tops(path) or room(name_of(path)) in ("tracking", "evaluation")


def test_records_imports_the_standard_library_and_pyarrow():
    assert tops(ROOT / "ssd/records.py") - sys.stdlib_module_names == {"pyarrow"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("ssd/stats/*.py")), ids=relative)
def test_stats_imports_numpy_and_scipy_alone(path):
    foreign = tops(path) - sys.stdlib_module_names - {"numpy", "scipy"}
    assert foreign <= {"ssd"}
    assert all(name.startswith("ssd.stats") for name in imports(path) if name.startswith("ssd"))


@pytest.mark.parametrize("path", FILES, ids=relative)
@pytest.mark.parametrize("backend", ["vllm", "openai", "ray"])
def test_a_backend_is_imported_only_in_its_engine(path, backend):
    own = {f"ssd/engines/{backend}.py"} | ({"ssd/engines/truncate_first.py"} if backend == "vllm" else set())
    assert backend not in tops(path) or relative(path) in own


# What draws: these may be imported by a step, by evaluation and within report/; for a sort key or a width, by nobody.
DRAWS = {"ssd.report.figures", "ssd.report.page"}


@pytest.mark.parametrize("path", IN_SSD, ids=relative)
def test_a_figure_or_a_page_is_imported_only_to_be_drawn(path):
    assert not imported_modules(path) & DRAWS or room(name_of(path)) in ("report", "evaluation")
    assert relative(path) != "ssd/report/blocks.py" or not imported_modules(path) & DRAWS


def test_reading_grades_loads_no_grader():
    code = "import sys, ssd.grades, ssd.samples\nprint([name for name in sys.modules if 'grading' in name])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_steps_that_need_no_model_load_no_torch():
    steps = ", ".join(f"steps.{name}" for name in ("prepare", "power", "compare", "report", "main"))
    code = f"import sys, {steps}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_entry_point_is_a_step_and_every_step_an_entry_point():
    assert set(ENTRY_POINTS) == {path.stem for path in ROOT.glob("steps/*.py")} - {"__init__"}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_parameters_of_an_entry_point_are_the_flags_of_its_command_and_of_its_step(name, monkeypatch, capsys):
    parameters = list(ENTRY_POINTS[name]["parameters"])
    command = ENTRY_POINTS[name]["command"]
    assert command.startswith(f"python -m steps.{name} ")
    assert re.findall(r"--(\w+) \{(\w+)\}", command) == [(p, p) for p in parameters]
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module(f"steps.{name}", run_name="__main__")
    assert re.findall(r"^  --(\w+) ", capsys.readouterr().out, re.MULTILINE) == parameters


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_step_has_at_most_ten_parameters_besides_its_preset_and_decoding(name):
    from ssd.evaluation import DECODING

    assert len(set(ENTRY_POINTS[name]["parameters"]) - {"preset", *DECODING}) <= 10


@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_preset_sets_only_parameters_that_exist_and_repeats_no_default(path):
    from ssd.parameters import load_preset

    for step, values in load_preset(path.stem).items():
        declared = ENTRY_POINTS[step.split()[0]]["parameters"]
        for name, value in values.items():
            assert " " in step or str(value) != str(declared[name]["default"]), f"{step}.{name} repeats its default"


def test_conda_and_pyproject_pin_the_same_versions():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = next(
        e["pip"] for e in yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"] if isinstance(e, dict)
    )
    assert sorted(conda) == sorted(project["dependencies"] + project["optional-dependencies"]["gpu"])


def test_readme_names_every_module_and_entry_point():
    readme = (ROOT / "README.md").read_text()
    missing = [p.stem for p in FILES if p.stem != "__init__" and not re.search(rf"\b{p.stem}\b", readme)]
    assert not missing


def test_no_remote_code_and_no_pickled_weights():
    for path in FILES:
        text = path.read_text()
        assert not re.search(
            r"trust_remote_code\W+True|torch\.load\(|pickle\.load|\beval\(|\bexec\(", text.replace(".eval()", "")
        )
