"""The sinks of layers that a GPU compacts in one launch, and which layers it cannot."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from express_vllm.backend.gpu.joint import joint_softmax, require_alike
from express_vllm.conflicts import ConflictError


def layer(sinks=None, scale=0.125, soft_cap=50.0):
    return SimpleNamespace(scale=scale, soft_cap=soft_cap, sinks=sinks)


def read(softmax, i):
    """The sinks of layer i, as a kernel finds them."""
    at = softmax.sinks.data_ptr() + int(softmax.offsets[i]) * softmax.sinks.element_size()
    count = len(softmax.sinks)
    return torch.tensor((ctypes.c_float * count).from_address(at)[:])


@pytest.mark.parametrize("without", [set(), {0}, {1, 2}])
def test_each_layer_finds_its_own_sinks_and_others_find_none(without):
    given = [None if i in without else torch.nn.Parameter(torch.randn(3)) for i in range(4)]
    joint = joint_softmax([layer(sinks) for sinks in given])
    assert (joint.scale, joint.cap) == (0.125, 50.0)
    for i, sinks in enumerate(given):
        expected = torch.full((3,), -torch.inf) if sinks is None else sinks.detach()
        assert torch.equal(read(joint, i), expected)
    part = joint.of_layers(1, 2)
    assert torch.equal(read(part, 1), read(joint, 2))
    with torch.no_grad():
        given[3].fill_(7.0)
    assert torch.equal(read(joint, 3), torch.full((3,), 7.0)), "weights that are loaded later count"


def test_layers_without_sinks_have_none():
    assert joint_softmax([layer(), layer()]) == (0.125, 50.0, None, None)


@pytest.mark.parametrize(
    "other",
    [layer(scale=0.25), layer(soft_cap=0.0), layer(torch.zeros(3, dtype=torch.bfloat16))],
)
def test_layers_that_differ_otherwise_are_refused(other):
    require_alike([layer(torch.zeros(3)), layer(), layer(torch.ones(3))])
    with pytest.raises(ConflictError, match="differ between layers"):
        require_alike([layer(torch.zeros(3)), layer(), other])
