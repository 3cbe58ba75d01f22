"""Graph matching at toy size with each of its switches off: docs/methods.md's table.

    python -m tests.benchmarks.bench_matching_toy [--seeds 3] [--steps 100]

A linear encoder of four cells a node; 24 of 32 input dimensions differ between the views. Printed: the share of nodes matched
with themselves in the first 10 and in the last 20 steps.
"""

import argparse
import sys
from dataclasses import dataclass

import torch
from meddino_pretrain.methods.graph_matching.affinities import (
    MessagePassing,
    edge_affinity,
    global_affinity,
    local_affinity,
    nearest_nodes,
)
from torch import nn

from meddino.core.seeds import numpy_rng
from meddino.losses.matching import EdgeAffinities, MatchingSetting, matching_loss


@dataclass(frozen=True)
class Switches:
    """What of the method is on."""

    edge_weight: float = 1.0
    message_layers: int = 2
    message_scale: float | None = 0.1
    noise_scale: float = 0.05
    alpha: float = 0.8


SWITCHES = {
    "full": Switches(),
    "no second order": Switches(edge_weight=0),
    "no message passing": Switches(message_layers=0),
    "no noise": Switches(noise_scale=0),
    "noise as in the paper": Switches(noise_scale=1),
    "no local": Switches(alpha=1),
    "messages as printed": Switches(message_scale=None),
}


def toy(on: Switches, seed: int, steps: int, nodes: int = 16, cells: int = 4) -> tuple[float, float]:
    """Train and return the share of nodes matched with themselves, at first and at last."""
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    encoder, projector = nn.Linear(32, 64), nn.Linear(64, 128)
    messages = MessagePassing(128, on.message_layers, on.message_scale)
    optimizer = torch.optim.Adam([*encoder.parameters(), *projector.parameters(), *messages.parameters()], lr=2e-3)
    centres, shares = torch.rand(nodes, cells, 2, generator=rng), []

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    for step in range(steps):
        signal = draw(2, nodes, 1, 8) + 0.7 * draw(2, nodes, cells, 8)
        seen = [
            encoder(torch.cat([signal + 0.3 * draw(*signal.shape), 2.6 * draw(2, nodes, cells, 24)], dim=-1)) for _ in range(2)
        ]
        features = [projector(each.mean(2)) for each in seen]
        heads = [nearest_nodes(each, 5) for each in features]
        one, other = (messages(*graph) for graph in zip(features, heads, strict=True))
        vertex = global_affinity(one, other)
        if on.alpha < 1:
            local = [local_affinity(*graph, centres, centres, (4, 4)) for graph in zip(*seen, strict=True)]
            vertex = on.alpha * vertex + (1 - on.alpha) * torch.stack(local)
        edges = EdgeAffinities(edge_affinity(one, heads[0], other, heads[1]), *heads) if on.edge_weight else None
        noise = on.noise_scale * torch.from_numpy(numpy_rng(seed, step).gumbel(size=(2, nodes, nodes))).float()
        loss, share = matching_loss(vertex, edges, noise if on.noise_scale else None, MatchingSetting())
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        shares.append(share.mean().item())
    return sum(shares[:10]) / 10, sum(shares[-20:]) / 20


def main() -> None:
    """Print a line a switch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, on in SWITCHES.items():
        found = [toy(on, seed, arguments.steps) for seed in range(arguments.seeds)]
        sys.stdout.write(f"{name}: {', '.join(f'{first:.3f} -> {last:.3f}' for first, last in found)}\n")


if __name__ == "__main__":
    main()
