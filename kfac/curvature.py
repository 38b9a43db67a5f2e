"""All layers' curvature blocks: their factors, their inverses, and what to do with a gradient."""

import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from kfac import checkpoint
from kfac.arguments import NON_NEGATIVE_INTEGER
from kfac.directions import Directions, Stack
from kfac.distributed.communication import Ranks
from kfac.example_gradients import Basis
from kfac.factors import Bucket, as_kind, fill_buckets, nearest_kronecker
from kfac.inverse import Ekfac, Inverse, merge
from kfac.kronecker import Eigendecomposition, Factors
from kfac.layers import Layer


class Curvature:
    """The Kronecker factors of every layer and the inverse that a strategy makes of them.

    Args:
        layers: The layers under K-FAC.
        inverse: The strategy.
        refresh_tolerance: Staleness of an inverse up to which a refresh that is due is skipped; see
            :meth:`kfac.inverse.Inverse.staleness`. None to skip none.
    """

    def __init__(
        self, layers: Sequence[Layer], inverse: Inverse, refresh_tolerance: float | None = None
    ) -> None:
        self.layers = {layer.name: layer for layer in layers if layer.primary is layer}
        self.inverse = inverse
        self.refresh_tolerance = refresh_tolerance
        self.buckets = _buckets_of(list(self.layers.values()), inverse.has_second_moments)
        # Factors of layers that use a block's weight transposed, by the block's name.
        self._transposed: dict[str, list[str]] = {}
        for layer in layers:
            if layer.is_transposed:
                self._transposed.setdefault(layer.primary.name, []).append(layer.name)
        self._side_buckets = _buckets_of([layer for layer in layers if layer.is_transposed])
        self._primaries = {layer.name: layer.primary.name for layer in layers}
        self.states: list[dict[str, Tensor]] = [
            {
                key: torch.zeros(len(b.names), *shape, dtype=b.dtype, device=b.device)
                for key, shape in inverse.state_shapes(b.shape).items()
            }
            for b in self.buckets
        ]
        self.counters = dict.fromkeys(
            ("factor_updates", "inverse_refreshes", "skipped_refreshes", "failed_refreshes"), 0
        )
        self.ready = dict.fromkeys(self.layers, False)
        self._seen = dict.fromkeys(self.layers, False)
        self._warned: set[str] = set()
        self._failures = dict.fromkeys(self.layers, 0)
        self._failed_now: set[str] = set()  # of the layers, since the last step
        slots = {
            name: (bucket, index)
            for bucket in self._all_buckets
            for index, name in enumerate(bucket.names)
        }
        self._slots = {layer.name: slots[layer.block] for layer in layers}
        # Damping that each inverse was made with from the present factors, so that nothing is
        # inverted twice; always 1 where it makes no difference.
        self._made_from: dict[str, float] = {}
        self._vectors: dict[int, tuple[tuple[float, ...], Tensor]] = {}
        self._starts = _starts(list(self.layers.values()))

    @property
    def _all_buckets(self) -> list[Bucket]:
        return self.buckets + self._side_buckets

    @property
    def _all_states(self) -> list[dict[str, Tensor]]:
        return [*self.states, *({} for _ in self._side_buckets)]

    # --- statistics ----------------------------------------------------------------------------

    def accumulate(self, layer: str, factor: str, moment: Tensor, rows: int | Tensor) -> None:
        """Add a batch's moment to a layer's pending sum; see :meth:`Bucket.accumulate`."""
        bucket, index = self._slots[layer]
        self._follow(bucket, layer)
        bucket.accumulate(index, factor, moment, rows)

    @property
    def has_pending(self) -> bool:
        """Whether any statistics wait to be folded in."""
        return not all(bucket.is_empty for bucket in self._all_buckets)

    @property
    def is_waiting(self) -> bool:
        """Whether there are no statistics yet, or some layer's have all been unusable."""
        return not any(self._seen.values()) or any(
            seen and not self.ready[name] for name, seen in self._seen.items()
        )

    def discard(self) -> None:
        """Forget the pending statistics; another step begins."""
        self._failed_now.clear()
        for bucket in self._all_buckets:
            bucket.discard()

    def fold(self, decay: float, g_scale: Tensor, accept: Tensor, ranks: Ranks) -> Tensor:
        """Fold the pending statistics of every layer into its running averages.

        Over several processes they are averaged first, each with equal weight, as gradients are;
        a process in which a layer did not run does not count for that layer.

        Args:
            decay: β in [0, 1).
            g_scale: What this process's pending sums of G are multiplied by.
            accept: Boolean scalar tensor; False drops the batch.
            ranks: The processes.

        Returns:
            Number of layers whose statistics were dropped, a scalar tensor.
        """
        buckets = self._all_buckets
        present = [bucket.normalize(g_scale) for bucket in buckets]
        ranks.sum_([t for bucket in buckets for t in bucket.pending.values()] + present)
        dropped = torch.zeros((), dtype=torch.int64, device=accept.device)
        for bucket, counts in zip(buckets, present, strict=True):
            # Of several processes, only a message tells which layers have run in another one.
            ran = bucket.rows if ranks.size == 1 else counts.tolist()
            for name, count in zip(bucket.names, ran, strict=True):
                self._seen[self._primaries[name]] |= isinstance(count, Tensor) or count > 0
            dropped += bucket.fold(counts, decay, accept).sum().to(dropped)
        self.counters["factor_updates"] += 1
        self._made_from.clear()
        return dropped

    # --- inverses ------------------------------------------------------------------------------

    def due(self, step: int, period: int, *, staggered: bool) -> frozenset[str]:
        """The layers whose inverses a step should refresh.

        Args:
            step: Number of completed steps.
            period: Steps between two refreshes of a layer.
            staggered: Whether the layers' turns are spread over the period, each at a time that is
                proportional to the cost of those before it; else all have theirs at once.
        """
        turn = step % period
        if not staggered:
            return frozenset(self.layers if turn == 0 else ())
        return frozenset(n for n, start in self._starts.items() if turn == int(start * period))

    def refresh(self, damping: Mapping[str, float], due: Set[str]) -> None:
        """Recompute the inverses that have changed of layers that are due or have none.

        Args:
            damping: λ by layer name.
            due: Names of the layers whose turn it is.

        Raises:
            RuntimeError: If a layer's factors could not be decomposed too many times in a row. The
                factors have taken in this step's statistics by then.
        """
        exhausted = []
        probed = self.refresh_tolerance is not None  # and then every layer that is due is counted
        for index, bucket in enumerate(self.buckets):
            is_live = self.inverse.damping_is_live
            sources = [1.0 if is_live else float(damping[n]) for n in bucket.names]
            wanted = [
                i
                for i, (name, source) in enumerate(zip(bucket.names, sources, strict=True))
                if (name in due and (probed or self._made_from.get(name) != source))
                or (self._seen[name] and not self.ready[name])
            ]
            wanted = self._stale(index, wanted, damping)
            if wanted:
                exhausted += self._refresh_members(index, wanted, damping)
                self._made_from |= {bucket.names[i]: sources[i] for i in wanted}
        if exhausted:
            raise self._failure(exhausted[0], damping[exhausted[0]])

    def _stale(self, index: int, members: Sequence[int], damping: Mapping[str, float]) -> list[int]:
        """Those of some layers of a bucket that have no inverse, or one that is too wrong."""
        names = [self.buckets[index].names[i] for i in members]
        if self.refresh_tolerance is None or not any(self.ready[name] for name in names):
            return list(members)
        factors, _, state = self._members(index, members)
        staleness = self.inverse.staleness(
            self.buckets[index].shape,
            factors,
            self._vector([damping[n] for n in names], index),
            state,
        )
        # What is not a number is too wrong.
        fresh = (staleness <= self.refresh_tolerance).tolist()
        stale = [
            i
            for i, name, is_fresh in zip(members, names, fresh, strict=True)
            if not (is_fresh and self.ready[name])
        ]
        self.counters["skipped_refreshes"] += len(members) - len(stale)
        return stale

    def _members(
        self, index: int, members: Sequence[int]
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Factors, weights and inverse state of some layers of a bucket."""
        bucket = self.buckets[index]
        self._follow(bucket, bucket.names[0])
        factors, weight = self._merged(bucket)
        if len(members) < len(bucket.names):
            factors = {key: factor[members] for key, factor in factors.items()}
            weight = weight[members]
        return factors, weight, {key: t[members] for key, t in self.states[index].items()}

    def _refresh_members(
        self, index: int, members: Sequence[int], damping: Mapping[str, float]
    ) -> list[str]:
        """Invert the factors of some layers of a bucket.

        Returns:
            The layers that have failed too often.
        """
        bucket = self.buckets[index]
        factors, weight, previous = self._members(index, members)
        names = [bucket.names[i] for i in members]
        new, failed = self.inverse.refresh(
            bucket.shape, factors, self._vector([damping[n] for n in names], index), previous
        )
        kept = failed | (weight == 0)
        if isinstance(self.inverse, Ekfac):
            self._carry_second_moments(self.inverse, index, members, new, kept)
        merge(self.states[index], new, kept, members)
        self.counters["inverse_refreshes"] += 1
        exhausted = []
        for name, has_failed, is_kept in zip(names, failed.tolist(), kept.tolist(), strict=True):
            if is_kept and not has_failed:
                continue  # nothing is known of it yet
            self.ready[name] |= not has_failed
            self.counters["failed_refreshes"] += has_failed
            if self._count_failure(name, has_failed):
                exhausted.append(name)
        return exhausted

    def _count_failure(self, name: str, has_failed: bool) -> bool:
        """Count steps in a row in which a layer could not be decomposed; whether it is too many.

        A step that looks for its damping refreshes several times, and is counted once.
        """
        if not has_failed:
            self._failures[name] = 0
            return False
        if name not in self._failed_now:
            self._failed_now.add(name)
            self._failures[name] += 1
        return self._failures[name] >= self.inverse.max_consecutive_failures

    def _carry_second_moments(
        self,
        inverse: Ekfac,
        index: int,
        members: Sequence[int],
        new: Mapping[str, Tensor],
        kept: Tensor,
    ) -> None:
        """Take second moments to their new basis, or start them from its eigenvalues."""
        bucket = self.buckets[index]
        state = {key: tensor[members] for key, tensor in self.states[index].items()}
        old = bucket.factors["S"][members]
        moved = inverse.moved_second_moments(old, state, new)
        first = inverse.first_second_moments(new, bucket.shape)
        ready = torch.tensor([self.ready[bucket.names[i]] for i in members], device=bucket.device)
        # Where the basis is the same, so are they, without a rounding.
        same = [(new[key] == state[key]).flatten(1).all(1) for key in new if "vectors" in key]
        kept = kept | (ready & torch.stack(same).all(0)) if same else kept | ready
        ready, kept = (mask.view(-1, 1, 1, 1) for mask in (ready, kept))
        bucket.factors["S"][members] = torch.where(kept, old, torch.where(ready, moved, first))

    def basis(self, block: str) -> Basis | None:
        """The eigenbasis of a block, None before the first."""
        if not self.ready[block]:
            return None
        bucket, i = self._slots[block]
        self._follow(bucket, block)
        state = self.states[self.buckets.index(bucket)]
        vectors = (state.get(f"{name}_eigenvectors") for name in ("A", "G"))
        return Basis(*(None if v is None else v[i] for v in vectors))

    def _merged(self, bucket: Bucket) -> tuple[dict[str, Tensor], Tensor]:
        """A bucket's factors and weights, those of transposed uses of the same weights included."""
        tied = [(i, name) for i, name in enumerate(bucket.names) if name in self._transposed]
        if not tied:
            return bucket.kronecker_factors, bucket.weight
        factors = {key: factor.clone() for key, factor in bucket.kronecker_factors.items()}
        weight = bucket.weight.clone()
        for i, name in tied:
            a, g = factors["A"][i], factors["G"][i]
            pairs = [(a.clone(), g.clone())]
            for other in self._transposed[name]:
                side, j = self._slots[other]
                self._follow(side, other)
                # A bias is not shared, so its row stays zero.
                on_inputs, on_outputs = side.factors["G"][j], side.factors["A"][j]
                pairs.append((as_kind(on_inputs, a), as_kind(on_outputs, g)))
                weight[i] += side.weight[j]
            merged_a, merged_g = nearest_kronecker(pairs)
            a.copy_(merged_a)
            g.copy_(merged_g)
        return factors, weight

    def _failure(self, name: str, damping: float) -> RuntimeError:
        shape = self.layers[name].shape
        return RuntimeError(
            f"The factors of the layer {name!r} (A {shape.d_in}×{shape.d_in}, "
            f"G {shape.d_out}×{shape.d_out}) could not be decomposed {self._failures[name]} "
            f"times in a row with damping {damping:g}. Raise damping, leave the layer out "
            "with skip=, or train it in float32."
        )

    def _follow(self, bucket: Bucket, name: str) -> None:
        """Bring a bucket to where a layer of it is now, if the model was moved or converted."""
        place = self._place(name)
        if place == (bucket.device, bucket.dtype):
            return
        places = {self._place(other): other for other in bucket.names}
        if len(places) > 1:
            raise _apart(places.values())
        bucket.to(*place)
        for mine, state in zip(self.buckets, self.states, strict=True):
            if mine is bucket:
                state.update({key: tensor.to(*place) for key, tensor in state.items()})

    def _place(self, name: str) -> tuple[torch.device, torch.dtype]:
        """Where the factors of a layer belong."""
        layer = self.layers[self._primaries[name]]
        return layer.weight.parameter.device, layer.dtype

    def _vector(self, values: Sequence[float], index: int) -> Tensor:
        """Numbers as a tensor beside a bucket, which is the one of the last call if they are."""
        bucket = self.buckets[index]
        known, vector = self._vectors.get(index, ((), None))
        place = (bucket.device, bucket.dtype)
        if vector is None or known != tuple(values) or (vector.device, vector.dtype) != place:
            vector = torch.tensor(values, dtype=bucket.dtype).to(bucket.device, non_blocking=True)
            self._vectors[index] = tuple(values), vector
        return vector

    def precondition(
        self, gradients: Mapping[nn.Parameter, Tensor], damping: Mapping[str, float]
    ) -> Directions:
        """Compute (F + λI)⁻¹ g for every layer that has an inverse and a gradient.

        Args:
            gradients: Gradients of the mean loss.
            damping: λ by layer name.
        """
        stacks = []
        for index, bucket in enumerate(self.buckets):
            members = [i for i, name in enumerate(bucket.names) if self._usable(name, gradients)]
            if not members:
                continue
            layers = [self.layers[bucket.names[i]] for i in members]
            if len({gradients[layer.weight.parameter].device for layer in layers}) > 1:
                raise _apart(layer.name for layer in layers)
            self._follow(bucket, layers[0].name)
            state = self.states[index] | bucket.factors
            if len(members) < len(bucket.names):
                state = {key: tensor[members] for key, tensor in state.items()}
            matrices = [layer.gradient_matrix(gradients).to(bucket.dtype) for layer in layers]
            stacked = torch.stack(matrices) if len(matrices) > 1 else matrices[0].unsqueeze(0)
            amounts = self._vector([damping[layer.name] for layer in layers], index)
            direction = self.inverse.precondition(state, stacked, amounts)
            stacks.append(Stack(layers, stacked, direction))
        return Directions(stacks, gradients)

    def _usable(self, name: str, gradients: Mapping[nn.Parameter, Tensor]) -> bool:
        if self.layers[name].weight.parameter not in gradients:
            return False
        if not self._seen[name] and name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"The layer {name!r} has a gradient but produced no statistics, so its gradient is "
                "used as it is. Its weight is probably used without calling the module.",
                stacklevel=2,
            )
        return self.ready[name]

    # --- going back ----------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Copies of all that a step may change; takes as much memory as that."""
        return {
            "factors": [{k: t.clone() for k, t in b.factors.items()} for b in self._all_buckets],
            "weights": [bucket.weight.clone() for bucket in self._all_buckets],
            "states": [{k: t.clone() for k, t in state.items()} for state in self.states],
            "records": [dict(d) for d in (self.counters, self.ready, self._seen, self._failures)],
            "made_from": dict(self._made_from),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go back to a snapshot, bit for bit."""
        for bucket, factors, weight in zip(
            self._all_buckets, snapshot["factors"], snapshot["weights"], strict=True
        ):
            for key, tensor in factors.items():
                bucket.factors[key].copy_(tensor)
            bucket.weight.copy_(weight)
        for state, saved in zip(self.states, snapshot["states"], strict=True):
            for key, tensor in saved.items():
                state[key].copy_(tensor)
        kept: tuple[dict[str, Any], ...] = (
            self.counters, self.ready, self._seen, self._failures,
        )  # fmt: skip
        for record, saved in zip(kept, snapshot["records"], strict=True):
            record.update(saved)
        self._made_from = dict(snapshot["made_from"])

    # --- reports and state ---------------------------------------------------------------------

    def factor(self, layer: str) -> tuple[Tensor | None, Tensor | None]:
        """Copies of a layer's running averages A and G; None for an identity.

        Raises:
            KeyError: If K-FAC has no layer of this name.
        """
        if layer not in self._slots:
            raise KeyError(f"No layer {layer!r} under K-FAC; there are {', '.join(self._slots)}.")
        bucket, index = self._slots[layer]
        factors, _ = self._merged(bucket)
        a, g = (factors.get(name) for name in ("A", "G"))
        return (None if a is None else a[index].clone(), None if g is None else g[index].clone())

    def matrix(self, layer: str) -> Factors | Eigendecomposition:
        """Copies of what a layer's block is approximated by."""
        basis = self.basis(layer) if self.inverse.has_second_moments else None
        if basis is None:
            return Factors.of(self.layers[layer].shape, *self.factor(layer))
        bucket, index = self._slots[layer]
        q_a, q_g = (None if vectors is None else vectors.clone() for vectors in basis)
        return Eigendecomposition(q_a, q_g, bucket.factors["S"][index].clone())

    def has_statistics(self, layer: str) -> bool:
        """Whether a layer's running averages hold anything; reading it waits for the device."""
        bucket, index = self._slots[layer]
        _, weight = self._merged(bucket)
        return float(weight[index]) > 0

    def memory_estimate(self) -> dict[str, int]:
        """Bytes held between steps, by kind."""
        kinds = {
            "factors": [bucket.factors for bucket in self._all_buckets],
            "pending": [bucket.pending for bucket in self._all_buckets],
            "inverses": self.states,
        }
        return {
            kind: sum(t.numel() * t.element_size() for d in dicts for t in d.values())
            for kind, dicts in kinds.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Factors, inverses and what is known of each layer by its name, and the counters."""
        records: checkpoint.Records = {
            "ready": self.ready,
            "seen": self._seen,
            "failures": self._failures,
            "made_from": self._made_from,
        }
        return {
            "inverse": self.inverse.name,
            "counters": dict(self.counters),
            "layers": checkpoint.layers_to_dict(self._all_buckets, self._all_states, records),
        }

    def check_loadable(self, saved: Mapping[str, Any], *, strict: bool) -> None:
        """Raise ``ValueError`` unless :meth:`load_state_dict` would succeed.

        Args:
            saved: What :meth:`state_dict` returned.
            strict: Whether it must have the layers of this one, no more and no fewer.

        Raises:
            RuntimeError: If a part of the model was moved or converted, and layers whose factors
                are in one stack are no longer alike.
        """
        # What is loaded takes the dtype and the device that the model has now.
        for bucket in self._all_buckets:
            for name in bucket.names:
                self._follow(bucket, name)
        checkpoint.check_setting(saved, "inverse", self.inverse.name)
        counts = dict.fromkeys(self.counters, NON_NEGATIVE_INTEGER)
        checkpoint.check_entries(saved["counters"], "counters in kfac", counts)
        checkpoint.check_layers(saved["layers"], self._all_buckets, self._all_states, strict=strict)

    def adopt(self, other: "Curvature") -> None:
        """Take over the factors and inverses of the layers that are the same in another one."""
        names = {
            name
            for name, layer in other.layers.items()
            if name in self.layers
            and layer.weight.parameter is self.layers[name].weight.parameter
            and other._transposed.get(name) == self._transposed.get(name)
        }
        names |= {side for name in names for side in self._transposed.get(name, ())}
        layers = other.state_dict()["layers"]
        kept = {name: saved for name, saved in layers.items() if name in names}
        kept = checkpoint.fitting(kept, self._all_buckets, self._all_states)
        self._load_layers(kept)
        self.counters = dict(other.counters)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, once :meth:`check_loadable` has passed.

        Layers that it lacks start anew.
        """
        self.discard()
        self._load_layers(saved["layers"])
        self.counters = dict(saved["counters"])

    def _load_layers(self, layers: Mapping[str, Any]) -> None:
        records = checkpoint.load_layers(layers, self._all_buckets, self._all_states)
        self.ready, self._seen, self._failures = (
            {name: records[key][name] for name in self.layers}
            for key in ("ready", "seen", "failures")
        )
        made_from = records["made_from"]
        self._made_from = {n: made_from[n] for n in self.layers if made_from[n] is not None}


def _apart(names: Iterable[str]) -> RuntimeError:
    """Layers whose factors are in one stack have come to be in different places."""
    return RuntimeError(
        "A part of the model was moved or converted after construction, and the layers "
        f"{', '.join(map(repr, names))} are no longer alike. Call update_layers() of the optimizer "
        "after moving or converting a part of its model."
    )


def _starts(layers: Sequence[Layer]) -> dict[str, float]:
    """For each layer, the share of all inversions' cost that the layers before it have."""
    costs = [
        sum(prod(s) * (s[-1] if len(s) > 2 else 1) for s in layer.shape.factor_shapes().values())
        for layer in layers
    ]
    before = accumulate([0, *costs])
    return {la.name: cost / max(sum(costs), 1) for la, cost in zip(layers, before, strict=False)}


def _buckets_of(layers: Sequence[Layer], with_second_moments: bool = False) -> list[Bucket]:
    return fill_buckets(
        [layer.name for layer in layers],
        [layer.shape for layer in layers],
        [layer.dtype for layer in layers],
        [layer.weight.parameter.device for layer in layers],
        with_second_moments=with_second_moments,
    )
