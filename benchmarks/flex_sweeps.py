"""FlexAttention in `sweeps.py`, which starts this: a case a line on standard input, its seconds out.

Needs torch, which is no dependency of this project. The first time that a case is asked for compiles it.
"""

import functools
from collections.abc import Callable
from typing import Any

from flex_attention import calls_of, device_seconds  # first, for what it sets before it imports torch
from flex_process import answer_all
from sweep_cases import SweepCase

# isort: split
import torch  # pyright: ignore[reportMissingImports]
import torch._functorch.config  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Answers each line with one, the versions first."""
    torch._functorch.config.donated_buffer = False  # or what forward keeps serves one backward pass alone
    answer_all(_measured, {"torch": torch.__version__, "cuda": torch.version.cuda})


def _measured(case: dict[str, Any], samples: int) -> dict[str, Any]:
    seconds, failed = {}, {}
    for name, call in _calls_of(SweepCase(**case)).items():
        try:
            seconds[name] = device_seconds(call, samples)
        except Exception as error:  # whatever it is, the other parts are to be measured
            failed[name] = f"{type(error).__name__}: {error}"[:400]
    return {"seconds": {name: {"median": x} for name, x in seconds.items()}, "failed": failed}


@functools.lru_cache(maxsize=1)
def _calls_of(case: SweepCase) -> dict[str, Callable[[], Any]]:
    return calls_of(case.case)


if __name__ == "__main__":
    main()
