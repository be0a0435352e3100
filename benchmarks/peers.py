"""What a user could pick instead of our kernels: PyTorch and JAX, by automatic differentiation.

Each form is the loss alone; the library derives the gradients. *naive* forms multiply the softmax
of the classifier with the whole noise matrix, as published ports do; *column* and *flat* forms stay
in the log domain and gather column z_t. The libraries are imported in the workers only. On the
CPU and on a GPU the forms are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from benchmarks import devices
from benchmarks.devices import CPU, CUDA
from benchmarks.kernel_cases import (
    Case,
    dense_bytes,
    differentiated,
    in_turn,
    input_sets,
    labels_name,
    too_large,
)
from benchmarks.timing import Arm
from benchmarks.worker import Arrays, Work

Form = Callable[..., Any]
MODULE = "benchmarks.peers"


class Padded(NamedTuple):
    """For every label its links, padded to the longest list: what a gather over columns needs."""

    links: np.ndarray
    """(K, L) link number i * l + s"""
    present: np.ndarray
    """(K, L) whether there is such a link"""


def padded_links(support: np.ndarray) -> Padded:
    """Return the transposed support as rows of one length."""
    k, _ = support.shape
    order = np.argsort(support.ravel(), kind="stable")
    n_links_j = np.bincount(support.ravel(), minlength=k)
    present = np.arange(n_links_j.max()) < n_links_j[:, None]
    links = np.zeros(present.shape, dtype=np.int64)
    links[present] = order
    return Padded(links, present)


def constants(case: Case, form: str, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return what a form takes beyond the arrays with gradients; an index is built once."""
    labels = arrays[labels_name(case.kernel)]
    if "support" not in arrays:
        return [labels]
    if form == "column":
        return [*padded_links(arrays["support"]), labels]
    return [arrays["support"], labels]


# --- PyTorch ---------------------------------------------------------------------------------


def _torch_forms(torch: Any) -> dict[str, dict[str, Form]]:
    """Return the loss of every kernel in every form."""
    functional = torch.nn.functional

    def log_softmax(scores):
        return functional.log_softmax(scores, dim=-1)

    def mean_nll(log_joint):
        return -torch.logsumexp(log_joint, 1).mean()

    def softmax_naive(a, z):
        return -torch.log(torch.softmax(a, 1).gather(1, z[:, None])).mean()

    def s_naive(a, b, z):
        m = torch.softmax(a, 1) @ torch.softmax(b, 1)
        return -torch.log(m.gather(1, z[:, None])).mean()

    def s_column(a, b, z):
        return mean_nll(log_softmax(a) + log_softmax(b).index_select(1, z).t())

    def s_gather(a, b, z):
        # The same column by torch.gather: torch.compile can crash on index_select's gradient.
        log_theta_it = log_softmax(b).gather(1, z.expand(b.shape[0], -1))
        return mean_nll(log_softmax(a) + log_theta_it.t())

    def column_of(log_theta, z):
        index = z[:, None, None].expand(-1, log_theta.shape[1], 1)
        return log_theta.gather(2, index).squeeze(2)

    def flat_scores(h, u, b):
        return (h @ u.flatten(0, 1).t()).view(-1, *b.shape) + b

    def c_flat(a, h, u, b, z):
        return mean_nll(log_softmax(a) + column_of(log_softmax(flat_scores(h, u, b)), z))

    def c_einsum(a, h, u, b, z):
        scores = torch.einsum("td,ijd->tij", h, u) + b
        return mean_nll(log_softmax(a) + column_of(log_softmax(scores), z))

    def c_naive(a, h, u, b, z):
        theta = torch.softmax(flat_scores(h, u, b), 2)
        m = (torch.softmax(a, 1)[:, None, :] @ theta).squeeze(1)
        return -torch.log(m.gather(1, z[:, None])).mean()

    def dense_theta(b, support):
        k = b.shape[0]
        return b.new_zeros(k, k).scatter(1, support, torch.softmax(b, 1))

    def sparse_s_scatter(a, b, support, z):
        m = torch.softmax(a, 1) @ dense_theta(b, support)
        return -torch.log(m.gather(1, z[:, None])).mean()

    def sparse_s_scatter_column(a, b, support, z):
        m = (torch.softmax(a, 1) * dense_theta(b, support).index_select(1, z).t()).sum(1)
        return -torch.log(m).mean()

    def sparse_s_torch_sparse(a, b, support, z):
        k, n_kept = b.shape
        rows = torch.arange(k).repeat_interleave(n_kept)
        index = torch.stack([support.flatten(), rows])
        theta_ji = torch.sparse_coo_tensor(index, torch.softmax(b, 1).flatten(), (k, k))
        m = torch.sparse.mm(theta_ji, torch.softmax(a, 1).t())
        return -torch.log(m.gather(0, z[None])).mean()

    def sparse_s_column(a, b, links, present, z):
        link = links.index_select(0, z)
        log_theta = log_softmax(b).flatten().index_select(0, link.flatten()).view(link.shape)
        log_joint = log_softmax(a).gather(1, link // b.shape[1]) + log_theta
        return mean_nll(log_joint.masked_fill(~present.index_select(0, z), -torch.inf))

    def sparse_c_flat(a, h, u, b, support, z):
        log_theta = log_softmax(flat_scores(h, u, b))
        leads_to_z = support == z[:, None, None]
        log_joint = log_softmax(a)[:, :, None] + log_theta
        return mean_nll(log_joint.masked_fill(~leads_to_z, -torch.inf).flatten(1))

    def sparse_c_column(a, h, u, b, links, present, z):
        link = links.index_select(0, z)
        i = (link // b.shape[1]).flatten()
        u_of_links = u.index_select(0, i).view(*link.shape, *u.shape[1:])
        scores = torch.einsum("td,tpsd->tps", h, u_of_links)
        scores = scores + b.index_select(0, i).view(scores.shape)
        log_theta = log_softmax(scores).gather(2, (link % b.shape[1])[:, :, None]).squeeze(2)
        log_joint = log_softmax(a).gather(1, i.view(link.shape)) + log_theta
        return mean_nll(log_joint.masked_fill(~present.index_select(0, z), -torch.inf))

    return {
        "softmax_nll": {"naive": softmax_naive, "cross_entropy": functional.cross_entropy},
        "s_model": {"naive": s_naive, "column": s_column, "gather": s_gather},
        "c_model": {"naive": c_naive, "flat": c_flat, "einsum": c_einsum},
        "sparse_s_model": {
            "scatter": sparse_s_scatter,
            "scatter, column": sparse_s_scatter_column,
            "torch.sparse": sparse_s_torch_sparse,
            "column": sparse_s_column,
        },
        "sparse_c_model": {"flat": sparse_c_flat, "column": sparse_c_column},
    }


def parts_of(n: int, parts: int) -> list[slice]:
    """Return the samples of a batch in parts of equal size."""
    return [slice(t * n // parts, (t + 1) * n // parts) for t in range(parts)]


def arrays_of_samples(case: Case) -> int:
    """Return how many of the differentiated arrays have a row for each sample: they come first."""
    return 2 if case.d else 1


def build_torch(
    case: dict[str, Any], form: str, compiled: bool, device: str = CPU, parts: int = 1
) -> Work:
    """Return loss and gradients in PyTorch, eager or through torch.compile.

    What does not fit into memory at once is done in ``parts`` of the batch, whose gradients add up.
    """
    torch = devices.torch_on(device)
    wanted = Case(**case)
    sets = input_sets(wanted, device)
    put = devices.Put(lambda array: torch.from_numpy(array).to(device))
    loss = _torch_forms(torch)[wanted.kernel][form]
    if compiled:
        loss = torch.compile(loss)

    def whole(leaves: list[Any], fixed: list[Any]) -> tuple[Any, ...]:
        nll = loss(*leaves, *fixed)
        return nll.detach(), *torch.autograd.grad(nll, leaves)

    def in_parts(leaves: list[Any], fixed: list[Any]) -> tuple[Any, ...]:
        for leaf in leaves:
            leaf.grad = None
        total = 0
        for rows in parts_of(wanted.n, parts):
            given = [leaf[rows] for leaf in leaves[:n_samples]] + leaves[n_samples:]
            nll = loss(*given, *fixed[:-1], fixed[-1][rows]) / parts
            nll.backward()
            total = total + nll.detach()
        return total, *(leaf.grad for leaf in leaves)

    def call_on(arrays: dict[str, np.ndarray]) -> Callable[[], tuple[Any, ...]]:
        leaves = [put(array).requires_grad_() for array in differentiated(arrays)]
        fixed = [put(array) for array in made_once(arrays)]
        return lambda: (whole if parts == 1 else in_parts)(leaves, fixed)

    n_samples = arrays_of_samples(wanted)
    made_once = _constants_once(wanted, form)
    calls = [call_on(arrays) for arrays in sets]

    def results() -> Arrays:
        return devices.results_of(calls[0](), device)

    result_bytes = sum(array.nbytes for array in differentiated(sets[0]))
    return Work(in_turn(calls), results, result_bytes, devices.clock_of("torch", device))


def _constants_once(case: Case, form: str) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
    """Return :func:`constants` for sets that differ in their labels only: one index for all."""
    index: list[np.ndarray] = []

    def made(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        if not index:
            index.extend(constants(case, form, arrays)[:-1])
        return [*index, arrays[labels_name(case.kernel)]]

    return made


# --- JAX -------------------------------------------------------------------------------------


def _jax_forms(jax: Any) -> dict[str, dict[str, Form]]:
    """Return the loss of every kernel in every form."""
    jnp = jax.numpy
    log_softmax, softmax = jax.nn.log_softmax, jax.nn.softmax

    def mean_nll(log_joint):
        return -jax.nn.logsumexp(log_joint, axis=1).mean()

    def at(values, index, axis=1):
        return jnp.take_along_axis(values, index, axis)

    def softmax_column(a, z):
        return -at(log_softmax(a), z[:, None]).mean()

    def s_naive(a, b, z):
        return -jnp.log(at(softmax(a) @ softmax(b), z[:, None])).mean()

    def s_column(a, b, z):
        return mean_nll(log_softmax(a) + log_softmax(b)[:, z].T)

    def flat_scores(h, u, b):
        return (h @ u.reshape(-1, u.shape[-1]).T).reshape(-1, *b.shape) + b

    def c_log_joint(a, scores, z):
        return log_softmax(a) + at(log_softmax(scores), z[:, None, None], 2)[:, :, 0]

    def c_flat(a, h, u, b, z):
        return mean_nll(c_log_joint(a, flat_scores(h, u, b), z))

    def c_einsum(a, h, u, b, z):
        return mean_nll(c_log_joint(a, jnp.einsum("td,ijd->tij", h, u) + b, z))

    def sparse_s_column(a, b, links, present, z):
        link = links[z]
        log_joint = at(log_softmax(a), link // b.shape[1]) + log_softmax(b).ravel()[link]
        return mean_nll(jnp.where(present[z], log_joint, -jnp.inf))

    def sparse_c_flat(a, h, u, b, support, z):
        log_joint = log_softmax(a)[:, :, None] + log_softmax(flat_scores(h, u, b))
        leads_to_z = support == z[:, None, None]
        return mean_nll(jnp.where(leads_to_z, log_joint, -jnp.inf).reshape(len(z), -1))

    def sparse_c_column(a, h, u, b, links, present, z):
        link = links[z]
        i, s = link // b.shape[1], link % b.shape[1]
        scores = jnp.einsum("td,tpsd->tps", h, u[i]) + b[i]
        log_theta = at(log_softmax(scores), s[:, :, None], 2)[:, :, 0]
        return mean_nll(jnp.where(present[z], at(log_softmax(a), i) + log_theta, -jnp.inf))

    return {
        "softmax_nll": {"column": softmax_column},
        "s_model": {"naive": s_naive, "column": s_column},
        "c_model": {"flat": c_flat, "einsum": c_einsum},
        "sparse_s_model": {"column": sparse_s_column},
        "sparse_c_model": {"flat": sparse_c_flat, "column": sparse_c_column},
    }


def build_jax(case: dict[str, Any], form: str, device: str = CPU) -> Work:
    """Return loss and gradients in JAX, compiled by jax.jit."""
    wanted = Case(**case)
    jax = devices.jax_on(device, wanted.dtype)
    sets = input_sets(wanted, device)
    put = devices.Put(jax.device_put)
    numbers = tuple(range(len(differentiated(sets[0]))))
    loss = _jax_forms(jax)[wanted.kernel][form]
    function = jax.jit(jax.value_and_grad(loss, argnums=numbers))
    clock = devices.clock_of("jax", device)

    def call_on(arrays: dict[str, np.ndarray]) -> Callable[[], tuple[Any, ...]]:
        arguments = [put(a) for a in (*differentiated(arrays), *made_once(arrays))]

        def call() -> tuple[Any, ...]:
            nll, gradients = function(*arguments)
            return nll, *gradients

        return call if clock else lambda: jax.block_until_ready(call())

    made_once = _constants_once(wanted, form)
    calls = [call_on(arrays) for arrays in sets]

    def results() -> Arrays:
        return devices.results_of(calls[0](), device)

    result_bytes = sum(array.nbytes for array in differentiated(sets[0]))
    return Work(in_turn(calls), results, result_bytes, clock)


# --- the list --------------------------------------------------------------------------------

TORCH_FORMS = {
    "softmax_nll": ("naive", "cross_entropy"),
    "s_model": ("naive", "column", "gather"),
    "c_model": ("naive", "flat", "einsum"),
    "sparse_s_model": ("scatter", "scatter, column", "torch.sparse", "column"),
    "sparse_c_model": ("flat", "column"),
}
COMPILED_FORMS = {
    "softmax_nll": ("cross_entropy",),
    "s_model": ("naive", "column", "gather"),
    "c_model": ("flat",),
    "sparse_s_model": ("column",),
    "sparse_c_model": ("flat", "column"),
}
JAX_FORMS = {
    "softmax_nll": ("column",),
    "s_model": ("naive", "column"),
    "c_model": ("flat", "einsum"),
    "sparse_s_model": ("column",),
    "sparse_c_model": ("flat", "column"),
}
# On a GPU compiling takes longer than all else, so the best of these on the CPU is enough.
GPU_TORCH_FORMS = {
    "softmax_nll": ("cross_entropy",),
    "s_model": ("naive", "column"),
    "c_model": ("naive", "flat"),
    "sparse_s_model": ("column",),
    "sparse_c_model": ("column",),
}
GPU_COMPILED_FORMS = {
    "softmax_nll": ("cross_entropy",),
    "s_model": ("gather", "column"),
    "c_model": ("flat",),
    "sparse_s_model": ("column",),
    "sparse_c_model": ("column",),
}
GPU_JAX_FORMS = {
    "softmax_nll": ("column",),
    "s_model": ("column",),
    "c_model": ("flat",),
    "sparse_s_model": ("column",),
    "sparse_c_model": ("column",),
}
PART_BYTES = 16e9
NAIVE = "naive"
DOES_NOT_APPLY = {
    "softmax_nll": "takes features and the classifier's weights, a kernel takes logits",
    "": "fuses the classifier with plain cross-entropy; a noise layer needs all of its logits",
}


def form_bytes(case: Case, form: str) -> float:
    """Return about how much memory a form takes: the copies that autograd keeps of its tensors."""
    pairs = case.n * case.k * (case.n_kept or case.k)
    if case.kernel.endswith("c_model") and form == "column":
        pairs = 4 * case.n * case.n_kept * case.n_kept * case.d  # gathered rows of U
    if form.startswith("scatter") or form == "torch.sparse":
        return dense_bytes(case)
    held = case.k * (case.n_kept or case.k) * (1 + case.d)
    return case.item_bytes * (5 * pairs * (case.d > 0) + 4 * held + 6 * case.n * case.k)


def is_installed(library: str) -> bool:
    """Tell whether a library is there, without importing it."""
    return find_spec(library) is not None


def peer_arms(case: Case, device: str = CPU, compiled: bool = True) -> list[Arm]:
    """Return every peer of a kernel, those that are missing or do not apply included.

    On a GPU fewer forms, and those that a library compiles only if ``compiled``.
    """
    given = asdict(case)

    def arm(name: str, library: str, form: str, build: str, **arguments: Any) -> Arm:
        label, needed = f"{name}, {form}", form_bytes(case, form)
        if not is_installed(library):
            return Arm(label, skip="missing", detail=f"{library} is not installed", backend=library)
        if device == CUDA:
            arguments["device"] = device
            in_parts = library == "torch" and case.d and not case.n_kept and form != NAIVE
            if in_parts and needed > PART_BYTES:
                parts = 2 ** math.ceil(math.log2(needed / PART_BYTES))
                label, needed = f"{label}, in {parts} parts", needed / parts
                arguments["parts"] = parts
        why = too_large(needed, device)
        return Arm(
            label,
            f"{MODULE}:{build}",
            {"case": given, "form": form, **arguments},
            skip="not run" if why else "",
            detail=why,
            backend=library,
            process=name,
        )

    kernel = case.kernel
    eager, compiles, jitted = (
        (GPU_TORCH_FORMS, GPU_COMPILED_FORMS, GPU_JAX_FORMS)
        if device == CUDA
        else (TORCH_FORMS, COMPILED_FORMS, JAX_FORMS)
    )
    arms = [arm("torch", "torch", f, "build_torch", compiled=False) for f in eager[kernel]]
    if compiled:
        arms += [
            *(
                arm("torch.compile", "torch", f, "build_torch", compiled=True)
                for f in compiles[kernel]
            ),
            *(arm("jax.jit", "jax", f, "build_jax") for f in jitted[kernel]),
        ]
    if device == CUDA:
        return arms
    why = DOES_NOT_APPLY.get(kernel, DOES_NOT_APPLY[""])
    return [
        *arms,
        Arm("torch linear_cross_entropy", skip="does not apply", detail=why, backend="torch"),
    ]
