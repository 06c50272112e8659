"""Checks that no module of moe_ext imports itself by way of others, inside of functions either.

    python tests/import_cycles.py

A package that imports its own modules is no cycle; a module that imports from its package is.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def modules():
    """{name: file}; a package has its own name."""
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in sorted((ROOT / "moe_ext").rglob("*.py"))
    }


def imported(name, file, known):
    """The modules of `known` that a file imports, at its top or later."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parts, *filter(None, [node.module])]) if node.level else node.module
            for alias in node.names:  # a module of that package, or what is in its __init__
                inner = f"{base}.{alias.name}"
                yield from (m for m in (inner if inner in known else base,) if m in known)


def cycle(graph):
    """Modules each of which imports the next and the last the first, or None."""
    done = set()

    def visit(name, path):
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return None
        done.add(name)
        return next(filter(None, (visit(next_, [*path, name]) for next_ in graph[name])), None)

    return next(filter(None, (visit(name, []) for name in graph)), None)


def main():
    known = modules()
    found = cycle({name: sorted({*imported(name, file, known)}) for name, file in known.items()})
    if found:
        print("import cycle:", " -> ".join([*found, found[0]]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
