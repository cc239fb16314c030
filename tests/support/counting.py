"""Counts what a rank says to the others, by operation: calls, and bytes of their first tensors."""

from collections import defaultdict

import torch

calls, sent = defaultdict(int), defaultdict(int)


def count(owner, names):
    """Count the calls of functions or methods of `owner`."""
    for name in names:
        setattr(owner, name, _counted(name, getattr(owner, name)))


def _counted(name, function):
    def call(*args, **kwargs):
        calls[name] += 1
        tensors = [x for x in args[:2] if isinstance(x, torch.Tensor)]  # args[0] may be `self`
        sent[name] += sum(x.nbytes for x in tensors[:1])
        return function(*args, **kwargs)

    return call


class CountingMixin:
    """For a worker: what was counted since the last time."""

    def collectives(self):
        found = {name: [calls[name], sent[name]] for name in calls}
        calls.clear()
        sent.clear()
        return found
