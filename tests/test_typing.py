"""What is public is typed, documented, and said to be public."""

import importlib
import inspect
import pkgutil

import pytest

import moe_ext

# Modules that a user imports from; the others are rooms of the package.
PUBLIC = ["checkpoint", "config", "functional", "losses", "masking", "moe", "parameters", "presets",
          "reference", "replace", "routing", "stats", "testing", "training", "types"]  # fmt: skip


def public():
    """(the name, the object) of every class and function that is public."""
    for module in [moe_ext, *(importlib.import_module(f"moe_ext.{name}") for name in PUBLIC)]:
        for name in module.__all__:
            yield f"{module.__name__}.{name}", getattr(module, name)


def functions(name, thing):
    if inspect.isfunction(thing):
        yield name, thing
    elif inspect.isclass(thing):
        for attribute, value in vars(thing).items():
            function = inspect.unwrap(getattr(value, "__func__", value))
            is_public = attribute == "__init__" or not attribute.startswith("_")
            if is_public and inspect.isfunction(function):
                yield f"{name}.{attribute}", function


def missing(function):
    """The parameters without a type, and "return"."""
    annotated = function.__annotations__
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    code = function.__code__
    named = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4)]
    names = [name for name in names if name in named]
    if function.__name__ != "__init__":
        names.append("return")
    return [name for name in names if name not in annotated]


def test_every_public_function_is_typed():
    found = {}
    for name, thing in public():
        for function_name, function in functions(name, thing):
            if function.__module__.startswith("moe_ext"):
                found[function_name] = missing(function)
    assert len(found) > 40
    assert {name: gaps for name, gaps in found.items() if gaps} == {}


def test_every_argument_is_documented():
    undocumented = {}
    for name, thing in public():
        for function_name, function in functions(name, thing):
            owner = thing if function_name.endswith("__init__") else function
            text = inspect.getdoc(owner) or ""
            names = list(inspect.signature(function).parameters)
            gaps = [n for n in names if f"{n}: " not in text and n not in ("self", "cls")]
            named = function.__module__ in ("moe_ext.reference", "moe_ext.routing", "moe_ext.stats")
            if gaps and not named and function is not moe_ext.MoE.__init__:
                undocumented[function_name] = gaps
    assert undocumented == {}


def test_every_public_module_says_what_is_public():
    private = {"_checks", "_compat", "_load", "_masks", "_ops", "__main__"}
    known = {m.name for m in pkgutil.iter_modules(moe_ext.__path__)} - {"_C", "integrations"}
    inner = {"conversions", "dense", "experts", "flops", "groups", "inference", "option_groups", "options",
             "pretrained", "upcycling"}  # fmt: skip
    assert known == private | inner | {*PUBLIC}


def test_the_integration_is_typed():
    transformers = pytest.importorskip("moe_ext.integrations.transformers")
    for name in transformers.__all__:
        for function_name, function in functions(name, getattr(transformers, name)):
            if not function_name.startswith("RoutingCallback.on_"):  # transformers' own
                assert missing(function) == [], function_name
