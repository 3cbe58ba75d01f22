"""What runs through torch.compile: modules when a run says so, and the point-wise chains of losses along with them."""

import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from meddino.core.machine_config import Compile

BACKEND = "inductor"

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_switch = {"functions": False}


def wants_compiling(asked: Compile, device: torch.device) -> bool:
    """Tell whether to compile: "auto" does on a CUDA device; on a CPU our own layers are faster and begin at once."""
    return device.type == "cuda" if asked == "auto" else asked


def compile_modules(modules: Iterable[nn.Module]) -> None:
    """Compile modules' forward passes, in place, each for any number of tokens at once.

    A kernel for one number would be followed by one for any: drop path and crop sizes change it from step to step. The forward
    pass alone is compiled, around what recomputes activations and inside what gathers weights: hooks stay outside, in the
    order checkpointing, compiling, sharding.
    """
    for module in modules:
        forward = module.forward
        if isinstance(forward, functools.partial) and hasattr(forward.func, "stays_outside"):
            compiled = torch.compile(forward.args[0], dynamic=True, backend=BACKEND)
            module.forward = functools.partial(forward.func, compiled)
        else:
            module.forward = torch.compile(forward, dynamic=True, backend=BACKEND)


def outside_of_graphs(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Mark a function whose first argument is a module's forward pass: `compile_modules` compiles that alone.

    Dynamo cannot put what is computed again into one graph twice.
    """
    function.stays_outside = True  # type: ignore[attr-defined]
    return function


def compile_functions(enabled: bool) -> None:
    """Say whether functions marked with `compilable` run compiled from now on, in this process."""
    _switch["functions"] = enabled


def compilable(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Mark a function of tensors, without a gradient, that is worth compiling: many passes over memory become few."""

    @functools.cache
    def compiled() -> Callable[_Arguments, _Result]:
        return torch.compile(function, dynamic=True, backend=BACKEND)

    @functools.wraps(function)
    def chosen(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
        return (compiled() if _switch["functions"] else function)(*arguments, **named)

    chosen.runs_compiled = True  # type: ignore[attr-defined]
    return chosen
