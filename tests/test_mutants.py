"""Bugs of published packages, planted here one by one: each is caught by a test with a name."""

import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import test_averaging as averaging
import test_burn_in as burn_in
import test_checkpoint as checkpoint
import test_exactness as exactness
import test_finetuning as finetuning
import test_gradients_untouched as untouched
import test_grafting as grafting
import test_invariance as invariance
import test_ties as ties
import torch
from mutants import Replacement, replace
from torch import Tensor, nn

import kfac.averaging
import kfac.capture
import kfac.damping
import kfac.factors
import kfac.grafting
import kfac.inverse.eigen
import kfac.inverse.factored
import kfac.optimizer
import kfac.preconditioner
from kfac.capture import Capture
from kfac.curvature import Curvature
from kfac.factors import Bucket
from kfac.fisher import Bernoulli, CrossEntropy, _TermwiseLikelihood
from kfac.grafting import Graft
from kfac.hooks import ModuleHook
from kfac.layers.conv import ConvLayer
from kfac.layers.embedding import TableLayer
from kfac.layers.linear import LinearLayer
from kfac.optimizer import KFAC
from kfac.preconditioner import Preconditioner
from kfac.taps import Taps
from kfac.vectors import OutputVectors


def without_geometry(key: str, value: object) -> Callable:
    """A convolution whose factors know nothing of one of its arguments."""
    return replace(ConvLayer, "geometry", lambda original, self: original(self) | {key: value})


def positions(layer: ConvLayer, x: Tensor) -> int:
    return layer.row_count(x) // len(x)


def inverted_average(original: Replacement, bucket: Bucket, *arguments: object) -> Tensor:
    """The weights of the old average and of the new value swapped: old + new - average."""
    old = {name: factor.clone() for name, factor in bucket.factors.items()}
    result = original(bucket, *arguments)
    for name, average in bucket.factors.items():
        weight = bucket.weight.view(-1, *[1] * (average.dim() - 1))
        new = old[name] + (average - old[name]) * weight
        average.copy_(old[name] + new - average)
    return result


def identity_start(original: Replacement, bucket: Bucket) -> None:
    original(bucket)
    bucket.weight.fill_(1)
    for factor in bucket.factors.values():
        factor.diagonal(dim1=-2, dim2=-1).fill_(1)


def damp_in_place(original: Replacement, factor: Tensor, amount: Tensor) -> Tensor:
    return factor.copy_(original(factor, amount))


def last_call_wins(
    original: Replacement, bucket: Bucket, index: int, name: str, moment: Tensor, rows: int = 0
) -> None:
    bucket.pending[name][index] = 0
    if name == "A":
        bucket.rows[index] = 0
    original(bucket, index, name, moment, rows)


def average_groups(original: Replacement, layer: ConvLayer, x: Tensor) -> Tensor:
    moment = original(layer, x)
    return moment.mean(0, keepdim=True).expand_as(moment)


def count_without_grad(
    original: Replacement, taps: Taps, layer: Any, args: tuple, *rest: object
) -> Tensor | None:
    if not torch.is_grad_enabled():
        x = args[0]
        capture_of(taps).statistics.sink(layer.name, "A", layer.input_moment(x), layer.row_count(x))
    return original(taps, layer, args, *rest)


def capture_of(taps: Taps) -> Capture:
    return taps._visit().__self__


def count_inputs_in_the_forward_pass(patch: pytest.MonkeyPatch) -> None:
    def tap(original: Replacement, taps: Taps, layer: Any, args: tuple, *rest: object):
        if torch.is_grad_enabled():
            accumulate(
                capture_of(taps).statistics.sink.__self__,
                layer.name,
                "A",
                layer.input_moment(args[0].detach()),
                0,
            )
        return original(taps, layer, args, *rest)

    accumulate = Curvature.accumulate
    replace(Taps, "_tap_call", tap)(patch)
    replace(
        Curvature,
        "accumulate",
        lambda original, self, layer, factor, moment, rows: original(
            self, layer, factor, moment * 0 if factor == "A" else moment, rows
        ),
    )(patch)


def overflow_enters(original: Replacement, optimizer: KFAC) -> bool:
    overflowed = original(optimizer)
    if overflowed:
        optimizer._engine.update_factors(torch.tensor(True), 1.0)
    return overflowed


def without_statistics_of_the_next(
    original: Replacement, engine: Preconditioner, accept: Tensor
) -> None:
    original(engine, accept)
    engine.capture.schedule(active=engine.burned_in % engine.factor_update_period.at(0) == 0)


def refresh_too(original: Replacement, engine: Preconditioner, accept: Tensor) -> None:
    engine.blocks.refresh(dict.fromkeys(engine.blocks.layers, 0.3), frozenset())
    original(engine, accept)


def hooks_follow_copies(patch: pytest.MonkeyPatch) -> None:
    """A copied hook calls back, and every backward pass counts as one of the model."""
    patch.setattr(ModuleHook, "__reduce__", lambda self: (lambda: self, ()))
    replace(
        ModuleHook,
        "__call__",
        lambda original, self, module, *arguments: original(self, self.module, *arguments),
    )(patch)
    patch.setattr(kfac.capture, "fate_of_gradient", lambda tensor: "accumulated")


def couple_weight_decay(
    original: Replacement, parameters: list, directions: list, *rest: object, **settings: Any
) -> None:
    decay = settings.pop("weight_decay")
    directions = [d + decay * p for d, p in zip(directions, parameters, strict=True)]
    original(parameters, directions, *rest, weight_decay=0.0, **settings)


def most_likely_labels(original: Replacement, self: Any, rows: Tensor, generator: Any) -> Tensor:
    original(self, rows, generator)
    p = rows.softmax(1)
    return p - torch.nn.functional.one_hot(p.argmax(1), p.shape[1])


def only(moves: list, kept: set) -> list:
    """The part of an update that moves some of the parameters."""
    found = []
    for move in moves:
        chosen = [i for i, p in enumerate(move.members) if p in kept]
        buffers = move.momentum and [move.momentum[i] for i in chosen]
        members, directions = ([a[i] for i in chosen] for a in (move.members, move.directions))
        if members:
            found.append(move._replace(members=members, directions=directions, momentum=buffers))
    return found


def step_again(self: KFAC, descend: Replacement, moves: list, again: set, accept: Any) -> None:
    descend(self, moves, accept)
    descend(self, only(moves, again), accept)


def update_for_every_call(patch: pytest.MonkeyPatch) -> None:
    """A module that was called twice is in the list of what to update twice."""
    calls: Counter[nn.Parameter] = Counter()

    def tap(original: Replacement, taps: Taps, layer: Any, *rest: object) -> Tensor | None:
        calls[layer.weight.parameter] += 1
        return original(taps, layer, *rest)

    def descend(original: Replacement, self: KFAC, moves: list, accept: Tensor) -> None:
        twice = {p for p, count in calls.items() if count > 1}
        step_again(self, original, moves, twice, accept)

    replace(Taps, "_tap_call", tap)(patch)
    replace(KFAC, "_descend", descend)(patch)


def update_for_every_module(original: Replacement, self: KFAC, moves: list, accept: Tensor) -> None:
    tied = {
        p for layer in self._engine.layers if layer.primary is not layer for p in layer.parameters
    }
    step_again(self, original, moves, tied, accept)


def only_known_layers(original: Replacement, self: KFAC, moves: list, accept: Tensor) -> None:
    known = {p for layer in self._engine.layers for p in layer.parameters}
    original(self, only(moves, known), accept)


def statistics_unchecked(patch: pytest.MonkeyPatch) -> None:
    """What is not finite enters the averages, and stays."""
    always = lambda original, tensors: torch.tensor(True)  # noqa: E731
    replace(kfac.optimizer, "all_finite", always)(patch)
    all_of = lambda original, stack: torch.ones(len(stack), dtype=torch.bool)  # noqa: E731
    replace(kfac.factors, "_are_finite", all_of)(patch)


def square_tables(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TableLayer, "has_sparse_inputs", False)


def without(error: type[Exception], test: Callable) -> Callable:
    """The test, which fails where the package raises an error."""

    def run(*arguments: object) -> None:
        try:
            test(*arguments)
        except error as found:
            raise AssertionError from found

    return run


NATURAL = exactness.test_step_is_the_dense_natural_gradient
FACTORED = exactness.test_stored_inverses_are_the_dense_factored_damping
EXPLICIT = exactness.test_step_is_the_solve_with_explicit_factors
RESUMED = checkpoint.test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit
COUNTED = untouched.test_only_the_training_pass_is_counted

# name: (the mutant, the test that catches it, that test's arguments)
MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable, tuple]] = {
    # factors
    "A of a convolution misses 1/T": (
        replace(ConvLayer, "row_count", lambda original, self, x: len(x)),
        EXPLICIT,
        ("convolution", "expand", "type-2"),
    ),
    "G of a convolution is averaged over positions": (
        replace(
            ConvLayer,
            "gradient_moment",
            lambda original, self, g: original(self, g) / (g.shape[2] * g.shape[3]),
        ),
        EXPLICIT,
        ("convolution", "expand", "type-2"),
    ),
    "reduce: inputs summed over positions": (
        replace(
            ConvLayer,
            "input_mean",
            lambda original, self, x, n: original(self, x, n) * positions(self, x),
        ),
        NATURAL,
        ("3×3",),
    ),
    "reduce: gradients averaged over positions": (
        replace(
            ConvLayer,
            "gradient_sum",
            lambda original, self, g, n: original(self, g, n) / (g.shape[2] * g.shape[3]),
        ),
        NATURAL,
        ("3×3",),
    ),
    "Linear over a sequence misses 1/S": (
        replace(LinearLayer, "row_count", lambda original, self, x: len(x)),
        NATURAL,
        ("sequences",),
    ),
    "dilation ignored": (without_geometry("dilation", (1, 1)), NATURAL, ("dilation",)),
    "stride ignored": (without_geometry("stride", (1, 1)), NATURAL, ("stride",)),
    "padding ignored": (without_geometry("padding", (0, 0)), NATURAL, ("padding",)),
    "padding_mode ignored": (without_geometry("padding_mode", "zeros"), NATURAL, ("circular",)),
    "groups averaged": (
        replace(ConvLayer, "input_moment", average_groups),
        EXPLICIT,
        ("convolution, groups", "expand", "type-2"),
    ),
    "bias missing from A": (
        replace(
            LinearLayer,
            "input_moment",
            lambda original, self, x: original(self, x).index_fill(-1, torch.tensor([-1]), 0.0),
        ),
        NATURAL,
        ("deep linear net",),
    ),
    "factors kept in bfloat16": (
        replace(
            Curvature,
            "accumulate",
            lambda original, self, layer, factor, moment, rows: original(
                self, layer, factor, moment.bfloat16().to(moment), rows
            ),
        ),
        exactness.test_factors_keep_their_precision_under_autocast,
        (),
    ),
    # what is counted
    "division by the count dropped": (
        replace(
            Bucket,
            "accumulate",
            lambda original, self, index, name, moment, rows=0: original(
                self, index, name, moment, min(rows, 1)
            ),
        ),
        invariance.test_repeating_the_batch_changes_nothing,
        ("cross-entropy", "type-2", "eigen"),
    ),
    "module called twice: last call wins": (
        replace(Bucket, "accumulate", last_call_wins),
        EXPLICIT,
        ("layer called twice", "expand", "empirical"),
    ),
    "module called twice: two updates": (
        update_for_every_call,
        EXPLICIT,
        ("layer called twice", "expand", "empirical"),
    ),
    "tied weight stepped twice": (
        replace(KFAC, "_descend", update_for_every_module),
        ties.test_a_weight_tied_along_independent_paths_is_exact,
        (),
    ),
    "unused layer raises KeyError": (
        replace(Curvature, "_usable", lambda original, self, name, gradients: self.ready[name]),
        without(KeyError, finetuning.test_what_did_not_run_stays_as_it_is),
        ("eigen", "type-2"),
    ),
    "unsupported parameters never trained": (
        replace(KFAC, "_descend", only_known_layers),
        finetuning.test_recurrent_layers_and_lone_parameters_are_trained,
        (nn.LSTM, "sgd"),
    ),
    "square factor for a table": (
        square_tables,
        finetuning.test_a_table_has_no_square_factor_whatever_its_size,
        (),
    ),
    "micro-batches: last one wins": (
        replace(Bucket, "accumulate", last_call_wins),
        invariance.test_micro_batches_equal_one_batch,
        ("cross-entropy", "empirical", "expand", 2),
    ),
    "forwards without gradient counted": (
        replace(Taps, "_tap_call", count_without_grad),
        COUNTED,
        ("empirical", "evaluation_between", "mean"),
    ),
    "A counted twice under checkpointing": (
        count_inputs_in_the_forward_pass,
        untouched.test_checkpointing_counts_every_layer_once,
        ("empirical",),
    ),
    "statistics of an overflow enter the average": (
        replace(KFAC, "_overflowed", overflow_enters),
        invariance.test_a_step_with_overflow_leaves_no_trace,
        ("type-2", False),
    ),
    "a batch with inf enters the factors": (
        statistics_unchecked,
        invariance.test_a_batch_that_is_not_finite_leaves_no_trace,
        ("type-2", "eigen", torch.inf),
    ),
    "every step rejected": (
        replace(kfac.optimizer, "all_finite", lambda original, tensors: torch.tensor(False)),
        NATURAL,
        ("deep linear net",),
    ),
    "statistics of a skipped step stay": (
        replace(Preconditioner, "discard", lambda original, self: None),
        invariance.test_zero_grad_after_a_step_that_the_user_skipped_discards_its_statistics,
        (),
    ),
    "gradient scaler's factor stays in G": (
        replace(
            kfac.preconditioner,
            "empirical_scale",
            lambda original, terms, reduction, scale: original(terms, reduction, 1.0),
        ),
        invariance.test_amp_scale_changes_nothing,
        ("empirical", 1),
    ),
    "summed gradient not divided": (
        replace(
            Preconditioner,
            "mean_gradients",
            lambda original, self, scale: {p: p.grad / scale for p in self.params},
        ),
        invariance.test_summed_loss_steps_like_the_mean,
        ("cross-entropy", "type-2", 1),
    ),
    # running average
    "running average inverted": (
        replace(Bucket, "fold", inverted_average),
        invariance.test_running_average_is_exact_from_the_first_update_on,
        (0.7, 1),
    ),
    "running average starts from the identity": (
        replace(Bucket, "__post_init__", identity_start),
        invariance.test_running_average_is_exact_from_the_first_update_on,
        (0.7, 1),
    ),
    "burn-in: the period of the factors applies": (
        replace(Preconditioner, "advance_burn_in", without_statistics_of_the_next),
        burn_in.test_the_first_step_has_the_average_over_all_batches,
        ("eigen", 3),
    ),
    "burn-in: inverses of its first batch": (
        replace(Preconditioner, "advance_burn_in", refresh_too),
        burn_in.test_the_first_step_has_the_average_over_all_batches,
        ("eigen", 3),
    ),
    "burn-in: the same labels in every step": (
        replace(
            OutputVectors, "start_step", lambda original, self, step: original(self, max(step, 0))
        ),
        burn_in.test_every_step_of_the_burn_in_draws_labels_of_its_own,
        (),
    ),
    # averages of the parameters
    "parameter average: no mean at first": (
        replace(kfac.averaging, "latest_share", lambda original, count, decay: 1 - decay),
        averaging.test_the_average_follows_its_formula,
        (0.99,),
    ),
    "parameter average: one model too many in the mean": (
        replace(
            kfac.averaging,
            "latest_share",
            lambda original, count, decay: original(count + 1, decay),
        ),
        averaging.test_the_average_follows_its_formula,
        (0.99,),
    ),
    "parameter average: the mean never ends": (
        replace(kfac.averaging, "latest_share", lambda original, count, decay: 1 / count),
        averaging.test_the_average_follows_its_formula,
        (0.5,),
    ),
    "copies of the model feed the factors": (
        hooks_follow_copies,
        averaging.test_evaluating_the_average_leaves_no_trace,
        ("convolutions", "empirical"),
    ),
    # inverses
    "damping added in place": (
        replace(kfac.inverse.factored, "damped", damp_in_place),
        invariance.test_damping_is_not_accumulated,
        ("cholesky",),
    ),
    "each factor damped by λ": (
        replace(
            kfac.inverse.factored,
            "factored_damping",
            lambda original, a, g, damping, *sizes: original(a, g, damping.square(), *sizes),
        ),
        FACTORED,
        ("deep linear net", "cholesky"),
    ),
    "π left out": (
        replace(
            kfac.damping,
            "pi_ratio",
            lambda original, *arguments: torch.ones_like(original(*arguments)),
        ),
        FACTORED,
        ("deep linear net", "cholesky"),
    ),
    "Q where Qᵀ belongs": (
        replace(
            kfac.inverse.eigen,
            "eigenbasis",
            lambda original, m: (lambda r, bad: ((r[0], r[1].mT), bad))(*original(m)),
        ),
        NATURAL,
        ("deep linear net",),
    ),
    "eigenvalues sorted, eigenvectors not": (
        replace(
            kfac.inverse.eigen,
            "eigenbasis",
            lambda original, m: (lambda r, bad: ((r[0].flip(-1), r[1]), bad))(*original(m)),
        ),
        NATURAL,
        ("deep linear net",),
    ),
    # checkpoints
    "state that torch.load refuses": (
        replace(
            KFAC,
            "state_dict",
            lambda original, self: original(self) | {"sharing": kfac.factors.BlockShape(1, 1, 1)},
        ),
        without(pickle.UnpicklingError, RESUMED),
        ({"fisher": "mc"}, 4),
    ),
    "state of the step counter only": (
        replace(Curvature, "load_state_dict", lambda original, self, saved: None),
        RESUMED,
        ({"fisher": "mc"}, 4),
    ),
    # loss
    "class weights ignored": (
        replace(CrossEntropy, "_weight", lambda original, self: None),
        EXPLICIT,
        ("class weights", "expand", "type-2"),
    ),
    "ignored targets in the normaliser": (
        replace(
            CrossEntropy,
            "normalizer",
            lambda original, *arguments: _TermwiseLikelihood.normalizer(*arguments),
        ),
        NATURAL,
        ("ignore_index",),
    ),
    "ignored targets in the Fisher": (
        replace(
            CrossEntropy,
            "curvature_weights",
            lambda original, self, output, target, rows: torch.ones_like(rows[:, :1]),
        ),
        NATURAL,
        ("ignore_index",),
    ),
    "pos_weight ignored": (
        replace(
            Bernoulli,
            "curvature_weights",
            lambda original, *arguments: _TermwiseLikelihood.curvature_weights(*arguments).expand(
                -1, 1
            ),
        ),
        NATURAL,
        ("pos_weight",),
    ),
    "type-2: all positions in one vector": (
        replace(
            _TermwiseLikelihood,
            "vectors",
            lambda original, self, output, target, examples: original(
                self, output, target, len(self.rows(output))
            ),
        ),
        EXPLICIT,
        ("net that mixes positions", "expand", "type-2"),
    ),
    "mc: the most likely label instead of a sample": (
        replace(CrossEntropy, "sample_rows", most_likely_labels),
        exactness.test_sampled_fisher_is_unbiased,
        ("classifier",),
    ),
    # update
    "weight decay enters the momentum": (
        replace(kfac.optimizer, "descend", couple_weight_decay),
        exactness.test_update_is_that_of_sgd_with_decoupled_weight_decay,
        ("momentum, weight decay",),
    ),
    "graft: one length for all layers of a shape": (
        replace(
            kfac.grafting,
            "norms",
            lambda original, stack: original(stack).square().sum().sqrt().expand(len(stack)),
        ),
        grafting.test_a_step_has_the_natural_gradients_direction_and_the_others_length,
        ("equal layers", "plain", "sgd"),
    ),
    "graft: lengths exchanged": (
        replace(kfac.grafting, "length_ratio", lambda original, wanted, own: original(own, wanted)),
        grafting.test_a_step_has_the_natural_gradients_direction_and_the_others_length,
        ("deep linear net", "plain", "sgd"),
    ),
    "graft: Adam forgets": (
        replace(Graft, "commit", lambda original, self, state, accept: None),
        grafting.test_a_step_has_the_natural_gradients_direction_and_the_others_length,
        ("deep linear net", "plain", "adam"),
    ),
    "graft: a bad batch enters Adam's average": (
        replace(
            Graft,
            "commit",
            lambda original, self, state, accept: original(self, state, torch.tensor(True)),
        ),
        grafting.test_a_bad_batch_leaves_the_averages_alone,
        (torch.nan,),
    ),
    "KL clip without the square of the learning rate": (
        replace(
            kfac.optimizer,
            "predicted_change",
            lambda original, d, g, lrs: original(d, g, [lr**0.5 for lr in lrs]),
        ),
        exactness.test_kl_clip_scales_the_step_before_momentum_and_weight_decay,
        ("plain",),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, test, arguments = MUTANTS[name]
    test(*arguments)  # passes as it is
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test(*arguments)
