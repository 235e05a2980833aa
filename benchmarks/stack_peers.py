"""The environment of vllm-mlx, which cannot share ours: it needs mlx-lm < 0.32. Made when asked for."""

from __future__ import annotations

import sys
from importlib.metadata import version

from benchmarks.queue_peers import python_with

VLLM_MLX = "vllm-mlx==0.6.0"
_MLX = f"mlx[cpu]=={version('mlx')}" if sys.platform == "linux" else f"mlx=={version('mlx')}"

# What it needs to serve text. Left out of what it names: torchvision, opencv, gradio, mlx-vlm, mlx-embeddings and
# lm-format-enforcer (images, its web page, embeddings, JSON schemas), which it imports only for those.
PACKAGES = (
    _MLX,
    "mlx-lm==0.31.3",
    "transformers==5.23.0",
    "tokenizers==0.23.3",
    "numpy==2.4.6",
    "pillow==13.0.0",
    "pyyaml==6.0.3",
    "requests==2.34.2",
    "tabulate==0.10.0",
    "psutil==7.2.2",
    "fastapi==0.165.0",
    "starlette==1.10.0",
    "uvicorn==0.54.0",
    "prometheus-client==0.26.0",
    "mcp==2.3.0",
    "jsonschema==4.26.0",
    "llguidance==1.9.1",
    "pytz==2026.6",
    "tqdm==4.70.1",
)


def vllm_mlx_python() -> str:
    """The interpreter of an environment with vllm-mlx and the MLX version that we have."""
    return python_with(PACKAGES, alone=(VLLM_MLX,))
