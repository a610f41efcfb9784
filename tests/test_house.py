"""The house itself: imports run one way, tasks have one home, and the prose is plain."""

import ast
import sys
from pathlib import Path

import prose
import pytest
from helpers import ROOT

GROUND = (
    "manager fields files index world hub tokenizer images multigrid metrics torch_files trackers"
).split()
GROUND += ["drawing"]
MIDDLE = "model llava_manager chat data scenes weights export llava_parquet shard loop".split()
MIDDLE += "tasks objectives small_towers analysis explore".split()
SCRIPTS = "train train_llava finetune eval ask figures prepare bench roofline compare".split()
SCRIPTS += "comparison compare_llava eval_chat eval_lmms".split()
FILES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
SYSTEMS = {f"systems/{path.stem}": path for path in sorted((ROOT / "systems").glob("*.py"))}


def imported_by(name):
    """Names of the modules that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    return modules


def own_imports(name):
    return imported_by(name) & FILES.keys()


# ---------------------------------------------------------------- imports
def test_every_file_has_its_level():
    assert FILES.keys() == {*GROUND, *MIDDLE, *SCRIPTS}


def test_imports_run_one_way():
    """No circle, whatever is imported inside of functions too."""
    finished = set()

    def visit(name, path):
        assert name not in path, f"a circle of imports: {' -> '.join([*path, name])}"
        if name not in finished:
            for other in own_imports(name):
                visit(other, [*path, name])
            finished.add(name)

    for name in FILES:
        visit(name, [])
    assert finished == FILES.keys()


@pytest.mark.parametrize("name", [*GROUND, *MIDDLE])
def test_nothing_below_imports_a_script_or_a_leaf(name):
    allowed = GROUND if name in GROUND else [*GROUND, *MIDDLE]
    assert own_imports(name) <= set(allowed)
    assert not imported_by(name) & {"systems", "runs", "tests"}


def test_the_manager_needs_torch_alone():
    assert imported_by("manager") == {"torch"}


def test_no_file_names_a_system_but_the_one_that_finds_it():
    """A system is imported by its name, so that the core is whole without the folder."""
    for name in FILES:
        assert "systems" not in imported_by(name)
    import train

    assert {module.replace(".", "/") for module in train.SYSTEMS.values()} <= SYSTEMS.keys()


def test_training_loads_neither_evaluation_nor_preparation():
    loaded = set()

    def load(name):
        if name not in loaded:
            loaded.add(name)
            for node in ast.parse(FILES[name].read_text()).body:  # not inside of functions
                if isinstance(node, ast.ImportFrom) and node.module in FILES:
                    load(node.module)
                elif isinstance(node, ast.Import):
                    for alias in node.names:
                        if alias.name in FILES:
                            load(alias.name)

    load("train")
    assert "loop" in loaded
    assert not loaded & {"eval", "prepare", "finetune", "ask", "figures", "bench", "train_llava"}


def test_only_the_eight_requirements_are_imported_at_the_top():
    """What only development needs is imported where it is used."""
    allowed = {
        "torch",
        "numpy",
        "PIL",
        "sentencepiece",
        "tokenizers",
        "safetensors",
        "tqdm",
        "yaml",
    }
    for name, path in FILES.items():
        for node in ast.parse(path.read_text()).body:
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module.split(".")[0]]
            for module in modules:
                own = module in FILES or module in sys.stdlib_module_names
                assert own or module in allowed, f"{name}.py imports {module}"


# ---------------------------------------------------------------- tasks
def texts_in(path):
    """(text, line) of every string constant in a file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, node.lineno


def test_a_downstream_task_has_one_home():
    """Its name stands in tasks.py; else only where scenes, raw files, heads, weights and the
    normalisers of answers are named.
    """
    import metrics
    import model
    import tasks

    names = {*tasks.TASKS, *(head for task in tasks.TASKS.values() for head in task.heads)}
    names -= {"itm", "itc"}  # the heads of pre-training
    homes = {"tasks", "scenes", "prepare", "weights"}
    heads_table = set(model.HEADS)
    for name, path in FILES.items():
        for text, line in texts_in(path):
            if name in homes or (name == "model" and text in heads_table):
                continue
            if name == "metrics" and text in metrics.NORMALISERS:
                continue
            assert text not in names, f"{path.name}:{line} names the task {text!r}"


# ---------------------------------------------------------------- prose
def measured():
    paths = {**FILES, **SYSTEMS}
    return {name: prose.measure(path.read_text()) for name, path in paths.items()}


def test_the_prose_is_plain():
    files = measured()
    total = prose.add(list(files.values()))
    thousand = total.statements / 1000
    assert total.nodes / total.statements <= 12.5
    assert total.heavy / total.statements <= 0.01
    assert total.tuple_assignments / thousand <= 8
    assert total.nested_comprehensions <= 8
    for name, counts in files.items():
        assert counts.nodes / counts.statements <= 14, name
        assert counts.long_lines == 0, name
        assert counts.complexity <= 12, name


@pytest.mark.parametrize("name", ["manager", "model", "loop", "llava_manager"])
def test_the_long_stories_have_comments(name):
    counts = prose.measure(FILES[name].read_text())
    assert counts.comments / counts.lines >= 0.1


def test_no_test_imports_another_test():
    for path in (ROOT / "tests").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) if isinstance(node, ast.ImportFrom) else None
            assert not str(module).startswith("test_"), path.name


def test_prose_counts_what_it_says():
    text = "x = 1\na, b = 2, 3\nfor i in range(3):\n    print([j for j in range(i)])  # why\n"
    counts = prose.measure(text)
    assert (counts.lines, counts.statements, counts.comments) == (4, 4, 1)
    assert (counts.tuple_assignments, counts.comprehensions, counts.nested_comprehensions) == (
        1,
        1,
        0,
    )
    # x = 1: a name with its context and a number; the loop without its body: a name, a call ...
    assert prose.count_nodes(ast.parse("x = 1").body[0]) == 3
    swap = prose.measure("a, b = b, a")
    assert swap.tuple_assignments == 0
    assert Path(prose.__file__).name == "prose.py"
