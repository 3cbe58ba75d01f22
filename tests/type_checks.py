"""Checks shapes and types of every signature while tests run."""

import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any

import beartype
import jaxtyping

_jaxtyped = jaxtyping.jaxtyped


def check_types(*packages: str) -> None:
    """Check every signature of packages that are not imported yet.

    Args:
        packages: Their names.
    """
    # An int may stand for a float, as mypy has it; a violation is a TypeError, as jaxtyping's own is. The hook takes its
    # checker by a name in a module, so this one gets a name there.
    vars(beartype)["as_mypy"] = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
    # What the hook decorates everything with. jaxtyping's own binds the arguments in Python and checks them twice, some 30 us
    # a call and two fifths of a training test, for more words in a message.
    jaxtyping.jaxtyped = _checked
    jaxtyping.install_import_hook(list(packages), "beartype.as_mypy")


def _checked(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """Do what `jaxtyped` does: names of sizes stand for the same number in all of a call."""

    def decorate(thing: Any) -> Any:
        # Of a generator function the checker would look at what is yielded too, when the call's sizes are long forgotten;
        # names in quotes that stand for nothing while tests run, only jaxtyping tolerates.
        hints = [part for hint in getattr(thing, "__annotations__", {}).values() for part in _parts(hint)]
        in_quotes = any(isinstance(part, str | typing.ForwardRef) for part in hints)
        if not inspect.isfunction(thing) or inspect.isgeneratorfunction(thing) or in_quotes:
            return _jaxtyped(thing, typechecker=typechecker)
        checked = typechecker(thing)
        if checked is thing:  # nothing in it is annotated
            return thing
        has_shapes = any(inspect.isclass(part) and issubclass(part, jaxtyping.AbstractArray) for part in hints)

        @functools.wraps(thing)
        def call(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            if jaxtyping.config.jaxtyping_disable:
                return thing(*args, **kwargs)
            if not has_shapes:
                return checked(*args, **kwargs)
            with _jaxtyped("context"):
                return checked(*args, **kwargs)

        return call

    return decorate


def _parts(hint: Any) -> Iterator[Any]:
    """Yield what a type hint is made of."""
    inner = hint if isinstance(hint, list) else typing.get_args(hint)  # a list: the arguments of a Callable
    if not inner:
        yield hint
    for part in inner:
        yield from _parts(part)
