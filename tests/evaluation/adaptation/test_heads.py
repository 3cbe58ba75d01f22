import numpy as np
import pytest
import torch
from meddino_evaluation.adaptation.features import FeatureTable
from meddino_evaluation.adaptation.heads import HeadPlan, Schedule, class_loss, train_heads


def _table(cases=20, slices=(1, 4), widths=(6, 6), patch=6, seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        torch.from_numpy(rng.normal(size=(rng.integers(*slices), sum(widths) + patch)).astype(np.float32)) for _ in range(cases)
    ]
    return FeatureTable(tuple(str(i) for i in range(cases)), tuple(rows), widths)


PLANS = [
    HeadPlan(1e-2),
    HeadPlan(5e-2, last_blocks=4, average_pool=True),
    HeadPlan(1e-2, hidden_dim=8),
    HeadPlan(1e-3, attention=True),
]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_train_heads__a_grid_equals_heads_trained_alone(optimizer):
    table, labels = _table(), np.arange(20) % 3
    schedule = Schedule(2, 12, 8, optimizer=optimizer, dropout=0.3)
    grid = train_heads(table, labels, PLANS, schedule, outputs=3, seed=4)
    for plan, together in zip(PLANS, grid, strict=True):
        alone = train_heads(table, labels, [plan], schedule, outputs=3, seed=4)[0]
        for name, value in together.head.state_dict().items():
            torch.testing.assert_close(value, alone.head.state_dict()[name], rtol=0, atol=0)
    again = train_heads(table, labels, PLANS[::-1], schedule, outputs=3, seed=4)[::-1]
    np.testing.assert_array_equal(
        again[0].probabilities(table, "multiclass", "mean"), grid[0].probabilities(table, "multiclass", "mean")
    )


def test_train_heads__a_linear_head_equals_torch_written_out():
    table, labels = _table(slices=(1, 2)), np.arange(20) % 2
    schedule = Schedule(1, 10, 50)  # one full batch a step: order does not matter
    plan = HeadPlan(5e-2)
    trained = train_heads(table, labels, [plan], schedule, outputs=2, seed=1)[0]
    x = table.vectors()
    x = (x - x.mean(0)) / x.std(0, unbiased=False)
    first = train_heads(table, labels, [plan], Schedule(1, 0, 50, init_std=0.01), outputs=2, seed=1)[0]
    assert first.head.last.weight.shape == (2, 6)
    weight = torch.zeros(2, 6)
    from meddino.core.seeds import torch_rng

    weight.normal_(0.0, 0.01, generator=torch_rng(1, "head", plan.name))
    weight.requires_grad_()
    bias = torch.zeros(2, requires_grad=True)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(10):
        loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, torch.from_numpy(labels))
        gradients = torch.autograd.grad(loss, [weight, bias])
        rate = 5e-2 * (1 + np.cos(np.pi * step / 10)) / 2
        with torch.no_grad():
            for parameter, gradient, speed in zip((weight, bias), gradients, velocity, strict=True):
                speed.mul_(0.9).add_(gradient)
                parameter.sub_(rate * speed)
    torch.testing.assert_close(trained.head.last.weight, weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_head__padding_has_no_influence(plan):
    table, labels = _table(slices=(2, 5)), np.arange(20) % 2
    trained = train_heads(table, labels, [plan], Schedule(1, 5, 8), outputs=2, seed=0)[0]
    together = trained.probabilities(table, "binary", "mean")
    alone = np.concatenate([trained.probabilities(table.subset([i]), "binary", "mean") for i in range(20)])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_vectors__mean_and_max_over_real_slices():
    table = _table()
    row = table.rows[3]
    torch.testing.assert_close(table.vectors(1)[3], row[:, 6:12].mean(0))
    torch.testing.assert_close(table.vectors(2, pooling="max")[3], row[:, :12].max(0).values)
    torch.testing.assert_close(table.vectors(1, average_pool=True)[3], row[:, 6:].mean(0))


def test_class_loss__unknown_labels_are_left_out():
    scores = torch.randn(5, 3)
    labels = torch.tensor([[1, 0, -1]] * 5)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(scores[:, :2], labels[:, :2].float())
    torch.testing.assert_close(class_loss(scores, labels), expected)


def test_train_heads__one_case_a_class_is_enough():
    table = _table(cases=2)
    out = train_heads(table, np.array([0, 1]), [HeadPlan(5e-2)], Schedule(1, 50, 8), outputs=2, seed=0)[0]
    assert (out.probabilities(table, "binary", "mean").argmax(1) == [0, 1]).all()
