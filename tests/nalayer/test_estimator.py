"""The scikit-learn classifier: scikit-learn's own checks, and what it promises beyond them."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import nalayer
import nalayer.estimator as estimator_module
from em_baseline import expected_counts
from em_baseline.statements import Literal
from nalayer import (
    CModel,
    NoiseAdaptationClassifier,
    PlainModel,
    clustered_start,
    confusion_start,
    noise_matrix,
    noise_matrix_error,
    uniform_start,
)
from nalayer.datasets import load_digits
from tests.cases import JIT

pytestmark = pytest.mark.skipif(not JIT, reason="many fits, minutes with kernels as Python loops")

DIGITS = load_digits()
_rng = nalayer.stream(0, "label noise")
THETA = nalayer.make_noise_matrix("permutation", 10, 0.3, _rng)
N = 300
X, Y = DIGITS.x_train[:N], DIGITS.labels_train[:N]
Z = nalayer.corrupt_labels(DIGITS.labels_train, THETA, _rng)[:N]
FAST = {"n_baseline_epochs": 4, "n_epochs": 2, "hidden_layer_sizes": (16,), "random_state": 0}
KINDS = {
    "simple": {},
    "complex": {"noise_model": "complex"},
    "sparse simple": {"n_kept": 3},
    "sparse complex": {"n_kept": 3, "noise_model": "complex"},
    "em": {"method": "em", "inner_epochs": 1},
    "em complex": {"method": "em", "inner_epochs": 1, "noise_model": "complex"},
    "clustered": {"initialisation": "clustered"},
    "none": {"noise_model": "none"},
}
WITH_NOISE_LAYER = {name: kind for name, kind in KINDS.items() if name != "none"}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
every_noise_layer = pytest.mark.parametrize(
    "kind", WITH_NOISE_LAYER.values(), ids=WITH_NOISE_LAYER.keys()
)


def fast(**settings) -> NoiseAdaptationClassifier:
    return NoiseAdaptationClassifier(**(FAST | settings))


def fitted(**settings) -> NoiseAdaptationClassifier:
    return fast(**settings).fit(X, Z)


@parametrize_with_checks(
    [
        NoiseAdaptationClassifier(),
        NoiseAdaptationClassifier("complex", method="em", n_epochs=3),
    ]
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


# --- weights, order, missing labels --------------------------------------------------------------


@every_kind
def test_a_weight_is_a_number_of_copies_to_the_bit(kind):
    counts = np.random.default_rng(1).integers(0, 4, size=N)
    copies = np.random.default_rng(2).permutation(np.arange(N).repeat(counts))
    weighted = fast(**kind).fit(X, Z, sample_weight=counts)
    repeated = fast(**kind).fit(X[copies], Z[copies])
    doubled = fast(**kind).fit(X, Z, sample_weight=2.0 * counts)
    plain = fast(**kind).fit(X[counts > 0], Z[counts > 0])
    assert (weighted.parameters_ == repeated.parameters_).all()
    assert (weighted.parameters_ == doubled.parameters_).all()
    assert weighted.log_likelihood_ == repeated.log_likelihood_
    assert weighted.certificate_ == repeated.certificate_
    assert (weighted.parameters_ != plain.parameters_).any()


def test_weights_move_the_fit_towards_the_samples_that_have_them():
    favoured = np.where(Z == 3, 10.0, 1.0)
    a, b = fast(n_baseline_epochs=20).fit(X, Z), fast(n_baseline_epochs=20)
    b.fit(X, Z, sample_weight=favoured)
    assert b.predict_noisy_proba(X)[:, 3].mean() > 1.5 * a.predict_noisy_proba(X)[:, 3].mean()


@every_kind
def test_equal_weights_and_the_order_of_samples_change_nothing(kind):
    order = np.random.default_rng(0).permutation(N)
    a = fitted(**kind)
    b = fast(**kind).fit(X[order], Z[order], sample_weight=np.full(N, 3.0))
    assert (a.parameters_ == b.parameters_).all()


def test_minus_zero_is_zero():
    x = np.where(X == 0, -0.0, X)
    twice = fast().fit(np.concatenate([X, x]), np.concatenate([Z, Z]))
    assert (twice.parameters_ == fitted().parameters_).all()


@pytest.mark.parametrize(
    ("marker", "names"),
    [
        (-1, np.arange(10)),
        (np.nan, np.arange(10.0)),
        ("?", np.array(list("abcdefghij"))),
        ("", np.array(list("abcdefghij"), dtype=object)),
    ],
)
def test_samples_without_a_label_are_left_out_of_the_likelihood(marker, names):
    missing = np.random.default_rng(0).random(N) < 0.3
    z = np.where(missing, marker, names[Z])
    clf = fast(missing_label=marker).fit(X, z)
    without = fast().fit(X[~missing], names[Z[~missing]])
    assert clf.classes_.tolist() == without.classes_.tolist()
    assert len(clf.classes_) == 10
    assert (clf.parameters_ == without.parameters_).all()
    c, q = clf.posterior(X, z), clf.predict_proba(X)
    assert (c[missing] == q[missing]).all()
    assert np.abs(c[~missing] - q[~missing]).max() > 0.1
    assert not np.isin(clf.find_label_errors(X, z, 1.1), np.flatnonzero(missing)).any()
    assert clf.find_label_errors(X, z, 1.1).size == (~missing).sum()


def test_a_marker_of_another_type_than_the_labels_marks_nothing():
    assert (fast(missing_label="?").fit(X, Z).parameters_ == fitted().parameters_).all()


# --- what is predicted ---------------------------------------------------------------------------


@every_noise_layer
def test_probabilities_are_those_of_the_literal_formulas(kind):
    clf = fitted(**kind)
    literal = Literal.of(clf.model_, clf.parameters_, X, Z)
    q, c = clf.predict_proba(X), clf.posterior(X, Z)
    assert np.abs(q - literal.q).max() <= 1e-13
    assert np.abs(c - literal.c).max() <= 1e-12
    noisy = clf.predict_noisy_proba(X)
    assert np.abs(noisy[np.arange(N), Z] - literal.m).max() <= 1e-13
    assert np.abs(noisy.sum(axis=1) - 1).max() <= 1e-13
    # the law of total probability: the posterior averaged over what could be observed is the prior
    mean = sum(
        noisy[:, [j]] * clf.posterior(X, np.full(N, j)) for j in range(10) if noisy[:, j].all()
    )
    assert np.abs(mean - q).max() <= 1e-12


def test_one_slice_or_many_are_the_same():
    many = np.tile(X, (5, 1))
    for clf in (fitted(), fitted(noise_model="complex")):
        assert len(many) > nalayer.buffers.SLICE
        once = clf.predict_noisy_proba(X), clf.posterior(X, Z)
        again = clf.predict_noisy_proba(many), clf.posterior(many, np.tile(Z, 5))
        for a, b in zip(once, again, strict=True):
            assert np.abs(np.tile(a, (5, 1)) - b).max() <= 1e-13


def test_the_noise_matrix_has_true_classes_in_its_rows():
    always = np.where(Y == 1, 7, Y)  # every 1 is called a 7, some others too
    z = np.where(np.random.default_rng(0).random(N) < 0.4, always, Y)
    clf = NoiseAdaptationClassifier(random_state=0).fit(X, z)
    assert clf.noise_matrix_[1, 7] > 0.2 > clf.noise_matrix_[7, 1]
    assert np.abs(clf.noise_matrix_.sum(axis=1) - 1).max() <= 1e-14


def test_wrong_labels_are_ranked_by_the_posterior_of_the_given_one():
    clf = NoiseAdaptationClassifier(random_state=0).fit(X, Z)
    c_given = clf.posterior(X, Z)[np.arange(N), Z]
    everything = clf.find_label_errors(X, Z, threshold=1.1)
    assert sorted(everything) == list(range(N))
    assert (np.diff(c_given[everything]) >= 0).all()
    found = clf.find_label_errors(X, Z)
    assert (found == everything[: found.size]).all()
    assert found.size == (c_given < 0.5).sum()
    assert (Z != Y)[found].mean() > 0.8


def test_the_likelihood_belongs_to_the_parameters_and_the_certificate_bounds_its_gain():
    clf = fitted(early_stopping=False)
    literal = Literal.of(clf.model_, clf.parameters_, X, Z)
    assert abs(clf.log_likelihood_ - literal.log_likelihood / N) <= 1e-13
    theta = clf.noise_matrix_
    for _ in range(300):  # Eq. 4 on theta alone
        q, m = literal.q, literal.q @ theta
        theta = theta * (q.T @ (np.eye(10)[Z] / m[np.arange(N), Z][:, None]))
        theta /= theta.sum(axis=1, keepdims=True)
    gain = np.log((literal.q @ theta)[np.arange(N), Z]).mean() - clf.log_likelihood_
    assert 0.01 < gain <= clf.certificate_
    assert fitted(noise_model="complex").certificate_ is None
    assert fitted(noise_model="none").certificate_ is None


def test_without_a_noise_layer_there_is_no_posterior():
    clf = fitted(noise_model="none")
    assert isinstance(clf.model_, PlainModel)
    assert (clf.noise_matrix_ == np.eye(10)).all()
    assert (clf.predict_noisy_proba(X) == clf.predict_proba(X)).all()
    assert not hasattr(clf, "posterior")
    with pytest.raises(AttributeError, match="find_label_errors"):
        clf.find_label_errors(X, Z)


# --- stages, warm start, partial_fit -------------------------------------------------------------


def test_the_noise_models_are_started_one_from_the_other():
    clf = fitted(noise_model="complex", early_stopping=False)
    stages = [line["stage"] for line in clf.history_]
    assert stages == ["baseline"] * 5 + ["simple"] * 3 + ["complex"] * 3
    ends = {line["stage"]: line["loss"] for line in clf.history_}
    starts = {line["stage"]: line["loss"] for line in clf.history_ if line["epoch"] == 0}
    assert starts["complex"] == pytest.approx(ends["simple"], rel=1e-13)  # U = 0
    simple, baseline = (
        fitted(early_stopping=False),
        fitted(noise_model="none", early_stopping=False),
    )
    assert simple.history_[-1]["loss"] == ends["simple"]
    assert baseline.history_[-1]["loss"] == ends["baseline"]
    assert clf.n_iter_ == 2


def test_the_noise_matrix_starts_where_initialisation_says():
    at_start = {"n_epochs": 0, "early_stopping": False}
    q = fitted(noise_model="none", **at_start).predict_proba(X)
    starts = {
        "hard": confusion_start(q, Z, "hard"),
        "soft": confusion_start(q, Z, "soft"),
        "uniform": uniform_start(10, 0.2),
        "clustered": clustered_start(q, Z, nalayer.stream(0, "clusters")),
    }
    found = {
        name: fitted(initialisation=name, init_noise=0.2, **at_start).noise_matrix_
        for name in starts
    }
    for name in ("hard", "soft", "uniform"):
        assert np.abs(found[name] - noise_matrix(starts[name])).max() <= 1e-12, name
    # k-means depends on the order of the samples, so only the kind of start can be told
    apart = {name: np.abs(found["clustered"] - found[name]).max() for name in found}
    assert min(apart["hard"], apart["soft"], apart["uniform"]) > 0.05
    like = noise_matrix_error(found["clustered"], noise_matrix(starts["clustered"]))
    assert like < 0.5 * noise_matrix_error(found["clustered"], found["uniform"])


@pytest.mark.parametrize("damping", [1.0, 0.25])
def test_a_round_of_em_moves_the_noise_matrix_towards_eq_4(damping):
    start = fitted(n_epochs=0, early_stopping=False)
    counts = expected_counts(start.posterior(X, Z), Z)
    eq_4 = counts / counts.sum(axis=1, keepdims=True)
    expected = (1 - damping) * start.noise_matrix_ + damping * eq_4
    em = fitted(method="em", n_epochs=1, damping=damping, early_stopping=False)
    assert np.abs(em.noise_matrix_ - expected).max() <= 1e-12
    assert np.abs(em.noise_matrix_ - start.noise_matrix_).max() > 0.01
    assert [line["epoch"] for line in em.history_ if line["stage"] == "simple"] == [0, 1]


@every_kind
def test_early_stopping_keeps_the_parameters_with_the_best_held_out_loss(kind):
    clf = fitted(n_baseline_epochs=30, learning_rate=0.02, patience=2, **kind)
    last = clf.history_[-1]["stage"]
    losses = [line["validation_loss"] for line in clf.history_ if line["stage"] == last]
    assert None not in losses
    assert len(losses) <= 1 + max(30, FAST["n_epochs"])
    best = [line for line in clf.history_ if line["stage"] == last][int(np.argmin(losses))]
    assert clf.log_likelihood_ == pytest.approx(-best["loss"], rel=1e-12)


def test_held_out_samples_are_not_trained_on(monkeypatch):
    trained_on = []

    def watched(model, start, x, targets, *, validation, **options):
        trained_on.append((x, validation[0]))
        return nalayer.train(model, start, x, targets, validation=validation, **options)

    monkeypatch.setattr(estimator_module, "train", watched)
    fitted()
    assert len(trained_on) == 2
    for x, held_out in trained_on:
        assert len(x) + len(held_out) == N
        assert len(np.unique(np.concatenate([x, held_out]), axis=0)) == N
        assert 25 <= len(held_out) <= 35


def test_held_out_is_that_share_of_each_class_and_never_all_of_it():
    z = np.repeat([0, 1, 2], [1, 4, 40])
    chosen = estimator_module._held_out(z, 0.1, np.random.default_rng(0))
    assert np.bincount(z[chosen], minlength=3).tolist() == [0, 0, 4]
    everything = estimator_module._held_out(z, 0.999, np.random.default_rng(0))
    assert np.bincount(z[~everything], minlength=3).tolist() == [1, 1, 1]


def test_a_warm_start_goes_on_and_a_cold_one_does_not():
    warm = fast(warm_start=True, early_stopping=False).fit(X, Z)
    loss = warm.history_[-1]["loss"]
    warm.fit(X, Z)
    assert warm.history_[0]["stage"] == "simple"
    assert warm.history_[0]["loss"] == pytest.approx(loss, rel=1e-13)
    warm.set_params(noise_model="complex").fit(X, Z)
    assert isinstance(warm.model_, CModel)
    assert {line["stage"] for line in warm.history_} == {"complex"}
    cold = fast(early_stopping=False).fit(X, Z)
    first = cold.parameters_
    assert (cold.fit(X, Z).parameters_ == first).all()


@pytest.mark.parametrize(
    ("change", "y", "message"),
    [
        ({"noise_model": "none"}, Z, "noise_model must be one of"),
        ({"n_kept": 2}, Z, "n_kept must stay None where warm_start goes on; found 2"),
        ({"hidden_layer_sizes": (8,)}, Z, "network's settings must stay"),
        ({}, Z + 1, "y must hold the classes of the fit that warm_start goes on from"),
    ],
)
def test_a_warm_start_that_does_not_fit_is_refused(change, y, message):
    clf = fitted(warm_start=True).set_params(**change)
    with pytest.raises(ValueError, match=message):
        clf.fit(X, y)


def test_partial_fit_trains_network_and_noise_layer_from_the_uniform_start():
    clf = fast(init_noise=0.3, hidden_layer_sizes=(64,), dropout=0.2)
    clf.partial_fit(X[:100], Z[:100], classes=range(10))
    assert clf.noise_matrix_[0, 0] == pytest.approx(0.7, abs=0.01)
    handed_out, before = clf.parameters_, clf.parameters_.copy()
    first = clf.log_likelihood_
    for _ in range(60):
        clf.partial_fit(X, Z)
    assert (handed_out == before).all()
    assert clf.n_iter_ == 61
    assert clf.log_likelihood_ > first + 0.5
    assert clf.score(DIGITS.x_test, DIGITS.labels_test) > 0.75


@every_kind
def test_partial_fit_goes_on_after_a_fit_and_a_pickle_of_it_too(kind):
    clf = fitted(**kind)
    theta = clf.noise_matrix_.copy()
    clf.partial_fit(X, Z, sample_weight=np.arange(N) % 3)
    assert (clf.noise_matrix_ != theta).any() or kind.get("noise_model") == "none"
    again = pickle.loads(pickle.dumps(clf))
    assert (again.partial_fit(X, Z).parameters_ == clf.partial_fit(X, Z).parameters_).all()


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, (X, Z), "classes must name all labels in the first call of partial_fit"),
        ({"n_kept": 3}, (X, Z, range(10)), "n_kept must be None in a partial_fit without a fit"),
        ({}, (X, Z, range(9)), r"y must hold labels of \[0 1 2 3 4 5 6 7 8\]; found np.int64\(9\)"),
        ({}, (X, Z.astype(str), range(10)), r"y must hold labels of \[0 1 .* found np.str_"),
    ],
)
def test_a_partial_fit_that_cannot_be_is_refused(settings, arguments, message):
    with pytest.raises(ValueError, match=message):
        fast(**settings).partial_fit(*arguments)


def test_classes_must_not_change_between_partial_fits():
    with pytest.raises(ValueError, match=r"classes must stay \[0 1 .*; found \[0 1\]"):
        fitted().partial_fit(X, Z, classes=[0, 1])


# --- in scikit-learn's company -------------------------------------------------------------------


@pytest.mark.parametrize("names", [list("abcdefghij"), [i - 4.0 for i in range(10)], range(-5, 5)])
def test_labels_of_any_type(names):
    y = [names[label] for label in Z]
    clf = fast().fit(X.tolist(), y)
    assert clf.classes_.tolist() == sorted(names)
    assert (np.searchsorted(clf.classes_, clf.predict(X)) == fitted().predict(X)).all()
    assert clf.posterior(X, y).shape == (N, 10)


def test_booleans_are_labels():
    clf = fast().fit(X, Z > 4)
    assert clf.classes_.tolist() == [False, True]
    assert clf.predict(X).dtype == bool


def test_pipeline_grid_search_cross_validation_clone_and_pickle():
    pipeline = make_pipeline(StandardScaler(), NoiseAdaptationClassifier(random_state=0))
    scores = cross_val_score(pipeline, X, Z, cv=3)
    assert scores.min() > 0.4
    grid = {"noiseadaptationclassifier__noise_model": ["none", "simple"]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(X, Z)
    assert set(search.best_params_.values()) <= {"none", "simple"}
    assert search.score(X, Y) > 0.5
    clf = search.best_estimator_[-1]
    copy = clone(clf)
    assert copy.get_params() == clf.get_params()
    with pytest.raises(NotFittedError):
        copy.predict(X)
    again = pickle.loads(pickle.dumps(clf))
    assert (again.predict_proba(X) == clf.predict_proba(X)).all()


@pytest.mark.parametrize(
    ("dtype", "x_dtype", "expected"),
    [
        (None, np.float32, np.float32),
        (None, np.float64, np.float64),
        (None, np.uint8, np.float64),
        ("float32", np.float64, np.float32),
        ("float64", np.float32, np.float64),
    ],
)
def test_dtype_is_that_of_parameters_and_probabilities(dtype, x_dtype, expected):
    clf = fast(dtype=dtype).fit(X.astype(x_dtype), Z)
    assert clf.parameters_.dtype == expected
    assert clf.predict_proba(X).dtype == clf.posterior(X, Z).dtype == expected
    assert clf.predict_noisy_proba(X).dtype == expected


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_backend_is_used_everywhere(backend):
    clf = fitted(backend=backend)
    assert clf.model_.backend == backend
    assert {layer.backend for layer in clf.model_.network.layers[:-1]} == {backend}


def test_the_cnn_reads_rows_as_images():
    x = np.random.default_rng(0).random((20, 144))
    y = np.arange(20) % 2
    clf = fast(network="cnn", image_shape=(12, 12, 1), n_baseline_epochs=1, n_epochs=1)
    assert clf.fit(x, y).model_.network == nalayer.cnn((12, 12, 1), 2)
    assert clf.predict_proba(x).shape == (20, 2)
    for shape in (None, (12, 12, 2)):
        with pytest.raises(ValueError, match="image_shape must be rows, columns, channels of an"):
            clf.set_params(image_shape=shape).fit(x, y)


@pytest.mark.parametrize(("sizes", "widths"), [((), []), (7, [7]), ([9, 5], [9, 5])])
def test_hidden_layer_sizes(sizes, widths):
    clf = fitted(hidden_layer_sizes=sizes)
    assert [layer.n_out for layer in clf.model_.network.layers[:-1]] == widths


def test_a_progress_bar_is_shown_when_asked_for(capsys):
    fitted(noise_model="complex", verbose=True)
    shown = capsys.readouterr().err
    assert all(stage in shown for stage in ("baseline", "simple", "complex"))
    fitted()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_model": "s"}, "noise_model must be one of .*; found 's'"),
        ({"method": "EM"}, "method must be one of"),
        ({"network": "rnn"}, "network must be one of"),
        ({"initialisation": "true"}, "initialisation must be one of"),
        ({"backend": "cupy"}, "backend must be one of"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"n_kept": 11}, r"n_kept must lie in 1\.\.10; found 11"),
        ({"n_kept": 0}, r"n_kept must lie in 1\.\.10; found 0"),
        ({"hidden_layer_sizes": (8, 0)}, r"hidden_layer_sizes must be .* found \(8, 0\)"),
        ({"hidden_layer_sizes": 7.5}, "hidden_layer_sizes must be integers of at least 1"),
        ({"dropout": 1.0}, r"rate must lie in \[0, 1\); found 1.0"),
        ({"batch_size": 0}, "batch_size must be at least 1; found 0"),
        ({"n_epochs": -1}, "n_epochs must be at least 0; found -1"),
        ({"patience": -1}, "patience must be at least 0"),
        ({"validation_fraction": 1.0}, r"validation_fraction must lie in \(0, 1\); found 1.0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive; found 0.0"),
        ({"init_noise": 0.0, "initialisation": "uniform"}, r"init_noise must lie in \(0, 1\)"),
        ({"damping": 0.0, "method": "em"}, r"damping must lie in \(0, 1\]; found 0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fitted(**settings)


@pytest.mark.parametrize(
    ("y", "weights", "message"),
    [
        (None, None, "requires y to be passed"),
        (Z[:-1], None, "inconsistent numbers of samples"),
        (np.zeros(N), None, "y must hold at least 2 classes; found 1 class"),
        (np.full(N, -1), None, "found no label that has a weight"),
        (Z, np.zeros(N), "(must not be zero for all|at least one non-zero)"),
        (Z, -np.ones(N), "[Nn]egative"),
        (np.linspace(0, 1, N), None, "Unknown label type: continuous"),
    ],
)
def test_data_that_cannot_be_are_refused(y, weights, message):
    with pytest.raises(ValueError, match=message):
        fast(missing_label=-1).fit(X, y, weights)


def test_what_is_loaded_by_importing_the_package():
    code = (
        "import sys, nalayer; assert 'sklearn' not in sys.modules, 'scikit-learn was imported';"
        "from nalayer import *; NoiseAdaptationClassifier; assert 'em_baseline' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        nalayer.Nothing  # noqa: B018
