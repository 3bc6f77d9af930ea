"""Measures of explanations against numbers worked out by hand, and against loops that count what the papers count."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynlrp import InputError, metrics

WEIGHTS = torch.tensor([[4.0, 1.0, 2.0, -1.0]])


def total(kept: torch.Tensor) -> torch.Tensor:
    """A model that adds up what is left."""
    return (kept * WEIGHTS).sum(1)


def test_flip_of_a_sum():
    curves = metrics.flip(total, WEIGHTS, steps=4)
    assert curves.morf.tolist() == [[6, 2, 0, -1, 0]]
    assert curves.lerf.tolist() == [[6, 7, 6, 4, 0]]
    assert curves.deletion.item() == (3 + 2 + 0 - 1 + 0) / 4
    assert curves.insertion.item() == (3 + 7 + 6 + 4 + 0) / 4
    assert (curves.abpc.item(), curves.comprehensiveness.item(), curves.sufficiency.item()) == (4, 5, 1)
    assert curves.normalized().abpc.item() == pytest.approx(4 / 6)
    assert curves.normalized().morf[0, :2].tolist() == pytest.approx([1, 2 / 6])


def test_steps_hide_shares_to_the_nearest_number():
    relevance = torch.tensor([[5.0, 4, 3, 2, 1], [5, 4, 3, 2, 1]])
    valid = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]])
    curves = metrics.flip(lambda kept: kept.sum(1).float(), relevance, steps=4, valid=valid)
    assert curves.morf.tolist() == [[5, 4, 2, 1, 0], [5, 4, 3, 3, 2]]  # of 3: 0.75, 1.5 and 2.25


def test_what_is_not_valid_stays_in_both_orders():
    relevance = torch.tensor([[9.0, 1, 2, -9]])
    seen = []
    metrics.flip(
        lambda kept: seen.append(kept[0].int().tolist()) or kept.sum(1).float(),
        relevance,
        steps=2,
        valid=torch.tensor([[False, True, True, False]]),
    )
    assert seen == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1]]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9), st.integers(1, 9))
def test_least_relevant_first_is_insertion_read_backwards(values, steps):
    relevance = torch.tensor([values], dtype=torch.float32)
    weights = torch.arange(1.0, len(values) + 1).square()
    curves = metrics.flip(lambda kept: (kept * weights).sum(1), relevance, steps=steps)
    order = sorted(range(len(values)), key=lambda i: -values[i])
    for step in range(steps + 1):
        hidden = math.floor(len(values) * step / steps + 0.5)
        assert curves.lerf[0, step] == sum(weights[i] for i in order[: len(values) - hidden])
        assert curves.morf[0, step] == sum(weights[i] for i in order[hidden:])


def test_several_scores_at_once():
    curves = metrics.flip(lambda kept: torch.stack([total(kept), -total(kept)], 1), WEIGHTS, steps=4)
    assert curves.morf.shape == (1, 5, 2)
    assert curves.abpc.tolist() == [[4, -4]]
    assert curves.normalized().abpc.tolist() == [pytest.approx([4 / 6, 4 / 6])]


def test_a_score_that_never_changes_has_no_unit():
    with pytest.raises(InputError, match="no unit"):
        metrics.flip(lambda kept: torch.ones(1), WEIGHTS, steps=2).normalized()


def test_flip_pixels_hides_patches_of_all_channels():
    images = torch.arange(32.0).view(1, 2, 4, 4)
    relevance = torch.zeros(1, 2, 4, 4)
    relevance[0, 0, 0, 3], relevance[0, 1, 3, 0], relevance[0, 1, 3, 1] = 3, 2, 2  # upper right 3, lower left 4
    left = metrics.flip_pixels(
        lambda x: x[:, :, ::2, ::2].flatten(1), images, relevance, fill=metrics.zero, patch=2, steps=4
    )
    corners = [0, 2, 8, 10, 16, 18, 24, 26]  # the first pixel of every patch, in both channels
    assert left.morf[0, 0].tolist() == corners
    assert left.morf[0, 1].tolist() == [0, 2, 0, 10, 16, 18, 0, 26]
    assert left.morf[0, 2].tolist() == [0, 0, 0, 10, 16, 0, 0, 26]
    assert left.lerf[0, 1].tolist() == [0, 2, 8, 0, 16, 18, 24, 0]
    assert left.lerf[0, 4].tolist() == [0] * 8
    flat = metrics.flip_pixels(
        lambda x: x.sum((1, 2, 3)), images, relevance.sum(1), fill=metrics.zero, patch=2, steps=4
    )
    assert flat.morf[0].tolist() == [496, 348, 248, 164, 0]  # patches of 84, 100, 148 and 164


def test_patches_at_the_border_may_be_smaller():
    images = torch.ones(1, 1, 5, 5)
    relevance = torch.zeros(1, 5, 5)
    relevance[0, 4, 4] = 1
    curves = metrics.flip_pixels(lambda x: x.sum((1, 2, 3)), images, relevance, fill=metrics.zero, patch=2, steps=9)
    assert curves.morf[0, :3].tolist() == [25, 24, 20]


def test_blur():
    spot = torch.zeros(1, 2, 5, 5)
    spot[0, 0, 1, 1] = spot[0, 1, 2, 2] = 1
    blurred = metrics.blur(3, 1.0)(spot)
    side, middle = (v / (1 + 2 * math.exp(-0.5)) for v in (math.exp(-0.5), 1))
    assert blurred[0, 1, 2, 2].item() == pytest.approx(middle**2)
    assert blurred[0, 1, 1, 2].item() == pytest.approx(side * middle)
    assert blurred[0, 0, 0, 0].item() == pytest.approx((2 * side) ** 2)  # mirrored at both borders
    assert blurred[0, 1, 0, 0] == 0
    assert torch.allclose(metrics.blur()(torch.full((2, 3, 64, 64), 0.7)), torch.tensor(0.7))
    wide = metrics.blur(51, 20.0)(torch.eye(101)[50].expand(1, 1, 101, 101))  # a vertical line
    assert wide[0, 0, 50, 50 + 25] / wide[0, 0, 50, 50] == pytest.approx(math.exp(-0.5 * (25 / 20) ** 2))
    assert wide[0, 0, 50, 50 + 26] == 0


def test_other_fills():
    images = torch.arange(8.0).view(1, 2, 2, 2)
    assert metrics.mean(images).flatten().tolist() == [1.5, 5.5]
    assert metrics.zero(images) == 0


def test_flip_tokens():
    ids = torch.tensor([[1, 10, 20, 30, 2]])
    seen = []
    curves = metrics.flip_tokens(
        lambda ids: seen.append(ids[0].tolist()) or ids.sum(1).float(),
        ids,
        torch.tensor([[9.0, 0.5, -1, 2, 9]]),
        fill=7,
        steps=3,
        valid=torch.tensor([[0, 1, 1, 1, 0]]),
    )
    assert seen[2:4] == [[1, 10, 20, 7, 2], [1, 10, 7, 30, 2]]
    assert curves.morf[0].tolist() == [63, 40, 37, 24]
    assert curves.lerf[0].tolist() == [63, 50, 47, 24]


def test_scores_need_no_graph():
    weight = torch.ones(1, 4, requires_grad=True)
    assert not metrics.flip(lambda kept: (kept * weight).sum(1), WEIGHTS, steps=2).morf.requires_grad


@pytest.mark.parametrize(
    ("order", "answer", "accuracy", "union"),
    [
        ([2, 3], [2, 3], 1, 1),
        ([2, 3, 4], [2, 3, 4], 1, 1),  # two of three
        ([2, 5], [2, 3], 1 / 2, 1 / 3),
        ([5, 6], [2, 3], 0, 0),
        ([2, 5], [2], 1, 1),  # a single position counts twice, and the second place is not looked at
        ([5, 2], [2], 1, 2 / 3),
        ([5, 6], [2], 0, 0),
    ],
)
def test_top_2(order, answer, accuracy, union):
    relevance, mask = torch.zeros(1, 8), torch.zeros(1, 8, dtype=torch.bool)
    relevance[0, order] = torch.arange(9.0, 9 - len(order), -1)
    mask[0, answer] = True
    found = metrics.top_k(relevance, mask, 2)
    assert found.accuracy.item() == pytest.approx(accuracy)
    assert found.iou.item() == pytest.approx(union)


def test_top_1_among_what_is_valid():
    relevance = torch.tensor([[9.0, 1, 2], [1, 2, 3]])
    mask = torch.tensor([[False, False, True], [True, False, False]])
    valid = torch.tensor([[False, True, True], [True, True, True]])
    assert metrics.top_k(relevance, mask, 1).accuracy.tolist() == [0, 0]
    assert metrics.top_k(relevance, mask, 1, valid).accuracy.tolist() == [1, 0]


@given(st.integers(0, 2**31), st.booleans())
def test_top_2_as_the_paper_counts(seed, strict):
    """Hits and unions counted place by place for an answer from ``start`` to ``end``."""
    generator = torch.Generator().manual_seed(seed)
    relevance = torch.randperm(7, generator=generator).float()[None]
    start, end = sorted(torch.randint(7, (2,), generator=generator).tolist())
    hits, union, ends = 0, 2, set()
    for place in relevance[0].topk(2).indices.tolist():
        if ends == {"start", "end"}:
            break
        hits += (place == start) + (place == end)
        ends |= {name for name, at in (("start", start), ("end", end)) if at == place}
        if start < place < end:
            hits, union = (hits, union + 1) if strict else (hits + 1, union)
        elif place < start or place > end:
            union += 1
    mask = torch.zeros(1, 7, dtype=torch.bool)
    mask[0, [start, end] if strict else list(range(start, end + 1))] = True
    found = metrics.top_k(relevance, mask, 2)
    assert found.accuracy.item() == pytest.approx(hits / 2)
    assert found.iou.item() == pytest.approx(hits / union)


def test_iou_of_what_is_above_half_of_the_largest():
    relevance = torch.tensor([[4.0, 2.1, 2, -9], [-1, -2, -3, -4]])
    mask = torch.tensor([[True, False, True, False], [True, False, False, False]])
    assert metrics.iou(relevance, mask).tolist() == pytest.approx([1 / 3, 0])
    assert metrics.iou(relevance, mask, above=0).tolist() == pytest.approx([2 / 3, 0])


def test_localisation():
    relevance = torch.tensor([[[3.0, -5], [1, 4]], [[-1, -1], [-2, -2]]])
    mask = torch.tensor([[[True, True], [False, False]], [[True, False], [False, False]]])
    assert metrics.mass_accuracy(relevance, mask).tolist() == [3 / 8, 0]
    assert metrics.rank_accuracy(relevance, mask).tolist() == [1 / 2, 1]


def test_rank_correlation():
    a = torch.tensor([[1.0, 2, 2, 4], [1, 2, 3, 4], [1, 1, 1, 1]])
    b = torch.tensor([[10.0, 30, 20, 40], [-1, -4, -9, -16], [1, 2, 3, 4]])
    assert metrics.rank_correlation(a, b).tolist() == pytest.approx([4.5 / math.sqrt(4.5 * 5), -1, 0])


def test_rank_correlation_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randint(5, (2, 1, 40), generator=torch.Generator().manual_seed(0)).float()
    assert metrics.rank_correlation(a, b).item() == pytest.approx(stats.spearmanr(a[0], b[0]).statistic, abs=1e-6)


def test_bootstrap_of_two_values():
    values = torch.tensor([0.0, 1.0])  # means of resamples: 0, 1/2 and 1 with probabilities 1/4, 1/2 and 1/4
    assert metrics.bootstrap(values) == (0.5, 0, 1)
    assert metrics.bootstrap(values, confidence=0.4) == (0.5, 0.5, 0.5)
    assert str(metrics.bootstrap(values)) == "0.500 [0.000, 1.000]"


def test_bootstrap_of_many_values_is_nearly_normal():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    found = metrics.bootstrap(values)
    error = 1.96 * values.std().item() / math.sqrt(1000)
    assert found.mean == pytest.approx(values.mean().item())
    # 10,000 draws know a quantile of 2.5 % to 2 % of the standard error or so
    assert found.high - found.mean == pytest.approx(error, rel=0.1)
    assert found.mean - found.low == pytest.approx(error, rel=0.1)
    assert torch.equal(before, torch.get_rng_state())
    assert found == metrics.bootstrap(values)
    assert found != metrics.bootstrap(values, seed=1)


def test_groups_are_drawn_together():
    values = torch.tensor([0.0, 0, 0, 1])
    assert metrics.bootstrap(values, groups=[5, 5, 5, 2], confidence=0.4) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.flip(total, WEIGHTS, steps=0),
        lambda: metrics.flip(total, WEIGHTS[0], steps=2),
        lambda: metrics.flip(total, WEIGHTS, steps=2, valid=torch.ones(1, 3)),
        lambda: metrics.flip(total, WEIGHTS / 0 * 0, steps=2),
        lambda: metrics.flip_pixels(total, torch.rand(1, 3, 4, 4), torch.rand(1, 2, 4, 4)),
        lambda: metrics.flip_pixels(total, torch.rand(1, 3, 4, 4), torch.rand(2, 4, 4)),
        lambda: metrics.flip_tokens(total, torch.ones(1, 3), WEIGHTS, fill=0),
        lambda: metrics.top_k(WEIGHTS, torch.zeros(1, 4, dtype=torch.bool)),
        lambda: metrics.iou(WEIGHTS, torch.ones(1, 3, dtype=torch.bool)),
        lambda: metrics.bootstrap(torch.ones(2, 2)),
        lambda: metrics.bootstrap(torch.ones(0)),
    ],
)
def test_what_makes_no_sense_is_refused(call):
    with pytest.raises(InputError):
        call()
