"""What every method has: a name, the cache that it makes for each layer, how layers differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from express_vllm.config import ServerConfig
from express_vllm.shape import Shape, make_shape
from express_vllm.wide import settle

from ..harness import Heads, LayerCache

#: A number of slots; in a policy's name it may be a share of the policy's slots: 0.25.
Size = int
#: Makes the cache of a layer, given the layer's number.
Maker = Callable[[int], LayerCache]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to keep what attention needs, without its number of slots.

    Fields are its parameters; None and "" mean: as the method does it by itself.
    """

    name: ClassVar[str]
    #: What tables call it.
    title: ClassVar[str]
    #: Whether its outcome depends on a seed.
    seeded: ClassVar[bool] = False

    def shape(self, slots: int) -> Shape:
        """Of our cache of so many slots, at whose interval others evict."""
        return make_shape(slots)

    def maker(self, heads: Heads, slots: int, seed: int) -> Maker:
        """For layers of `slots` slots; their caches share what does not depend on the layer."""
        raise NotImplementedError

    def layer_slots(self, heads: Heads, slots: int) -> list[int]:
        """Peak slots of every layer; their mean is at most `slots`."""
        return [slots] * heads.layers

    def caches(self, heads: Heads, slots: int, seed: int) -> list[LayerCache]:
        makers: dict[int, Maker] = {}
        caches = []
        for layer, own in enumerate(self.layer_slots(heads, slots)):
            if own not in makers:
                makers[own] = self.maker(heads, own, seed)
            caches.append(makers[own](layer))
        return caches


@dataclass(frozen=True, kw_only=True)
class Layered(Method):
    """A method whose layers may differ in slots at equal memory.

    Either by `tilt`, from (1 + tilt) times the mean in the first layer to (1 - tilt) times in the
    last, in `steps` groups of layers, each with the mean of its layers (0: every layer by itself).
    Or by `wide` layers, which have `factor` times the slots of the others: numbers with slashes,
    or `auto` for those that the server takes for the model.
    """

    tilt: float = 0.0
    steps: int = 0
    wide: str = ""
    factor: int = ServerConfig.wide_factor

    def layer_slots(self, heads: Heads, slots: int) -> list[int]:
        wide, factor = self._wide_layers(heads)
        if wide:
            ordinary = slots * heads.layers // (heads.layers + len(wide) * (factor - 1))
            return [ordinary * (factor if i in wide else 1) for i in range(heads.layers)]
        steps = self.steps or (heads.layers if self.tilt else 1)
        groups = torch.linspace(1 + self.tilt, 1 - self.tilt, heads.layers).tensor_split(steps)
        return [round(slots * float(g.mean())) for g in groups for _ in range(len(g))]

    def _wide_layers(self, heads: Heads) -> tuple[tuple[int, ...], int]:
        """The wide layers and how many times the slots of an ordinary one they have."""
        if self.wide == "auto":
            config = settle(ServerConfig(), heads.config)
            return config.wide_layers or (), config.wide_factor
        layers = tuple(map(int, filter(None, self.wide.split("/"))))
        if any(layer >= heads.layers for layer in layers):
            raise ValueError(
                f"{self.name}, wide={self.wide}: the model's layers are 0 to {heads.layers - 1}"
            )
        return layers, self.factor
