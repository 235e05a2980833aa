"""`python -m tests.hanging_engine HANG_FILE --model …`: the real engine process, for models of the type "hanging":
a llama whose forward pass never ends once HANG_FILE is there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx_lm.models import llama

from workers.engine.__main__ import main

hang_file = Path("/nowhere")


class Model(llama.Model):
    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        while hang_file.exists():
            pass
        return super().__call__(inputs, cache, input_embeddings)


if __name__ == "__main__":
    hang_file = Path(sys.argv.pop(1))
    module = ModuleType("mlx_lm.models.hanging")
    module.Model, module.ModelArgs = Model, llama.ModelArgs  # type: ignore[attr-defined]  # pyright: ignore
    sys.modules[module.__name__] = module
    main()
