"""Which attributes of which classes a package reads, found in its source: an attribute counts for the class that owns it.

A reader that follows annotations: of parameters, of attributes and of what functions return, through assignments, loops,
comprehensions and calls within a function. What it cannot follow counts for nobody, so it errs on the side of "not read".
"""

import ast
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# A type is ("object", class), ("class", class), ("call", function, its module, the class it belongs to), ("items", of which
# types), ("map", of which types) or ("pair", (types of each)); an expression has a set of them.
Type = tuple
Types = frozenset
NOTHING: Types = frozenset()
ITEMS = {"list", "tuple", "set", "frozenset", "Sequence", "Iterable", "Iterator", "Generator", "Collection", "deque"}
MAPS = {"dict", "Mapping", "MutableMapping", "defaultdict"}
SAME = {"list", "tuple", "set", "frozenset", "sorted", "reversed", "iter"}
FIRST = {"next", "min", "max"}
MADE_FROM_CLASS = {"load_config", "check_config", "resolve_config", "cast"}  # what they return is their first argument's
GIVERS = (ast.Assign, ast.NamedExpr, ast.For, ast.comprehension, ast.AnnAssign, ast.withitem, ast.Call)
MADE_BY_METHOD = {"model_copy", "model_validate", "model_validate_json", "model_construct"}
COPIES = {"replace", "deepcopy", "copy"}


@dataclass(eq=False)
class Module:
    """A parsed file: its names, and where imported ones come from."""

    name: str
    tree: ast.Module
    imports: dict[str, str] = field(default_factory=dict)
    names: dict[str, ast.AST] = field(default_factory=dict)


class Source:
    """All modules of some packages."""

    def __init__(self, files: Iterable[tuple[str, Path]]) -> None:
        self.modules = {name: _module(name, ast.parse(file.read_text())) for name, file in files}
        self.kept: dict[tuple[str, str], dict[str, Types]] = {}

    @functools.cache  # noqa: B019
    def find(self, name: str, module: Module) -> tuple[ast.AST, Module] | None:
        """Return the definition that a name means in a module."""
        if name in module.names:
            return module.names[name], module
        parent, _, last = module.imports.get(name, "").rpartition(".")
        return self.find(last, self.modules[parent]) if parent in self.modules else None

    def types_of(self, annotation: ast.AST | None, module: Module) -> Types:  # noqa: PLR0911 (one a form)
        """Return what an annotation stands for."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            name = annotation.value.removeprefix("type[").removesuffix("]")
            return self.types_of(ast.Name(name), module) if name.isidentifier() else NOTHING  # else a shape
        if isinstance(annotation, ast.BinOp):
            return self.types_of(annotation.left, module) | self.types_of(annotation.right, module)
        if isinstance(annotation, ast.Subscript):
            name = annotation.value.attr if isinstance(annotation.value, ast.Attribute) else getattr(annotation.value, "id", "")
            inside = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
            found = [self.types_of(item, module) for item in inside]
            if name in MAPS:
                return frozenset({("map", found[-1])})
            if name == "tuple" and not any(isinstance(item, ast.Constant) and item.value is ... for item in inside):
                return frozenset({("pair", tuple(found))})
            if name == "type":
                return frozenset(("class", what[1]) for what in found[0] if what[0] == "object")
            if name in ITEMS:
                return frozenset({("items", found[0])})
            return frozenset().union(*found)
        if isinstance(annotation, ast.Name):
            place = self.find(annotation.id, module)
            if place is not None and isinstance(place[0], ast.ClassDef):
                return frozenset({("object", (place[1].name, place[0].name))})
            if place is not None and isinstance(place[0], ast.Assign):
                return self.types_of(place[0].value, place[1])
        return NOTHING

    @functools.cache  # noqa: B019 (lives as long as the test)
    def bases(self, owner: tuple[str, str]) -> tuple[tuple[str, str], ...]:
        """Return a class and those it inherits from."""
        module = self.modules[owner[0]]
        found = [owner]
        for base in module.names[owner[1]].bases:
            for kind, other in (what[:2] for what in self.types_of(base, module)):
                found += self.bases(other) if kind == "object" else ()
        return tuple(found)

    def member(self, owner: tuple[str, str], name: str) -> Types:
        """Return the types of an attribute of an object."""
        for module_name, class_name in self.bases(owner):
            module = self.modules[module_name]
            for node in module.names[class_name].body:
                if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == name:
                    return self.types_of(node.annotation, module)
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    if any(
                        getattr(mark, "id", getattr(mark, "attr", "")) in ("property", "cached_property")
                        for mark in node.decorator_list
                    ):
                        return self.types_of(node.returns, module)
                    return frozenset({("call", node, module_name, owner)})
            kept = self._kept_on_self((module_name, class_name)).get(name)
            if kept:
                return kept
        return NOTHING

    def _kept_on_self(self, owner: tuple[str, str]) -> dict[str, Types]:
        if owner in self.kept:
            return self.kept[owner]
        found = self.kept[owner] = {}  # there already while it is filled: a constructor may ask for its own attributes
        module = self.modules[owner[0]]
        for node in module.names[owner[1]].body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                reader = FunctionReader(self, module, node, owner)
                given = (pair for inner in reader.inside if isinstance(inner, ast.Assign) for pair in _assignments(inner))
                for target, value in given:
                    if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
                        found[target.attr] = found.get(target.attr, NOTHING) | reader.infer(value)
                for inner in reader.inside:
                    if isinstance(inner, ast.AnnAssign) and getattr(getattr(inner.target, "value", None), "id", "") == "self":
                        found[inner.target.attr] = self.types_of(inner.annotation, module)
        return found


class FunctionReader:
    """The types of the expressions in one function."""

    def __init__(
        self, source: Source, module: Module, node: ast.AST, owner: tuple[str, str] | None, outer: dict | None = None
    ) -> None:
        self.source, self.module, self.node = source, module, node
        self.inside = list(_own(node))
        self.names: dict[str, Types] = dict(outer or {})
        arguments = getattr(node, "args", None)
        if arguments is not None:
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            self.names |= {argument.arg: source.types_of(argument.annotation, module) for argument in every}
            if arguments.vararg:
                self.names[arguments.vararg.arg] = frozenset({("items", source.types_of(arguments.vararg.annotation, module))})
            if owner and every and every[0].arg in ("self", "cls"):
                self.names[every[0].arg] = frozenset({("object" if every[0].arg == "self" else "class", owner)})
        self._learn_names()

    def _learn_names(self) -> None:
        givers = [node for node in self.inside if isinstance(node, GIVERS)]
        for _ in range(3):  # a name may be used above the line that gives it
            before = dict(self.names)
            for node in givers:
                self._learn_from(node)
            if self.names == before:
                return

    def _learn_from(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign | ast.NamedExpr):
            for target, value in _assignments(node):
                self._bind(target, self.infer(value))
        elif isinstance(node, ast.For | ast.comprehension):
            self._bind(node.target, self._items(node.iter))
        elif isinstance(node, ast.AnnAssign):
            self._bind(node.target, self.source.types_of(node.annotation, self.module))
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            given = self.infer(node.context_expr)
            self._bind(node.optional_vars, given | _inside(given))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            kinds = node.args[1].elts if isinstance(node.args[1], ast.Tuple) else [node.args[1]]
            for kind in kinds:
                self._bind(node.args[0], self.source.types_of(kind, self.module))

    def reads(self) -> Iterator[tuple[tuple[str, str], str]]:
        """Yield (class, attribute) of all that is read, in functions inside this one too."""
        for inner in self.inside:
            if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Load):
                yield from ((what[1], inner.attr) for what in self.infer(inner.value) if what[0] == "object")
            if (
                isinstance(inner, ast.Call)
                and getattr(inner.func, "id", "") == "getattr"
                and isinstance(inner.args[1], ast.Constant)
            ):
                yield from ((what[1], inner.args[1].value) for what in self.infer(inner.args[0]) if what[0] == "object")
            if isinstance(inner, ast.FunctionDef | ast.Lambda) and inner is not self.node:
                yield from FunctionReader(self.source, self.module, inner, None, self.names).reads()

    def infer(self, node: ast.AST | None) -> Types:
        """Return what an expression may be."""
        rule = getattr(self, f"_of_{type(node).__name__.lower()}", None)
        return rule(node) if rule else NOTHING

    def _of_name(self, node: ast.Name) -> Types:
        if node.id in self.names:
            return self.names[node.id]
        place = self.source.find(node.id, self.module)
        if place is None:
            return NOTHING
        found, module = place
        if isinstance(found, ast.ClassDef):
            return frozenset({("class", (module.name, found.name))})
        if isinstance(found, ast.FunctionDef):
            return frozenset({("call", found, module.name, None)})
        if isinstance(found, ast.AnnAssign):
            return self.source.types_of(found.annotation, module)
        return NOTHING

    def _of_attribute(self, node: ast.Attribute) -> Types:
        found = NOTHING
        for what in self.infer(node.value):
            if what[0] in ("object", "class"):
                found |= self.source.member(what[1], node.attr)
            elif what[0] == "map" and node.attr in ("values", "items", "get", "pop"):
                found |= {(node.attr, what[1])}
        return found

    def _of_subscript(self, node: ast.Subscript) -> Types:
        found = NOTHING
        for what in self.infer(node.value):
            if what[0] in ("items", "map"):
                found |= {what} if isinstance(node.slice, ast.Slice) else what[1]
            elif (
                what[0] == "pair"
                and isinstance(node.slice, ast.Constant)
                and isinstance(node.slice.value, int)
                and node.slice.value < len(what[1])
            ):
                found |= what[1][node.slice.value]
        return found

    def _of_call(self, node: ast.Call) -> Types:  # noqa: PLR0911 (one a form)
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name in SAME and node.args:
            return frozenset({("items", self._items(node.args[0]))})
        if name in FIRST and node.args:
            return self._items(node.args[0])
        if name == "enumerate" and node.args:
            return frozenset({("items", frozenset({("pair", (NOTHING, self._items(node.args[0])))}))})
        if name == "zip":
            return frozenset({("items", frozenset({("pair", tuple(self._items(argument) for argument in node.args))}))})
        if name in MADE_BY_METHOD and isinstance(node.func, ast.Attribute):
            return frozenset(("object", what[1]) for what in self.infer(node.func.value) if what[0] in ("class", "object"))
        if name in COPIES and node.args:
            return self.infer(node.args[0])
        if name in MADE_FROM_CLASS and node.args:
            return frozenset(("object", what[1]) for what in self.infer(node.args[0]) if what[0] == "class")
        found = NOTHING
        for what in self.infer(node.func):
            if what[0] == "class":
                found |= {("object", what[1])}
            elif what[0] == "call":
                found |= self._returned(what)
            elif what[0] in ("get", "pop"):
                found |= what[1]
            elif what[0] in ("values", "items"):
                found |= {("items", what[1] if what[0] == "values" else frozenset({("pair", (NOTHING, what[1]))}))}
        return found

    def _returned(self, what: Type) -> Types:
        _, function, module, owner = what
        if getattr(function.returns, "id", "") == "Self" and owner:
            return frozenset({("object", owner)})
        return self.source.types_of(function.returns, self.source.modules[module])

    def _of_ifexp(self, node: ast.IfExp) -> Types:
        return self.infer(node.body) | self.infer(node.orelse)

    def _of_boolop(self, node: ast.BoolOp) -> Types:
        return frozenset().union(*(self.infer(value) for value in node.values))

    def _of_namedexpr(self, node: ast.NamedExpr) -> Types:
        return self.infer(node.value)

    def _of_listcomp(self, node: ast.ListComp) -> Types:
        return frozenset({("items", self.infer(node.elt))})

    _of_setcomp = _of_generatorexp = _of_listcomp

    def _of_dictcomp(self, node: ast.DictComp) -> Types:
        return frozenset({("map", self.infer(node.value))})

    def _of_list(self, node: ast.List) -> Types:
        items = [self._items(item.value) if isinstance(item, ast.Starred) else self.infer(item) for item in node.elts]
        return frozenset({("items", frozenset().union(*items))})

    def _of_dict(self, node: ast.Dict) -> Types:
        return frozenset({("map", frozenset().union(*(self.infer(value) for value in node.values)))})

    def _of_tuple(self, node: ast.Tuple) -> Types:
        if any(isinstance(item, ast.Starred) for item in node.elts):
            return self._of_list(node)
        return frozenset({("pair", tuple(self.infer(item) for item in node.elts))})

    def _items(self, node: ast.AST) -> Types:
        return _inside(self.infer(node))

    def _bind(self, target: ast.AST, types: Types) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = self.names.get(target.id, NOTHING) | types
        elif isinstance(target, ast.Tuple | ast.List):
            for number, part in enumerate(target.elts):
                for what in types:
                    if what[0] == "pair" and number < len(what[1]):
                        self._bind(part, what[1][number])
                    elif what[0] == "items":
                        self._bind(part, what[1])


def attributes_read(source: Source) -> set[tuple[tuple[str, str], str]]:
    """Return (class, attribute) of every read, each for the class that the object is known to be and all that it inherits.

    A class's own validators do not count: a key that is only checked is as dead as one that is not.
    """
    found: set[tuple[tuple[str, str], str]] = set()
    for module in source.modules.values():
        for node, owner in _functions(module):
            for read_of, name in FunctionReader(source, module, node, owner).reads():
                found.update((base, name) for base in source.bases(read_of))
    return found


def _functions(module: Module) -> Iterator[tuple[ast.AST, tuple[str, str] | None]]:
    yield module.tree, None
    for node in module.tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node, None
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and "validator" not in ast.unparse(ast.Tuple(method.decorator_list)):
                    yield method, (module.name, node.name)


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what is inside a function or a module, but not what is inside the functions and classes in it."""
    open_ = list(ast.iter_child_nodes(node))
    while open_:
        child = open_.pop()
        yield child
        if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            open_ += ast.iter_child_nodes(child)


def _assignments(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yield what an assignment gives to what."""
    for target in getattr(node, "targets", None) or [node.target]:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        yield target, node.value


def _inside(types: Types) -> Types:
    found = NOTHING
    for what in types:
        if what[0] == "items":
            found |= what[1]
        elif what[0] == "pair":
            found = found.union(*what[1])
    return found


def _module(name: str, tree: ast.Module) -> Module:
    module = Module(name, tree)
    for node in ast.walk(tree):  # imports inside of functions as well
        if isinstance(node, ast.ImportFrom) and node.module:
            module.imports |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            module.names[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            module.names[node.targets[0].id] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            module.names[node.target.id] = node
    return module
