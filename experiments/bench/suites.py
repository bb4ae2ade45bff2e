"""The table of suites: what each measures is in the file that it comes from."""

from collections.abc import Callable
from typing import Literal, get_args

Name = Literal[
    "peers", "losses", "classes", "gaussian", "growth", "step", "start", "first-minutes", "devices",
    "population", "torch-cpu",
    "gpu-step", "gpu-epoch", "gpu-torch",
]  # fmt: skip
NAMES: tuple[str, ...] = get_args(Name)


def suite(name: Name) -> Callable[..., tuple[list[dict], list[str]]]:
    """Return a suite, ``(out, *, repeats=...) -> (rows, notes)``.

    It is imported only now, because suites need packages that the others do not.
    """
    match name:
        case "peers":
            from .peers import peers as measured
        case "losses":
            from .transport import losses as measured
        case "classes":
            from .losses import classes as measured
        case "gaussian":
            from .losses import gaussian as measured
        case "growth":
            from .growth import growth as measured
        case "step":
            from .step import step as measured
        case "start":
            from .start import start as measured
        case "first-minutes":
            from .first_minutes import first_minutes as measured
        case "devices":
            from .devices import devices as measured
        case "population":
            from .population import population as measured
        case "torch-cpu":
            from .torch_cpu import torch_cpu as measured
        case "gpu-step":
            from .gpu import gpu_step as measured
        case "gpu-epoch":
            from .gpu import gpu_epoch as measured
        case "gpu-torch":
            from .gpu_torch import gpu_torch as measured
    return measured
