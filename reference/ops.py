"""Makes the vectors of crates/metal-candle/tests/reference.rs: every operation in f64, by PyTorch.

    pip install -r reference/requirements.lock && python reference/ops.py
"""

from pathlib import Path

import torch

from vectors import (
    attention, casts, elementwise, indexing, losses, movement, norms, products, reductions,
)
from vectors.case import write_all

# One thread, so that sums have one order.
torch.set_num_threads(1)

FOLDER = Path(__file__).parent.parent / "crates/metal-candle/tests/reference"
FAMILIES = [
    elementwise, casts, reductions, movement, indexing, products, norms, attention, losses,
]

if __name__ == "__main__":
    write_all(FOLDER, [family.make() for family in FAMILIES])
