"""The rule of `timm_ep/README.md`: imports lead downwards only, so there is no circle."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import timm_ep

PACKAGE = Path(timm_ep.__file__).parent
ROOT = Path(__file__).parents[1]
WINGS = ("base", "core", "models", "signals", "data", "hub", "training", "studies")  # from the bottom up
FLOORS = {name: floor for floor, name in enumerate(WINGS)}


def imports() -> dict[str, set[str]]:
    """What each module of the package imports of the package, imports inside functions included; all by full names."""
    modules = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} has a relative import"
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "timm_ep":
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                found[module] |= members & modules.keys() or {str(node.module)}
            elif isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "timm_ep"}
    return found


def wing(module: str) -> str | None:
    name = [*module.split("."), ""][1]
    return name if name in FLOORS else None


def test_imports_lead_downwards():
    """A wing imports itself and those below; `core` imports torch and itself alone. The top level may import all."""
    wrong = [
        f"{module} imports {imported}"
        for module, members in imports().items()
        for imported in members
        if (here := wing(module))
        and imported != "timm_ep.version"
        and ((there := wing(imported)) is None or FLOORS[there] > FLOORS[here] or (here == "core" and there != "core"))
    ]
    assert not wrong, wrong


def test_no_circle():
    """Not within a wing either."""
    order = list(TopologicalSorter(imports()).static_order())  # raises CycleError, which names the circle
    assert "timm_ep.core.energy" in order


def test_the_core_knows_torch_alone():
    known = {"torch", "timm_ep", *sys.stdlib_module_names}
    for path in (PACKAGE / "core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {name.partition(".")[0] for name in names} <= known, path


def test_the_picture_shows_these_arrows():
    """Every arrow drawn is an import, and every import follows arrows; the top level may import all below it."""
    picture = (ROOT / ".github" / "architecture.svg").read_text(encoding="utf-8")
    arrows = set(re.findall(r'<path id="(\w+)-(\w+)"', picture))
    edges = {(wing(module) or "top", wing(one) or "top") for module, members in imports().items() for one in members}
    edges = {(above, below) for above, below in edges if above != below and below != "top"}
    reached = set(arrows)
    for middle in WINGS:
        reached |= {(above, below) for above, one in reached for other, below in reached if one == other == middle}
    assert arrows <= edges, f"drawn, but no import: {arrows - edges}"
    assert edges <= reached, f"imports to draw in .github/architecture.svg: {edges - reached}"


def test_every_wing_is_named():
    """A new folder needs a floor."""
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(WINGS)
