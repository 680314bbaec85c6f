"""The numerical core imports without the libraries that only the edges need."""

import subprocess
import sys

EDGES = ["datasets", "tensorboard", "accelerate", "sentencepiece", "tokenizers"]


def test_the_numerical_core_needs_torch_alone():
    """As on a machine that has none of the others: their import fails, the core's does not."""
    blocked = ["transformers", *EDGES]
    code = f"""
import sys, types
for name in {blocked!r}:
    sys.modules[name] = None
package = types.ModuleType("deq_lm")
package.__path__ = ["deq_lm"]
sys.modules["deq_lm"] = package
import deq_lm.equilibrium, deq_lm.regularizers.jacobian, deq_lm.heads, deq_lm.cells.transformer_xl
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_does_not_import_what_only_the_edges_need():
    code = f"import sys, deq_lm; print([name for name in {EDGES[:2]!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"
