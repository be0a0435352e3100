import tracemalloc

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kernels import link_index
from nalayer import gather_links, scatter_links, top_support


def judge(confusion: np.ndarray, n_kept: int) -> list[list[int]]:
    """Keep the diagonal; then, one by one, the largest entry left, the first among equals."""
    support = []
    for i, row in enumerate(confusion.tolist()):
        kept = [i]
        while len(kept) < n_kept:
            best = None
            for j, entry in enumerate(row):
                if j not in kept and (best is None or entry > row[best]):
                    best = j
            kept.append(best)
        support.append(sorted(kept))
    return support


@st.composite
def confusions(draw):
    k = draw(st.integers(2, 7))
    entries = draw(st.sampled_from([st.integers(0, 3), st.floats(0, 1e6)]))
    return draw(arrays(np.float64, (k, k), elements=entries, fill=st.just(0.0)))


@given(confusions(), st.data())
@settings(deadline=None)
def test_dense_and_sparse_agree_with_the_plain_loops(confusion, data):
    n_kept = data.draw(st.integers(1, len(confusion)))
    expected = judge(confusion, n_kept)
    for form in (np.asarray, np.asfortranarray, scipy.sparse.csr_matrix, scipy.sparse.coo_array):
        found = top_support(form(confusion), n_kept)
        assert found.dtype == np.int64
        assert found.tolist() == expected
    link_index(found)  # accepts it


@given(confusions(), st.data())
@settings(deadline=None)
def test_it_is_the_l_largest_entries_with_the_diagonal_forced(confusion, data):
    k = len(confusion)
    n_kept = data.draw(st.integers(1, k))
    support = top_support(confusion, n_kept)
    for i, row in enumerate(confusion):
        by_size = sorted(range(k), key=lambda j: (-row[j], j))
        largest = by_size[:n_kept]
        if i not in largest:
            largest[-1] = i
        assert support[i].tolist() == sorted(largest)
    # every label is covered, by its own row if by no other
    assert set(range(k)) <= set(support.ravel().tolist())


def test_ties_go_to_the_lower_class_and_the_diagonal_stays_although_it_is_smallest():
    confusion = np.full((4, 4), 5) - 5 * np.eye(4, dtype=int)
    expected = [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 3]]
    assert top_support(confusion, 3).tolist() == expected
    assert top_support(scipy.sparse.csr_array(confusion), 3).tolist() == expected


def test_entries_of_a_sparse_matrix_that_are_named_twice_are_summed_and_stored_zeros_are_zeros():
    rows, columns = np.array([0, 0, 0, 0, 1]), np.array([3, 3, 2, 1, 3])
    confusion = scipy.sparse.coo_matrix(([2, 2, 3, 0, 0], (rows, columns)), shape=(4, 4))
    assert top_support(confusion, 2).tolist() == judge(confusion.toarray(), 2)
    assert top_support(confusion, 3).tolist() == judge(confusion.toarray(), 3)
    assert confusion.nnz == 5  # what was given is not changed


def test_a_large_sparse_matrix_is_never_made_dense():
    k, n_kept, rng = 100_000, 5, np.random.default_rng(0)
    entries = (
        rng.integers(1, 9, 3 * k),
        (rng.integers(k, size=3 * k), rng.integers(k, size=3 * k)),
    )
    confusion = scipy.sparse.coo_array(entries, shape=(k, k))
    tracemalloc.start()
    support = top_support(confusion, n_kept)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * 8 * k * n_kept < k * k / 8  # not even a bit for each pair
    some = rng.integers(k, size=20)
    rows = confusion.tocsr()[some].toarray()
    for i, row, found in zip(some, rows, support[some], strict=True):
        row[i] = 10**9
        assert found.tolist() == sorted(np.argsort(-row, kind="stable")[:n_kept])


@pytest.mark.parametrize("form", [np.asarray, scipy.sparse.csr_matrix])
@pytest.mark.parametrize(
    ("confusion", "n_kept", "error", "message"),
    [
        (np.ones((2, 3)), 1, ValueError, r"confusion must have shape \(K, K\); found \(2, 3\)"),
        (np.ones((1, 1)), 1, ValueError, "n_classes must be at least 2; found 1"),
        (np.array([[1, np.nan], [0, 1]]), 1, ValueError, "finite and not negative; found nan"),
        (np.array([[1, np.inf], [0, 1]]), 1, ValueError, "finite and not negative; found inf"),
        (np.array([[1, 0], [-0.5, 1]]), 1, ValueError, "finite and not negative; found -0.5"),
        (np.eye(2) * 1j, 1, TypeError, "confusion must hold real numbers; found complex128"),
        (np.eye(2), 0, ValueError, r"n_kept must lie in 1\.\.2; found 0"),
        (np.eye(2), 3, ValueError, r"n_kept must lie in 1\.\.2; found 3"),
        (np.eye(2), 1.5, TypeError, "n_kept must be an integer; found float"),
        (np.eye(2), True, TypeError, "n_kept must be an integer; found bool"),
    ],
)
def test_what_is_no_confusion_matrix_is_refused(form, confusion, n_kept, error, message):
    with pytest.raises(error, match=message):
        top_support(form(confusion), n_kept)


def test_what_is_no_matrix_is_refused():
    with pytest.raises(TypeError, match="confusion must be a NumPy"):
        top_support([[1, 0], [0, 1]], 1)
    with pytest.raises(ValueError, match=r"confusion must have shape \(K, K\); found \(2,\)"):
        top_support(np.ones(2), 1)


def test_gathering_and_scattering_are_each_other_s_inverse_on_the_links():
    rng = np.random.default_rng(0)
    matrix, links = rng.random((4, 4)), link_index(np.array([[0, 3], [2, 1], [2, 0], [1, 3]]))
    kept = gather_links(matrix, links)
    for i in range(4):
        for s, j in enumerate(links.support[i]):
            assert kept[i, s] == matrix[i, j]
    dense = scatter_links(kept, links, missing=-1.0)
    assert (dense == matrix).sum() == 8
    assert (dense == -1).sum() == 8
    assert np.array_equal(gather_links(dense, links), kept)
    assert np.array_equal(gather_links(scipy.sparse.coo_matrix(matrix), links), kept)
    wide = rng.random((4, 4, 3))
    assert np.array_equal(gather_links(wide, links)[1, 0], wide[1, 2])
    with pytest.raises(ValueError, match=r"values must have shape \(4, 2\); found \(4, 3\)"):
        scatter_links(np.ones((4, 3)), links, 0.0)
