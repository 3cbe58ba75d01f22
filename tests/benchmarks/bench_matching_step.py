"""What the matching costs beside a ResNet-50's step: one graph of the paper's size, one thread, a JSON line.

    python -m tests.benchmarks.bench_matching_step

A graph is 16 images in two crops of 224 px and two of 96 px: the network's forward and backward pass over its 64 crops beside
the matching of its 5 pairs of views with 5 edges a node, affinities of edges and gradient included. Both grow with the number
of graphs alike. Then 40 such matchings by 1, 2 and 4 worker threads.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from meddino_pretrain.methods.graph_matching.affinities import edge_affinity, nearest_nodes

from meddino.losses.matching import EdgeAffinities, MatchingSetting, matching_loss
from meddino.models.registry import build_backbone

NODES, EDGES, DIM, PAIRS = 16, 5, 128, 5
CROPS_PX = (224, 224, 96, 96)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3)
    times = parser.parse_args().times
    torch.set_num_threads(1)
    backbone = build_backbone("timm:resnet50").train()
    step = _median(partial(_network, backbone), times, time.process_time)
    matching = _median(partial(_matching, PAIRS, 1), times * 5, time.process_time)
    by_threads = {
        threads: round(_median(partial(_matching, 40, threads), times, time.perf_counter), 4) for threads in (1, 2, 4)
    }
    found = {"network_s": round(step, 3), "matching_s": round(matching, 4), "share": round(matching / step, 5)}
    sys.stdout.write(json.dumps({**found, "wall_s_of_40_by_threads": by_threads}) + "\n")


def _network(backbone: torch.nn.Module) -> None:
    for px in CROPS_PX:
        seen = backbone(torch.randn(NODES, 3, px, px))
        (seen.cls_token.mean() + seen.patch_tokens.mean()).backward()


def _matching(count: int, threads: int) -> None:
    torch.manual_seed(0)
    one = torch.randn(count, NODES, DIM, requires_grad=True)
    other = torch.randn(count, NODES, DIM, requires_grad=True)  # views that have nothing in common yet: the longest search
    heads, other_heads = nearest_nodes(one, EDGES), nearest_nodes(other, EDGES)
    vertex = torch.nn.functional.normalize(one, dim=-1) @ torch.nn.functional.normalize(other, dim=-1).transpose(1, 2)
    edges = EdgeAffinities(edge_affinity(one, heads, other, other_heads), heads, other_heads)
    loss, _ = matching_loss(vertex, edges, None, replace(MatchingSetting(), threads=threads))
    loss.mean().backward()  # type: ignore[no-untyped-call]


def _median(work: Callable[[], None], times: int, clock: Callable[[], float]) -> float:
    spent = []
    for _ in range(times + 1):  # the first one warms up
        start = clock()
        work()
        spent.append(clock() - start)
    return sorted(spent[1:])[times // 2]


if __name__ == "__main__":
    main()
