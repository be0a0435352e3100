import numpy as np
import pytest

from nalayer import SGD, Adam, PlainModel, SModel, labels_hash, mlp, stream, train
from nalayer.datasets import load_dataset, load_digits, validation_split
from nalayer.optimisers import Projected, Split
from nalayer.training import minibatches
from tests.cases import point

P = point(n=90)
TRAIN, HELD_OUT = slice(0, 60), slice(60, 90)
DATA = (P.x[TRAIN], P.noisy_labels[TRAIN])
VALIDATION = (P.x[HELD_OUT], P.noisy_labels[HELD_OUT])


def run(**options):
    defaults = {"n_epochs": 5, "batch_size": 16, "shuffling": stream(0, "shuffling")}
    return train(P.model, P.parameters, *DATA, **(defaults | options))


def test_adam_follows_algorithm_1_of_kingma_and_ba():
    """Scalars, written as the paper's algorithm states it."""
    rng = np.random.default_rng(0)
    parameters, optimiser = rng.normal(size=3), Adam()
    expected, m, v = parameters.copy(), np.zeros(3), np.zeros(3)
    state = optimiser.initial_state(parameters)
    for t in range(1, 30):
        gradient = rng.normal(size=3)
        optimiser.update(parameters, gradient, state, np.array([1.0, 1.0, 0.1]))
        for i, factor in enumerate((1.0, 1.0, 0.1)):
            m[i] = 0.9 * m[i] + 0.1 * gradient[i]
            v[i] = 0.999 * v[i] + 0.001 * gradient[i] ** 2
            m_hat, v_hat = m[i] / (1 - 0.9**t), v[i] / (1 - 0.999**t)
            expected[i] -= 0.001 * factor * m_hat / (v_hat**0.5 + 1e-8)
    assert np.abs(parameters - expected).max() <= 1e-15


def test_split_gives_each_part_its_own_rule_and_projection_comes_last():
    parameters = np.array([1.0, 1.0, 1.0])
    rule = Projected(Split(SGD(0.5), SGD(0.1), 1), lambda p: np.maximum(p, 0.3, out=p))
    state = rule.initial_state(parameters)
    rule.update(parameters, np.array([2.0, 2.0, 2.0]), state, np.array([1.0, 1.0, 2.0]))
    assert np.abs(parameters - [0.3, 0.8, 0.6]).max() <= 1e-15


def test_sgd_takes_the_plain_step():
    parameters = np.array([1.0, 2.0])
    SGD(0.5).update(parameters, np.array([2.0, -2.0]), None, np.array([1.0, 0.0]))
    assert parameters.tolist() == [0.0, 2.0]


@pytest.mark.parametrize(("n", "size"), [(10, 3), (9, 3), (2, 5), (1, 1)])
def test_batches_hold_every_sample_exactly_once(n, size):
    batches = minibatches(n, size, stream(0, "shuffling"))
    assert sorted(np.concatenate(batches)) == list(range(n))
    assert all(b.size == size for b in batches[:-1])
    assert 1 <= batches[-1].size <= size


def test_training_lowers_the_loss_and_leaves_its_inputs_alone():
    before = P.parameters.copy()
    result = run(n_epochs=20)
    assert result.history[-1].loss < result.history[0].loss - 0.01
    assert np.array_equal(P.parameters, before)
    assert result.history[-1].gradients == 20 * 4


def test_history_belongs_to_the_parameters_of_its_epoch():
    seen = []
    run(validation=VALIDATION, on_epoch=lambda epoch, p: seen.append((epoch, p.copy())))
    assert len(seen) == 6
    for epoch, parameters in seen:
        assert epoch.loss == P.model.loss(parameters, *DATA)
        assert epoch.validation_loss == P.model.loss(parameters, *VALIDATION)


def test_the_best_parameters_on_the_held_out_labels_come_back():
    seen = []
    result = run(
        n_epochs=200,
        patience=3,
        optimiser=Adam(0.02),
        validation=VALIDATION,
        on_epoch=lambda epoch, p: seen.append((epoch, p.copy())),
    )
    losses = [epoch.validation_loss for epoch, _ in seen]
    best = int(np.argmin(losses))
    assert result.best.number == best
    assert np.array_equal(result.parameters, seen[best][1])
    assert len(seen) == best + 1 + 3 + 1  # the start, then patience + 1 epochs without progress
    assert len(seen) < 201


def test_without_validation_the_last_parameters_come_back():
    result = run()
    assert result.best == result.history[-1]
    assert P.model.loss(result.parameters, *DATA) == result.history[-1].loss


def test_equal_streams_give_equal_bits_and_others_do_not():
    a, b = run(), run()
    assert np.array_equal(a.parameters, b.parameters)
    assert (a.parameters != run(shuffling=stream(1, "shuffling")).parameters).any()


def test_step_factor_zero_freezes_the_noise_layer():
    _, frozen = P.model.unpack(run(step_factors=P.model.step_factors(0)).parameters)
    assert np.array_equal(frozen, P.channel_logits)
    _, moved = P.model.unpack(run().parameters)
    assert (moved != P.channel_logits).all()


def test_the_labels_used_are_fingerprinted_held_out_ones_too():
    assert run().labels_hash == labels_hash(P.noisy_labels[TRAIN])
    assert run(validation=VALIDATION).labels_hash == labels_hash(P.noisy_labels)


def test_held_out_loss_leaves_the_pseudo_counts_out():
    model = SModel(P.network, 5.0, 60)
    result = train(
        model,
        P.parameters,
        *DATA,
        validation=VALIDATION,
        n_epochs=0,
        shuffling=stream(0, "shuffling"),
    )
    start = result.history[0]
    assert start.validation_loss == P.model.loss(P.parameters, *VALIDATION)
    assert start.loss > P.model.loss(P.parameters, *DATA) + 1


def test_dropout_is_used_in_training_and_not_in_evaluation():
    network = mlp(5, (7, 6), 4, dropout=0.5)
    model = PlainModel(network)
    options = {"n_epochs": 1, "batch_size": 60}
    plain, dropped = (
        train(model, P.weights, *DATA, shuffling=stream(0, "shuffling"), dropout=d, **options)
        for d in (None, stream(0, "dropout"))
    )
    assert (plain.parameters != dropped.parameters).any()
    assert plain.history[0].loss == dropped.history[0].loss


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1.*found 0"),
        ({"n_epochs": -1}, ValueError, "n_epochs must be at least 0; found -1"),
        ({"patience": -1}, ValueError, "patience must be at least 0; found -1"),
        ({"validation": (P.x[:, :2], P.noisy_labels)}, ValueError, "x must have shape"),
        ({"shuffling": 0}, TypeError, "shuffling must be a numpy.random.Generator.*found int"),
        ({"dropout": 0}, TypeError, "dropout must be a numpy.random.Generator.*found int"),
        ({"step_factors": np.ones(3)}, ValueError, r"step_factors must be a number or have shape"),
    ],
)
def test_bad_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)


def test_a_loss_that_explodes_is_an_error():
    expected = pytest.raises(FloatingPointError, match="the training loss is nan after epoch 1")
    with expected, np.errstate(all="ignore"):
        run(optimiser=SGD(1e308))


def test_digits_are_split_by_class_without_overlap():
    digits = load_digits()
    assert digits.x_train.shape == (1297, 64)
    assert digits.x_test.shape == (500, 64)
    assert 0 == digits.x_train.min() < digits.x_train.max() == 1
    shares = np.bincount(digits.labels_test) / np.bincount(digits.labels_train)
    assert shares.max() - shares.min() < 0.02
    train_rows = {row.tobytes() for row in digits.x_train}
    assert not any(row.tobytes() in train_rows for row in digits.x_test)
    for share in (0.0, 1.0, 2.0):
        with pytest.raises(ValueError, match=r"share must lie in \(0, 1\)"):
            validation_split(10, np.zeros(10, int), share, stream(0, "split"))
    with pytest.raises(ValueError, match=r"dataset must be one of .*'digits'.*; found 'letters'"):
        load_dataset("letters")


def test_validation_split_is_a_stratified_partition():
    labels = np.repeat([0, 1, 2], [100, 200, 300])
    kept, held_out = validation_split(600, labels, 0.1, stream(0, "split"))
    assert sorted(np.concatenate([kept, held_out])) == list(range(600))
    assert np.bincount(labels[held_out]).tolist() == [10, 20, 30]


def test_training_goes_the_same_way_without_its_loss_being_evaluated():
    with_loss, without = (run(validation=VALIDATION, with_loss=asked) for asked in (True, False))
    assert np.array_equal(with_loss.parameters, without.parameters)
    assert [e.validation_loss for e in with_loss.history] == [
        e.validation_loss for e in without.history
    ]
    assert {e.loss for e in without.history} == {None}
    with pytest.raises(ValueError, match="with_loss must be True"):
        run(with_loss=False)


def test_a_nan_that_a_relu_hides_from_the_loss_is_an_error():
    """Adam's square of a gradient of 1e38 is infinite in float32, and inf - inf the step after."""
    model = PlainModel(mlp(1, (3,), 2, backend="numpy"), "numpy")
    parameters = np.full(model.n_parameters, 0.5, np.float32)
    parameters[8] = 1e38
    data = np.ones((4, 1), np.float32), np.array([1, 1, 1, 0])
    expected = pytest.raises(FloatingPointError, match="a parameter is nan after epoch 2")
    with expected, np.errstate(all="ignore"):
        train(model, parameters, *data, shuffling=stream(0, "shuffling"), n_epochs=3)
