"""The refit against a direct solution of the whole ridge problem, in float64."""

from __future__ import annotations

import pytest
import torch

from expertcut.measure import refit as module
from expertcut.measure.refit import LEAST, Linear, best_ridge, refit

TOKENS, HIDDEN, WIDTH = 400, 12, 7
RIDGES = (0.01, 0.3, 3.0)


def linear(seed: int, tokens: int, width: int = WIDTH, of: int = TOKENS) -> tuple[Linear, torch.Tensor]:
    """A map that sees some of the tokens, and its inputs (n, I)."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randperm(of, generator=random)[:tokens].sort().values
    inputs = torch.randn(tokens, width, generator=random)
    return Linear(rows, inputs), inputs


def noise(seed: int = 99, of: int = TOKENS) -> torch.Tensor:
    return torch.randn(of, HIDDEN, generator=torch.Generator().manual_seed(seed))


def changes(maps: list[Linear]) -> list[torch.Tensor]:
    """What was found; all maps must have changed."""
    return [found for found in (it.change for it in maps) if found is not None]


def solved(made: list[tuple[Linear, torch.Tensor]], target: torch.Tensor, ridge: float) -> list[torch.Tensor]:
    """The changes that are best together: all maps' inputs side by side, each with its own strength, solved at once."""
    wide = torch.zeros(len(target), sum(a.shape[1] for _, a in made), dtype=torch.float64)
    strength, at = torch.zeros(wide.shape[1], dtype=torch.float64), 0
    for it, a in made:
        part = slice(at, at + a.shape[1])
        wide[it.rows_n, part] = a.double()
        strength[part] = ridge * a.double().square().sum() / a.shape[1]
        at += a.shape[1]
    found = torch.linalg.solve(wide.T @ wide + strength.diag(), wide.T @ target.double())
    return [part.T for part in found.split([a.shape[1] for _, a in made])]


@pytest.mark.parametrize("ridge", RIDGES)
def test_one_map_is_the_closed_form_and_stays_so(ridge: float) -> None:
    made, target = linear(0, 150), noise()
    (expected,) = solved([made], target, ridge)
    for rounds in (1, 5):
        it, left = Linear(made[0].rows_n, made[0].given_nI), target.clone()
        refit([it], left, ridge, rounds)
        (found,) = changes([it])
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
        taken = target.clone()
        taken[it.rows_n] -= made[1] @ found.T
        torch.testing.assert_close(left, taken, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ridge", RIDGES)
def test_many_rounds_lead_to_what_is_best_for_all_maps_together(ridge: float) -> None:
    made = [linear(0, 150), linear(1, 250, 5), linear(2, 90), linear(3, TOKENS, 9)]
    maps, target = [it for it, _ in made], noise()
    refit(maps, target.clone(), ridge, 1)
    after_one = changes(maps)
    maps, left = [Linear(it.rows_n, it.given_nI) for it in maps], target.clone()
    refit(maps, left, ridge, 60)
    expected = solved(made, target, ridge)
    for found, wanted in zip(changes(maps), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)
    assert not any(torch.allclose(one.double(), best, atol=1e-5) for one, best in zip(after_one, expected, strict=True))
    for it, a in made:
        target[it.rows_n] -= a @ expected.pop(0).float().T
    torch.testing.assert_close(left, target, atol=1e-4, rtol=1e-4)


def test_every_round_lowers_what_is_minimised() -> None:
    made = [linear(seed, 200) for seed in range(5)]
    maps, left, values = [it for it, _ in made], noise(), list[float]()
    for _ in range(4):
        refit(maps, left, 0.3, 1)
        paid = sum(
            float(0.3 * a.square().sum() / WIDTH * found.square().sum())
            for (_, a), found in zip(made, changes(maps), strict=True)
        )
        values.append(float(left.square().sum()) + paid)
    assert values == sorted(values, reverse=True) and values[0] < float(noise().square().sum())


def test_few_tokens_leave_a_map_alone() -> None:
    few, enough = linear(0, LEAST - 1)[0], linear(1, LEAST)[0]
    target = noise()
    left = target.clone()
    refit([few], left, 0.3, 2)
    assert few.change is None and torch.equal(left, target)
    refit([few, enough], left, 0.3, 2)
    assert few.change is None and enough.change is not None and not torch.equal(left, target)


def test_a_map_that_is_given_nothing_adds_nothing() -> None:
    it, left = Linear(torch.arange(TOKENS), torch.zeros(TOKENS, WIDTH)), noise()
    refit([it, Linear(torch.arange(0), torch.zeros(0, WIDTH))], left, 0.3, 2)
    assert it.change is None and torch.equal(left, noise())
    assert best_ridge([it], left, torch.arange(TOKENS) % 4 == 3, RIDGES) == (None, 0.0)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (module.CHUNK, 37, 1):
        monkeypatch.setattr(module, "CHUNK", size)
        maps, left = [linear(seed, 200)[0] for seed in range(3)], noise()
        held = torch.arange(TOKENS) % 4 == 3
        chosen = best_ridge(maps, left, held, RIDGES)
        refit(maps, left, 0.3, 2)
        found.append((chosen, left, changes(maps)))
    for chosen, left, some in found[1:]:
        assert chosen[0] == found[0][0][0] and chosen[1] == pytest.approx(found[0][0][1], rel=1e-4)
        torch.testing.assert_close(left, found[0][1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(some, found[0][2], atol=1e-6, rtol=1e-4)


HELD = torch.arange(4000) % 4 == 3


def target_of(made: list[tuple[Linear, torch.Tensor]], of: int) -> torch.Tensor:
    """What fixed changes of these maps would add up to."""
    found = torch.zeros(of, HIDDEN)
    for seed, (it, a) in enumerate(made):
        found[it.rows_n] += a @ noise(seed, WIDTH)
    return found


def test_a_plain_signal_asks_for_a_weak_ridge_and_noise_for_a_strong_one_or_none() -> None:
    made = [linear(seed, 1000, of=4000) for seed in range(3)]
    maps, signal = [it for it, _ in made], target_of([linear(0, 1000, of=4000)], 4000)
    ridge, share = best_ridge(maps[:1], signal, HELD, RIDGES)
    assert ridge == min(RIDGES) and share > 0.99
    for seed in range(8):
        ridge, share = best_ridge(maps, noise(seed, 4000), HELD, RIDGES)
        assert (ridge is None or ridge == max(RIDGES)) and 0 <= share < 0.01
    assert all(it.change is None for it in maps), "choosing changes nothing"


def test_what_helps_only_where_it_was_fitted_is_none() -> None:
    made = [linear(seed, 1000, of=4000) for seed in range(2)]
    opposite = target_of(made, 4000)
    opposite[HELD] *= -1
    assert best_ridge([it for it, _ in made], opposite, HELD, RIDGES) == (None, 0.0)


def test_without_enough_tokens_on_either_side_there_is_none() -> None:
    maps, signal = [linear(0, 60)[0]], target_of([linear(0, 60)], TOKENS)
    for count, expected in ((LEAST - 1, None), (LEAST, min(RIDGES)), (60 - LEAST, min(RIDGES)), (61 - LEAST, None)):
        held = torch.zeros(TOKENS, dtype=torch.bool)
        held[maps[0].rows_n[:count]] = True
        assert best_ridge(maps, signal, held, RIDGES)[0] == expected, count
