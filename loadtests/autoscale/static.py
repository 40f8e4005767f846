"""The best static placement of many models on a number of GPUs: an exact knapsack over the goodput that each model has
with each number of replicas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def best_placement(goodput: Mapping[str, Sequence[float]], gpus: int) -> dict[str, int]:
    """Return the number of replicas of each model, at most `gpus` in all, with the highest goodput. `goodput[model][n]`
    is the goodput of n replicas.
    """
    best = [0.0] * (gpus + 1)
    choice: list[dict[str, int]] = [{} for _ in range(gpus + 1)]
    for model, by_count in goodput.items():
        above, chosen = list(best), list(choice)
        for have in range(gpus + 1):
            for count in range(1, min(len(by_count) - 1, have) + 1):
                value = best[have - count] + by_count[count]
                if value > above[have]:
                    above[have], chosen[have] = value, {**choice[have - count], model: count}
        best, choice = above, chosen
    return choice[max(range(gpus + 1), key=lambda have: best[have])]
