"""`import compressor` is cheap, and registers with transformers in either order of import."""

import subprocess
import sys

import pytest

REGISTERED = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'halfweight' in m"


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import compressor, transformers",
        "import transformers.quantizers.auto, compressor",
        "import compressor.hf",
        "import compressor, compressor.hf, importlib; importlib.reload(compressor)",
    ],
)
def test_either_order_registers_once(imports: str) -> None:
    run(f"{imports}; {REGISTERED}")


def test_importing_compressor_loads_neither_torch_nor_transformers() -> None:
    run("import compressor, sys; assert not {'torch', 'transformers'} & set(sys.modules)")
