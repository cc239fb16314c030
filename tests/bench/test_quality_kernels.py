"""The harness drives the Triton kernels as it does on a GPU; here in Triton's interpreter.

The interpreter must be chosen before Triton is loaded, so this runs in a process of its own.
"""

import pytest
import torch
from interpreted import assert_same

SCRIPT = """
import torch
from bench.quality.harness import Heads
from bench.quality.policies import Policy

heads = Heads(2, 4, 2, 64, 0.125, None, None)
generator = torch.Generator().manual_seed(0)
query = 2 * torch.randn(2, 4, 170, 64, generator=generator)
key, value = torch.randn(2, 2, 2, 170, 64, generator=generator)
for name in ("express", "paper", "express:schedule=paper,kernel=gaussian"):
    outputs = []
    for triton in (False, True):
        cache = Policy.parse(name, 128).caches(heads, seed=3)[1]
        cache.triton = triton
        parts = [cache.attend(*(x[:, :, a:b] for x in (query, key, value)))
                 for a, b in ((0, 101), (101, 170))]
        outputs.append(torch.cat(parts, 2))
    worst = float((outputs[0] - outputs[1]).abs().max())
    assert worst < 1e-3, (name, worst)
print("same")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles the kernels")
def test_the_kernels_in_the_harness_equal_the_cpu_path():
    assert_same(SCRIPT)
